"""Files of users and their recommendations: CSV, JSON lines or Parquet, read and written as streams."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minionerec.common.files import (
    InputError,
    atomic_write,
    first_line,
    open_text,
    parse_list,
    read_lines,
    replace_surrogates,
    require_file,
)
from minionerec.common.processes import say
from minionerec.common.row_files import iterate_csv
from minionerec.evaluation.histories import split_titles

FORMATS = (".csv", ".jsonl", ".parquet")
# The columns where none are named. Of the histories: what users write, then those of the project's own splits.
HISTORY_COLUMNS = ("history", "history_item_id", "history_item_sid", "history_item_title")
USER_COLUMN = "user_id"
OUTPUT_COLUMNS = ("user_id", "rank", "item_id", "sid", "title", "score", "reason", "original_id")
WRITTEN_AT_ONCE = 65_536  # rows of a Parquet group


@dataclass(frozen=True)
class User:
    """One row of a file of users.

    Attributes:
        user_id: the row's user, or its number where the file names none.
        row: its number in the file, from 1.
        history: names of items, oldest first; empty where `problem` says why it cannot be read.
        problem: why the row is left out, or "".
        has_ids: digits in the history are what the raw log calls an item, or else its id, and no title such as "187".
    """

    user_id: str
    row: int
    history: tuple[str | int, ...] = ()
    problem: str = ""
    has_ids: bool = False


def check_format(path: str, flag: str) -> str:
    """The suffix of a file of users or recommendations.

    Raises:
        InputError: none of FORMATS.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"--{flag} {path}: expected a file named {', '.join(f'*{known}' for known in FORMATS)}")
    return suffix


def read_users(
    path: str, column: str | None = None, user_column: str | None = None, flag: str = "input"
) -> Iterator[User]:
    """The users of a file, one by one, in its order. A row that cannot be read is a user with a `problem`.

    Args:
        path: a CSV file with a header, JSON objects a line, or Parquet.
        column: of the histories; None takes the first of HISTORY_COLUMNS that is there. A cell is a list, or a text:
            a list literal, or names between semicolons.
        user_column: of the users; None takes USER_COLUMN, and row numbers where that is not there.
        flag: the command-line flag that named the file.

    Raises:
        InputError: no such file, or one without a column that is named, or without any of histories.
    """
    records = {".csv": _read_csv, ".jsonl": _read_json_lines, ".parquet": _read_parquet}[check_format(path, flag)]
    chosen, told = column, False
    for row, (record, problem) in enumerate(records(path, flag), 1):
        if record is None:
            yield User(str(row), row, problem=problem)
            continue
        if chosen is None:
            chosen = next((name for name in HISTORY_COLUMNS if name in record), None)
        if chosen is None or chosen not in record:
            expected = chosen or " or ".join(HISTORY_COLUMNS)
            found = ", ".join(map(str, record))
            hint = "" if column else "; --history_column names another"
            raise InputError(f"--{flag} {path}, row {row}: no column {expected}; found {found}{hint}")
        if user_column is not None and user_column not in record:
            found = ", ".join(map(str, record))
            raise InputError(f"--{flag} {path}, row {row}: no column {user_column}; found {found}")
        if not told and user_column is None and USER_COLUMN not in record and len(record) > 1:
            others = ", ".join(str(name) for name in record if name != chosen)
            say(f"--{flag} {path}: no column {USER_COLUMN}, users are row numbers; --user_column names one of {others}")
        told = True
        user_id = record.get(user_column or USER_COLUMN)
        user_id = str(row) if user_id is None else str(user_id)
        try:
            history = parse_history(record[chosen])
            # In a person's file a number is what that person calls the item; in a split it is the catalogue's number.
            has_ids = chosen not in ("history_item_id", "history_item_title")
            yield User(user_id, row, history, has_ids=has_ids)
        except InputError as error:
            yield User(user_id, row, problem=str(error))


def parse_history(value: Any) -> tuple[str | int, ...]:
    """The names of a cell: a list of texts and numbers, or a text that holds one.

    Raises:
        InputError: anything else, or no name.
    """
    if isinstance(value, str):
        text = value.strip()
        is_list = text.startswith("[") and text.endswith("]")
        value = parse_list(text, "history") if is_list else split_titles(text) if text else []
    if not isinstance(value, list | tuple):
        raise InputError(f"expected a list of items, got {str(value)[:60]!r}")
    names: list[str | int] = []
    for entry in value:
        if isinstance(entry, bool) or not isinstance(entry, str | int):
            hint = "; item ids are whole numbers" if isinstance(entry, float) else ""
            raise InputError(f"expected titles, SIDs or item ids, got {str(entry)[:60]!r}{hint}")
        if not isinstance(entry, str) or entry.strip():
            names.append(entry)
    if not names:
        raise InputError("the history is empty")
    return tuple(names)


Record = tuple[dict[str, Any] | None, str]  # a row by column, or None and what is wrong with it


def _read_csv(path: str, flag: str) -> Iterator[Record]:
    with open_text(path, flag) as file:
        lines = iterate_csv(file, path)
        header = next(lines, (1, []))[1]
        if not header:
            raise InputError(f"--{flag} {path}: expected a header line")
        for _, cells in lines:
            whole = len(cells) == len(header)
            yield (dict(zip(header, cells, strict=True)), "") if whole else (None, f"expected {len(header)} fields")


def _read_json_lines(path: str, flag: str) -> Iterator[Record]:
    for _, line in read_lines(path, flag):
        if not line.strip():
            continue
        try:
            record = replace_surrogates(json.loads(line))
        except (ValueError, RecursionError) as error:
            yield None, f"not valid JSON ({first_line(error)})"
            continue
        yield (record, "") if isinstance(record, dict) else (None, "expected an object")


def _read_parquet(path: str, flag: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(require_file(path, flag)) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    yield record, ""
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"--{flag} {path}: not a whole Parquet file ({first_line(error)})") from None


def write_lists(path: str, lists: Iterable[dict[str, Any]]) -> int:
    """Write the recommendations of users as a stream; the file appears whole or not at all.

    CSV and Parquet have a row for every recommendation (OUTPUT_COLUMNS), JSON lines one object for every user.

    Args:
        path: of the file.
        lists: {"user_id", "recommendations": [{"item_id", "sid", "title", "score", "reason"}, ...]} of every user,
            with "original_id" where it is known.

    Returns:
        How many users were written.
    """
    suffix = check_format(path, "output")
    writers = {".csv": _open_csv, ".jsonl": _open_json_lines, ".parquet": _open_parquet}
    count = 0
    with atomic_write(path) as temporary, writers[suffix](temporary) as write:
        for users in lists:
            write(users)
            count += 1
    return count


def _flatten(users: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for rank, item in enumerate(users["recommendations"], 1):
        columns = (item["item_id"], item["sid"], item["title"], item["score"], item["reason"])
        yield users["user_id"], rank, *columns, item.get("original_id", "")


@contextmanager
def _open_csv(path: Path) -> Iterator[Any]:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(OUTPUT_COLUMNS)
        yield lambda users: writer.writerows(_flatten(users))


@contextmanager
def _open_json_lines(path: Path) -> Iterator[Any]:
    with path.open("w", encoding="utf-8") as file:
        yield lambda users: file.write(json.dumps(users, ensure_ascii=False) + "\n")


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.string()
    kinds = (text, pyarrow.int32(), pyarrow.int64(), text, text, pyarrow.float64(), text, text)
    schema = pyarrow.schema(list(zip(OUTPUT_COLUMNS, kinds, strict=True)))
    waiting: list[tuple[Any, ...]] = []
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            columns = list(zip(*waiting, strict=True)) or [()] * len(kinds)
            arrays = [pyarrow.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            waiting.clear()

        def write(users: dict[str, Any]) -> None:
            waiting.extend(_flatten(users))
            if len(waiting) >= WRITTEN_AT_ONCE:
                flush()

        yield write
        flush()
