#!/usr/bin/env bash
# The linter and the whole test suite, in the environment of everything else.
#
#   bash scripts/test.sh                                 both; the last line says what failed
#   bash scripts/test.sh tests/test_trie.py -k loaded    the chosen tests alone: arguments go to pytest
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -eq 0 ] || exec "$PYTHON" -m pytest "$@"
FAILED=()
bash scripts/lint.sh || FAILED+=(lint)
"$PYTHON" -m pytest || FAILED+=(tests)
[ ${#FAILED[@]} -eq 0 ] || { echo "FAILED: ${FAILED[*]}" >&2; exit 1; }
echo "lint and tests passed"
