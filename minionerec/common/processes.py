"""Which process this is, how many there are, and what the main one says."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

LEFT_ALONE_SECONDS = 20  # a launcher looks several times a second whether a process has ended


def is_main_process() -> bool:
    """True in the one process that prints, logs and writes.

    Launchers tell a process its rank in the environment before anything is imported, so this needs no torch.
    """
    return int(os.environ.get("RANK", "0")) == 0


def count_processes() -> int:
    """Number of processes of this run, as its launcher announced it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(text: str) -> None:
    """Print a line on the main process only."""
    if is_main_process():
        print(text, flush=True)


def process_state() -> PartialState:
    """Rank, number of processes and device; with several processes on a machine without accelerator it starts gloo."""
    # Imported here, because flags and files are checked long before torch is needed.
    from accelerate import PartialState

    return PartialState(cpu=computes_on_cpu())


def computes_on_cpu() -> bool:
    """True without an accelerator, and where the launcher's file says `use_cpu: true`."""
    import torch

    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()


def report_failure(text: str) -> None:
    """Print why this process ends and, where a launcher started it, leave the line for the launcher's last words.

    torchrun and accelerate end all other processes once one has ended, and print what stands in that one's error file.
    """
    rank = os.environ.get("RANK", "0")
    line = f"error: {text}" if rank == "0" else f"error on rank {rank}: {text}"
    print(line, file=sys.stderr, flush=True)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and count_processes() > 1:
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
