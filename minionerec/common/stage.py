"""One step of the pipeline: settings shown once, finished work not redone, a record beside the output."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from minionerec.common.cli import get_default, recorded_settings
from minionerec.common.files import InputError, read_json, write_json, write_text
from minionerec.common.processes import count_processes, is_main_process, process_state, say
from minionerec.common.sharing import broadcast_value

UNREAD = ("README.md",)  # of a folder: a model card says more after each evaluation, and no stage reads it
RECORD_SUFFIX, SETTINGS_SUFFIX = ".stage.json", ".settings.yaml"


def _fingerprint(path: Path) -> list:
    """What tells that an input changed: size and modification time of a file, or of a folder's files."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name not in UNREAD)
        return [[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _peak_memory_mb() -> int:
    """Largest resident memory of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def _measure_cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended, all threads."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def open_stage(
    name: str,
    flags: Any,
    inputs: Iterable[str | os.PathLike | None],
    outputs: Iterable[str | os.PathLike],
    record: str | os.PathLike,
) -> Stage:
    """Open a stage on every process of a run, the main one first, so that the others see what it decided.

    Args:
        name: of the stage, as it is printed.
        flags: the command's flags, resolved; a `force` among them does a finished stage again.
        inputs: files and folders the stage reads. None and names of hub models, which are no paths here, are skipped.
        outputs: what it makes.
        record: the JSON file that remembers the run, named X.stage.json.

    Returns:
        The stage; where its `finished` is True there is nothing left to do.
    """
    with process_state().main_process_first() if count_processes() > 1 else nullcontext():
        stage = Stage(name, flags, inputs, outputs, record)
    # The main process has already written that a run began, which to the others looks like one that was cut off.
    stage.finished, stage.resuming = broadcast_value((stage.finished, stage.resuming))
    return stage


class Stage:
    """A step with its settings, inputs and outputs, recorded in a JSON file beside its output.

    The settings also stand beside the record as X.settings.yaml, which --config reads again.

    Attributes:
        finished: the same settings and inputs already gave these outputs, so that there is nothing to do.
        resuming: a run with the same settings and inputs was cut off, so that its checkpoints may be continued.

    Raises:
        InputError: an input that is missing.
    """

    def __init__(
        self,
        name: str,
        flags: Any,
        inputs: Iterable[str | os.PathLike | None],
        outputs: Iterable[str | os.PathLike],
        record: str | os.PathLike,
    ):
        self.name, self.record = name, Path(record)
        self.outputs = [str(path) for path in outputs]
        self.settings = recorded_settings(flags)
        force = getattr(flags, "force", False)
        paths = [Path(path) for path in inputs if path is not None]
        for path in paths:
            if not path.exists():
                raise InputError(f"{path}: no such file or folder (an input of {name})")
        self._inputs = {str(path): _fingerprint(path) for path in paths}
        self._started = time.time()
        self._seconds_before = self._cpu_before = 0.0
        before = read_json(self.record) if self.record.is_file() else {}
        changed = self._changed_settings(before.get("settings", {}), flags)
        same = not changed and before.get("inputs") == self._inputs and not force
        complete = before.get("status") == "done" and all(Path(path).exists() for path in self.outputs)
        self.finished = bool(before) and same and complete
        self.resuming = same and before.get("status") == "running"
        if self.finished:
            say(f"[{name}] already done ({self.record}); --force True does it again")
            return
        if before and not same and not force:
            what = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in changed.items())
            say(f"[{name}] doing it again, changed: {what or 'its input files'}")
        if self.resuming:
            self._seconds_before, self._cpu_before = before.get("seconds", 0.0), before.get("cpu_seconds", 0.0)
            say(f"[{name}] an earlier run was cut off; going on")
        say(f"[{name}] " + " ".join(f"{key}={value}" for key, value in self.settings.items()))
        self._write("running")
        self._write_settings()

    def _changed_settings(self, before: dict[str, Any], flags: Any) -> dict[str, tuple[Any, Any]]:
        """{flag: (value before, value now)} where they differ; a flag that is newer than the record had its default."""
        defaults = {field.name: get_default(field) for field in dataclasses.fields(flags)}
        old = {name: before.get(name, defaults[name]) for name in self.settings}
        return {name: (old[name], value) for name, value in self.settings.items() if old[name] != value}

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
                "cpu_seconds": round(self._cpu_before + _measure_cpu_seconds(), 2),  # of the main process
                "peak_memory_mb": _peak_memory_mb(),
                "settings": self.settings,
                "results": results or {},
                "outputs": self.outputs,
                "inputs": self._inputs,
            },
        )

    def _write_settings(self) -> None:
        import yaml  # only here: a stage that is finished does not need it

        if is_main_process():
            path = self.record.with_name(self.record.name.removesuffix(RECORD_SUFFIX) + SETTINGS_SUFFIX)
            write_text(path, yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True))

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
