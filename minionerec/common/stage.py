"""Bookkeeping that every stage shares."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minionerec.common.files import InputError, read_json, write_json
from minionerec.common.processes import is_main_process, say


def _fingerprint(path: Path) -> list:
    """What tells that an input changed: size and modification time of a file, or of a folder's files."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return [[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _peak_memory_mb() -> int:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


class Stage:
    """One step of the pipeline with its settings, inputs and outputs, recorded in a JSON file beside its output.

    `finished` is True when the same settings and inputs already gave these outputs: the stage then has nothing to do.
    `resuming` is True when a run with the same settings and inputs was cut off, so that its checkpoints may be continued.
    `done()` records success, the seconds the stage took (over all its resumed runs) and the results to print later.
    """

    def __init__(
        self,
        name: str,
        settings: dict[str, Any],
        inputs: Iterable[str | os.PathLike],
        outputs: Iterable[str | os.PathLike],
        record: str | os.PathLike,
        force: bool = False,
    ):
        self.name, self.record = name, Path(record)
        self.outputs = [str(path) for path in outputs]
        self.settings = {key: value for key, value in settings.items() if key != "force"}
        inputs = [Path(path) for path in inputs]
        for path in inputs:
            if not path.exists():
                raise InputError(f"{path}: no such file or folder (an input of {name})")
        self._inputs = {str(path): _fingerprint(path) for path in inputs}
        self._started = time.time()
        self._seconds_before = 0.0
        before = read_json(self.record) if self.record.is_file() else {}
        same = before.get("settings") == self.settings and before.get("inputs") == self._inputs and not force
        complete = before.get("status") == "done" and all(Path(path).exists() for path in self.outputs)
        self.finished = same and complete
        self.resuming = same and before.get("status") == "running"
        if self.finished:
            say(f"[{name}] already done ({self.record}); --force True does it again")
            return
        if before and not same and not force:
            old = before.get("settings", {})
            changed = [key for key in self.settings if old.get(key) != self.settings[key]]
            what = ", ".join(f"{key}: {old.get(key)} -> {self.settings[key]}" for key in changed) or "its input files"
            say(f"[{name}] doing it again, changed: {what}")
        if self.resuming:
            self._seconds_before = before.get("seconds", 0.0)
            say(f"[{name}] an earlier run was cut off; going on")
        say(f"[{name}] " + " ".join(f"{key}={value}" for key, value in self.settings.items()))
        self._write("running")

    def _write(self, status: str, results: dict[str, Any] | None = None) -> None:
        if not is_main_process():
            return
        seconds = round(self._seconds_before + time.time() - self._started, 2)
        write_json(
            self.record,
            {
                "stage": self.name,
                "status": status,
                "seconds": seconds,
                "peak_memory_mb": _peak_memory_mb(),
                "settings": self.settings,
                "results": results or {},
                "outputs": self.outputs,
                "inputs": self._inputs,
            },
        )

    def tick(self) -> None:
        """Note the time spent so far; called where a checkpoint is written, so that a resumed run counts it."""
        self._write("running")

    def done(self, **results: Any) -> None:
        """Record success and print what was made."""
        self._write("done", results)
        say(f"[{self.name}] done in {time.time() - self._started:.1f} s")
        for key, value in results.items():
            say(f"  {key:<28} {value}")
        for path in self.outputs:
            say(f"  -> {path}")
