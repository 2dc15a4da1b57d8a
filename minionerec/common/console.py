"""What a command shows: bars on a terminal, a line now and then elsewhere, and log.txt in the folder of its output."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from minionerec.common.processes import is_main_process, say

LOG_FILE = "log.txt"
SECONDS_BETWEEN_LINES = 30  # where there is no terminal
MEASURED_SECONDS = 20  # of work, before its end is foretold
LONG_SECONDS = 30 * 60  # what is worth foretelling
AS_LINE = "{n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"


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


def format_seconds(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is read at a glance."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


def foretell_epochs(run_epoch: Callable[[], Any], epochs: int, shorter: str) -> None:
    """Print how long `epochs` of a training take, by the time of a few: the first warms up, two more are measured.

    Args:
        run_epoch: trains for one epoch. Called on every process.
        epochs: of the whole run.
        shorter: the flags that make it shorter.
    """
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run_epoch()
        seconds.append(time.perf_counter() - start)
    each = sum(seconds[1:]) / 2
    say(
        f"  {epochs:,} epochs take about {format_seconds(each * epochs)}, without validation: two measured ones took "
        f"{format_seconds(each)} each; shorter with {shorter}"
    )


class ProgressBar(tqdm):
    """tqdm's bar on a terminal; elsewhere a line every SECONDS_BETWEEN_LINES, and none for what is shorter.

    Shown by the main process alone, and never recorded. Takes the arguments of tqdm.

    Args:
        shorter: the flags that make the work shorter. With them, work that will take more than half an hour says so
            once, as soon as some of it was measured.
    """

    def __init__(self, *arguments: Any, shorter: str = "", **named: Any):
        self._shorter = shorter
        screen = getattr(sys.stderr, "screen", sys.stderr)
        self.as_lines = not screen.isatty()
        named.setdefault("disable", not is_main_process())
        named["file"] = screen
        if self.as_lines:
            seconds = SECONDS_BETWEEN_LINES
            named |= {"mininterval": seconds, "maxinterval": seconds, "miniters": 1, "delay": seconds, "leave": False}
            described = len(arguments) > 1 or "desc" in named
            named["bar_format"] = "{desc}: " + AS_LINE if described else AS_LINE
        super().__init__(*arguments, **named)

    def update(self, n: float = 1) -> bool | None:
        """Count `n` more as done."""
        shown = super().update(n)
        if self._shorter and not self.disable:
            self._foretell()
        return shown

    def _foretell(self) -> None:
        done, gone = self.n - self.initial, self._time() - self.start_t
        if gone < MEASURED_SECONDS or done < 2 or not self.total:
            return
        left = (self.total - self.n) * gone / done
        if left > LONG_SECONDS:
            how = f"{done:,.0f} {self.unit} took {format_seconds(gone)}"
            self.say(f"  about {format_seconds(left)} to go ({how}); shorter with {self._shorter}")
        self._shorter = ""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or print it as a line."""
        if self.as_lines:
            print(str(self) if msg is None else msg, file=self.fp, flush=True)
        else:
            super().display(msg, pos)

    def set_postfix(self, ordered_dict: Mapping[str, Any] | None = None, refresh: bool = True, **named: Any) -> None:
        """Figures behind the count."""
        super().set_postfix(ordered_dict, refresh and not self.as_lines, **named)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """A text behind the count."""
        super().set_postfix_str(s, refresh and not self.as_lines)

    def clear(self, nolock: bool = False) -> None:
        """Take the bar from the screen; a line stays."""
        if not self.as_lines:
            super().clear(nolock)

    def say(self, text: str) -> None:
        """Print a text above the bar."""
        shown = not (self.disable or self.as_lines)
        if shown:
            self.clear()
        say(text)
        if shown:
            self.refresh()

    def close(self) -> None:
        """End the bar."""
        if self.as_lines:
            self.delay = math.inf  # for tqdm: nothing was drawn that is to be taken away
        super().close()
