"""Does everything work on this machine's GPUs, and how fast? Twin checks, launches and timings in a few minutes.

The parts are `correct` (search, sampling, SFT and GRPO against slow twins, in float32 and bfloat16, with sdpa and
flex_attention), `launch` (a tiny run of sft.py, rl.py and evaluate.py with every engine that the GPUs allow) and
`speed` (search, training and a GRPO step of models with random weights against the ordinary way). Without a GPU the
same runs in a tiny form on the CPU, where it shows that this program works and nothing else. What does not fit into
the time is skipped and listed. The last line is JSON; the status is 1 if a part failed.

    bash scripts/gpu_check.sh
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from benchmarks.settings import SHAPE_NAMES
from minionerec.common.cli import Flags, flag, parse_flags, run_command

KINDS = ("correct", "launch", "speed")


@dataclass
class GPUCheckFlags(Flags):
    """Check."""

    device: str = flag("auto", "where; auto is CUDA where there is a GPU", choices=("auto", "cpu", "cuda"))
    parts: list[str] = flag(list(KINDS), "which parts", choices=KINDS)
    seconds: float = flag(530.0, "time for all parts; a part that needs more than what is left is skipped")
    shapes: list[str] | None = flag(
        None, "models of the speed part", choices=SHAPE_NAMES, default_text="the two Qwen2.5 ones, on a CPU qwen3-tiny"
    )
    seed: int = flag(0, "seed of everything random")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(GPUCheckFlags)
    if FLAGS.device == "cpu":  # for the launched commands too
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

import importlib.util
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import device_checks, device_timings
from benchmarks.device_checks import CheckFailed
from benchmarks.problems import make_up_data, write_published_data
from minionerec.common.files import InputError, read_json, write_json
from minionerec.common.processes import say

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {
    "cpu": "one process",
    "gpu": "one process",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
TINY_BASE = {
    "model_type": "qwen3",
    "tokenizer_vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@dataclass
class Part:
    """One thing that is checked.

    Attributes:
        name: KIND/what it is.
        needs: seconds that must be left for it to begin.
        run: does it; returns figures.
        missing: why this machine cannot run it.
        status, seconds, figures, reason: what came of it.
    """

    name: str
    needs: float
    run: Callable[[], dict[str, Any]]
    missing: str = ""
    status: str = "skipped"
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


class OutOfTime(Exception):
    """A part took longer than what was left."""


@contextmanager
def limit_seconds(seconds: float) -> Iterator[None]:
    """Inside, OutOfTime is raised once so many seconds have passed."""

    def stop(_signal, _frame):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(part: Part, left: float) -> None:
    """Run a part if it can be run within the seconds that are left; what came of it is noted in the part."""
    part.reason = part.missing or (
        f"needs {part.needs:.0f} s, {max(left, 0):.0f} are left" if part.needs > left else ""
    )
    if part.reason:
        return
    start = time.perf_counter()
    try:
        with limit_seconds(left):
            part.figures = part.run()
        part.status = "ok"
    except OutOfTime:
        part.status, part.reason = "FAILED", f"not done after {left:.0f} s"
    except Exception as error:  # whatever it is, the other parts are still to be run
        if not isinstance(error, CheckFailed):
            traceback.print_exc()
        part.status, part.reason = "FAILED", f"{type(error).__name__}: {error}".splitlines()[0]
    part.seconds = round(time.perf_counter() - start, 1)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------------------- launch
def run_command_line(command: list[str], environment: dict[str, str]) -> str:
    """What a command prints; it and all that it started are ended with this call.

    Raises:
        CheckFailed: another status than 0, with the last line.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        print(output, file=sys.stderr)
        last = (output.strip().splitlines() or ["no output"])[-1]
        raise CheckFailed(f"{' '.join(command[1:2])} ended with status {process.returncode}: {last}")
    return output


def launch_pipeline(how: str, processes: int, seed: int) -> dict[str, Any]:
    """sft.py, rl.py and evaluate.py of a tiny model from random weights, as LAUNCH=`how` starts them.

    Raises:
        CheckFailed: a command that fails, or another engine than the one asked for.
    """
    environment = {**os.environ, "LAUNCH": how, "MINIONEREC_PYTHON": sys.executable}
    if how not in ("cpu", "gpu"):
        environment["PROCESSES"] = str(processes)
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, catalogue = make_up_data(random.Random(seed), users=16 * processes, items=60)
        paths = write_published_data(rows[: 100 * processes], catalogue, folder / "data")
        write_json(folder / "base.json", TINY_BASE)
        splits = [f"--{flag}={paths[flag]}" for flag in ("train_file", "eval_file")]
        commands = {
            "sft": [
                *splits, f"--sid_index_path={paths['sid_index_path']}", f"--item_meta_path={paths['item_meta_path']}",
                f"--base_model={folder / 'base.json'}", "--train_from_scratch=True", f"--output_dir={folder / 'sft'}",
                f"--batch_size={16 * processes}", "--micro_batch_size=16", "--num_epochs=1", "--learning_rate=0.001",
            ],
            "rl": [
                *splits, f"--info_file={paths['info_file']}", f"--model_path={folder / 'sft' / 'final_checkpoint'}",
                f"--output_dir={folder / 'rl'}", "--num_generations=4", "--train_batch_size=16", "--max_steps=2",
                "--gradient_accumulation_steps=1", "--test_during_training=False",
            ],
            "evaluate": [
                f"--train_file={paths['train_file']}", f"--info_file={paths['info_file']}",
                f"--test_data_path={paths['test_data_path']}", "--num_beams=10", "--K=10",
                f"--base_model={folder / 'rl' / 'final_checkpoint'}", f"--result_json_data={folder / 'test.json'}",
            ],
        }  # fmt: skip
        world = f"{processes} process{'es' if processes > 1 else ''}, engine: {ENGINES[how]}"
        for command, arguments in commands.items():
            start = time.perf_counter()
            output = run_command_line(["bash", f"scripts/{command}.sh", *arguments], environment)
            seconds[f"{command}_s"] = round(time.perf_counter() - start, 1)
            if command != "evaluate" and f"[launch] {world}" not in output:
                started = next((line for line in output.splitlines() if "[launch]" in line), "no line of [launch]")
                raise CheckFailed(f"{command}.py was to run as {world}, but says: {started}")
        hit_ratio = read_json(folder / "test.metrics.json")["sid"]["HR@10"]
    return {**seconds, "processes": processes, "HR@10": hit_ratio}


def list_launches(device: torch.device, seed: int) -> list[Part]:
    """A part per engine, with the reason where this machine cannot start it."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    lacks_deepspeed = "" if importlib.util.find_spec("deepspeed") else "deepspeed is not installed"
    parts = []
    for how in ENGINES:
        if how == ("cpu" if gpus else "gpu"):
            continue  # one process: on the GPU where there is one
        missing = ""
        if how != "cpu":
            least = 1 if how in ("gpu", "zero2", "zero3") else 2
            missing = f"needs {least} GPUs, there {'is' if gpus == 1 else 'are'} {gpus}" if gpus < least else ""
        if how.startswith("zero"):
            missing = lacks_deepspeed or missing
        processes = 1 if how in ("cpu", "gpu") else max(gpus, 1)
        run = partial(launch_pipeline, how, processes, seed)
        parts.append(Part(f"launch/{how}", 30 if how == "cpu" else 60, run, missing))
    return parts


# ---------------------------------------------------------------------------------------------------- correct and speed
def list_checks(device: torch.device, seed: int) -> list[Part]:
    """The twin checks, for both precisions and both attentions."""
    parts = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        missing = ""
        if dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            missing = "this GPU has no bfloat16"
        for kind, check in (("search", device_checks.check_search), ("sampling", device_checks.check_sampling)):
            parts.append(Part(f"correct/{kind}/{name}", 10, partial(check, device, dtype, seed), missing))
        for attention in ("sdpa", "flex_attention"):
            for kind, check in (("training", device_checks.check_training), ("grpo", device_checks.check_grpo)):
                lacks = missing
                if kind == "grpo" and attention == "flex_attention" and device.type == "cpu":
                    lacks = "flex_attention has no backward pass on a CPU"
                # flex_attention is compiled the first time.
                needs = 90 if attention == "flex_attention" and device.type == "cuda" else 15
                run = partial(check, device, dtype, attention, seed)
                parts.append(Part(f"correct/{kind}/{name}/{attention}", needs, run, lacks))
    return parts


def list_timings(device: torch.device, shapes: list[str], seed: int) -> list[Part]:
    """The timings of every shape, with the reason where it does not fit into the memory."""
    on_gpu = device.type == "cuda"
    sizes = device_timings.GPU_SIZES if on_gpu else device_timings.TOY_SIZES
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 0
    parts = [Part("speed/peak", 10, partial(device_timings.measure_peaks, device))]
    for shape in shapes:
        weights = device_timings.count_parameters(shape, sizes.vocab_size)
        timings: list[tuple[str, float, float, Callable]] = [
            # What it is, seconds, bytes a weight beside 8 GiB of activations, how it is measured.
            ("search", 30, 2, partial(device_timings.time_search, shape, device, sizes, seed)),
            ("training/sdpa", 40, 8, partial(device_timings.time_training, shape, device, sizes, "sdpa", seed)),
            ("training/flex_attention", 90, 8,
             partial(device_timings.time_training, shape, device, sizes, "flex_attention", seed)),
            ("grpo", 90, 16, partial(device_timings.time_grpo, shape, device, sizes, seed)),
        ]  # fmt: skip
        for name, needs, each, run in timings:
            missing = ""
            if on_gpu and weights * each + 8 * 2**30 > memory:
                missing = f"needs about {(weights * each) / 2**30 + 8:.0f} GiB, the GPU has {memory / 2**30:.0f}"
            if name == "training/flex_attention" and not on_gpu:
                missing = "flex_attention has no backward pass on a CPU"
            parts.append(Part(f"speed/{name}/{shape}", needs if on_gpu else 10, run, missing))
    return parts


def choose_device(name: str) -> torch.device:
    """The device of --device.

    Raises:
        InputError: CUDA where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def order_parts(flags: GPUCheckFlags, device: torch.device) -> list[Part]:
    """All chosen parts; what is most worth knowing comes first, for time may run out."""
    default = ["qwen2.5-0.5b", "qwen2.5-1.5b"] if device.type == "cuda" else ["qwen3-tiny"]
    launches = list_launches(device, flags.seed)
    by_kind = {
        "correct": list_checks(device, flags.seed),
        "launch": launches[:1],
        "speed": list_timings(device, flags.shapes or default, flags.seed),
    }
    parts = [part for kind, members in by_kind.items() if kind in flags.parts for part in members]
    return parts + (launches[1:] if "launch" in flags.parts else [])


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "gpus": torch.cuda.device_count() if on_gpu else 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
    }


def check(flags: GPUCheckFlags) -> dict[str, Any]:
    """Run the parts one after the other, print the table and the JSON, and return what that holds."""
    start = time.monotonic()
    device = choose_device(flags.device)
    machine = describe_machine(device)
    say(", ".join(f"{name} {value}" for name, value in machine.items()))
    parts = order_parts(flags, device)
    for part in parts:
        run_part(part, flags.seconds - (time.monotonic() - start))
        say(f"{part.name}: {part.status} {part.reason}".rstrip())
    width = max(len(part.name) for part in parts)
    say(f"\n{'part':<{width}}  {'status':<8}{'seconds':>8}  figures")
    for part in parts:
        figures = part.reason or ", ".join(f"{name} {value}" for name, value in part.figures.items())
        say(f"{part.name:<{width}}  {part.status:<8}{part.seconds:>8.1f}  {figures}")
    report = {
        "benchmark": "gpu_check",
        **machine,
        "seconds": round(time.monotonic() - start, 1),
        "failed": [part.name for part in parts if part.status == "FAILED"],
        "skipped": {part.name: part.reason for part in parts if part.status == "skipped"},
        "parts": {part.name: {"seconds": part.seconds, **part.figures} for part in parts if part.status == "ok"},
    }
    print(json.dumps(report))
    return report


def check_and_exit(flags: GPUCheckFlags) -> None:
    """`check`, with status 1 where a part failed."""
    failed = check(flags)["failed"]
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_command(check_and_exit, FLAGS)
