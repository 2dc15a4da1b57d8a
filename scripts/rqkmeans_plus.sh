#!/usr/bin/env bash
# RQ-KMeans+: embeddings -> k-means codebooks -> OUT/rqkmeans_plus/*.pth -> OUT/NAME.index.json and its quality report.
#
#   bash scripts/rqkmeans_plus.sh --data_path DIR/NAME.emb-PLM-td.npy --output_dir OUT [flags of rq.rqkmeans_plus]
#
#   --pretrained_codebook_path FILE.npz   k-means run to start from; default: rq.rqkmeans_faiss, run into OUT/kmeans
#   --kmeans "..."                        flags of that run, such as "--codebook_size 64 --num_levels 2"
#   --checkpoint FILE                     which model of OUT/rqkmeans_plus gives the SIDs, as in rqvae.sh
#   --index_file FILE, --indices "..."    as in rqvae.sh, which also explains LAUNCH
COMMAND=rq.rqkmeans_plus CHECKPOINT=best_collision_model.pth
source "$(dirname "${BASH_SOURCE[0]}")/sids.sh"
if [[ " ${FLAGS[*]} " != *" --pretrained_codebook_path"* ]]; then
    KMEANS="$OUT/kmeans/$(basename "$INDEX")"
    SEED="$(find_flag seed "${FLAGS[@]}")"
    KMEANS_WORDS=(--data_path "$DATA_PATH" ${SEED:+--seed "$SEED"} "${KMEANS_WORDS[@]}")
    if [ -n "$DRY_RUN" ] && [ ! -f "${KMEANS%.json}.codebooks.npz" ]; then
        # The plan needs its codebooks, which are a matter of seconds.
        SCRATCH=$(mktemp -d)
        trap 'rm -rf "$SCRATCH"' EXIT
        "$PYTHON" -m rq.rqkmeans_faiss "${KMEANS_WORDS[@]}" --output_file "$KMEANS" --dry_run True
        KMEANS="$SCRATCH/$(basename "$INDEX")"
        "$PYTHON" -m rq.rqkmeans_faiss "${KMEANS_WORDS[@]}" --output_file "$KMEANS" > /dev/null 2>&1
    else
        "$PYTHON" -m rq.rqkmeans_faiss "${KMEANS_WORDS[@]}" --output_file "$KMEANS" ${DRY_RUN:+--dry_run True}
    fi
    FLAGS+=(--pretrained_codebook_path "${KMEANS%.json}.codebooks.npz")
fi
train_codes --data_path "$DATA_PATH" --ckpt_dir "$OUT/rqkmeans_plus" "${FLAGS[@]}"
generate rq.generate_indices_plus "$OUT/rqkmeans_plus/$CHECKPOINT" "${WORDS[@]}"
