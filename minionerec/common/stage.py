"""One step of the pipeline: settings shown once, finished work not redone, a record beside the output."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import resource
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from minionerec.common.cli import get_default, recorded_settings
from minionerec.common.console import open_log
from minionerec.common.environment import describe_environment
from minionerec.common.file_kinds import hint_at_missing
from minionerec.common.files import TEMPORARY, InputError, read_json, write_json, write_text
from minionerec.common.processes import count_processes, is_main_process, process_state, say
from minionerec.common.run_lock import release_lock, remove_stale_files, take_lock
from minionerec.common.sharing import broadcast_value

UNREAD = ("README.md",)  # of a folder: a model card says more after each evaluation, and no stage reads it
RECORD_SUFFIX, SETTINGS_SUFFIX, LOCK_SUFFIX = ".stage.json", ".settings.yaml", ".lock"
TRAINING_LOCK = "training.lock"  # in a folder of checkpoints, whichever command trains there


def _fingerprint(path: Path) -> list:
    """What tells that an input changed: size and content of a file, or of a folder's files; never their times.

    A copied, unpacked or cloned file has another time and is the same.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name not in UNREAD)
        files = [p for p in files if not re.fullmatch(TEMPORARY, p.name)]
        return [[str(p.relative_to(path)), p.stat().st_size, _hash_content(p)] for p in files]
    return [path.stat().st_size, _hash_content(path)]


def _hash_content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _is_same_input(before: Any, now: list) -> bool:
    """Whether a fingerprint of a record is that of now; records of earlier versions hold sizes and times."""
    if not isinstance(before, list) or len(before) != len(now):
        return False
    if now and isinstance(now[0], list):
        return all(
            isinstance(old, list) and len(old) == 3 and old[0] == new[0] and _is_same_input(old[1:], new[1:])
            for old, new in zip(before, now, strict=True)
        )
    return before[:1] == now[:1] and (not now or isinstance(before[1], int) or before[1] == now[1])


def _resolve(path: str, before: dict[str, Any]) -> str:
    """An old path as an absolute one, from the folder that its run worked in."""
    return os.path.normpath(os.path.join(str(before.get("working_folder", "")), path))


def _peak_memory_mb() -> int:
    """Largest resident memory of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def _measure_cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended, all threads."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def read_results(record: str | os.PathLike) -> dict[str, Any]:
    """The results that a finished stage recorded; {} where there is no whole record of one."""
    try:
        content = read_json(record)
    except InputError:
        return {}
    results = content.get("results") if isinstance(content, dict) else None
    return results if isinstance(results, dict) else {}


def open_stage(
    name: str,
    flags: Any,
    inputs: Iterable[str | os.PathLike | None],
    outputs: Iterable[str | os.PathLike],
    record: str | os.PathLike,
    *,
    trains_in: str | os.PathLike | None = None,
) -> Stage:
    """Open a stage on every process of a run, the main one first, so that the others see what it decided.

    Args:
        name: of the stage, as it is printed.
        flags: the command's flags, resolved; a `force` among them does a finished stage again.
        inputs: files and folders the stage reads. None and names of hub models, which are no paths here, are skipped.
        outputs: what it makes.
        record: the JSON file that remembers the run, named X.stage.json.
        trains_in: a folder of checkpoints, in which no other training may write meanwhile, of this stage or another.

    Returns:
        The stage; where its `finished` is True there is nothing left to do.
    """
    with process_state().main_process_first() if count_processes() > 1 else nullcontext():
        stage = Stage(name, flags, inputs, outputs, record, trains_in=trains_in)
    # The main process has already written that a run began, which to the others looks like one that was cut off.
    stage.finished, stage.resuming = broadcast_value((stage.finished, stage.resuming))
    return stage


class Stage:
    """A step with its settings, inputs and outputs, recorded in a JSON file beside its output.

    The settings also stand beside the record as X.settings.yaml, which --config reads again.

    Attributes:
        finished: the same settings and inputs already gave these outputs, or `dry_run` is among the flags, so that
            there is nothing to do.
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
        *,
        trains_in: str | os.PathLike | None = None,
    ):
        self.name, self.record = name, Path(record)
        self.outputs = [str(path) for path in outputs]
        self._locks = [self.record.with_name(self.record.name.removesuffix(RECORD_SUFFIX) + LOCK_SUFFIX)]
        self._locks += [Path(trains_in) / TRAINING_LOCK] if trains_in is not None else []
        self.settings = recorded_settings(flags)
        force = getattr(flags, "force", False)
        paths = [Path(path) for path in inputs if path is not None]
        for path in paths:
            if not path.exists():
                raise InputError(f"{path}: no such file or folder (an input of {name}){hint_at_missing(path)}")
        # The main process decides, see `open_stage`; reading all inputs on every one would take long.
        self._inputs = {str(path): _fingerprint(path) for path in paths} if is_main_process() else {}
        self._started = time.time()
        self._seconds_before = self._cpu_before = 0.0
        before = self._read_record()
        self._place = str(self.record.parent.absolute())
        changed = self._changed_settings(before, flags)
        same_inputs = self._has_same_inputs(before.get("inputs"))
        same = bool(before) and not changed and same_inputs and not force
        complete = before.get("status") == "done" and all(Path(path).exists() for path in self.outputs)
        self.finished = same and complete
        self.resuming = same and before.get("status") == "running"
        if getattr(flags, "dry_run", False):
            self._print_plan(before, changed, same)
            self.finished = True
            return
        if self.finished:
            self._clear_up()
            say(f"[{name}] already done ({self.record}); --force True does it again")
            return
        if is_main_process():
            self._take_locks()
        open_log(self.record.parent)
        if is_main_process():
            for path in remove_stale_files(self.record.parent, [self.record, *map(Path, self.outputs)]):
                say(f"[{name}] removed {path}, which a run that was cut off left")
        if before and not same and not force:
            what = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in changed.items())
            say(f"[{name}] doing it again, changed: {what or 'its input files'}")
        if self.resuming:
            self._seconds_before, self._cpu_before = before.get("seconds", 0.0), before.get("cpu_seconds", 0.0)
            say(f"[{name}] an earlier run was cut off; going on")
        say(f"[{name}] " + " ".join(f"{key}={value}" for key, value in self.settings.items()))
        self._write("running")
        self._write_settings()

    def _clear_up(self) -> None:
        """Remove what a run left that was killed after its last word; nothing where a run still writes."""
        if not is_main_process() or not any(lock.exists() for lock in self._locks):
            return
        try:
            self._take_locks()
        except InputError:
            return
        remove_stale_files(self.record.parent, [self.record, *map(Path, self.outputs)])
        self._release_locks()

    def _take_locks(self) -> None:
        """Hold all locks or none.

        Raises:
            InputError: another run holds one.
        """
        try:
            for lock in self._locks:
                take_lock(lock, str(lock.parent))
        except InputError:
            self._release_locks()
            raise

    def _release_locks(self) -> None:
        for lock in self._locks:
            release_lock(lock)

    def _read_record(self) -> dict[str, Any]:
        """The record of an earlier run; one that is cut off counts as none."""
        if not self.record.is_file():
            return {}
        try:
            before = read_json(self.record)
        except InputError:
            before = None
        if isinstance(before, dict) and isinstance(before.get("settings"), dict):
            return before
        say(f"[{self.name}] {self.record} is cut off or damaged: the stage counts as not finished")
        return {}

    def _has_same_inputs(self, before: Any) -> bool:
        """Whether the inputs of a record are those of now, in their order; their folder may be another one."""
        if not isinstance(before, dict) or len(before) != len(self._inputs):
            return False
        return all(map(_is_same_input, before.values(), self._inputs.values()))

    def _changed_settings(self, before: dict[str, Any], flags: Any) -> dict[str, tuple[Any, Any]]:
        """{flag: (value before, value now)} where they differ; a flag that is newer than the record had its default.

        A path that only moved is no change: that of an input whose content is the same, or of the folder that the
        record stands in.
        """
        if not before:
            return {}
        defaults = {field.name: get_default(field) for field in dataclasses.fields(flags)}
        old = {name: before["settings"].get(name, defaults[name]) for name in self.settings}
        moved: list[tuple[str, str]] = []
        if isinstance(before.get("inputs"), dict) and len(before["inputs"]) == len(self._inputs):
            pairs = zip(before["inputs"].items(), self._inputs.items(), strict=True)
            moved = [(path, new) for (path, print_before), (new, now) in pairs if _is_same_input(print_before, now)]
        changed = {}
        for name, value in self.settings.items():
            pair = (old[name], value)
            same_place = isinstance(value, str) and (pair in moved or self._moved_with(*pair, before))
            if old[name] != value and not same_place:
                changed[name] = pair
        return changed

    def _moved_with(self, old: Any, new: Any, before: dict[str, Any]) -> bool:
        """Whether a path changed as the folder of the record did."""
        place = before.get("place")
        if not (isinstance(old, str) and isinstance(new, str) and isinstance(place, str)):
            return False
        there, here = (
            os.path.relpath(os.path.abspath(new), self._place),
            os.path.relpath(_resolve(old, before), place),
        )
        return there == here

    def _print_plan(self, before: dict[str, Any], changed: dict[str, tuple[Any, Any]], same: bool) -> None:
        """What a run would read, do and write; nothing is written."""
        what = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in changed.items()) or "its input files"
        done = "it is done already, and --force True would do it again"
        fresh = "it was not run before" if not before else f"it would be done again, changed: {what}"
        state = done if self.finished else "it would go on with a run that was cut off" if self.resuming else fresh
        say(f"[{self.name}] dry run, nothing is written; {state}")
        say(f"[{self.name}] " + " ".join(f"{key}={value}" for key, value in self.settings.items()))
        for path in self._inputs:
            size = "a folder" if Path(path).is_dir() else f"{Path(path).stat().st_size:,} bytes"
            say(f"  reads  {path} ({size})")
        for path in (*self.outputs, self.record):
            say(f"  writes {path}")
        if before.get("status") == "done":
            settings = "the same settings" if same else "other settings or files"
            minutes, memory = before["seconds"] / 60, before["peak_memory_mb"]
            say(f"  an earlier run with {settings} took {minutes:.1f} minutes and {memory:,} MB")

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
                "command": shlex.join(sys.argv),
                "environment": describe_environment(),
                "place": self._place,
                "working_folder": os.getcwd(),
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
        if is_main_process():
            self._release_locks()
        say(f"[{self.name}] done in {time.time() - self._started:.1f} s")
        for key, value in results.items():
            say(f"  {key:<28} {value}")
        for path in self.outputs:
            say(f"  -> {path}")
