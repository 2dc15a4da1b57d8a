#!/usr/bin/env bash
# RQ-VAE: embeddings -> OUT/rqvae/*.pth -> OUT/NAME.index.json and its quality report.
#
#   bash scripts/rqvae.sh --data_path DIR/NAME.emb-PLM-td.npy --output_dir OUT [flags of rq.rqvae]
#
#   --checkpoint FILE   which model of OUT/rqvae gives the SIDs: best_collision_model.pth (default), best_loss_model.pth
#                       or final_model.pth
#   --index_file FILE   the index; default OUT/NAME.index.json
#   --indices "..."     flags of rq.generate_indices, such as "--collisions extra_token"
#
# LAUNCH=ddp PROCESSES=N before the command shares the training among processes (docs/cluster.md), SID_THREADS=N sets
# the threads of each.
COMMAND=rq.rqvae CHECKPOINT=best_collision_model.pth
source "$(dirname "${BASH_SOURCE[0]}")/sids.sh"
train_codes --data_path "$DATA_PATH" --ckpt_dir "$OUT/rqvae" "${FLAGS[@]}"
generate rq.generate_indices "$OUT/rqvae/$CHECKPOINT" "${WORDS[@]}"
