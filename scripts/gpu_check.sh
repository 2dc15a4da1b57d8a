#!/usr/bin/env bash
# Does everything work on the GPUs of this machine, and how fast? At most nine minutes; docs/gpu.md explains the table.
# Without a GPU it runs in a tiny form on the CPU, in less than a minute.
#
#   bash scripts/gpu_check.sh --flag value ...
#
# All flags go to the command.
COMMAND=benchmarks.gpu_check
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" -m benchmarks.gpu_check "$@"
