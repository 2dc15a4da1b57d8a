#!/usr/bin/env bash
# SFT -> RL -> evaluation on data in the published format: {train,valid,test}/CATEGORY*.csv, info/CATEGORY*.txt,
# index/CATEGORY*.index.json and index/CATEGORY*.item.json below one folder.
#
#   bash scripts/run_category.sh --data_root DIR --category Industrial_and_Scientific
#
#   --data_root DIR       the folder
#   --category NAME       what the file names begin with
#   --base_model MODEL    HF folder or hub name; default: a tiny model from scratch (config/recipes/industrial_*.yaml)
#   --output_dir DIR      default output/NAME
#   --seed N              default 42
#   --sft "--flag value"  more flags for sft.py;  --rl "..." for rl.py;  --eval "..." for evaluate.py
#
# LAUNCH=ddp|zero2|zero3|fsdp2|FILE before the command runs SFT, RL and evaluation over several processes
# (docs/cluster.md).
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/files.sh"
DATA_ROOT="" CATEGORY="" BASE_MODEL="" OUTPUT_DIR="" SEED=42 SFT="" RL="" EVAL=""
read_flags "data_root category base_model output_dir seed sft rl eval" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source scripts/launch.sh
find_splits
INDEX=$(find_file "index/$CATEGORY*.index.json")
ITEMS=$(find_file "index/$CATEGORY*.item.json")

# Later flags win, so the user's stand behind the recipe's.
read -ra SFT_FLAGS <<< "$SFT"
read -ra RL_FLAGS <<< "$RL"
read -ra EVAL_FLAGS <<< "$EVAL"
# The published indices let a few items share a SID (31 of 3,686 for Industrial), hence --shared_sids.
DATA=(--train_file "$TRAIN" --info_file "$INFO" --shared_sids True)
SFT_DATA=(--train_file "$TRAIN" --eval_file "$VALID" --sid_index_path "$INDEX" --item_meta_path "$ITEMS" --seed "$SEED")

"$PYTHON" baselines.py "${DATA[@]}" --test_data_path "$TEST" --output_dir "$OUTPUT_DIR/baselines"
if [ -z "$BASE_MODEL" ]; then
    RECIPES=config/recipes/industrial
    launch sft.py --config ${RECIPES}_likeness.yaml "${SFT_DATA[@]}" --output_dir "$OUTPUT_DIR/likeness"
    BASE_MODEL="$OUTPUT_DIR/likeness/final_checkpoint"
    SFT_FLAGS=(--config ${RECIPES}_sft.yaml "${SFT_FLAGS[@]}")
    RL_FLAGS=(--config ${RECIPES}_rl.yaml "${RL_FLAGS[@]}")
fi
launch sft.py --base_model "$BASE_MODEL" "${SFT_DATA[@]}" --output_dir "$OUTPUT_DIR/sft" "${SFT_FLAGS[@]}"
launch evaluate.py --base_model "$OUTPUT_DIR/sft/final_checkpoint" "${DATA[@]}" --test_data_path "$TEST" \
    --result_json_data "$OUTPUT_DIR/sft/test.json" "${EVAL_FLAGS[@]}"
launch rl.py --model_path "$OUTPUT_DIR/sft/final_checkpoint" "${DATA[@]}" --eval_file "$VALID" \
    --output_dir "$OUTPUT_DIR/rl" --seed "$SEED" "${RL_FLAGS[@]}"
launch evaluate.py --base_model "$OUTPUT_DIR/rl/final_checkpoint" "${DATA[@]}" --test_data_path "$TEST" \
    --result_json_data "$OUTPUT_DIR/rl/test.json" "${EVAL_FLAGS[@]}"
"$PYTHON" -m scripts.summary --run_dir "$OUTPUT_DIR"
