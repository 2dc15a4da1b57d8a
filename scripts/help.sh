# Sourced before env.sh: with --help or -h among its arguments a script prints the comment at its head and, where
# COMMAND names the Python command that gets all other flags, the help of that command. Nothing is installed or run
# before.
for argument in "$@"; do
    [ "$argument" = --help ] || [ "$argument" = -h ] || continue
    awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
    if [ -n "${COMMAND:-}" ]; then
        root="$(dirname "${BASH_SOURCE[0]}")/.."
        python="${MINIONEREC_PYTHON:-$root/.venv/bin/python}"
        command -v "$python" > /dev/null || python=python3 # the help needs no package
        printf '\nFlags of %s:\n\n' "$COMMAND"
        PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -m "$COMMAND" --help
    fi
    exit 0
done
