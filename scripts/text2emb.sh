#!/usr/bin/env bash
# Item texts to embeddings, rq.text2emb.amazon_text2emb, in one process.
#
#   LAUNCH=auto bash scripts/text2emb.sh --flag value ...
#
# LAUNCH is auto, cpu or gpu. All flags go to the command.
COMMAND=rq.text2emb.amazon_text2emb
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
case "${LAUNCH:-auto}" in
    auto) LAUNCH=none ;;
    cpu) export CUDA_VISIBLE_DEVICES= ;;
    gpu) ;;
    *) launch_fail "LAUNCH=$LAUNCH: text2emb runs in one process: auto, cpu or gpu" ;;
esac
launch -m "$COMMAND" "$@"
