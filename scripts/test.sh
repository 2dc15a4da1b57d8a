#!/usr/bin/env bash
# The linter and the whole test suite, in the environment of everything else.
#
#   bash scripts/test.sh                                 both, a test process for each core (at most 8; TEST_PROCESSES=N
#                                                        takes another number); the last line says what failed
#   bash scripts/test.sh tests/test_trie.py -k loaded    the chosen tests alone: arguments go to pytest
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -eq 0 ] || exec "$PYTHON" -m pytest "$@"
FAILED=()
bash scripts/lint.sh || FAILED+=(lint)
cores="$("$PYTHON" -c 'import os; print(min(8, os.cpu_count() or 1))')"
"$PYTHON" -m pytest -n "${TEST_PROCESSES:-$cores}" --dist worksteal || FAILED+=(tests)
[ ${#FAILED[@]} -eq 0 ] || { echo "FAILED: ${FAILED[*]}" >&2; exit 1; }
echo "lint and tests passed"
