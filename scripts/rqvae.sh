#!/usr/bin/env bash
# RQ-VAE: embeddings -> OUT/rqvae/*.pth -> OUT/NAME.index.json and its quality report.
#
#   bash scripts/rqvae.sh --data_path DIR/NAME.emb-PLM-td.npy --output_dir OUT [flags of rq.rqvae]
#
#   --checkpoint FILE   which model of OUT/rqvae gives the SIDs: best_collision_model.pth (default), best_loss_model.pth
#                       or final_model.pth
COMMAND=rq.rqvae CHECKPOINT=best_collision_model.pth
source "$(dirname "${BASH_SOURCE[0]}")/sids.sh"
"$PYTHON" -m "$COMMAND" --data_path "$DATA_PATH" --ckpt_dir "$OUT/rqvae" "${FLAGS[@]}"
"$PYTHON" -m rq.generate_indices --ckpt_path "$OUT/rqvae/$CHECKPOINT" --data_path "$DATA_PATH" --output_file "$INDEX"
