"""Logs and catalogues as people have them: CSV files with a plain header line, read as items and interactions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from data_process.cleaning import EARLIEST, LATEST, LeftOut, convert_times, unify_ids
from data_process.interactions import bound_window, select_interactions
from data_process.recbole_files import TITLE_FIELDS, YEAR_FIELDS, build_item_records, parse_numbers
from data_process.settings import CsvFlags
from minionerec.common.files import InputError, open_text
from minionerec.common.row_files import iterate_csv

USER_FIELDS = ("user_id", "user", "userid", "uid", "customer_id", "customer", "reviewerid", "visitor_id", "session_id")
ITEM_FIELDS = ("item_id", "item", "itemid", "iid", "product_id", "product", "movie_id", "movieid", "asin", "sku", "id")
TIME_FIELDS = ("timestamp", "time", "date", "datetime", "ts", "created_at", "event_time", "unixreviewtime")
CATEGORY_FIELDS = ("categories", "category", "class", "genre", "genres")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}")


def iterate_cells(path: str | Path, flag: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of a file: separated by commas, by tabs in one whose name ends in .tsv.

    Raises:
        InputError: what is no CSV, with the line.
    """
    with open_text(path, flag) as file:
        if Path(path).suffix != ".tsv":
            yield from iterate_csv(file, path)
            return
        for number, line in enumerate(file, 1):
            if line.strip("\r\n"):
                yield number, line.rstrip("\r\n").split("\t")


def read_table(path: str | Path, flag: str) -> pd.DataFrame:
    """A CSV as texts, its index being line number - 2.

    Raises:
        InputError: no header line, columns of one name, another separator, or a line with too many or too few cells.
    """
    lines = iterate_cells(path, flag)
    header = [name.strip() for name in next(lines, (1, []))[1]]
    if not header:
        raise InputError(f"{path}: the file is empty")
    if any(_NUMBER.fullmatch(name) or _DATE.match(name) for name in header):
        raise InputError(f"{path}, line 1: expected a header such as user,item,time, got {','.join(header)[:60]}")
    if len(header) == 1:
        other = next((name for mark, name in SEPARATORS.items() if mark in header[0]), None)
        if other:
            raise InputError(f"{path}, line 1: separated by {other}; expected commas, or tabs in a .tsv")
    if len({name.lower() for name in header}) < len(header):
        raise InputError(f"{path}, line 1: a column is named twice: {', '.join(header)}")
    numbers, rows = [], []
    for number, cells in lines:
        if len(cells) != len(header):
            raise InputError(f"{path}, line {number}: expected {len(header)} cells, got {len(cells)}")
        numbers.append(number - 2)
        rows.append(cells)
    if not rows:
        raise InputError(f"{path}: no line below the header")
    return pd.DataFrame(rows, columns=header, index=numbers, dtype=str)


def find_column(path: str | Path, table: pd.DataFrame, flag: str, wanted: str | None, usual: tuple[str, ...]) -> str:
    """The column that a flag names, or the first of the usual names that is there, in any case.

    Raises:
        InputError: neither.
    """
    names = {name.lower(): name for name in table.columns}
    column = next((names[name.lower()] for name in ((wanted,) if wanted else usual) if name.lower() in names), None)
    if column is None:
        missing = f"no column {wanted}" if wanted else f"no column is called {', '.join(usual[:4])}, ..."
        raise InputError(f"{path}: {missing}; its columns are {', '.join(table.columns)}; name one with --{flag}")
    return column


def parse_times(path: str | Path, table: pd.DataFrame, column: str, *, needs_unit: bool) -> pd.Series:
    """A column of times as seconds since 1970: numbers, whose size tells their unit, or dates, in UTC without a zone.

    Args:
        path, table, column: where they stand.
        needs_unit: whether more than the order of numbers counts, see `convert_times`.

    Raises:
        InputError: the first line that holds neither, or numbers without a unit where it counts.
    """
    if not _DATE.match(table[column].iloc[0].strip()):
        return convert_times(path, column, parse_numbers(path, table, column), needs_unit=needs_unit)
    times = pd.to_datetime(table[column].str.strip(), utc=True, errors="coerce", format="ISO8601")
    # Not by a difference of times, which overflows in the year 7024 of a slip of the finger.
    seconds = times.dt.tz_localize(None).to_numpy().astype("datetime64[ms]").astype(np.int64) / 1000
    wrong = times.isna() | (seconds < 0) | (seconds >= LATEST)
    if wrong.any():
        row = wrong.idxmax()
        raise InputError(
            f"{path}, line {row + 2}, column {column}: expected a date from 1970 to 2099 such as 2024-05-31 17:20:00, "
            f"got {table.loc[row, column]!r}"
        )
    return pd.Series(seconds, index=table.index)


def read_csv_items(path: str | Path, flags: CsvFlags) -> dict[str, dict[str, str]]:
    """{original item id: title, description, brand, categories, original_id}, see `build_item_records`.

    Columns of numbers say nothing in words and are left out, except years.

    Raises:
        InputError: a malformed file, no column of ids or titles, or an item that stands there twice.
    """
    table = read_table(path, "items_file")
    item_field = find_column(path, table, "item_field", flags.item_field, ITEM_FIELDS)
    title_field = find_column(path, table, "title_field", flags.title_field, TITLE_FIELDS)
    table[item_field] = unify_ids(path, item_field, table[item_field].str.strip())
    twice = table[item_field].duplicated()
    if twice.any():
        row = twice.idxmax()
        raise InputError(f"{path}, line {row + 2}: item {table.loc[row, item_field]!r} is here twice")
    category_field = None
    if flags.category_field or any(name.lower() in CATEGORY_FIELDS for name in table.columns):
        category_field = find_column(path, table, "category_field", flags.category_field, CATEGORY_FIELDS)
    kept = {item_field: item_field, title_field: title_field, category_field: category_field}
    table = table.rename(columns=lambda name: kept.get(name, name.lower()))
    kinds = {
        name: "token" if name in (*YEAR_FIELDS, *kept) or not table[name].map(_is_number_or_empty).all() else "float"
        for name in table.columns
    }
    records = build_item_records(table, kinds, item_field, title_field, category_field)
    return {name: {**record, "original_id": name} for name, record in records.items()}


def _is_number_or_empty(text: str) -> bool:
    return not text.strip() or bool(_NUMBER.fullmatch(text.strip()))


def is_name(text: str) -> bool:
    """Whether a cell can be an id: not empty, and in one piece in a file whose lines are split at tabs."""
    return bool(text) and not set(text) & set("\t\r\n")


def read_csv_interactions(
    flags: CsvFlags, items: dict[str, dict[str, str]] | None, left_out: LeftOut
) -> tuple[pd.DataFrame, dict[str, dict[str, str]], int]:
    """The interactions that count, see `select_interactions`.

    Args:
        flags: the file, its columns, the window and the least rating.
        items: of `read_csv_items`; None: every item of the log, its id being its title.
        left_out: takes the number of the others by reason.

    Returns:
        The interaction table, the items, and how many lines the file has below its header.

    Raises:
        InputError: a malformed file, a column that is not found, times without a unit, ids written in two ways.
    """
    path = flags.interactions_file
    raw = read_table(path, "interactions_file")
    columns = {
        "user": find_column(path, raw, "user_field", flags.user_field, USER_FIELDS),
        "item": find_column(path, raw, "item_field", flags.item_field, ITEM_FIELDS),
        "time": find_column(path, raw, "time_field", flags.time_field, TIME_FIELDS),
    }
    window = bound_window(flags)
    needs_unit = any((bound or 0) > EARLIEST for bound in window)
    times = parse_times(path, raw, columns["time"], needs_unit=needs_unit)
    table = pd.DataFrame(
        {name: unify_ids(path, columns[name], raw[columns[name]].str.strip()) for name in ("user", "item")}
    )
    table["timestamp"] = times
    if items is None:
        empty = {"description": "", "brand": "", "categories": ""}
        items = {name: {"title": name, **empty, "original_id": name} for name in table["item"]}
    elif not table["item"].isin(items.keys()).any():
        raise InputError(
            f"{path}: none of its items stands in {flags.items_file}: {table['item'].iloc[0]!r} here, "
            f"{next(iter(items))!r} there; both must name items alike"
        )
    rated = pd.Series(True, index=table.index)
    if flags.min_rating is not None:
        rating = find_column(path, raw, "rating_field", flags.rating_field, ())
        rated = parse_numbers(path, raw, rating) >= flags.min_rating
    named = table["user"].map(is_name) & table["item"].map(is_name)
    return select_interactions(table, named, rated, window, items, left_out), items, len(raw)
