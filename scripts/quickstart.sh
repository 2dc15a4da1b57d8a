#!/usr/bin/env bash
# The whole pipeline on MovieLens-100K: raw interactions -> embeddings -> SIDs -> SFT -> GRPO -> metrics.
# Run it again after a break and it goes on where it was; finished stages are not redone.
#
#   bash scripts/quickstart.sh                     results in output/quickstart
#   OUT=elsewhere SEED=7 bash scripts/quickstart.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

OUT="${OUT:-output/quickstart}"
SEED="${SEED:-42}"
DS=ml-100k
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

"$PYTHON" -m data_process.recbole_data_process --dataset $DS --input_dir "$RAW" --output_path "$DATA" --user_k 5 --item_k 5
"$PYTHON" -m rq.text2emb.amazon_text2emb --dataset $DS --root "$DATA" --plm_name tfidf --dim 256
# One thread: the RQ-VAE is too small to gain from two, and on a busy machine they wait for each other.
OMP_NUM_THREADS=1 "$PYTHON" -m rq.rqvae --data_path "$DATA/$DS.emb-tfidf-td.npy" --ckpt_dir "$OUT/rqvae" --seed "$SEED" \
    --num_emb_list 128,128,128 --layers 256 --e_dim 64 --epochs 800 --batch_size 2048 --lr 1e-3 --eval_step 50 --warmup_epochs 20
"$PYTHON" -m rq.generate_indices --ckpt_path "$OUT/rqvae/best_collision_model.pth" --data_path "$DATA/$DS.emb-tfidf-td.npy" \
    --output_file "$DATA/$DS.index.json"
"$PYTHON" convert_dataset.py --dataset_name $DS --data_dir "$DATA" --output_dir "$CSV"

TRAIN="$CSV/train/$DS.csv" VALID="$CSV/valid/$DS.csv" TEST="$CSV/test/$DS.csv" INFO="$CSV/info/$DS.txt"
"$PYTHON" baselines.py --train_file "$TRAIN" --test_data_path "$TEST" --info_file "$INFO" --output_dir "$OUT/baselines"
"$PYTHON" sft.py --base_model config/mini_qwen3.json --train_from_scratch True --seed "$SEED" \
    --train_file "$TRAIN" --eval_file "$VALID" --eval_sample 1000 \
    --sid_index_path "$DATA/$DS.index.json" --item_meta_path "$DATA/$DS.item.json" --output_dir "$OUT/sft" \
    --batch_size 160 --micro_batch_size 160 --num_epochs 10 --learning_rate 3e-3 --weight_decay 0.1
"$PYTHON" evaluate.py --base_model "$CHECKPOINT" --train_file "$TRAIN" --info_file "$INFO" --test_data_path "$TEST" \
    --result_json_data "$OUT/sft/test.json"
"$PYTHON" rl.py --model_path "$CHECKPOINT" --train_file "$TRAIN" --eval_file "$VALID" --info_file "$INFO" --seed "$SEED" \
    --output_dir "$OUT/rl" --max_steps 100 --train_batch_size 1024 --learning_rate 5e-4 --warmup_ratio 0.1 --eval_sample 2000 --eval_step 25
"$PYTHON" evaluate.py --base_model "$OUT/rl/final_checkpoint" --train_file "$TRAIN" --info_file "$INFO" --test_data_path "$TEST" \
    --result_json_data "$OUT/rl/test.json"
"$PYTHON" scripts/summary.py --run_dir "$OUT"
