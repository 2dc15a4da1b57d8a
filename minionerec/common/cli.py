"""fire, made strict, and the bookkeeping every stage shares: settings shown once, finished work not redone.

`run(function)` turns a function into a command. Flag names are checked against its signature before anything runs, values
are parsed by its annotations, and an `InputError` becomes one line and exit status 2.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire

from minionerec.common.files import InputError


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
