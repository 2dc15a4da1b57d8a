#!/usr/bin/env bash
# Reinforcement learning, rl.py, on everything that the machine has.
#
#   LAUNCH=auto bash scripts/rl.sh --flag value ...
#
# LAUNCH is auto, cpu, gpu, ddp, zero2, zero3, fsdp2 or a file of accelerate, PROCESSES how many of them share the work
# (default: the number of GPUs); docs/cluster.md explains them. All flags go to the command.
COMMAND=rl
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch rl.py "$@"
