"""Amazon Reviews dumps of 2014, 2018 and 2023 as streams: one record a line, JSON or a Python literal, plain or gzip.

The fields of each line tell its form, so no flag does:

      user        item         time                 rating   metadata
2014  reviewerID  asin         unixReviewTime in s  overall  title, description, brand, categories (list of lists)
2018  reviewerID  asin         unixReviewTime in s  overall  title, description (list), brand, category (list)
2023  user_id     parent_asin  timestamp in ms      rating   title, description (list), store, categories (list)

In 2023 `asin` is a variant (size, colour) of the item `parent_asin`. 2014 metadata are Python literals, read as data
only.
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import math
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import pandas as pd

from data_process.cleaning import TimeReader, clean_title, is_id
from minionerec.common.file_kinds import GZIP
from minionerec.common.files import InputError, require_text
from minionerec.common.processes import say
from minionerec.common.progress import ProgressBar
from minionerec.common.texts import clean_text

BLOCK = 1 << 20  # bytes read at a time
SHOWN = 5  # malformed lines of a file that are reported one by one

# Names of user, item, time and rating, and the unit that the time is usually in.
FIELDS_2014 = ("reviewerID", "asin", "unixReviewTime", "overall", "seconds")
FIELDS_2023 = ("user_id", "parent_asin", "timestamp", "rating", "milliseconds")


def parse_line(line: bytes) -> object:
    """The value of a line of JSON or of a Python literal; None if it is neither."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            # orjson refuses half of a surrogate pair, which JSON can name and no UTF-8 file can hold: "?" replaces it.
            # The way through JSON also leaves texts, numbers, lists and objects only.
            plain = json.dumps(parse(text), ensure_ascii=False, allow_nan=False)
            return json.loads(plain.encode("utf-8", "replace"))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


class Dump:
    """A dump file that is read line by line, as often as asked for. Malformed lines are left out and counted.

    Attributes:
        bad_lines: malformed lines so far.
        lines: lines of the last complete pass, blank ones not counted.
    """

    def __init__(self, path: str | Path, flag: str, max_bad_lines: int):
        self.path = require_text(path, flag, allowed=(GZIP,))
        self.max_bad_lines = max_bad_lines
        self.lines = self.bad_lines = 0
        self._first_bad: str | None = None

    def report_bad_line(self, number: int, what: str) -> None:
        """Count line `number` as malformed and print the first few.

        Raises:
            InputError: there are more than allowed.
        """
        message = f"{self.path}, line {number}: {what}"
        self.bad_lines += 1
        self._first_bad = self._first_bad or message
        if self.bad_lines > self.max_bad_lines:
            raise InputError(f"{message}; this is one malformed line more than --max_bad_lines {self.max_bad_lines}")
        if self.bad_lines <= SHOWN:
            say(f"left out: {message}")

    def iterate_lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number from 1, line) with a progress bar.

        Raises:
            InputError: a gzip file that is cut off or damaged.
        """
        bar = ProgressBar(
            total=self.path.stat().st_size,
            desc=self.path.name,
            unit="B",
            unit_scale=True,
        )
        with self.path.open("rb", buffering=BLOCK) as file, bar:
            packed = file.peek(2)[:2] == GZIP
            # GzipFile finds line ends in Python; a buffer around it does that in C.
            source = io.BufferedReader(gzip.GzipFile(fileobj=file), BLOCK) if packed else file
            number = 0
            try:
                for number, line in enumerate(source, 1):
                    yield number, line
                    if not number & 0x3FFF:
                        bar.update(file.tell() - bar.n)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InputError(f"{self.path}: damaged gzip file, behind line {number} ({error})") from None
            bar.update(file.tell() - bar.n)

    def iterate_records(self) -> Iterator[tuple[int, dict]]:
        """(line number, object) of every line that holds one.

        Raises:
            InputError: no line is good, or more malformed ones than allowed.
        """
        number = blank = 0
        bad_before = self.bad_lines
        for number, line in self.iterate_lines():
            record = parse_line(line)
            if type(record) is dict:
                yield number, record
            elif line.isspace():
                blank += 1
            else:
                self.report_bad_line(
                    number, f"expected a JSON object or Python dictionary, got {line[:40].decode('utf-8', 'replace')!r}"
                )
        self.lines = number - blank
        if self.lines == 0:
            raise InputError(f"{self.path}: the file is empty")
        if self.lines == self.bad_lines - bad_before:
            raise InputError(f"{self._first_bad} (no line of the file is good)")


def read_titles(dump: Dump, max_words: int) -> tuple[dict[str, int], array]:
    """Number the items with a valid title.

    Returns:
        {item id: number from 0}, and by number the line of the record that counts, the item's first valid one.
    """
    numbers: dict[str, int] = {}
    lines = array("q")
    for number, record in dump.iterate_records():
        item = record.get("parent_asin", record.get("asin"))
        if not is_id(item):
            dump.report_bad_line(
                number, f"expected an item with a text asin (2014, 2018) or parent_asin (2023), got {str(item)[:40]!r}"
            )
        elif item not in numbers and clean_title(record.get("title"), max_words):
            numbers[item] = len(lines)
            lines.append(number)
    return numbers, lines


@dataclass
class Reviews:
    """The reviews that count, in file order, and how many were left out for which reason (the first that applies).

    Attributes:
        table: `user` and `item` int32 numbers, `timestamp` float64 seconds since 1970 UTC.
        users: user ids by number.
    """

    table: pd.DataFrame
    users: list[str]
    outside_window: int
    low_rating: int
    without_title: int


def read_reviews(
    dump: Dump, items: dict[str, int], start: float | None, end: float | None, min_rating: float | None
) -> Reviews:
    """Read the reviews that count.

    Args:
        dump: the reviews.
        items: {item id: number} of the items whose reviews count.
        start, end: in seconds since 1970 UTC, start <= time < end; None for an open side.
        min_rating: least rating; None for any.
    """
    start, end = -math.inf if start is None else start, math.inf if end is None else end
    users: dict[str, int] = {}
    user_column, item_column, time_column = array("i"), array("i"), array("d")
    outside_window = low_rating = without_title = 0
    readers = {fields: TimeReader(fields[-1]) for fields in (FIELDS_2014, FIELDS_2023)}
    for number, record in dump.iterate_records():
        fields = FIELDS_2023 if "parent_asin" in record else FIELDS_2014
        user_field, item_field, time_field, rating_field, usual = fields
        try:
            user, item, time = record[user_field], record[item_field], readers[fields].convert(record[time_field] + 0)
            rated = min_rating is None or record[rating_field] >= min_rating
        except KeyError as error:
            dump.report_bad_line(
                number, f"expected a review with {user_field}, {item_field} and {time_field}, found no {error}"
            )
            continue
        except (TypeError, OverflowError):
            dump.report_bad_line(number, f"expected numbers in {time_field} and {rating_field}")
            continue
        if type(user) is not str or type(item) is not str or time is None:
            unit = readers[fields].unit or usual
            dump.report_bad_line(
                number, f"expected texts in {user_field} and {item_field}, {unit} since 1970 in {time_field}"
            )
        elif not start <= time < end:
            outside_window += 1
        elif not rated:
            low_rating += 1
        elif (item_number := items.get(item)) is None:
            without_title += 1
        else:
            user_number = users.get(user)
            if user_number is None:
                if not is_id(user):
                    dump.report_bad_line(number, f"expected {user_field} without white space, got {user[:40]!r}")
                    continue
                user_number = users[user] = len(users)
            user_column.append(user_number)
            item_column.append(item_number)
            time_column.append(time)
    for fields, reader in readers.items():
        if reader.unit not in (None, fields[-1]):
            say(f"{dump.path}: {fields[2]} in {reader.unit}, told by their size")
    table = pd.DataFrame(
        {
            "user": np.asarray(user_column),
            "item": np.asarray(item_column),
            "timestamp": np.asarray(time_column),
        }
    )
    return Reviews(table, list(users), outside_window, low_rating, without_title)


def join_categories(record: dict) -> str:
    """Category names, each once, from the general to the particular: a list, a list of paths (2014), or one name."""
    value = record.get("categories") or record.get("category") or record.get("main_category")
    paths = value if isinstance(value, list) else [value]
    names = [clean_text(name) for path in paths for name in (path if isinstance(path, list) else [path])]
    return ", ".join(dict.fromkeys(filter(None, names)))


def read_item_texts(dump: Dump, wanted: dict[int, str]) -> dict[str, dict[str, str]]:
    """{item id: title, description, brand and categories as plain text} for `wanted`: {line number: item id}."""
    texts = {}
    for number, line in dump.iterate_lines():
        if number in wanted:
            record = parse_line(line)
            texts[wanted[number]] = {
                "title": clean_text(record["title"]),
                "description": clean_text(record.get("description")),
                "brand": clean_text(record.get("brand") or record.get("store")),
                "categories": join_categories(record),
            }
            if len(texts) == len(wanted):
                break
    return texts
