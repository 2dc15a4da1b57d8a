#!/usr/bin/env bash
# Kill -9 at 30 random moments of all stages of a small pipeline, started again each time: every final file must be that
# of an undisturbed run. The last line sums it up. Some twenty minutes on two cores.
#
#   bash scripts/fault_test.sh                          all stages, 30 kills
#   bash scripts/fault_test.sh --kills 3 --stages rqvae [flags of scripts.fault_runs]
COMMAND=scripts.fault_runs
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
"$PYTHON" -m scripts.fault_runs --work_dir "$WORK/faults" "$@"
