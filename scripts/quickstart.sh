#!/usr/bin/env bash
# The whole pipeline on MovieLens-100K: raw interactions -> embeddings -> SIDs -> SFT -> GRPO -> metrics.
# Run it again after a break and it goes on where it was; finished stages are not redone.
#
#   bash scripts/quickstart.sh                     results in output/quickstart
#   OUT=elsewhere SEED=7 bash scripts/quickstart.sh
#
# Its settings stand in config/recipes/quickstart_*.yaml.
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
[ $# -eq 0 ] || { echo "error: unexpected argument $1; OUT and SEED stand before the command" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

OUT="${OUT:-output/quickstart}"
SEED="${SEED:-42}"
DS=ml-100k
RECIPES=config/recipes/quickstart
RAW="$OUT/raw" DATA="$OUT/data" CSV="$OUT/csv"
CHECKPOINT="$OUT/sft/final_checkpoint"

# Real data that a user gets with pip: the recbole wheel carries MovieLens-100K.
if [ ! -f "$RAW/$DS.item" ]; then
    mkdir -p "$RAW"
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$RAW" recbole==1.2.1
    "$PYTHON" -m zipfile -e "$RAW"/recbole-1.2.1-*.whl "$RAW/wheel"
    mv "$RAW/wheel/recbole/dataset_example/$DS/$DS.inter" "$RAW/"
    mv "$RAW/wheel/recbole/dataset_example/$DS/$DS.item" "$RAW/" # last: its presence says that this step is done
    rm -rf "$RAW/wheel"
fi

EMBEDDINGS="$DATA/$DS.emb-tfidf-td.npy" INDEX="$DATA/$DS.index.json"
"$PYTHON" -m data_process.recbole_data_process --config ${RECIPES}_data.yaml --dataset $DS --input_dir "$RAW" \
    --output_path "$DATA"
"$PYTHON" -m rq.text2emb.amazon_text2emb --config ${RECIPES}_text2emb.yaml --dataset $DS --root "$DATA"
# One thread: the RQ-VAE is too small to gain from two, and on a busy machine they wait for each other.
OMP_NUM_THREADS=1 "$PYTHON" -m rq.rqvae --config ${RECIPES}_rqvae.yaml --data_path "$EMBEDDINGS" \
    --ckpt_dir "$OUT/rqvae" --seed "$SEED"
"$PYTHON" -m rq.generate_indices --ckpt_path "$OUT/rqvae/best_collision_model.pth" --data_path "$EMBEDDINGS" \
    --output_file "$INDEX"
"$PYTHON" convert_dataset.py --dataset_name $DS --data_dir "$DATA" --output_dir "$CSV"

TRAIN="$CSV/train/$DS.csv" VALID="$CSV/valid/$DS.csv" TEST="$CSV/test/$DS.csv" INFO="$CSV/info/$DS.txt"
"$PYTHON" baselines.py --train_file "$TRAIN" --test_data_path "$TEST" --info_file "$INFO" --output_dir "$OUT/baselines"
"$PYTHON" sft.py --config ${RECIPES}_sft.yaml --train_file "$TRAIN" --eval_file "$VALID" --sid_index_path "$INDEX" \
    --item_meta_path "$DATA/$DS.item.json" --output_dir "$OUT/sft" --seed "$SEED"
"$PYTHON" evaluate.py --base_model "$CHECKPOINT" --train_file "$TRAIN" --info_file "$INFO" --test_data_path "$TEST" \
    --result_json_data "$OUT/sft/test.json"
"$PYTHON" rl.py --config ${RECIPES}_rl.yaml --model_path "$CHECKPOINT" --train_file "$TRAIN" --eval_file "$VALID" \
    --info_file "$INFO" --output_dir "$OUT/rl" --seed "$SEED"
"$PYTHON" evaluate.py --base_model "$OUT/rl/final_checkpoint" --train_file "$TRAIN" --info_file "$INFO" \
    --test_data_path "$TEST" --result_json_data "$OUT/rl/test.json"
"$PYTHON" -m scripts.summary --run_dir "$OUT"
