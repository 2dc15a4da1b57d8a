"""What a command prints is kept in log.txt of the folder of its output."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from minionerec.common.processes import is_main_process

LOG_FILE = "log.txt"


class _Record:
    """The lines of a command, kept until the folder of its output is known, and in log.txt there from then on."""

    def __init__(self) -> None:
        self.early: list[str] = []
        self.file: TextIO | None = None

    def add(self, line: str) -> None:
        if self.file is None:
            self.early.append(line)
            return
        self.file.write(line)
        self.file.flush()

    def move_to(self, folder: Path) -> None:
        self.close()
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / LOG_FILE).open("a", encoding="utf-8")
        self.file.write(f"# {time.strftime('%FT%TZ', time.gmtime())} {shlex.join(sys.argv)}\n")
        for line in self.early:
            self.file.write(line)
        self.early.clear()
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


class RecordedStream:
    """A stream of the console whose whole lines are recorded as well; bars, which return to the line's start, are not.

    Attributes:
        screen: the stream itself.
    """

    def __init__(self, screen: TextIO, record: _Record):
        self.screen, self.record, self._line = screen, record, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.screen, name)

    def write(self, text: str) -> int:
        """Write to the stream and keep what completes a line."""
        self._line += text
        *lines, self._line = self._line.split("\n")
        for line in lines:
            if "\r" not in line.rstrip("\r"):
                self.record.add(line.rstrip("\r") + "\n")
        return self.screen.write(text)


_records: list[_Record] = []  # of the command that runs, if any; the inner one where one command runs another


@contextmanager
def record_console() -> Iterator[None]:
    """Inside, what the main process prints is kept for log.txt, see `open_log`."""
    if not is_main_process():
        yield
        return
    record, before = _Record(), (sys.stdout, sys.stderr)
    _records.append(record)
    sys.stdout, sys.stderr = (RecordedStream(stream, record) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        _records.pop()
        record.close()


def open_log(folder: str | Path) -> None:
    """From now on what the command prints stands in FOLDER/log.txt, behind earlier runs; what it printed so far too."""
    if _records:
        _records[-1].move_to(Path(folder))


def log_only(text: str) -> None:
    """A text for log.txt that the console gets from elsewhere, such as the traceback of an error."""
    if _records:
        _records[-1].add(text.rstrip("\n") + "\n")
