"""Progress of long work: bars on a terminal, a line now and then elsewhere, and how long it has to go."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from minionerec.common.processes import is_main_process, say

SECONDS_BETWEEN_LINES = 30  # where there is no terminal
MEASURED_SECONDS = 20  # of work, before its end is foretold
LONG_SECONDS = 30 * 60  # what is worth foretelling
AS_LINE = "{n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"


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
