"""Which process this is, how many there are, and what the main one says."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

# What launchers tell a process about the others; accelerate reads all of it.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ENGINE_VARIABLES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
LEFT_ALONE_SECONDS = 20  # a launcher looks several times a second whether a process has ended


def get_rank() -> int:
    """Number of this process among those of its run, 0 for the main one.

    Launchers tell a process its rank in the environment before anything is imported, so this needs no torch.
    """
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """True in the one process that prints, logs and writes."""
    return get_rank() == 0


def count_processes() -> int:
    """Number of processes of this run, as its launcher announced it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave_others() -> None:
    """End every process but the main one, which goes on as if it had been launched alone.

    For work that cannot be shared: were it done by all, each file would be written by several at once.
    """
    if count_processes() == 1:
        return
    if not is_main_process():
        sys.exit(0)
    say(f"[launch] this command is the work of one process; the other {count_processes() - 1} ended")
    for name in (*LAUNCHER_VARIABLES, *ENGINE_VARIABLES):
        os.environ.pop(name, None)


def is_first_of_machine() -> bool:
    """True in one process of every machine: the one that builds what the others of the machine then read."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def say(text: str) -> None:
    """Print a line on the main process only."""
    if is_main_process():
        print(text, flush=True)


def say_outputs(paths: Iterable[str | os.PathLike], dry_run: bool = False) -> None:
    """Name the files that a command wrote or, in a dry run, would write."""
    for path in paths:
        say(f"  {'not written, dry run:' if dry_run else '->'} {os.fspath(path)}")


def process_state() -> PartialState:
    """Rank, number of processes and device; with several processes on a machine without accelerator it starts gloo."""
    # Imported here, because flags and files are checked long before torch is needed.
    from accelerate import PartialState

    return PartialState(cpu=computes_on_cpu())


def computes_on_cpu() -> bool:
    """True without an accelerator, and where the launcher's file says `use_cpu: true`."""
    import torch

    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()


def leave_group() -> None:
    """Leave the group of the processes of this run at the end of its work, if they formed one.

    A thread of gloo may still hold the tensors of the last exchange. Were the interpreter to end meanwhile, that thread
    would abort the process, finished as it is, and the launcher report a failure.
    """
    torch = sys.modules.get("torch")
    if count_processes() == 1 or torch is None or not torch.distributed.is_initialized():
        return
    torch.distributed.destroy_process_group()
    gc.collect()  # what holds the group in a cycle, such as a trainer: the group waits for its threads once it is free


def report_failure(text: str, *, everywhere: bool = False) -> None:
    """Print why this process ends and, where a launcher started it, leave the line for the launcher's last words.

    torchrun and accelerate end all other processes once one has ended, and print what stands in that one's error file.

    Args:
        text: the reason.
        everywhere: all processes end for it, so that one of them prints it.
    """
    line = f"error: {text}" if is_main_process() or everywhere else f"error on rank {get_rank()}: {text}"
    if is_main_process() or not everywhere:
        print(line, file=sys.stderr, flush=True)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)


def wait_if_left_alone(error: Exception) -> None:
    """Wait for the launcher, which ends this process, if it failed only because another one had ended before.

    Without this the complaints about the lost connection would stand below the reason.
    """
    text = str(error)
    if count_processes() > 1 and any(word in text for word in ("gloo", "NCCL", "peer", "ProcessGroup")):
        time.sleep(LEFT_ALONE_SECONDS)
