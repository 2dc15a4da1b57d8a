#!/usr/bin/env bash
# Constrained RQ-KMeans: embeddings -> OUT/NAME.index.json, its quality report and its codebooks.
#
#   bash scripts/rqkmeans_constrained.sh --data_path DIR/NAME.emb-PLM-td.npy --output_dir OUT \
#       [flags of rq.rqkmeans_constrained]
COMMAND=rq.rqkmeans_constrained
source "$(dirname "${BASH_SOURCE[0]}")/sids.sh"
"$PYTHON" -m "$COMMAND" --data_path "$DATA_PATH" --output_file "$INDEX" "${FLAGS[@]}"
