# Sourced after env.sh: `launch sft.py --flag value ...` runs a command as LAUNCH says.
#
#   LAUNCH=auto     one process without a GPU or with one, DDP over all GPUs otherwise (the default)
#   LAUNCH=cpu      one process on the CPU, also where there are GPUs
#   LAUNCH=gpu      one process on one GPU
#   LAUNCH=ddp|zero2|zero3|fsdp2    all GPUs of the machine, or PROCESSES of them, config/accelerate/*.yaml;
#                   without GPUs PROCESSES says how many processes share the CPU
#   LAUNCH=FILE     a file of accelerate; PROCESSES as above, unless the file says how many
launch_fail() { echo "error: $1" >&2; exit 2; }

# count_gpus: prints how many GPUs the machine has, GPU_COUNT where that is known.
count_gpus() { echo "${GPU_COUNT:-$("$PYTHON" -c 'import torch; print(torch.accelerator.device_count())')}"; }

# choose_launch: sets LAUNCHER, the words before the command.
choose_launch() {
    local how="${LAUNCH:-auto}" gpus file
    LAUNCHER=("$PYTHON")
    case "$how" in
        cpu) export ACCELERATE_USE_CPU=true; return ;;
        none) return ;;
    esac
    gpus=$(count_gpus)
    if [ "$how" = auto ]; then
        [ "$gpus" -gt 1 ] || return 0
        how=ddp
    fi
    case "$how" in
        gpu) [ "$gpus" -gt 0 ] || launch_fail "LAUNCH=gpu: this machine has no GPU that torch can use"; return 0 ;;
        ddp) file=config/accelerate/ddp.yaml; [ "$gpus" -gt 0 ] || file=config/accelerate/ddp_cpu.yaml ;;
        zero2|zero3) file="config/accelerate/$how.yaml"; [ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu ;;
        fsdp2)
            [ "$gpus" -gt 0 ] || launch_fail "LAUNCH=fsdp2: accelerate has no FSDP on CPUs; use LAUNCH=ddp"
            file=config/accelerate/fsdp2.yaml ;;
        *)
            [ -f "$how" ] || launch_fail "LAUNCH=$how: expected auto, cpu, gpu, ddp, zero2, zero3, fsdp2 or a file"
            file="$how" ;;
    esac
    case "$how" in
        zero*) "$PYTHON" -c 'import deepspeed' 2> /dev/null || \
            launch_fail "LAUNCH=$how: deepspeed is not installed: pip install -r requirements-gpu.txt" ;;
    esac
    LAUNCHER=("$PYTHON" -m accelerate.commands.launch --config_file "$file" --main_process_port "${PORT:-0}")
    PROCESSES="${PROCESSES:-$gpus}"
    if [ "$PROCESSES" -gt 0 ]; then
        LAUNCHER+=(--num_processes "$PROCESSES")
    elif ! grep -q '^num_processes:' "$file"; then
        launch_fail "LAUNCH=$how: this machine has no GPU; say with PROCESSES how many processes share the CPU"
    fi
}

launch() {
    choose_launch
    "${LAUNCHER[@]}" "$@"
}

# launch_whole: `launch` for commands whose model every process holds whole: zero2, zero3 and fsdp2 mean ddp.
launch_whole() {
    case "${LAUNCH:-auto}" in
        zero2 | zero3 | fsdp2) local LAUNCH=ddp ;;
    esac
    launch "$@"
}
