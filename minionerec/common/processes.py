"""Bookkeeping that every stage shares."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """Rank, number of processes and device; with several processes on a machine without accelerator it starts gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


def is_main_process() -> bool:
    """True in the one process that prints, logs and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print on the main process only."""
    if is_main_process():
        print(text, flush=True)
