#!/usr/bin/env bash
# SFT -> RL -> evaluation on data in the published format: {train,valid,test}/CATEGORY*.csv, info/CATEGORY*.txt,
# index/CATEGORY*.index.json and index/CATEGORY*.item.json below one folder. It is pipeline.sh with a few flags set.
#
#   bash scripts/run_category.sh --data_root DIR --category Industrial_and_Scientific
#
#   --data_root DIR       the folder
#   --category NAME       what the file names begin with
#   --base_model MODEL    HF folder or hub name; default: a tiny model from scratch (config/recipes/industrial_*.yaml)
#   --output_dir DIR      default output/NAME; what every stage prints also goes to DIR/logs/NN_STAGE.log
#   --seed N              default 42
#   --dry_run True        write nothing: the plan of every stage, and a table of states, times and memory
#   --sft "--flag value"  more flags for sft.py;  --rl "..." for rl.py;  --eval "..." for evaluate.py;
#                         --likeness "..." for the run of sft.py before SFT ("--num_epochs 10" makes it shorter)
#
# LAUNCH=ddp|zero2|zero3|fsdp2|FILE before the command runs SFT, RL and evaluation over several processes
# (docs/cluster.md).
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/files.sh"
DATA_ROOT="" CATEGORY="" BASE_MODEL="" OUTPUT_DIR="" SEED=42 SFT="" RL="" EVAL="" LIKENESS="" DRY_RUN=""
read_flags "data_root category base_model output_dir seed sft rl eval likeness dry_run" "$@"
require_category
if [ -z "$BASE_MODEL" ]; then
    # Later flags win, so the user's stand behind the recipe's.
    RECIPES=config/recipes/industrial
    LIKENESS="--config ${RECIPES}_likeness.yaml $LIKENESS"
    SFT="--config ${RECIPES}_sft.yaml $SFT"
    RL="--config ${RECIPES}_rl.yaml $RL"
fi
# The published indices let a few items share a SID (31 of 3,686 for Industrial), hence --shared_sids.
exec bash "$(dirname "${BASH_SOURCE[0]}")/pipeline.sh" --data_root "$DATA_ROOT" --category "$CATEGORY" \
    --base_model "$BASE_MODEL" --output_dir "$OUTPUT_DIR" --seed "$SEED" --shared_sids True \
    --likeness "$LIKENESS" --sft "$SFT" --rl "$RL" --eval "$EVAL" --dry_run "$DRY_RUN"
