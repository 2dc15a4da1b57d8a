#!/usr/bin/env bash
# Popularity, transitions, repeat-last, likeness of texts, its sum with transitions, SASRec and GRU4Rec on one split of
# data in the published format: {train,valid,test}/CATEGORY*.csv and info/CATEGORY*.txt below one folder, and for the
# descriptions index/CATEGORY*.item.json, if it is there. One table and one page of plots at the end. What is open is
# chosen on the validation split.
#
#   bash scripts/baselines.sh --data_root DIR --category Industrial_and_Scientific
#
#   --data_root DIR       the folder
#   --category NAME       what the file names begin with
#   --output_dir DIR      default output/NAME, the folder of run_category.sh
#   --seed N              default 42
#   --dry_run True        write nothing: what each command would read, write and take
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/files.sh"
DATA_ROOT="" CATEGORY="" OUTPUT_DIR="" SEED=42 DRY_RUN=""
read_flags "data_root category output_dir seed dry_run" "$@"
check_dry_run "$DRY_RUN"
require_category
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
find_splits

# The published indices let a few items share a SID, hence --shared_sids.
DATA=(--train_file "$TRAIN" --test_data_path "$TEST" --info_file "$INFO" --shared_sids True)
DATA+=(${DRY_RUN:+--dry_run "$DRY_RUN"})
ITEMS=$(find_file "index/$CATEGORY*.item.json" 2> /dev/null) || ITEMS=""
"$PYTHON" baselines.py "${DATA[@]}" --valid_file "$VALID" ${ITEMS:+--item_meta_path "$ITEMS"} \
    --output_dir "$OUTPUT_DIR/baselines"
for MODEL in sasrec gru4rec; do
    "$PYTHON" sasrec.py --model "$MODEL" "${DATA[@]}" --valid_file "$VALID" --output_dir "$OUTPUT_DIR/$MODEL" \
        --seed "$SEED"
done
[ "$DRY_RUN" != True ] || exit 0
"$PYTHON" -m scripts.plots --output "$OUTPUT_DIR/baselines.png" --title "$CATEGORY" \
    --names popularity transitions repeat_last content transitions+content sasrec gru4rec \
    --metrics "$OUTPUT_DIR"/baselines/{popularity,transitions,repeat_last,content,transitions+content}.metrics.json \
    "$OUTPUT_DIR"/{sasrec,gru4rec}/test.metrics.json
