#!/usr/bin/env bash
# Pages in a real browser: reports are opened in headless Chromium, at 400 and 1,400 pixels. No script may fail, no
# picture may be missing, nothing may stick out of the page, texts may not be smaller than they can be read. Screenshots
# are left for the eye.
#
#   bash scripts/test_pages.sh                         pages of toy runs; makes .venv-pages once, for selenium
#   bash scripts/test_pages.sh output/*/report.html    these pages as well
#
# PAGES_OUT is the folder of the screenshots, default output/pages. Chromium and its driver come from the system:
# apt-get install chromium chromium-driver
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
PAGES=()
for page in "$@"; do
    [ -f "$page" ] || { echo "error: $page: no such page" >&2; exit 2; }
    PAGES+=("$(realpath "$page")")
done
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
for program in chromium chromedriver; do
    command -v "$program" > /dev/null ||
        { echo "error: $program is not installed: apt-get install chromium chromium-driver" >&2; exit 2; }
done
PAGES_VENV="$(realpath -m "${PAGES_VENV:-.venv-pages}")"
if ! "$PAGES_VENV/bin/python" -c 'import selenium' 2> /dev/null; then
    echo "[test_pages] installing selenium into $PAGES_VENV"
    "$PYTHON" -m venv "$PAGES_VENV"
    # What the environment of everything else holds is found there too, and not installed again.
    "$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
        > "$("$PAGES_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
    "$PAGES_VENV/bin/python" -m pip install --quiet --disable-pip-version-check 'selenium>=4.30,<5'
fi
export PAGES_OUT="$(realpath -m "${PAGES_OUT:-output/pages}")" PAGES_TESTS="$(IFS=:; echo "${PAGES[*]}")"
mkdir -p "$PAGES_OUT"
"$PAGES_VENV/bin/python" -m pytest tests/test_pages.py -rs
echo "screenshots: $PAGES_OUT"
