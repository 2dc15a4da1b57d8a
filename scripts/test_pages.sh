#!/usr/bin/env bash
# Pages in a real browser: reports are opened in headless Chromium, at 400 and 1,400 pixels. No script may fail, no
# picture may be missing, nothing may stick out of the page, texts may not be smaller than they can be read. In the demo
# a title is typed and chosen, and the list read. Screenshots are left for the eye.
#
#   bash scripts/test_pages.sh                         pages and the demo of toy runs; makes .venv-pages (selenium) and
#                                                      .venv-demo (gradio) once
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
source scripts/extra_env.sh
PAGES_VENV="$(realpath -m "${PAGES_VENV:-.venv-pages}")" DEMO_VENV="$(realpath -m "${DEMO_VENV:-.venv-demo}")"
extra_environment "$PAGES_VENV" test_pages 'selenium>=4.30,<5'
extra_environment "$DEMO_VENV" test_pages -r requirements-demo.txt
export DEMO_PYTHON="$DEMO_VENV/bin/python"
export PAGES_OUT="$(realpath -m "${PAGES_OUT:-output/pages}")" PAGES_TESTS="$(IFS=:; echo "${PAGES[*]}")"
mkdir -p "$PAGES_OUT"
"$PAGES_VENV/bin/python" -m pytest tests/test_pages.py tests/test_demo_page.py -rs
echo "screenshots: $PAGES_OUT"
