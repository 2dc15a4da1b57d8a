#!/usr/bin/env bash
# The four methods, 3 levels of 256 codes, on one set of embeddings, and one table of their SIDs.
#
#   bash scripts/compare_sids.sh --data_path DIR/NAME.emb-PLM-td.npy --output_dir OUT [--index OTHER.index.json]
#
#   --index FILE   an index made elsewhere, for the same items: one more row
#
# Each method has a folder below OUT with its index and its quality page. Sized for a few thousand items on a CPU.
source "$(dirname "${BASH_SOURCE[0]}")/sids.sh"
OTHER=""
if [ ${#FLAGS[@]} -gt 0 ]; then
    [ "${FLAGS[0]}" = --index ] && [ ${#FLAGS[@]} -eq 2 ] || fail "unknown flags: ${FLAGS[*]}; known: --data_path --output_dir --index"
    OTHER="${FLAGS[1]}"
fi
FILE="$(basename "$INDEX")"
SCRIPTS="$(dirname "${BASH_SOURCE[0]}")"

if [ -n "$OTHER" ]; then
    mkdir -p "$OUT/other"
    cmp -s "$OTHER" "$OUT/other/$FILE" || cp "$OTHER" "$OUT/other/$FILE"
    "$PYTHON" -m rq.quality --index "$OUT/other/$FILE" --emb "$DATA_PATH" --codebook_sizes 256,256,256
fi
bash "$SCRIPTS/rqkmeans_faiss.sh" --data_path "$DATA_PATH" --output_dir "$OUT/rqkmeans_faiss"
bash "$SCRIPTS/rqkmeans_faiss.sh" --data_path "$DATA_PATH" --output_dir "$OUT/rqkmeans_faiss_uniform" --uniform True
bash "$SCRIPTS/rqkmeans_constrained.sh" --data_path "$DATA_PATH" --output_dir "$OUT/rqkmeans_constrained"
bash "$SCRIPTS/rqkmeans_plus.sh" --data_path "$DATA_PATH" --output_dir "$OUT/rqkmeans_plus" \
    --layers 512,256 --batch_size 512 --epochs 200 --warmup_epochs 10 --lr 1e-3 --eval_step 20
bash "$SCRIPTS/rqvae.sh" --data_path "$DATA_PATH" --output_dir "$OUT/rqvae" \
    --layers 512,256,128 --batch_size 512 --epochs 600 --warmup_epochs 10 --eval_step 50 --revive_every 20
# The model after the last epoch, where the one with the fewest collisions is an early one.
"$PYTHON" -m rq.generate_indices_plus --ckpt_path "$OUT/rqkmeans_plus/rqkmeans_plus/final_model.pth" --data_path "$DATA_PATH" \
    --output_file "$OUT/rqkmeans_plus_final/$FILE"
"$PYTHON" -m rq.generate_indices --ckpt_path "$OUT/rqvae/rqvae/final_model.pth" --data_path "$DATA_PATH" \
    --output_file "$OUT/rqvae_final/$FILE"
"$PYTHON" scripts/sid_table.py --run_dir "$OUT"
