#!/usr/bin/env bash
# Item texts to embeddings, rq.text2emb.amazon_text2emb: processes share the texts and write one file.
#
#   LAUNCH=auto bash scripts/text2emb.sh --flag value ...
#
# LAUNCH is auto, cpu, gpu, ddp or a file of accelerate, PROCESSES how many of them share the work (default: the number
# of GPUs); docs/cluster.md explains them. All flags go to the command. TF-IDF is the work of one process.
COMMAND=rq.text2emb.amazon_text2emb
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch_whole -m "$COMMAND" "$@"
