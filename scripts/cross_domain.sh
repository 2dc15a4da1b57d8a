#!/usr/bin/env bash
# Does a model over semantic IDs carry over to another domain? One SID space over two datasets, a model trained on the
# first (A), and on the second (B): that model without any training, SFT of it and of a model from scratch on 10 % and
# on all of B's rows, and RL from it. One table. The same command again goes on after a break or a kill.
#
#   bash scripts/cross_domain.sh --first DIR/A --second DIR/B
#
#   --first PREFIX        A: PREFIX.item.json and PREFIX.train.inter, .valid.inter, .test.inter, as pipeline.sh leaves
#                         them in OUT/data
#   --second PREFIX       B
#   --output_dir DIR      default output/cross_domain; every seed has a folder below it
#   --seeds "N N N"       default 42
#   --dry_run True        write nothing: the plan of every stage
#   --sample N            take that many random test rows of either dataset; default all
#
# Every stage takes all flags of its command in one argument; they win over config/recipes/cross_domain_*.yaml:
#   --text2emb  --sids (rq.rqkmeans_constrained)  --sft (all five trainings)  --rl  --eval
#
# At the end: DIR/table.txt, DIR/table.csv and DIR/table.png.
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/files.sh"
FIRST="" SECOND="" OUTPUT_DIR=output/cross_domain SEEDS=42 SAMPLE="" TEXT2EMB="" SIDS="" SFT="" RL="" EVAL=""
DRY_RUN=""
read_flags "first second output_dir seeds sample text2emb sids sft rl eval dry_run" "$@"
check_dry_run "$DRY_RUN"
[ -n "$FIRST" ] || fail "--first is missing: DIR/NAME of NAME.item.json and NAME.train.inter"
[ -n "$SECOND" ] || fail "--second is missing: DIR/NAME of NAME.item.json and NAME.train.inter"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source scripts/launch.sh
source scripts/stages.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" LAUNCH="${LAUNCH:-none}"
A="$(basename "$FIRST")" B="$(basename "$SECOND")" SHARE=10

# One numbering of items and one SID space: texts are embedded and codes are fitted over both datasets.
join_domains() {
    DATA="$OUT/data" CSV="$OUT/csv"
    run_stage join "$PYTHON" -m data_process.join_data_process --first "$FIRST" --second "$SECOND" --output_path "$DATA"
    split_flags text2emb "$TEXT2EMB"
    run_stage text2emb "$PYTHON" -m rq.text2emb.amazon_text2emb --dataset joint --root "$DATA" "${WORDS[@]}"
    split_flags sids "$SIDS"
    run_stage sids bash scripts/rqkmeans_constrained.sh --data_path "$DATA/joint.emb-tfidf-td.npy" \
        --output_dir "$DATA" --seed "$SEED" --codebook_size 128 --num_levels 3 --collisions nearest_free "${WORDS[@]}"
    for name in "$A" "$B"; do
        run_stage "convert_$name" "$PYTHON" convert_dataset.py --dataset_name "$name" --data_dir "$DATA" \
            --item_file "$DATA/joint.item.json" --index_file "$DATA/joint.index.json" \
            --only_items "$DATA/$name.items.txt" --output_dir "$CSV" ${SAMPLE:+--max_test_samples "$SAMPLE"}
    done
}

# train_on FOLDER DATASET FLAGS...: SFT on the rows of a dataset.
train_on() {
    local folder="$1" name="$2"
    shift 2
    split_flags sft "$SFT"
    run_stage "$folder" launch_as SFT sft.py --train_file "$CSV/train/$name.csv" --eval_file "$CSV/valid/$name.csv" \
        --sid_index_path "$DATA/joint.index.json" --item_meta_path "$DATA/joint.item.json" \
        --output_dir "$OUT/$folder" --seed "$SEED" --config config/recipes/cross_domain_sft.yaml "${WORDS[@]}" "$@"
}

# evaluate_on FOLDER DATASET MODEL: a model on the test rows of a dataset, over the items of that dataset alone.
evaluate_on() {
    split_flags eval "$EVAL"
    run_stage "evaluate_$1" launch_as EVAL evaluate.py --base_model "$3" --train_file "$CSV/train/$2.csv" \
        --info_file "$CSV/info/$2.txt" --test_data_path "$CSV/test/$2.csv" --result_json_data "$OUT/$1/test.json" \
        "${WORDS[@]}"
}

run_all() {
    local scratch=(--base_model config/mini_qwen3.json --train_from_scratch True) rows part folder start
    STAGE=0
    join_domains
    run_stage baselines "$PYTHON" baselines.py --train_file "$CSV/train/$B.csv" --valid_file "$CSV/valid/$B.csv" \
        --test_data_path "$CSV/test/$B.csv" --info_file "$CSV/info/$B.txt" --item_meta_path "$DATA/joint.item.json" \
        --output_dir "$OUT/baselines"
    train_on first "$A" "${scratch[@]}"
    evaluate_on first "$A" "$OUT/first/final_checkpoint"
    evaluate_on zero "$B" "$OUT/first/final_checkpoint"
    rows=100
    [ ! -f "$CSV/train/$B.csv" ] || rows=$(($(wc -l < "$CSV/train/$B.csv") - 1))
    for folder in scratch_$SHARE transfer_$SHARE scratch_100 transfer_100; do
        start=("${scratch[@]}")
        [[ "$folder" == scratch_* ]] || start=(--base_model "$OUT/first/final_checkpoint" --prompts compact)
        part=()
        [[ "$folder" == *_100 ]] || part=(--sample $((rows * SHARE / 100)))
        train_on "$folder" "$B" "${start[@]}" "${part[@]}"
        evaluate_on "$folder" "$B" "$OUT/$folder/final_checkpoint"
    done
    split_flags rl "$RL"
    run_stage rl launch_as RL rl.py --model_path "$OUT/first/final_checkpoint" --train_file "$CSV/train/$B.csv" \
        --eval_file "$CSV/valid/$B.csv" --info_file "$CSV/info/$B.txt" --output_dir "$OUT/rl" --seed "$SEED" \
        --config config/recipes/cross_domain_rl.yaml "${WORDS[@]}"
    evaluate_on rl "$B" "$OUT/rl/final_checkpoint"
}

for SEED in $SEEDS; do
    OUT="$OUTPUT_DIR/seed_$SEED"
    check_then_run run_all "$DRY_RUN"
done
[ "$DRY_RUN" != True ] || exit 0
"$PYTHON" -m scripts.benchmark_table --run_dir "$OUTPUT_DIR" --kind cross_domain
