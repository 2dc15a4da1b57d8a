#!/usr/bin/env bash
# Ten thousand mutated files for every reader of the project: each must be read to the right value or be refused in one
# line. The last line sums it up.
#
#   bash scripts/fuzz.sh [flags of scripts.fuzz_readers]
COMMAND=scripts.fuzz_readers
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" -m scripts.fuzz_readers "$@"
