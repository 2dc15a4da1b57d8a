# Sourced by pipeline.sh and sids.sh after launch.sh: runs stages one after another, each with its log in OUT/logs.
source "$(dirname "${BASH_SOURCE[0]}")/dry_run.sh"
PLANNING="" # set while stages are planned

# split_flags NAME TEXT: sets WORDS to the words of --NAME TEXT, quotes understood as in a shell, nothing expanded.
split_flags() {
    local word
    WORDS=()
    [ -n "$2" ] || return 0
    "$PYTHON" -c 'import shlex, sys; shlex.split(sys.argv[1])' "$2" 2> /dev/null ||
        fail "--$1: a quote is not closed: $2"
    while IFS= read -r -d '' word; do
        WORDS+=("$word")
    done < <("$PYTHON" -c 'import shlex, sys; [print(w, end="\0") for w in shlex.split(sys.argv[1])]' "$2")
}

# run_stage NAME COMMAND...: the next stage; what it prints also goes to OUT/logs/NN_NAME.log and OUT/log.txt, behind
# earlier runs.
# While flags are checked (MINIONEREC_CHECK_FLAGS) the command ends once it has read them, and nothing is written.
run_stage() {
    local name="$1" log status=0 last
    shift
    STAGE=$((STAGE + 1))
    log=$(printf '%s/logs/%02d_%s.log' "$OUT" "$STAGE" "$name")
    if [ -n "${MINIONEREC_CHECK_FLAGS:-}" ]; then
        "$@" > /dev/null || fail "stage $name: its flags are wrong, nothing was run"
        return 0
    fi
    if [ -n "$PLANNING" ]; then
        plan_stage "$name" "$@"
        return 0
    fi
    mkdir -p "$OUT/logs"
    echo "[pipeline] $name, log: $log" | tee -a "$OUT/log.txt"
    echo "# $(date -u +%FT%TZ) $*" | tee -a "$OUT/log.txt" >> "$log"
    "$@" 2>&1 | tee -a "$log" "$OUT/log.txt" || status=$?
    [ "$status" -ne 0 ] || return 0
    last=$(tail -c 4000 "$log" | tr '\r' '\n' | grep -v '^[ =-]*$' | tail -n 1)
    fail "stage $name ended with status $status ($last); $log has all of it, the same command goes on from here"
}

# with_launch NAME COMMAND...: the command with LAUNCH_NAME as LAUNCH, where that is set.
with_launch() {
    local own="LAUNCH_$1"
    shift
    export LAUNCH="${!own:-${LAUNCH:-auto}}"
    [ -z "${MINIONEREC_CHECK_FLAGS:-}" ] || LAUNCH=none
    "$@"
}

# launch_as NAME COMMAND...: a Python command, as LAUNCH_NAME or LAUNCH says.
launch_as() {
    case "$1" in
        SFT | RL | EVAL) with_launch "$1" launch "${@:2}" ;;
        *) with_launch "$1" launch_whole "${@:2}" ;;
    esac
}

# check_then_run FUNCTION [DRY]: the stages that a function runs, after the flags of all of them were read; with
# MINIONEREC_CHECK_FLAGS set they are only read, with DRY True they are planned.
check_then_run() {
    (export MINIONEREC_CHECK_FLAGS=1; "$1")
    [ -z "${MINIONEREC_CHECK_FLAGS:-}" ] || return 0
    # Asked once, not by every stage.
    case "${LAUNCH:-auto}" in
        none | cpu) ;;
        *) GPU_COUNT=$(count_gpus); export GPU_COUNT ;;
    esac
    if [ "${2:-}" = True ]; then plan_run "$1"; else "$1"; fi
}
