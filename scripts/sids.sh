# Sourced by the SID scripts: answers --help; reads --data_path, --output_dir, --index_file and, where the sourcing
# script has set CHECKPOINT to a default, --checkpoint and --indices; leaves every other flag in FLAGS. Sets OUT (the
# folder), INDEX (--index_file, or OUT/NAME.index.json, NAME from NAME.emb-PLM-td.npy) and WORDS (those of --indices).
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source scripts/launch.sh
source scripts/stages.sh

fail() { echo "error: $1" >&2; exit 2; }

DATA_PATH="" OUT="" INDEX="" INDICES="" FLAGS=()
while [ $# -gt 0 ]; do
    case "$1" in
        --data_path | --output_dir | --index_file | --checkpoint | --indices)
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
        *) FLAGS+=("$1"); shift ;;
    esac
done
[ -n "$DATA_PATH" ] || fail "--data_path is missing (NAME.emb-PLM-td.npy)"
[ -n "$OUT" ] || fail "--output_dir is missing"
NAME="$(basename "$DATA_PATH" .npy)"
INDEX="${INDEX:-$OUT/${NAME%%.emb-*}.index.json}"
split_flags indices "$INDICES"

# train_codes FLAGS...: COMMAND as LAUNCH says, with SID_THREADS threads where that is set.
train_codes() (
    [ -z "${SID_THREADS:-}" ] || export OMP_NUM_THREADS="$SID_THREADS"
    launch_whole -m "$COMMAND" "$@"
)
