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
source scripts/extra_env.sh
DEMO_VENV="${DEMO_VENV:-.venv-demo}"
MODEL=output/quickstart/rl/final_checkpoint
if [ $# -gt 0 ] && [[ "$1" != --* ]]; then
    MODEL="$1"
    shift
fi
# Before a minute of installing.
[ -f "$MODEL/config.json" ] ||
    { echo "error: $MODEL: no model there; bash scripts/quickstart.sh makes one, or name a folder" >&2; exit 2; }
extra_environment "$DEMO_VENV" demo -r requirements-demo.txt
exec "$DEMO_VENV/bin/python" -m scripts.demo --model "$MODEL" "$@"
