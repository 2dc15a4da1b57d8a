# Sourced by the scripts that work on data in the published format, after they have set DATA_ROOT and CATEGORY: finds the files.
fail() { echo "error: $1" >&2; exit 2; }

# The one file that matches; the published names carry a suffix after the category.
only() {
    local found=("$DATA_ROOT"/$1)
    [ -f "${found[0]}" ] || fail "$DATA_ROOT/$1: no such file"
    [ ${#found[@]} -eq 1 ] || fail "$DATA_ROOT/$1: ${#found[@]} files match, expected one"
    echo "${found[0]}"
}
