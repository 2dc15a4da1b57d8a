"""The kinds of file that a split may come in, each read as a stream of records: CSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minionerec.common.files import InputError, open_text, read_lines, require_file

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
        raise InputError(f"{where}: missing column {', '.join(missing)}; found {', '.join(found)}")


def _iterate_csv(path: str | Path, flag: str | None) -> Records:
    with open_text(path, flag) as file:
        reader = csv.DictReader(file)
        _check_columns(path, list(reader.fieldnames or ()))
        for record in reader:
            where = f"{path}, line {reader.line_num}"
            if None in record.values() or None in record:
                raise InputError(f"{where}: expected {len(reader.fieldnames)} fields")
            yield where, record


def _iterate_json_lines(path: str | Path, flag: str | None) -> Records:
    for number, line in read_lines(path, flag):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError:
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
        raise InputError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
