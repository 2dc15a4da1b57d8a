"""The kinds of file that a split may come in, each read as a stream of records: CSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minionerec.common.files import InputError, first_line, open_text, read_lines, replace_surrogates, require_file

CSV_COLUMNS = (
    "user_id",
    "history_item_title",
    "item_title",
    "history_item_id",
    "item_id",
    "history_item_sid",
    "item_sid",
)
PARQUET_ROWS = 1000  # read at once
RETURN = "\ufdd0"  # stands for a carriage return while a line is cut into fields; Unicode keeps it free for such use

# Where a record stands, for an error, and its fields.
Records = Iterator[tuple[str, dict[str, Any]]]


def is_csv(path: str | Path) -> bool:
    """Whether a split is read as CSV: a name that ends in .jsonl or .parquet says otherwise."""
    return Path(path).suffix not in (".jsonl", ".parquet")


def iterate_records(path: str | Path, flag: str | None = None) -> Records:
    """(file and line or row, {column: value}) of every record of a split.

    Lists are literals in a CSV, and lists or literals in the other kinds.

    Raises:
        InputError: no such file, a missing column, or a record that is none.
    """
    readers = {".jsonl": _iterate_json_lines, ".parquet": _iterate_parquet}
    return readers.get(Path(path).suffix, _iterate_csv)(path, flag)


def _check_columns(path: str | Path, found: list[str]) -> None:
    missing = [name for name in CSV_COLUMNS if name not in found]
    if missing:
        where = f"{path}, line 1" if Path(path).suffix != ".parquet" else path
        separator = next((sign for sign in ";\t|" if len(found) == 1 and found[0].count(sign) >= len(missing) - 1), "")
        hint = f"; its columns are separated by {separator!r}, and commas are expected" if separator else ""
        raise InputError(f"{where}: missing column {', '.join(missing)}; found {', '.join(found)[:200]}{hint}")


def _iterate_csv(path: str | Path, flag: str | None) -> Records:
    with open_text(path, flag) as file:
        lines = iterate_csv(file, path)
        header = next(lines, (1, []))[1]
        if not header:
            raise InputError(f"{path}: the file is empty")
        _check_columns(path, header)
        for number, cells in lines:
            where = f"{path}, line {number}"
            if len(cells) != len(header):
                raise InputError(f"{where}: expected {len(header)} fields, got {len(cells)}")
            yield where, dict(zip(header, cells, strict=True))


def iterate_csv(lines: Iterable[str], path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, fields) of every line of a CSV that is not empty; of any length.

    A carriage return inside a field is part of it, quoted or not: some versions of Python write it without quotes,
    which the reader of none accepts.

    Raises:
        InputError: what is no CSV, with the line.
    """
    csv.field_size_limit(sys.maxsize)  # else it is 131,072 characters, which the writer does not know
    hidden = False

    def hide_returns() -> Iterator[str]:
        nonlocal hidden
        for line in lines:
            # One before the line's end is part of that; in quotes it stays what it is.
            end = "\r\n" if line.endswith("\r\n") else "\n" if line.endswith("\n") else ""
            text = line.removesuffix(end)
            if "\r" in text:
                hidden = True
                line = text.replace("\r", RETURN) + end
            yield line

    reader = csv.reader(hide_returns())
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, [cell.replace(RETURN, "\r") for cell in cells] if hidden else cells
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None


def _iterate_json_lines(path: str | Path, flag: str | None) -> Records:
    for number, line in read_lines(path, flag):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = replace_surrogates(json.loads(line))
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected a JSON object with {', '.join(CSV_COLUMNS)}")
        missing = [name for name in CSV_COLUMNS if record.get(name) is None]
        if missing:
            raise InputError(f"{where}: no {', '.join(missing)}")
        yield where, record


def _iterate_parquet(path: str | Path, flag: str | None) -> Records:
    from pyarrow import ArrowException, parquet  # only here: the other kinds need none of it

    require_file(path, flag)
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=list(CSV_COLUMNS)):
                for record in batch.to_pylist():
                    number += 1
                    missing = [name for name in CSV_COLUMNS if record[name] is None]
                    if missing:
                        raise InputError(f"{path}, row {number}: no {', '.join(missing)}")
                    yield f"{path}, row {number}", record
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({first_line(error)})") from None
