# Sourced after env.sh by the scripts that need more than requirements.txt.

# extra_environment FOLDER NAME PIP...: an environment with what `pip install PIP...` installs; what the environment of
# everything else holds, torch included, is found there too and not installed again. Made once, and anew where a
# requirement has changed.
extra_environment() {
    local folder="$1" name="$2" wanted argument
    shift 2
    wanted=$(for argument in "$@"; do if [ -f "$argument" ]; then cat "$argument"; else echo "$argument"; fi; done)
    [ "$(cat "$folder/requirements.installed" 2> /dev/null)" != "$wanted" ] || return 0
    echo "[$name] installing ${*: -1} into $folder (once, a minute)"
    "$PYTHON" -m venv "$folder"
    "$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
        > "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    echo "$wanted" > "$folder/requirements.installed"
}
