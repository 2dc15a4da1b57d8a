#!/usr/bin/env bash
# One row of the results table, from raw files to metrics: baselines, SFT, RL and fusion with several seeds, by one
# recipe. The same command again goes on after a break or a kill: what is finished is not done again.
#
#   bash scripts/benchmark.sh --dataset industrial --data DIR
#   bash scripts/benchmark.sh --dataset beauty --data DIR
#   bash scripts/benchmark.sh --dataset ml-100k
#   bash scripts/benchmark.sh --dataset ml-100k-rqvae
#
#   --dataset NAME        config/benchmarks/NAME.yaml is the recipe
#   --recipe FILE         a recipe of your own instead
#   --data DIR            where the raw files lie: the published splits for industrial, RecBole's Beauty.inter and
#                         Beauty.item for beauty; ml-100k and ml-100k-rqvae are fetched with pip without it
#   --output_dir DIR      default output/benchmark/NAME; every seed has a folder below it, which is one of pipeline.sh
#   --seeds "N N N"       default "42 1 2"; every stage of a run uses its seed
#   --dry_run True        write nothing: the plan of the stages of every seed
#
# At the end: DIR/table.txt, DIR/table.csv and DIR/table.png with the mean and the standard deviation of every figure,
# the published ones beside them, and CPU minutes; a page about every run, SEED/report.html, and one over all of them.
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/files.sh"
DATASET="" RECIPE="" DATA="" OUTPUT_DIR="" SEEDS="42 1 2" DRY_RUN=""
read_flags "dataset recipe data output_dir seeds dry_run" "$@"
check_dry_run "$DRY_RUN"
[ -n "$DATASET$RECIPE" ] || fail "--dataset is missing: industrial, beauty, ml-100k or ml-100k-rqvae; or --recipe"
[ -z "$DATASET" ] || [ -z "$RECIPE" ] || fail "--dataset: goes without --recipe"
ROOT="$(dirname "${BASH_SOURCE[0]}")/.."
[ -z "$DATASET" ] || [ -f "$ROOT/config/benchmarks/$DATASET.yaml" ] ||
    fail "--dataset $DATASET: expected industrial, beauty, ml-100k or ml-100k-rqvae"
[ -n "$DATA" ] || [[ "$DATASET" = ml-100k* ]] || fail "--data is missing: the folder of the raw files"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
NAME="${DATASET:-$(basename "$RECIPE" .yaml)}"
RECIPE="${RECIPE:-config/benchmarks/$DATASET.yaml}"
OUT="${OUTPUT_DIR:-output/benchmark/$NAME}"
if [ -z "$DATA" ]; then
    source scripts/movielens.sh
    DATA="$OUT/raw"
    if [ "$DRY_RUN" = True ] && [ ! -f "$DATA/ml-100k.item" ]; then
        DATA=$(mktemp -d)
        trap 'rm -rf "$DATA"' EXIT
    fi
    fetch_movielens "$DATA"
fi

# One thread: these models are too small to gain from two.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" LAUNCH="${LAUNCH:-none}"
RUNS=()
for seed in $SEEDS; do
    # One argument a line.
    mapfile -t ARGUMENTS < <("$PYTHON" -m scripts.recipe --recipe "$RECIPE" --data "$DATA" \
        --output_dir "$OUT/seed_$seed" --seed "$seed" || echo failed)
    [ "${ARGUMENTS[-1]}" != failed ] || exit 2
    echo "[benchmark] $NAME, seed $seed"
    bash scripts/pipeline.sh "${ARGUMENTS[@]}" ${DRY_RUN:+--dry_run "$DRY_RUN"}
    RUNS+=("$OUT/seed_$seed")
done
[ "$DRY_RUN" != True ] || exit 0
"$PYTHON" -m scripts.benchmark_table --run_dir "$OUT" --recipe "$RECIPE"
"$PYTHON" -m scripts.report "${RUNS[@]}" --output_dir "$OUT"
