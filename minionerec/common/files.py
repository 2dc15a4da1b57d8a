"""Files that pass between stages: atomic writes, and readers that name the line that is wrong."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from minionerec.common.file_kinds import describe_packed, describe_stand_in, hint_at_missing, read_start


class InputError(Exception):
    """The user's input is wrong. The message is one line: which file, which line or flag, what was expected."""

    def __init__(self, message: str):
        # What it quotes of a file may hold line ends of its own.
        super().__init__(" ".join(message.splitlines()))


def first_line(error: BaseException) -> str:
    """The first line of what a library says, the kind of its error where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the name of `path`, on failure it is removed.

    Works for a file or a folder; a folder replaces the folder of that name as a whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The machine stands in the name, since processes of several machines may have the same number.
    owner = f"{socket.gethostname()}-{os.getpid()}"
    temporary = path.with_name(f"{path.name}.tmp-{owner}")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            # A folder cannot be renamed onto one with content, so the old one steps aside first.
            aside = path.with_name(f"{path.name}.tmp-old-{owner}")
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


# The names that `atomic_write` gives: of a file, of the folder that steps aside, the machine and the process.
TEMPORARY = r"(?P<name>.+)\.tmp-(?P<aside>old-)?(?:(?P<host>.+)-)?(?P<process>\d+)"


def is_running(process: int) -> bool:
    """Whether this machine runs a process of that number."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def write_text(path: str | os.PathLike, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def require_file(path: str | os.PathLike, flag: str | None = None) -> Path:
    """`path` if it is a file that can be read; `flag` is the command-line flag that named it.

    Raises:
        InputError: no such file, or what a clone without git-lfs or a failed download leaves in its place.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{f'--{flag}: ' if flag else ''}{path}: no such file{hint_at_missing(path)}")
    problem = describe_stand_in(read_start(path))
    if problem:
        raise InputError(f"{path}: {problem}")
    return path


def require_text(path: str | os.PathLike, flag: str | None = None, allowed: tuple[bytes, ...] = ()) -> Path:
    """`path` if it is a file that may be text, see `require_file`; packed files that begin as one of `allowed` may be.

    Raises:
        InputError: no such file, or one of a known kind that is no text.
    """
    path = require_file(path, flag)
    problem = describe_packed(read_start(path), allowed)
    if problem:
        raise InputError(f"{path}: {problem}")
    return path


@contextmanager
def open_text(path: str | os.PathLike, flag: str | None = None) -> Iterator[TextIO]:
    """A UTF-8 text file (with or without a byte-order mark) open for reading, line ends as they are.

    Raises:
        InputError: no such file, or bytes that are not UTF-8.
    """
    with require_text(path, flag).open(encoding="utf-8-sig", newline="\n") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: not a UTF-8 text file (byte {error.object[error.start]:#04x}); convert it to UTF-8"
            ) from None


def read_json(path: str | os.PathLike, flag: str | None = None, *, pairs: bool = False, hint: str = "") -> Any:
    """What a JSON file holds. Half of a surrogate pair, which JSON can name and no UTF-8 file can hold, becomes "?".

    Args:
        path: the file. flag: the flag that named it.
        pairs: give every object as a tuple of (key, value) pairs, so that a key that stands there twice is seen.
        hint: what else the file may be, for the error.

    Raises:
        InputError: no such file, or no JSON; with the line.
    """
    with open_text(path, flag) as file:
        text = file.read()
    if not text.strip():
        raise InputError(f"{path}: the file is empty")
    try:
        value = json.loads(text, object_pairs_hook=tuple if pairs else None)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}){hint}") from None
    except (RecursionError, ValueError) as error:  # too deep; a number of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise InputError(f"{path}: not usable JSON ({reason})") from None
    return replace_surrogates(value) if HALF_PAIR.search(text) else value


HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def replace_surrogates(value: Any) -> Any:
    """A value of JSON with "?" for every half of a surrogate pair in its texts."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list | tuple):
        return type(value)(map(replace_surrogates, value))
    if isinstance(value, dict):
        return {replace_surrogates(key): replace_surrogates(part) for key, part in value.items()}
    return value


def read_yaml(path: str | os.PathLike, flag: str | None = None) -> Any:
    """What a YAML file holds, plain values only.

    Raises:
        InputError: no such file, or no YAML; with the line where it is known.
    """
    import yaml  # only here, so that a command without YAML does not wait for it

    class Loader(yaml.SafeLoader):
        """Of plain values; a key that stands there twice is an error, where the library takes the last."""

        def construct_mapping(self, node, deep=False):
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for number, key in enumerate(keys):
                if any((key.tag, key.value) == (other.tag, other.value) for other in keys[:number]):
                    text = f"{key.value} stands there twice"
                    raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
            return super().construct_mapping(node, deep)

    with open_text(path, flag) as file:
        try:
            return yaml.load(file, Loader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f", line {mark.line + 1}" if mark else ""
            raise InputError(
                f"{path}{place}: not valid YAML ({getattr(error, 'problem', None) or first_line(error)})"
            ) from None
        except UnicodeDecodeError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            # Of the values: a date that is none, a key that cannot be one, lists in lists without an end.
            lines = str(error).splitlines() or [type(error).__name__]
            raise InputError(f"{path}: a value is not valid YAML ({lines[0]})") from None


WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


def parse_item_id(value: object) -> int:
    """An item id, a whole number from 0 as JSON and this project write it.

    Raises:
        ValueError: it is none: 1.0, 01, +1, 1_0 and True are not.
    """
    if type(value) is int and 0 <= value < 10**18:
        return value
    if not WHOLE_NUMBER.fullmatch(str(value)):
        raise ValueError(f"{str(value)[:40]!r} is not a whole number from 0")
    return int(str(value))


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
    return replace_surrogates(value) if HALF_PAIR.search(text) else value
