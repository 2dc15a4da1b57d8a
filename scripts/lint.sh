#!/usr/bin/env bash
# ruff check and ruff format --check over the whole repository, in the environment of everything else.
#
#   bash scripts/lint.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
[ $# -eq 0 ] || { echo "error: unexpected argument $1; this script takes none" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
STATUS=0
"$PYTHON" -m ruff check --quiet . || { echo "lint: ruff check failed" >&2; STATUS=1; }
"$PYTHON" -m ruff format --check --quiet . ||
    { echo "lint: not formatted; $PYTHON -m ruff format . does it" >&2; STATUS=1; }
exit $STATUS
