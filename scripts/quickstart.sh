#!/usr/bin/env bash
# The whole pipeline on MovieLens-100K: raw interactions -> embeddings of texts and behaviour -> SIDs -> SFT -> GRPO ->
# metrics.
# Run it again after a break and it goes on where it was; finished stages are not redone.
#
#   bash scripts/quickstart.sh                     results in output/quickstart
#   OUT=elsewhere SEED=7 bash scripts/quickstart.sh
#   bash scripts/quickstart.sh --dry_run True      write nothing, say what is to be done and how long it takes
#
# Its settings stand in config/recipes/quickstart_*.yaml; the stages are those of pipeline.sh. Lists leave the user's
# history out, since nobody rates a film twice there.
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/files.sh"
DRY_RUN=""
[[ $# -eq 0 || "$1" == --dry_run* ]] || fail "unexpected argument $1; OUT and SEED stand before the command"
read_flags dry_run "$@"
check_dry_run "$DRY_RUN"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

OUT="${OUT:-output/quickstart}"
SEED="${SEED:-42}"
DS=ml-100k
RECIPES=config/recipes/quickstart
RAW="$OUT/raw"

source scripts/movielens.sh
if [ "$DRY_RUN" = True ] && [ ! -f "$RAW/$DS.item" ]; then
    RAW=$(mktemp -d)
    trap 'rm -rf "$RAW"' EXIT
fi
fetch_movielens "$RAW"

# One thread: these models are too small to gain from two, which on a busy machine wait for each other, up to ten times
# as long. The figures of docs/results.md are of one thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" LAUNCH="${LAUNCH:-none}"
# The networks are trained for a few minutes; the 60 epochs of their default would take longer than all else. GRU4Rec
# also teaches: of --folds 5, the one that has not seen a user says what should come next in the user's rows.
GRU4REC=$(printf %q "$OUT/gru4rec/model")
bash scripts/pipeline.sh --dataset $DS --input_dir "$RAW" --output_dir "$OUT" --seed "$SEED" \
    --sid_method rqkmeans_constrained --exclude_seen True \
    --data "--config ${RECIPES}_data.yaml" --text2emb "--config ${RECIPES}_text2emb.yaml" \
    --behaviour "--config ${RECIPES}_behaviour.yaml" --sids "--config ${RECIPES}_sids.yaml" \
    --baselines "--names popularity,transitions,cooccurrence_wide,content,transitions+content" \
    --network "--num_epochs 10" --gru4rec "--folds 5" \
    --sft "--config ${RECIPES}_sft.yaml --sid_init $(printf %q "$OUT/data/$DS.emb-behaviour-td.npy") \
        --teacher cooccurrence_wide+gru4rec --cf_path $GRU4REC" \
    --rl "--config ${RECIPES}_rl.yaml --cf_path $GRU4REC" \
    ${DRY_RUN:+--dry_run "$DRY_RUN"}
