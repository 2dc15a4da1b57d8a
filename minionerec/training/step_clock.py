"""Seconds of the phases of a training step, taken without making the host wait for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepClock:
    """Sums seconds by phase; a phase inside another counts for the inner one alone.

    On a GPU, events are recorded in its stream, and only `read` waits for them.

    Args:
        device: what does the work.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._open: list[str] = []
        self._laps: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._last: float | torch.cuda.Event | None = None

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Inside, time counts for a phase."""
        self._lap()
        self._open.append(phase)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def _lap(self) -> None:
        now = self._now()
        if self._open:
            self._laps.append((self._open[-1], self._last, now))
        self._last = now

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def read(self) -> dict[str, float]:
        """Seconds of every phase since the last call, which this one forgets."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = defaultdict(float)
        for phase, start, stop in self._laps:
            seconds[phase] += stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1000
        self._laps.clear()
        return dict(seconds)
