# Sourced by stages.sh: --dry_run True of the scripts that run stages, a plan of every stage and a table of all.
#
# Each command plans itself by its own --dry_run True. What a later stage reads may not be there yet, so stages that
# take seconds run in a temporary folder, where random SIDs and models without weights stand in for those that take
# long. Files of an earlier run are linked into that folder; commands rename what they write into place, which leaves
# the linked files as they are.
PLAN_SECONDS=300 # the longest that a stage may run to plan what follows it

# plan_run FUNCTION: the plan of the stages that a function runs into OUT; name_files, where the script has it, names
# the files of OUT anew.
plan_run() {
    PLANNED="$OUT" SCRATCH=$(mktemp -d) PLAN_ROWS=()
    trap 'rm -rf "$SCRATCH"' EXIT
    OUT="$SCRATCH/run"
    mkdir "$OUT"
    if [ -d "$PLANNED" ]; then
        cp -rs "$(realpath "$PLANNED")/." "$OUT/"
        # Files that are written in place, or by a run that is under way.
        find "$OUT" \( -name log.txt -o -name '*.lock' -o -name '*.tmp-*' \) -delete
    fi
    [ "$(type -t name_files)" != function ] || name_files
    PLANNING=True
    "$1"
    printf '\nPlan of %s (nothing was written)\n%-4s%-22s%-28s%-40s%s\n' "$PLANNED" "" stage state time memory
    printf '%s\n' "${PLAN_ROWS[@]}"
    rm -rf "$SCRATCH"
    trap - EXIT
}

# find_flag NAME WORD...: prints the last value of --NAME among the words.
find_flag() {
    local name="--$1" value=""
    shift
    while [ $# -gt 1 ]; do
        [ "$1" != "$name" ] || value="$2"
        shift
    done
    echo "$value"
}

# show_plan FILE: what a command printed, with the paths of the run in place of the temporary ones.
show_plan() { sed -e "s#$SCRATCH/run#$PLANNED#g" -e 's/^/  /' "$1"; }

# plan_stage NAME COMMAND...: prints the plan of a stage, adds its line to the table, and provides for what follows.
plan_stage() {
    local name="$1" said="$SCRATCH/said.txt" status=0 state time="" memory=""
    shift
    set -- "${@/#"$PLANNED/"/"$OUT/"}" # files of the run that the flags of a recipe name
    printf '\n[pipeline] %s, dry run\n' "$name"
    case " $* " in
        *" scripts.model_card "* | *" scripts.summary "* | *" scripts.report "*)
            echo "  reads what the stages above make"
            add_row "$name" "after all others" seconds ""
            return ;;
    esac
    "$@" --dry_run True > "$said" 2>&1 || status=$?
    show_plan "$said"
    if [ "$status" -ne 0 ]; then
        add_row "$name" "cannot be planned, see above" "" ""
        return
    fi
    state="to be done"
    ! grep -q 'it is done already' "$said" || state="done already"
    ! grep -q 'it would go on' "$said" || state="cut off, would go on"
    ! grep -q 'it would be done again' "$said" || state="changed, done again"
    memory=$(sed -n 's/^  peak  *\([0-9].*\)$/\1/p' "$said" | tail -n 1)
    time=$(sed -n -e 's/^  time, validation left out  *\(.* \(minutes\|hours\)\) at .*/\1, counted/p' \
        -e 's/^  .* epochs take about \(.*\), without.*/\1, measured/p' "$said" | tail -n 1)
    if [ -z "$time" ]; then
        time=$(sed -n 's/^  an earlier run .* took \(.* minutes\) and .*/\1, an earlier run/p' "$said" | head -n 1)
        memory=$(sed -n 's/^  an earlier run .* minutes and \(.* MB\)/\1/p' "$said" | head -n 1)
    fi
    provide_for_plan "$@"
    add_row "$name" "$state" "${time:-not known before it runs}" "$memory"
}

# add_row NAME STATE TIME MEMORY: a line of the table.
add_row() { PLAN_ROWS+=("$(printf '%3d %-22s%-28s%-40s%s' "$STAGE" "$@")"); }

# provide_for_plan COMMAND...: what the stages after this one read, in the temporary folder. Sets `time` of plan_stage
# where the stage ran.
provide_for_plan() {
    case " $* " in
        *" --plm_checkpoint "*) ;; # an encoder may take hours
        *" data_process."* | *" convert_dataset.py "* | *" rq.text2emb."* | *" rq.behaviour "*) try_stage "$@" ;;
        *" scripts/rq"*.sh" "*) stand_in_sids "$@" ;;
        *" sft.py "*) stand_in_for sft.py model "$@" ;;
        *" sasrec.py "*) stand_in_for sasrec.py network "$@" ;;
        *" rl.py "*) stand_in_rl "$@" ;;
    esac
}

# find_place WORD WORDS...: prints where the flags begin that stand behind a word.
find_place() {
    local word="$1" place=0
    shift
    while [ "$1" != "$word" ]; do
        place=$((place + 1))
        shift
    done
    echo $((place + 2))
}

# stand_in_for SCRIPT KIND COMMAND...: what a training will leave, by scripts/stand_in_KIND.py with the same flags.
stand_in_for() {
    local script="$1" kind="$2"
    shift 2
    "$PYTHON" -m "scripts.stand_in_$kind" "${@:$(find_place "$script" "$@")}" > "$said" 2>&1 || show_plan "$said"
}

# try_stage COMMAND...: a stage that takes seconds, in the temporary folder. One that takes too long is ended.
try_stage() {
    local start=$SECONDS status=0 limit=()
    if [ "$(type -t "$1")" = file ] && command -v timeout > /dev/null; then
        limit=(timeout "$PLAN_SECONDS")
    fi
    "${limit[@]}" "$@" > "$said" 2>&1 || status=$?
    if [ "$status" -eq 124 ]; then
        time="more than $((PLAN_SECONDS / 60)) minutes"
    elif [ "$status" -ne 0 ]; then
        show_plan "$said"
    elif [ "$state" != "done already" ]; then
        time="$((SECONDS - start)) s, measured"
    fi
}

# stand_in_sids COMMAND...: random SIDs with the levels and codes that the plan of a SID method names.
stand_in_sids() {
    local index codes levels own=()
    index=$(sed -n 's/^  writes \(.*\.index\.json\)$/\1/p' "$said" | tail -n 1)
    [ -n "$index" ] && [ ! -e "$index" ] || return 0
    codes=$(sed -n 's/.* num_emb_list=\[\([0-9, ]*\)\].*/\1/p' "$said" | tail -n 1 | tr -d ' ')
    if [ -z "$codes" ]; then
        # One size for every level, or a list with a size for each.
        codes=$(sed -n 's/.* codebook_size=\[\{0,1\}\([0-9][0-9, ]*\).*/\1/p' "$said" | tail -n 1 | tr -d ' ')
        levels=$(sed -n 's/.* num_levels=\([0-9]*\).*/\1/p' "$said" | tail -n 1)
        codes="${codes:-256}"
        if [[ "$codes" != *,* ]]; then
            codes=$(printf "$codes,%.0s" $(seq "${levels:-3}"))
            codes="${codes%,}"
        fi
    fi
    ! grep -q "collisions=\['own_token'\]" "$said" || own=(--own_token True)
    echo "  the stages below are planned with random SIDs, levels of $codes codes${own:+ and a token of each item}"
    "$PYTHON" -m scripts.stand_in_sids --item_meta_path "${index%.index.json}.item.json" --output_file "$index" \
        --codes "$codes" "${own[@]}" > "$said" 2>&1 || show_plan "$said"
}

# stand_in_rl COMMAND...: the shape of the model after RL, which is that of the one before.
stand_in_rl() {
    local model folder
    model=$(find_flag model_path "$@") folder="$(find_flag output_dir "$@")/final_checkpoint"
    [ -d "$folder" ] || [ ! -d "$model" ] || { mkdir -p "$folder" && cp -rL "$model/." "$folder/"; }
}
