#!/usr/bin/env bash
# The long form of the tests of launchers: every command that shares its work over two processes on the CPU, sft.py and
# rl.py under DDP, FSDP2, ZeRO-2 and ZeRO-3, whole and with adapters, killed and resumed, beside one process that was
# not killed; scripts/pipeline.sh from raw data to metrics. Forty minutes. Ends with a table of engines and commands:
# the largest difference of any weight, and the largest memory that a process had.
#
#   bash scripts/test_launch.sh                makes .venv-launch once: the environment of everything else and deepspeed
#   bash scripts/test_launch.sh -k zero3       the chosen tests alone: arguments go to pytest
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
LAUNCH_VENV="$(realpath -m "${LAUNCH_VENV:-.venv-launch}")"
if ! cmp -s requirements-gpu.txt "$LAUNCH_VENV/requirements.installed"; then
    echo "[test_launch] installing deepspeed into $LAUNCH_VENV"
    "$PYTHON" -m venv "$LAUNCH_VENV"
    # What the environment of everything else holds is found there too, and not installed again.
    "$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
        > "$("$LAUNCH_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
    # DS_BUILD_OPS=0: nothing is compiled for a GPU. ninja is there to compile what runs on the CPU when it is needed.
    DS_BUILD_OPS=0 "$LAUNCH_VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        "$(grep '^deepspeed' requirements-gpu.txt)" ninja
    # Compiled now, a minute once, and not within the time limit of a test.
    DS_ACCELERATOR=cpu PATH="$LAUNCH_VENV/bin:$PATH" "$LAUNCH_VENV/bin/python" -c \
        'from deepspeed.accelerator import get_accelerator as a; a().create_op_builder("ShareMemCommBuilder").load()'
    cp requirements-gpu.txt "$LAUNCH_VENV/requirements.installed"
fi
LAUNCH_TABLE=$(mktemp)
export DS_ACCELERATOR=cpu LAUNCH_TESTS=all LAUNCH_TABLE OMP_NUM_THREADS=1
PATH="$LAUNCH_VENV/bin:$PATH" # ninja
STATUS=0
"$LAUNCH_VENV/bin/python" -m pytest tests/test_sharded.py tests/test_two_processes.py tests/test_shared_commands.py \
    tests/test_pipeline.py tests/test_recipes.py -rs "$@" || STATUS=$?
[ ! -s "$LAUNCH_TABLE" ] || "$LAUNCH_VENV/bin/python" tests/launching.py "$LAUNCH_TABLE"
rm "$LAUNCH_TABLE"
exit $STATUS
