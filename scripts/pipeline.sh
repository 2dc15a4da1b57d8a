#!/usr/bin/env bash
# Raw data to metrics: items and interactions, text embeddings, SIDs, CSV splits, baselines, SFT, RL, evaluation, table.
# The same command again goes on after a break or a kill: what is finished is not done again.
#
#   bash scripts/pipeline.sh --dataset ml-100k --input_dir RAW --base_model Qwen/Qwen2.5-0.5B
#   bash scripts/pipeline.sh --dataset Beauty --reviews_file Beauty_5.json.gz --metadata_file meta_Beauty.json.gz ...
#   bash scripts/pipeline.sh --data_root DIR --category Industrial_and_Scientific ...
#
# The data are one of
#   --dataset NAME --input_dir DIR      RecBole files, DIR/NAME.inter and DIR/NAME.item
#   --dataset NAME --reviews_file FILE --metadata_file FILE      a dump of Amazon Reviews
#   --dataset NAME --interactions_file FILE [--items_file FILE]  a CSV of users, items and times, and one of titles
#   --dataset NAME --splits_dir DIR     splits in the published format, whose items get SIDs of your own
#   --data_root DIR --category NAME     the published format, SIDs and splits included; begins with the baselines
#
#   --output_dir DIR      default output/NAME; what every stage prints also goes to DIR/logs/NN_STAGE.log
#   --base_model MODEL    HF folder or hub name, unless a recipe of --sft or --likeness names it
#   --sid_method METHOD   rqvae (default), rqkmeans_faiss, rqkmeans_constrained or rqkmeans_plus
#   --plm_checkpoint DIR  text encoder, an HF folder or hub name; default: TF-IDF
#   --plm_name NAME       name of the embeddings, DIR/data/DATASET.emb-NAME-td.npy; default tfidf, qwen with an encoder
#   --fuse LIST           baselines that evaluation adds to the model, such as transitions,content,sasrec, with weights
#                         chosen on the validation split; the network of sasrec is that of --networks
#   --networks LIST       item-id networks among the baselines; default "sasrec gru4rec", "" for none
#   --shared_sids True    allow several items to have one SID
#   --exclude_seen True   lists of baselines, networks and models leave the history of their row out
#   --repeat_newest N     with --exclude_seen, but for its N newest items
#   --seed N              default 42
#   --dry_run True        write nothing: the plan of every stage, and a table of states, times and memory
#
# Every stage takes all flags of its command, in one argument, with quotes as in a shell, and they win over the above:
#   --sft "--config config/recipes/industrial_sft.yaml --num_epochs 3"
#
#   --data        data_process.recbole_data_process, .amazon18_data_process, .csv_data_process or
#                 .published_data_process
#   --text2emb    rq.text2emb.amazon_text2emb (--plm_name and --plm_checkpoint stand outside)
#   --behaviour   rq.behaviour: SIDs and --sid_init then look at what is bought together too; "default" is its
#                 defaults; without it there is none
#   --sids        scripts/METHOD.sh: the flags of rq.METHOD, and --indices "..." for those of rq.generate_indices
#   --convert     convert_dataset.py
#   --baselines   baselines.py;  --network  sasrec.py, for all of --networks;  --sasrec, --gru4rec  for one of them
#   --likeness    sft.py, as a run of its own before SFT, which begins with its model; without it there is none
#   --sft         sft.py;  --rl  rl.py;  --eval  evaluate.py, after SFT and after RL
#
# `bash scripts/sft.sh --help` and the like list them. All are checked before the first stage begins.
#
# LAUNCH and PROCESSES launch the stages that share their work (docs/cluster.md); LAUNCH_TEXT2EMB, LAUNCH_SIDS,
# LAUNCH_NETWORKS, LAUNCH_SFT, LAUNCH_RL and LAUNCH_EVAL are for one of them.
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/files.sh"
DATASET="" INPUT_DIR="" SPLITS_DIR="" REVIEWS_FILE="" METADATA_FILE="" DATA_ROOT="" CATEGORY="" OUTPUT_DIR=""
INTERACTIONS_FILE="" ITEMS_FILE=""
BASE_MODEL=""
SID_METHOD=rqvae PLM_CHECKPOINT="" PLM_NAME="" NETWORKS="sasrec gru4rec" SHARED_SIDS="" SEED=42 FUSE="" DRY_RUN=""
EXCLUDE_SEEN="" REPEAT_NEWEST=""
DATA="" TEXT2EMB="" BEHAVIOUR="" SIDS="" CONVERT="" BASELINES="" NETWORK="" SASREC="" GRU4REC="" LIKENESS="" SFT=""
RL="" EVAL=""
KNOWN="dataset input_dir splits_dir reviews_file metadata_file interactions_file items_file data_root category"
KNOWN+=" output_dir base_model sid_method plm_checkpoint plm_name fuse networks shared_sids seed dry_run"
KNOWN+=" exclude_seen repeat_newest"
KNOWN+=" data text2emb behaviour sids convert baselines network sasrec gru4rec likeness sft rl eval"
read_flags "$KNOWN" "$@"
check_dry_run "$DRY_RUN"
COMMAND_LINE="bash scripts/pipeline.sh$(printf ' %q' "$@")"

# What the data are, and where everything lies.
if [ -n "$DATA_ROOT" ]; then
    [ -n "$CATEGORY" ] || fail "--category is missing"
    [ -z "$DATASET$INPUT_DIR$SPLITS_DIR$REVIEWS_FILE$METADATA_FILE$INTERACTIONS_FILE$ITEMS_FILE" ] ||
        fail "--data_root: goes without --dataset and raw files"
    find_splits
    INDEX=$(find_file "index/$CATEGORY*.index.json")
    ITEMS=$(find_file "index/$CATEGORY*.item.json")
    OUT="${OUTPUT_DIR:-output/$CATEGORY}"
else
    [ -n "$DATASET" ] || fail "--dataset is missing, or --data_root with --category"
    [ -z "$CATEGORY" ] || fail "--category: goes with --data_root"
    [ -n "$INPUT_DIR$SPLITS_DIR$REVIEWS_FILE$INTERACTIONS_FILE" ] ||
        fail "--input_dir is missing, or --interactions_file, --splits_dir, or --reviews_file with --metadata_file"
    [ -z "$INPUT_DIR" ] || [ -z "$REVIEWS_FILE$METADATA_FILE" ] || fail "--input_dir: goes without --reviews_file"
    [ -z "$SPLITS_DIR" ] || [ -z "$INPUT_DIR$REVIEWS_FILE$METADATA_FILE" ] ||
        fail "--splits_dir: goes without --input_dir and --reviews_file"
    [ -z "$INTERACTIONS_FILE" ] || [ -z "$INPUT_DIR$SPLITS_DIR$REVIEWS_FILE$METADATA_FILE" ] ||
        fail "--interactions_file: goes without --input_dir, --splits_dir and --reviews_file"
    [ -z "$ITEMS_FILE" ] || [ -n "$INTERACTIONS_FILE" ] || fail "--items_file: goes with --interactions_file"
    [ -z "$REVIEWS_FILE" ] || [ -n "$METADATA_FILE" ] || fail "--metadata_file is missing"
    OUT="${OUTPUT_DIR:-output/$DATASET}"
    PLM_NAME="${PLM_NAME:-$([ -n "$PLM_CHECKPOINT" ] && echo qwen || echo tfidf)}"
fi
case "$SID_METHOD" in
    rqvae | rqkmeans_faiss | rqkmeans_constrained | rqkmeans_plus) ;;
    *) fail "--sid_method $SID_METHOD: expected rqvae, rqkmeans_faiss, rqkmeans_constrained or rqkmeans_plus" ;;
esac
for network in $NETWORKS; do
    case "$network" in
        sasrec | gru4rec) ;;
        *) fail "--networks $NETWORKS: expected sasrec, gru4rec, both or none" ;;
    esac
done
[ -z "$SASREC" ] || [[ " $NETWORKS " == *" sasrec "* ]] || fail "--sasrec: needs sasrec among --networks"
[ -z "$GRU4REC" ] || [[ " $NETWORKS " == *" gru4rec "* ]] || fail "--gru4rec: needs gru4rec among --networks"
for network in sasrec gru4rec; do
    [[ "$FUSE" != *$network* ]] || [[ " $NETWORKS " == *" $network "* ]] ||
        fail "--fuse $FUSE: needs $network among --networks"
done
[[ "$TEXT2EMB" != *--plm_* ]] || fail "--text2emb: --plm_name and --plm_checkpoint are flags of pipeline.sh itself"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source scripts/launch.sh
source scripts/stages.sh
SHARED=(${SHARED_SIDS:+--shared_sids "$SHARED_SIDS"})
SEEN=(${EXCLUDE_SEEN:+--exclude_seen "$EXCLUDE_SEEN"} ${REPEAT_NEWEST:+--repeat_newest "$REPEAT_NEWEST"})

# name_files: what stages read from each other, below OUT.
name_files() {
    if [ -z "$DATA_ROOT" ]; then
        EMBEDDINGS="$OUT/data/$DATASET.emb-$PLM_NAME-td.npy"
        INDEX="$OUT/data/$DATASET.index.json" ITEMS="$OUT/data/$DATASET.item.json"
        TRAIN="$OUT/csv/train/$DATASET.csv" VALID="$OUT/csv/valid/$DATASET.csv" TEST="$OUT/csv/test/$DATASET.csv"
        INFO="$OUT/csv/info/$DATASET.txt"
    fi
    FUSION=()
    [ -n "$FUSE" ] || return 0
    FUSION=(--fuse "$FUSE" --fuse_valid_file "$VALID")
    [[ "$FUSE" != *content* ]] || FUSION+=(--item_meta_path "$ITEMS")
    for network in sasrec gru4rec; do
        [[ "$FUSE" != *$network* ]] || FUSION+=(--cf_path "$OUT/$network/model")
    done
}

prepare_data() {
    split_flags data "$DATA"
    if [ -n "$INPUT_DIR" ]; then
        run_stage data "$PYTHON" -m data_process.recbole_data_process --dataset "$DATASET" --input_dir "$INPUT_DIR" \
            --output_path "$OUT/data" "${WORDS[@]}"
    elif [ -n "$INTERACTIONS_FILE" ]; then
        run_stage data "$PYTHON" -m data_process.csv_data_process --dataset "$DATASET" \
            --interactions_file "$INTERACTIONS_FILE" ${ITEMS_FILE:+--items_file "$ITEMS_FILE"} \
            --output_path "$OUT/data" "${WORDS[@]}"
    elif [ -n "$SPLITS_DIR" ]; then
        run_stage data "$PYTHON" -m data_process.published_data_process --dataset "$DATASET" \
            --splits_dir "$SPLITS_DIR" --output_path "$OUT/data" "${WORDS[@]}"
    else
        run_stage data "$PYTHON" -m data_process.amazon18_data_process --dataset "$DATASET" \
            --reviews_file "$REVIEWS_FILE" --metadata_file "$METADATA_FILE" --output_path "$OUT/data" "${WORDS[@]}"
    fi
    split_flags text2emb "$TEXT2EMB"
    run_stage text2emb launch_as TEXT2EMB -m rq.text2emb.amazon_text2emb --dataset "$DATASET" --root "$OUT/data" \
        --plm_name "$PLM_NAME" ${PLM_CHECKPOINT:+--plm_checkpoint "$PLM_CHECKPOINT"} "${WORDS[@]}"
    if [ -n "$BEHAVIOUR" ]; then
        split_flags behaviour "${BEHAVIOUR#default}"
        run_stage behaviour "$PYTHON" -m rq.behaviour --data_path "$EMBEDDINGS" \
            --train_file "$OUT/data/$DATASET.train.inter" --output_file "$OUT/data/$DATASET.emb-behaviour-td.npy" \
            --seed "$SEED" "${WORDS[@]}"
        EMBEDDINGS="$OUT/data/$DATASET.emb-behaviour-td.npy"
    fi
    split_flags sids "$SIDS"
    run_stage sids with_launch SIDS bash "scripts/$SID_METHOD.sh" --data_path "$EMBEDDINGS" --output_dir "$OUT" \
        --index_file "$INDEX" --seed "$SEED" "${WORDS[@]}"
    split_flags convert "$CONVERT"
    run_stage convert "$PYTHON" convert_dataset.py --dataset_name "$DATASET" --data_dir "$OUT/data" \
        --output_dir "$OUT/csv" "${SHARED[@]}" "${WORDS[@]}"
}

rank_baselines() {
    local data=(--train_file "$TRAIN" --test_data_path "$TEST" --info_file "$INFO" "${SHARED[@]}" "${SEEN[@]}")
    split_flags baselines "$BASELINES"
    run_stage baselines "$PYTHON" baselines.py "${data[@]}" --valid_file "$VALID" --item_meta_path "$ITEMS" \
        --output_dir "$OUT/baselines" "${WORDS[@]}"
    split_flags network "$NETWORK"
    local of_all=("${WORDS[@]}") own
    for network in $NETWORKS; do
        own="${network^^}"
        split_flags "$network" "${!own}"
        run_stage "$network" launch_as NETWORKS sasrec.py --model "$network" "${data[@]}" --valid_file "$VALID" \
            --output_dir "$OUT/$network" --seed "$SEED" "${of_all[@]}" "${WORDS[@]}"
    done
}

train_and_evaluate() {
    local data=(--train_file "$TRAIN" --eval_file "$VALID" --sid_index_path "$INDEX" --item_meta_path "$ITEMS")
    local base="$BASE_MODEL"
    if [ -n "$LIKENESS" ]; then
        split_flags likeness "$LIKENESS"
        run_stage likeness launch_as SFT sft.py "${data[@]}" --output_dir "$OUT/likeness" --seed "$SEED" \
            ${base:+--base_model "$base"} "${WORDS[@]}"
        base="$OUT/likeness/final_checkpoint"
    fi
    split_flags sft "$SFT"
    run_stage sft launch_as SFT sft.py ${base:+--base_model "$base"} "${data[@]}" --output_dir "$OUT/sft" \
        --seed "$SEED" "${WORDS[@]}"
    evaluate_model sft
    split_flags rl "$RL"
    run_stage rl launch_as RL rl.py --model_path "$OUT/sft/final_checkpoint" --train_file "$TRAIN" \
        --eval_file "$VALID" --info_file "$INFO" --output_dir "$OUT/rl" --seed "$SEED" "${SHARED[@]}" "${WORDS[@]}"
    evaluate_model rl
}

# evaluate_model FOLDER: the final checkpoint of a training run on the test split.
evaluate_model() {
    split_flags eval "$EVAL"
    run_stage "evaluate_$1" launch_as EVAL evaluate.py --base_model "$OUT/$1/final_checkpoint" --train_file "$TRAIN" \
        --info_file "$INFO" --test_data_path "$TEST" --result_json_data "$OUT/$1/test.json" "${SHARED[@]}" \
        "${SEEN[@]}" "${FUSION[@]}" "${WORDS[@]}"
}

run_all() {
    STAGE=0
    [ -n "$DATA_ROOT" ] || prepare_data
    rank_baselines
    train_and_evaluate
    for name in sft rl; do
        run_stage "card_$name" "$PYTHON" -m scripts.model_card --model "$OUT/$name/final_checkpoint" \
            --metrics "$OUT/$name/test.metrics.json"
    done
    [ -n "${MINIONEREC_CHECK_FLAGS:-}$PLANNING" ] || echo "$COMMAND_LINE" > "$OUT/command.txt"
    run_stage summary "$PYTHON" -m scripts.summary --run_dir "$OUT"
    run_stage report "$PYTHON" -m scripts.report "$OUT"
}
name_files
check_then_run run_all "$DRY_RUN"
