# Sourced by the SID scripts: answers --help; reads --data_path, --output_dir and, where the sourcing script has set
# CHECKPOINT to a default, --checkpoint; leaves every other flag in FLAGS, and sets OUT (the folder) and INDEX
# (OUT/NAME.index.json, NAME from NAME.emb-PLM-td.npy).
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

fail() { echo "error: $1" >&2; exit 2; }

DATA_PATH="" OUT="" FLAGS=()
while [ $# -gt 0 ]; do
    case "$1" in
        --data_path | --output_dir | --checkpoint) [ $# -ge 2 ] || fail "$1: a value is missing" ;;
    esac
    case "$1" in
        --data_path) DATA_PATH="$2"; shift 2 ;;
        --output_dir) OUT="$2"; shift 2 ;;
        --checkpoint)
            [ -n "${CHECKPOINT:-}" ] || fail "unknown flag --checkpoint: this method has none"
            CHECKPOINT="$2"
            shift 2
            ;;
        *) FLAGS+=("$1"); shift ;;
    esac
done
[ -n "$DATA_PATH" ] || fail "--data_path is missing (NAME.emb-PLM-td.npy)"
[ -n "$OUT" ] || fail "--output_dir is missing"
NAME="$(basename "$DATA_PATH" .npy)"
INDEX="$OUT/${NAME%%.emb-*}.index.json"
