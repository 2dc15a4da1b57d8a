"""Files that pass between stages: atomic writes, and readers that name the line that is wrong."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


class InputError(Exception):
    """The user's input is wrong. The message is one line: which file, which line or flag, what was expected."""


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the name of `path`, on failure it is removed.

    Works for a file or a folder; a folder replaces the folder of that name as a whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            # A folder cannot be renamed onto one with content, so the old one steps aside first.
            aside = path.with_name(f"{path.name}.tmp-old-{os.getpid()}")
            os.rename(path, aside)
            os.rename(temporary, path)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def require_file(path: str | os.PathLike, flag: str | None = None) -> Path:
    """`path` if it is a file that can be read; `flag` is the command-line flag that named it."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{f'--{flag}: ' if flag else ''}{path}: no such file")
    return path


@contextmanager
def open_text(path: str | os.PathLike, flag: str | None = None) -> Iterator[TextIO]:
    """A UTF-8 text file (with or without a byte-order mark) open for reading, line ends as they are.

    Raises:
        InputError: no such file, or bytes that are not UTF-8.
    """
    with require_file(path, flag).open(encoding="utf-8-sig", newline="\n") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: not a UTF-8 text file (byte {error.object[error.start]:#04x}); convert it to UTF-8"
            ) from None


def read_json(path: str | os.PathLike, flag: str | None = None) -> Any:
    with open_text(path, flag) as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None


def read_lines(path: str | os.PathLike, flag: str | None = None) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end) of every line of a UTF-8 file."""
    with open_text(path, flag) as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\r\n")


def parse_list(text: str, where: str) -> list:
    """A Python or JSON list literal; `where` is 'FILE, line N, column C' for the error."""
    # JSON first: a text that is valid as both differs only in JSON's own escapes (surrogate pairs, \/), which Python
    # would misread.
    value = None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
            break
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    if not isinstance(value, list):
        raise InputError(f"{where}: expected a list literal such as ['a', 'b'], got {str(text)[:60]!r}")
    return value
