# Sourced by the SID scripts: answers --help; reads --data_path, --output_dir, --index_file and, where the sourcing
# script has set CHECKPOINT to a default, --checkpoint and --indices, for RQ-KMeans+ also --kmeans; leaves every other
# flag in FLAGS. Sets OUT (the folder), INDEX (--index_file, or OUT/NAME.index.json, NAME from NAME.emb-PLM-td.npy),
# WORDS (those of --indices), KMEANS_WORDS (those of --kmeans) and DRY_RUN (--dry_run True, which stays among FLAGS).
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source scripts/launch.sh
source scripts/stages.sh

fail() { echo "error: $1" >&2; exit 2; }

DATA_PATH="" OUT="" INDEX="" INDICES="" KMEANS="" DRY_RUN="" FLAGS=()
while [ $# -gt 0 ]; do
    case "$1" in
        --data_path | --output_dir | --index_file | --checkpoint | --indices | --kmeans)
            [ $# -ge 2 ] || fail "$1: a value is missing" ;;
    esac
    case "$1" in
        --data_path) DATA_PATH="$2"; shift 2 ;;
        --output_dir) OUT="$2"; shift 2 ;;
        --index_file) INDEX="$2"; shift 2 ;;
        --checkpoint | --indices)
            [ -n "${CHECKPOINT:-}" ] || fail "unknown flag $1: this method has none"
            [ "$1" = --indices ] && INDICES="$2" || CHECKPOINT="$2"
            shift 2
            ;;
        --kmeans)
            [ "$COMMAND" = rq.rqkmeans_plus ] || fail "unknown flag $1: this method has none"
            KMEANS="$2"; shift 2 ;;
        --dry_run=True) DRY_RUN=True FLAGS+=("$1"); shift ;;
        --dry_run)
            [ "${2:-}" != True ] || DRY_RUN=True
            FLAGS+=("$1"); shift ;;
        *) FLAGS+=("$1"); shift ;;
    esac
done
[ -n "$DATA_PATH" ] || fail "--data_path is missing (NAME.emb-PLM-td.npy)"
[ -n "$OUT" ] || fail "--output_dir is missing"
NAME="$(basename "$DATA_PATH" .npy)"
INDEX="${INDEX:-$OUT/${NAME%%.emb-*}.index.json}"
split_flags kmeans "$KMEANS"
KMEANS_WORDS=("${WORDS[@]}")
split_flags indices "$INDICES"

# train_codes FLAGS...: COMMAND as LAUNCH says, with SID_THREADS threads where that is set.
train_codes() (
    [ -z "${SID_THREADS:-}" ] || export OMP_NUM_THREADS="$SID_THREADS"
    launch_whole -m "$COMMAND" "$@"
)

# generate MODULE CHECKPOINT FLAGS...: the SIDs that a trained model gives; in a dry run it need not be trained yet.
generate() {
    if [ -n "$DRY_RUN" ] && [ ! -f "$2" ]; then
        printf '[generate_indices] dry run; the model is to be trained first\n  reads  %s\n  writes %s\n' "$2" "$INDEX"
        return
    fi
    "$PYTHON" -m "$1" --ckpt_path "$2" --data_path "$DATA_PATH" --output_file "$INDEX" "${@:3}" \
        ${DRY_RUN:+--dry_run True}
}
