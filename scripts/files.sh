# Sourced by the scripts that work on a dataset: reads their flags, finds the files of the published format.
fail() { echo "error: $1" >&2; exit 2; }

# read_flags "data_root category ..." "$@": sets the variable of every flag that is given (--data_root sets DATA_ROOT).
read_flags() {
    local names="$1" name
    shift
    while [ $# -gt 0 ]; do
        case "$1" in
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        esac
        name="${1#--}"
        [[ "$1" == --* && " $names " == *" $name "* ]] || fail "unknown flag $1; known: --${names// / --}"
        [ $# -ge 2 ] || fail "$1: a value is missing"
        printf -v "$(echo "$name" | tr '[:lower:]' '[:upper:]')" %s "$2"
        shift 2
    done
}

# require_category: what data in the published format need.
require_category() {
    [ -n "$DATA_ROOT" ] || fail "--data_root is missing"
    [ -n "$CATEGORY" ] || fail "--category is missing"
    OUTPUT_DIR="${OUTPUT_DIR:-output/$CATEGORY}"
}

# find_file PATTERN: the one file below DATA_ROOT that matches; the published names carry a suffix after the category.
find_file() {
    local matches=("$DATA_ROOT"/$1)
    [ -f "${matches[0]}" ] || fail "$DATA_ROOT/$1: no such file"
    [ ${#matches[@]} -eq 1 ] || fail "$DATA_ROOT/$1: ${#matches[@]} files match, expected one"
    echo "${matches[0]}"
}

# find_splits: sets TRAIN, VALID, TEST and INFO.
find_splits() {
    TRAIN=$(find_file "train/$CATEGORY*.csv")
    VALID=$(find_file "valid/$CATEGORY*.csv")
    TEST=$(find_file "test/$CATEGORY*.csv")
    INFO=$(find_file "info/$CATEGORY*.txt")
}

# check_dry_run VALUE: what --dry_run is given.
check_dry_run() {
    case "$1" in
        True | False | "") ;;
        *) fail "--dry_run $1: expected True or False" ;;
    esac
}
