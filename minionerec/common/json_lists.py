"""JSON lists that may be larger than memory: written and read one element at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from minionerec.common.files import HALF_PAIR, InputError, atomic_write, open_text, read_json, replace_surrogates

CHUNK = 2**20  # characters read at once
AFTER_VALUE = frozenset(",] \t\n\r")
WHITESPACE = re.compile(r"[ \t\n\r]*")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def write_json_list(path: str | os.PathLike, values: Iterable[Any]) -> None:
    """Write the values as they come; the file is that of `write_json` of their list, without an indent."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        before = "["
        for value in values:
            file.write(before + json.dumps(value, ensure_ascii=False))
            before = ", "
        file.write("]\n" if before == ", " else "[]\n")


class _Window:
    """A part of a JSON text, which moves on as its values are read.

    Attributes:
        byte: where in the file the next value begins.
    """

    def __init__(self, file: TextIO, path: str | os.PathLike, byte: int):
        self._file, self._path, self._decoder = file, path, json.JSONDecoder()
        self._text, self._position, self._line, self.byte = "", 0, 1, byte

    def _extend(self) -> bool:
        """Read on, at least as much as is there already; False at the end of the file."""
        rest = self._text[self._position :]
        chunk = self._file.read(max(CHUNK, len(rest)))
        self._line += self._text.count("\n", 0, self._position)
        self._text, self._position = rest + chunk, 0
        return bool(chunk)

    def skip(self, end: int | None = None) -> None:
        """Go on to position `end`, or by one character."""
        end = self._position + 1 if end is None else end
        self.byte += len(self._text[self._position : end].encode())
        self._position = end

    def peek(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            self.skip(WHITESPACE.match(self._text, self._position).end())
            if self._position < len(self._text) or not self._extend():
                return self._text[self._position : self._position + 1]

    def read_value(self) -> tuple[Any, int, int]:
        """(the value that begins here, its first byte, the bytes it takes)."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                beyond = error.pos - self._position
                if not self._extend():
                    self.fail(error.msg, beyond)
                continue
            except RecursionError:
                self.fail("nested too deeply")
            except ValueError:
                self.fail("a number with too many digits")
            length = end - self._position  # positions are others once the window has moved on
            # A number that the window cuts may go on, as 1.5 in 1.5e-3.
            if self._text[end : end + 1] in AFTER_VALUE or not self._extend():
                start, end = self.byte, self._position + length
                if HALF_PAIR.search(self._text, self._position, end):
                    value = replace_surrogates(value)
                self.skip(end)
                return value, start, self.byte - start

    def fail(self, message: str, beyond: int = 0) -> NoReturn:
        """Raise the error of a text that is no JSON so many characters from here."""
        line = self._line + self._text.count("\n", 0, self._position + beyond)
        raise InputError(f"{self._path}, line {line}: not valid JSON ({message})")


def iterate_json_list(path: str | os.PathLike, flag: str, expected: str) -> Iterator[tuple[Any, int, int]]:
    """(element, its first byte in the file, the bytes it takes) of a list, one at a time.

    Args:
        path: of a UTF-8 file.
        flag: that named the file.
        expected: what the file should be, for the error where it is no list.

    Raises:
        InputError: no such file, or not such a list; JSON that is broken is found when the reading gets there.
    """
    with open_text(path, flag) as file:
        with Path(path).open("rb") as start:
            mark = start.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
        window = _Window(file, path, len(BYTE_ORDER_MARK) * mark)
        if window.peek() != "[":
            read_json(path, flag)  # what is no JSON at all has an error of its own
            raise InputError(f"--{flag}: {path}: expected {expected}")
        window.skip()
        more = window.peek() != "]"
        while more:
            yield window.read_value()
            more = window.peek() == ","
            if more:
                window.skip()
                window.peek()
            elif window.peek() != "]":
                window.fail("Expecting ',' delimiter")
        window.skip()
        if window.peek():
            window.fail("Extra data")
