"""fire, made strict, and the bookkeeping every stage shares: settings shown once, finished work not redone.

`run(function)` turns a function into a command. Flag names are checked against its signature before anything runs, values
are parsed by its annotations, and an `InputError` becomes one line and exit status 2.
"""

from __future__ import annotations

import inspect
import os
import resource
import sys
import time
import types
import typing
from pathlib import Path
from typing import Any, Callable, Iterable

import fire

from fileio import InputError, read_json, write_json


def _parse_value(name: str, kind: Any, text: str) -> Any:
    """`text` as `kind`: str, int, float, bool, list[...] (written 256,256,256), or any of these | None."""
    options = (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )
    if type(None) in options:
        if text in ("None", ""):
            return None
        kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is list:
        (element,) = typing.get_args(kind)
        parts = [part for part in text.strip("[]() ").replace(",", " ").split() if part]
        return [_parse_value(name, element, part) for part in parts]
    if kind is bool:
        if text not in ("True", "False", "true", "false"):
            raise InputError(f"--{name}: expected True or False, got {text!r}")
        return text in ("True", "true")
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"--{name}: expected {kind.__name__}, got {text!r}") from None


def _check_names(function: Callable, argv: list[str], positional: str | None = None) -> list[str]:
    """argv as `--name=value`, with every name known; several values after one flag become a list."""
    parameters = inspect.signature(function).parameters
    kinds = typing.get_type_hints(function)
    if positional and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}={argv[0]}", *argv[1:]]
    checked: list[str] = []
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if not argument.startswith("--"):
            raise InputError(f"unexpected argument {argument!r}: flags are written --name value")
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if name not in parameters:
            near = [known for known in parameters if known.startswith(name[:4])] or list(parameters)
            raise InputError(
                f"unknown flag --{name}; did you mean one of: {', '.join('--' + known for known in near)}?"
            )
        if not equals:
            values = []
            while position < len(argv) and not argv[position].startswith("--"):
                values.append(argv[position])
                position += 1
            if not values and kinds.get(name) is bool:
                values = ["True"]
            if not values:
                raise InputError(f"--{name}: a value is missing")
            if len(values) > 1 and "list" not in str(kinds.get(name)):
                raise InputError(f"--{name}: expected one value, got {len(values)}: {' '.join(values)}")
            value = ",".join(values)
        checked.append(f"--{name}={value}")
    if positional and sum(argument.startswith(f"--{positional}=") for argument in checked) > 1:
        raise InputError(f"--{positional} is given twice; an argument without a name stands for it")
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and not any(c.startswith(f"--{name}=") for c in checked)
    ]
    if missing:
        raise InputError(f"missing flag{'s' if len(missing) > 1 else ''}: {', '.join('--' + name for name in missing)}")
    return checked


def run(function: Callable, argv: list[str] | None = None, positional: str | None = None) -> None:
    """Run `function` with the flags of the command line; exits with 2 and one line on wrong input.

    positional: the flag that a first argument without a name stands for.
    """
    argv = sys.argv[1:] if argv is None else argv
    kinds = typing.get_type_hints(function)
    parsers = {
        name: (lambda text, name=name: _parse_value(name, kinds.get(name, str), text))
        for name in inspect.signature(function).parameters
    }
    try:
        checked = ["--", "--help"] if argv in (["--help"], ["-h"]) else _check_names(function, argv, positional)
        fire.Fire(fire.decorators.SetParseFns(**parsers)(function), command=checked, name=Path(sys.argv[0]).name)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def is_main_process() -> bool:
    """True in the one process that prints, logs and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print on the main process only."""
    if is_main_process():
        print(text, flush=True)


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
