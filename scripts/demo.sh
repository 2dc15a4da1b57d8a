#!/usr/bin/env bash
# A page on this machine where one builds a history and sees what a model recommends, and an API for programs.
#
#   bash scripts/demo.sh                                the model of the quickstart
#   bash scripts/demo.sh output/rl/final_checkpoint     another model folder
#   bash scripts/demo.sh FOLDER --port 7861             flags go to scripts/demo.py (--help lists them)
#
# Makes .venv-demo once, with requirements-demo.txt beside what everything else uses.
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
DEMO_VENV="${DEMO_VENV:-.venv-demo}"
MODEL=output/quickstart/rl/final_checkpoint
if [ $# -gt 0 ] && [[ "$1" != --* ]]; then
    MODEL="$1"
    shift
fi
if ! cmp -s requirements-demo.txt "$DEMO_VENV/requirements.installed"; then
    echo "[demo] installing requirements-demo.txt into $DEMO_VENV (once, a minute)"
    "$PYTHON" -m venv "$DEMO_VENV"
    # What the environment of everything else holds, torch included, is found there too, and not installed again.
    "$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
        > "$("$DEMO_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
    "$DEMO_VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements-demo.txt
    cp requirements-demo.txt "$DEMO_VENV/requirements.installed"
fi
exec "$DEMO_VENV/bin/python" -m scripts.demo --model "$MODEL" "$@"
