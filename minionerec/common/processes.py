"""Which process this is, how many there are, and what the main one says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


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
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())
