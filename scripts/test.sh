#!/usr/bin/env bash
# The whole test suite, in the same environment as everything else. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" -m pytest "$@" tests
