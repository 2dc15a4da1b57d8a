#!/usr/bin/env bash
# Evaluation, evaluate.py: processes share the rows and write one file.
#
#   LAUNCH=auto bash scripts/evaluate.sh --flag value ...
#
# LAUNCH is auto, cpu, gpu, ddp, zero2, zero3, fsdp2 or a file of accelerate, PROCESSES how many of them share the work
# (default: the number of GPUs); docs/cluster.md explains them. All flags go to the command.
COMMAND=evaluate
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch evaluate.py "$@"
