"""What every raw log is cleaned by, whatever its format: titles, ids, times, and the account of what was left out."""

from __future__ import annotations

import html
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.common.texts import MISSING, clean_text

# Times between these seconds since 1970 (1971 to 2100) tell their unit by their size; the units' ranges do not meet.
EARLIEST, LATEST = 31_536_000, 4_102_444_800
TICKS = {"seconds": 1, "milliseconds": 1_000, "microseconds": 1_000_000}

_PAGE = re.compile(r"<(?:span|div|script|style|img|table|iframe|input)\b|getTime\(|function\s*\(\)", re.IGNORECASE)
_OPEN_TAG = re.compile(r"<[/!]?[A-Za-z]")
_FLOAT_ID = re.compile(r"-?\d+\.0+")


def clean_title(value: object, max_words: int | None = None) -> str:
    """The cleaned title, or "" when the item is to be left out:

    - it is no text, or empty once cleaned, or one of the words that stand for a missing value (nan, None, ...);
    - it is a piece of a web page: it has a page tag (<span, <div, <script, <style, <img, <table, <iframe, <input) or
      page script (getTime(, function ()), or an unclosed tag is left after cleaning. Formatting such as <b> is just
      removed;
    - it has more than `max_words` words.
    """
    if not isinstance(value, str) or _PAGE.search(html.unescape(value)):
        return ""
    title = clean_text(value)
    return "" if _OPEN_TAG.search(title) or (max_words and len(title.split()) > max_words) else title


def is_id(value: object) -> bool:
    """Whether `value` can be an id: a text, not empty, that no white space splits in the files written."""
    return isinstance(value, str) and value.split() == [value]


def unify_ids(path: str | Path, column: str, ids: pd.Series) -> pd.Series:
    """Ids as texts, the `.0` taken off where a merge has turned a whole column of numbers into floats.

    Args:
        path, column: where they stand. ids: texts, whose index is the line number - 2.

    Raises:
        InputError: 3.0 on one line and 3 on another, of which nobody can say whether they are one.
    """
    distinct = pd.Index(ids.unique())
    floats = [name for name in distinct if _FLOAT_ID.fullmatch(name)]
    if not floats:
        return ids
    whole = {name: name.partition(".")[0] for name in floats}
    both = [name for name in floats if whole[name] in distinct]
    if both:
        lines = [int((ids == name).idxmax()) + 2 for name in (both[0], whole[both[0]])]
        raise InputError(
            f"{path}, column {column}: {both[0]} on line {lines[0]} and {whole[both[0]]} on line {lines[1]}; write "
            "every id in one way"
        )
    if any(name.strip().lower() not in ("", *MISSING) for name in distinct.difference(floats)):
        return ids
    say(f"{path}, column {column}: ids such as {floats[0]} are read as {whole[floats[0]]}")
    return ids.map(lambda name: whole.get(name, name))


def find_time_unit(value: float) -> str | None:
    """The unit of a time since 1970, by its size; None where that does not tell it."""
    return next((unit for unit, ticks in TICKS.items() if EARLIEST * ticks <= value < LATEST * ticks), None)


class TimeReader:
    """Times of a file that is read record by record: the first one that tells its unit decides for all.

    Args:
        usual: the unit of the format, for times so small that they tell none.

    Attributes:
        unit: what the times are in.
    """

    def __init__(self, usual: str):
        self.usual, self.unit = usual, None

    def convert(self, value: float) -> float | None:
        """Seconds since 1970; None for a time in another unit than those before it, before 1970 or behind 2100."""
        unit = find_time_unit(value)
        self.unit = self.unit or unit
        if unit is None and not 0 <= value < EARLIEST:
            return None
        if unit not in (None, self.unit):
            return None
        return value / TICKS[self.unit or self.usual]


def convert_times(path: str | Path, column: str, values: pd.Series, *, needs_unit: bool) -> pd.Series:
    """A column of times as seconds since 1970; their size tells the unit, which is said where it is not seconds.

    Args:
        path, column: where they stand.
        values: numbers, whose index is the line number - 2.
        needs_unit: whether more than their order counts, as for a window of months.

    Raises:
        InputError: times in different units, times whose unit cannot be told where it counts, or times far from now.
    """
    sizes = np.abs(values.to_numpy())
    found = {}
    for unit, ticks in TICKS.items():
        chosen = (sizes >= EARLIEST * ticks) & (sizes < LATEST * ticks)
        if chosen.any():
            found[unit] = int(values.index[int(chosen.argmax())]) + 2
    if len(found) > 1:
        (one, line), (other, other_line) = list(found.items())[:2]
        raise InputError(
            f"{path}, column {column}: line {line} is a time in {one}, line {other_line} one in {other}; write all in "
            "one unit"
        )
    unit = next(iter(found), None)
    ticks = TICKS[unit or "seconds"]
    far = (sizes >= LATEST * ticks) | ((sizes >= EARLIEST) & (sizes < EARLIEST * ticks))
    if far.any() or (needs_unit and unit is None and len(values)):
        row = int(far.argmax()) if far.any() else 0
        raise InputError(
            f"{path}, line {int(values.index[row]) + 2}, column {column}: {values.iloc[row]:.0f} is no time since 1970 "
            "in seconds, milliseconds or microseconds"
        )
    if unit not in (None, "seconds"):
        say(f"{path}: times in {unit}, told by their size")
    return values / ticks


class LeftOut(Counter):
    """How many records were left out, by the first reason that applied to each; reasons without any are kept too."""

    def describe(self) -> str:
        """The account in one line."""
        return ", ".join(f"{reason} {count}" for reason, count in self.items()) or "nothing left out"
