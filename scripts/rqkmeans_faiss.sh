#!/usr/bin/env bash
# RQ-KMeans by faiss: embeddings -> OUT/NAME.index.json, its quality report and its codebooks.
#
#   bash scripts/rqkmeans_faiss.sh --data_path DIR/NAME.emb-PLM-td.npy --output_dir OUT [flags of rq.rqkmeans_faiss]
COMMAND=rq.rqkmeans_faiss
source "$(dirname "${BASH_SOURCE[0]}")/sids.sh"
"$PYTHON" -m "$COMMAND" --data_path "$DATA_PATH" --output_file "$INDEX" "${FLAGS[@]}"
