# Sourced by the other scripts: makes .venv once, installs requirements.txt, and puts its python first on the PATH.
# Set MINIONEREC_PYTHON to use an environment of your own instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

if [ -n "${MINIONEREC_PYTHON:-}" ]; then
    PYTHON="$MINIONEREC_PYTHON"
else
    stamp=.venv/requirements.installed
    if ! cmp -s requirements.txt "$stamp"; then
        for candidate in python3 python python3.13 python3.12 python3.11; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                base="$candidate"
                break
            fi
        done
        [ -n "${base:-}" ] || { echo "error: Python 3.11 or newer is needed; none found on the PATH" >&2; exit 2; }
        echo "[env] installing requirements.txt into .venv (once, a few minutes)"
        [ -x .venv/bin/python ] || "$base" -m venv .venv
        # torch first: the others then find it and do not choose a build of their own.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt "$stamp"
    fi
    PYTHON="$PWD/.venv/bin/python"
fi
# Once, and not again by the scripts that this one calls. Not on the standard output, which some scripts read.
if [ -z "${MINIONEREC_ENV_SHOWN:-}" ]; then
    "$PYTHON" -c 'import sys; print("[env] Python {}.{}.{} of {}".format(*sys.version_info[:3], sys.prefix))' >&2
    export MINIONEREC_ENV_SHOWN=1
fi
