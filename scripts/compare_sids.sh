#!/usr/bin/env bash
# The four methods, 3 levels of 256 codes, on one set of embeddings, and one table of their SIDs.
#
#   bash scripts/compare_sids.sh --data_path DIR/NAME.emb-PLM-td.npy --output_dir OUT [--index OTHER.index.json]
#
#   --index FILE     an index made elsewhere, for the same items: one more row
#   --dry_run True   write nothing: what each method would read, write and take
#
# Each method has a folder below OUT with its index and its quality page. Sized for a few thousand items on a CPU by
# config/recipes/compare_sids_*.yaml.
source "$(dirname "${BASH_SOURCE[0]}")/sids.sh"
OTHER="" OWN=()
for word in "${FLAGS[@]}"; do
    [[ "$word" == --dry_run* || -n "$DRY_RUN" && "$word" == True ]] || OWN+=("$word")
done
FLAGS=("${OWN[@]}")
if [ ${#FLAGS[@]} -gt 0 ]; then
    [ "${FLAGS[0]}" = --index ] && [ ${#FLAGS[@]} -eq 2 ] ||
        fail "unknown flags: ${FLAGS[*]}; expected --data_path --output_dir --index"
    OTHER="${FLAGS[1]}"
fi
FILE="$(basename "$INDEX")"

if [ -n "$OTHER" ] && [ -z "$DRY_RUN" ]; then
    mkdir -p "$OUT/other"
    cmp -s "$OTHER" "$OUT/other/$FILE" || cp "$OTHER" "$OUT/other/$FILE"
    "$PYTHON" -m rq.quality --index "$OUT/other/$FILE" --emb "$DATA_PATH" --codebook_sizes 256,256,256
fi
run() { bash "scripts/$1.sh" --data_path "$DATA_PATH" --output_dir "$OUT/$2" "${@:3}" ${DRY_RUN:+--dry_run True}; }
run rqkmeans_faiss rqkmeans_faiss
run rqkmeans_faiss rqkmeans_faiss_uniform --uniform True
run rqkmeans_constrained rqkmeans_constrained
run rqkmeans_plus rqkmeans_plus --config config/recipes/compare_sids_rqkmeans_plus.yaml
run rqvae rqvae --config config/recipes/compare_sids_rqvae.yaml
[ -z "$DRY_RUN" ] || exit 0
# The model after the last epoch, where the one with the fewest collisions is an early one.
"$PYTHON" -m rq.generate_indices_plus --ckpt_path "$OUT/rqkmeans_plus/rqkmeans_plus/final_model.pth" \
    --data_path "$DATA_PATH" --output_file "$OUT/rqkmeans_plus_final/$FILE"
"$PYTHON" -m rq.generate_indices --ckpt_path "$OUT/rqvae/rqvae/final_model.pth" \
    --data_path "$DATA_PATH" --output_file "$OUT/rqvae_final/$FILE"
"$PYTHON" -m scripts.sid_table --run_dir "$OUT"
