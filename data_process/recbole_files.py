"""RecBole atomic files: tables with a typed header, read as items with texts and as interactions."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd

from data_process.cleaning import EARLIEST, LeftOut, clean_title, convert_times, is_id, unify_ids
from data_process.interactions import bound_window, select_interactions
from data_process.settings import RecboleFlags
from minionerec.common.files import InputError, first_line, require_text
from minionerec.common.texts import clean_text

TITLE_FIELDS = ("title", "movie_title", "item_title", "name", "item_name", "product_name")
CATEGORY_FIELDS = ("categories", "category", "class", "genre", "genres")
YEAR_FIELDS = ("release_year", "year")
DESCRIPTION_FIELDS = ("description", "text", "overview", "plot")
BRAND_FIELDS = ("brand", "store")


def read_atomic(path: str | Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """An atomic file as texts, its index being line number - 2, and the type of each column.

    Raises:
        InputError: an untyped header, a line with too many or too few fields, or text that is not UTF-8; with the line.
    """
    path = require_text(path)
    content = path.read_bytes().replace(b"\r\n", b"\n")
    if not content:
        raise InputError(f"{path}: the file is empty")
    # pandas fills up short lines without a word, so fields are counted first, vectorised over the bytes.
    characters = np.frombuffer(content, dtype=np.uint8)
    ends = np.append(np.flatnonzero(characters == ord("\n")), len(characters))
    fields = np.diff(np.searchsorted(np.flatnonzero(characters == ord("\t")), ends), prepend=0) + 1
    filled = np.diff(ends, prepend=-1) > 1
    wrong = np.flatnonzero(filled & (fields != fields[0]))
    if len(wrong):
        line = wrong[0]
        raise InputError(f"{path}, line {line + 1}: expected {fields[0]} tab-separated fields, got {fields[line]}")
    try:
        table = pd.read_csv(
            io.BytesIO(content),
            sep="\t",
            dtype=str,
            quoting=csv.QUOTE_NONE,
            keep_default_na=False,
            encoding="utf-8",
            skip_blank_lines=False,
            index_col=False,
            lineterminator="\n",
        )
    except UnicodeDecodeError as error:
        # pandas reports a position within its own block.
        lines = enumerate(content.split(b"\n"), 1)
        line = next(number for number, text in lines if text.decode("utf-8", "replace").encode() != text)
        raise InputError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise InputError(f"{path}: {first_line(error)}") from None
    columns = [name.partition(":") for name in table.columns]
    for name, colon, _ in columns:
        if not colon:
            raise InputError(f"{path}, line 1: expected a typed header such as user_id:token, got {name!r}")
    table.columns = [name for name, _, _ in columns]
    if table.columns.has_duplicates:
        raise InputError(f"{path}, line 1: a column is named twice: {', '.join(table.columns)}")
    table = table[filled[1 : len(table) + 1]]
    return table, {name: kind for name, _, kind in columns}


def require_columns(path: str | Path, table: pd.DataFrame, names: list[str]) -> None:
    """Refuse a table that lacks a column.

    Raises:
        InputError: not all `names` are columns.
    """
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise InputError(f"{path}: no column {', '.join(missing)}; its columns are {', '.join(table.columns)}")


def parse_numbers(path: str | Path, table: pd.DataFrame, name: str) -> pd.Series:
    """A column as finite floats.

    Raises:
        InputError: at the first line that holds none.
    """
    values = pd.to_numeric(table[name], errors="coerce")
    wrong = values.isna() | values.abs().eq(float("inf"))
    if wrong.any():
        raise InputError(
            f"{path}, line {wrong.idxmax() + 2}, column {name}: expected a number, "
            f"got {table.loc[wrong.idxmax(), name]!r}"
        )
    return values.astype("float64")


def split_values(text: str) -> list[str]:
    """The values of a list-like cell: separated by | or commas where it has them, else by spaces, RecBole's way."""
    separator = "|" if "|" in text else "," if "," in text else None
    parts = (part.strip(" \"'[]") if separator else part for part in text.split(separator))
    return [part for part in parts if part]


def _make_label(column: str) -> str:
    return column.replace("_", " ").capitalize()


def build_item_records(
    table: pd.DataFrame, kinds: dict[str, str], item_field: str, title_field: str, category_field: str | None
) -> dict[str, dict[str, str]]:
    """Original item id -> title, description, brand, categories, all text.

    The description is the item's own description column, if there is one, followed by a labelled sentence for every
    other text column: `Genres: Animation, Comedy. Year: 1995 (1990s).` The decade lets near years share a word.
    """
    records = {}
    columns = [column for column in table.columns if column not in (item_field, title_field)]
    columns = [column for column in columns if kinds[column] in ("token", "token_seq")]
    first = [column for column in columns if column in DESCRIPTION_FIELDS]
    columns = first + sorted((c for c in columns if c not in first), key=lambda column: column != category_field)
    for row in table.to_dict("records"):
        categories, brand, sentences = "", "", []
        for column in columns:
            text = clean_text(row[column])
            if not text or text.startswith(("http://", "https://")):
                continue
            if column == category_field:
                categories = ", ".join(filter(None, map(clean_text, split_values(text))))
                label = "Genres" if column in ("class", "genre", "genres") else "Categories"
                sentences.append(f"{label}: {categories}.")
            elif column in BRAND_FIELDS:
                brand = text
                sentences.append(f"Brand: {brand}.")
            elif column in DESCRIPTION_FIELDS:
                sentences.append(text)
            elif column in YEAR_FIELDS:
                decade = f" ({text[:3]}0s)" if re.fullmatch(r"\d{4}", text) else ""
                sentences.append(f"Year: {text}{decade}.")
            else:
                sentences.append(f"{_make_label(column)}: {text}.")
        records[row[item_field]] = {
            "title": clean_title(row[title_field]),
            "description": " ".join(sentences),
            "brand": brand,
            "categories": categories,
        }
    return records


def choose_column(path: Path, table: pd.DataFrame, wanted: str | None, usual: tuple[str, ...]) -> str | None:
    """The column the user named, or the first of the usual names that exists, or None.

    Raises:
        InputError: the table lacks the column that the user named.
    """
    if wanted is not None:
        require_columns(path, table, [wanted])
        return wanted
    return next((name for name in usual if name in table.columns), None)


def read_item_table(path: Path, flags: RecboleFlags) -> dict[str, dict[str, str]]:
    """The records of a .item file, as `build_item_records` makes them.

    Raises:
        InputError: a malformed file, no column of titles, or an item that stands there twice.
    """
    table, kinds = read_atomic(path)
    item_field = flags.item_field
    require_columns(path, table, [item_field])
    title_field = choose_column(path, table, flags.title_field, TITLE_FIELDS)
    if title_field is None:
        raise InputError(
            f"{path}: no title column ({', '.join(TITLE_FIELDS)}); its columns are "
            f"{', '.join(table.columns)}; name one with --title_field"
        )
    table[item_field] = unify_ids(path, item_field, table[item_field])
    twice = table[item_field].duplicated()
    if twice.any():
        row = twice.idxmax()
        raise InputError(f"{path}, line {row + 2}: item {table.loc[row, item_field]!r} is here twice")
    category_field = choose_column(path, table, flags.category_field, CATEGORY_FIELDS)
    return build_item_records(table, kinds, item_field, title_field, category_field)


def read_interaction_table(
    path: Path, flags: RecboleFlags, records: dict[str, dict[str, str]], left_out: LeftOut
) -> tuple[pd.DataFrame, int]:
    """(interactions in the time window that are rated high enough, of items with a title; how many the file has).

    Args:
        path: the .inter file.
        flags: its columns, the window and the least rating.
        records: the items, see `read_item_table`.
        left_out: takes the others, each under the first reason that applies.

    Raises:
        InputError: a malformed file, one that lacks a column, times without a unit, ids written in two ways.
    """
    raw, _ = read_atomic(path)
    rating = [] if flags.min_rating is None else [flags.rating_field]
    require_columns(path, raw, [flags.user_field, flags.item_field, flags.time_field, *rating])
    if not len(raw):
        raise InputError(f"{path}: no interactions below the header line")
    window = bound_window(flags)
    times = parse_numbers(path, raw, flags.time_field)
    times = convert_times(path, flags.time_field, times, needs_unit=any((bound or 0) > EARLIEST for bound in window))
    users, items = (unify_ids(path, name, raw[name]) for name in (flags.user_field, flags.item_field))
    table = pd.DataFrame({"user": users, "item": items, "timestamp": times})
    if len(items) and not items.isin(records.keys()).any():
        raise InputError(
            f"{path}: none of its items stands in the .item file: {items.iloc[0]!r} here, "
            f"{next(iter(records), None)!r} there; both must name items alike"
        )
    rated = pd.Series(True, index=table.index)
    if flags.min_rating is not None:
        rated = parse_numbers(path, raw, flags.rating_field) >= flags.min_rating
    named = users.map(is_id) & items.map(is_id)
    return select_interactions(table, named, rated, window, records, left_out), len(raw)
