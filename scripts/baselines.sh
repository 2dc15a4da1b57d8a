#!/usr/bin/env bash
# Popularity, transitions, repeat-last, SASRec and GRU4Rec on one split of data in the published format:
# {train,valid,test}/CATEGORY*.csv and info/CATEGORY*.txt below one folder. One table and one page of plots at the end.
#
#   bash scripts/baselines.sh --data_root DIR --category Industrial_and_Scientific
#
#   --data_root DIR       the folder
#   --category NAME       what the file names begin with
#   --output_dir DIR      default output/NAME, the folder of run_category.sh
#   --seed N              default 42
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source scripts/files.sh

DATA_ROOT="" CATEGORY="" OUT="" SEED=42
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || fail "$1: a value is missing"
    case "$1" in
        --data_root) DATA_ROOT="$2" ;;
        --category) CATEGORY="$2" ;;
        --output_dir) OUT="$2" ;;
        --seed) SEED="$2" ;;
        *) fail "unknown flag $1; known: --data_root --category --output_dir --seed" ;;
    esac
    shift 2
done
[ -n "$DATA_ROOT" ] || fail "--data_root is missing"
[ -n "$CATEGORY" ] || fail "--category is missing"
OUT="${OUT:-output/$CATEGORY}"
TRAIN=$(only "train/$CATEGORY*.csv")
VALID=$(only "valid/$CATEGORY*.csv")
TEST=$(only "test/$CATEGORY*.csv")
INFO=$(only "info/$CATEGORY*.txt")

# The published indices let a few items share a SID, hence --shared_sids.
DATA=(--train_file "$TRAIN" --test_data_path "$TEST" --info_file "$INFO" --shared_sids True)
"$PYTHON" baselines.py "${DATA[@]}" --output_dir "$OUT/baselines"
for MODEL in sasrec gru4rec; do
    "$PYTHON" sasrec.py --model "$MODEL" "${DATA[@]}" --valid_file "$VALID" --output_dir "$OUT/$MODEL" --seed "$SEED"
done
"$PYTHON" -m scripts.report --output "$OUT/baselines.png" --names popularity transitions repeat_last sasrec gru4rec \
    --metrics "$OUT"/baselines/{popularity,transitions,repeat_last}.metrics.json "$OUT"/{sasrec,gru4rec}/test.metrics.json
