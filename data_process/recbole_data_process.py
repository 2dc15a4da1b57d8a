"""RecBole atomic files (`NAME.inter`, `NAME.item`, typed header) into items and next-item samples.

python -m data_process.recbole_data_process --dataset ml-100k --input_dir DIR --output_path DIR
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd

from data_process.interactions import SPLITTERS, k_core, output_files, time_window, window_bounds, write_dataset
from minionerec.common.cli import run
from minionerec.common.files import InputError, require_file
from minionerec.common.stage import Stage

TITLE_FIELDS = ("title", "movie_title", "item_title", "name", "item_name", "product_name")
CATEGORY_FIELDS = ("categories", "category", "class", "genre", "genres")
YEAR_FIELDS = ("release_year", "year")
DESCRIPTION_FIELDS = ("description", "text", "overview", "plot")
BRAND_FIELDS = ("brand", "store")


def read_atomic(path: str | Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """An atomic file as texts, its index being line number - 2, and the type of each column.

    Raises InputError naming the line for an untyped header, a line with too many or too few fields, or text not UTF-8.
    """
    path = require_file(path)
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
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from None
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
    """InputError unless all `names` are columns."""
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise InputError(f"{path}: no column {', '.join(missing)}; its columns are {', '.join(table.columns)}")


def numbers(path: str | Path, table: pd.DataFrame, name: str) -> pd.Series:
    """A column as finite floats; InputError names the first line that is none."""
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


def _label(column: str) -> str:
    return column.replace("_", " ").capitalize()


def item_records(
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
            text = " ".join(row[column].split())
            if not text or text.startswith(("http://", "https://")):
                continue
            if column == category_field:
                categories = ", ".join(split_values(text))
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
                sentences.append(f"{_label(column)}: {text}.")
        records[row[item_field]] = {
            "title": " ".join(row[title_field].split()),
            "description": " ".join(sentences),
            "brand": brand,
            "categories": categories,
        }
    return records


def pick(path: Path, table: pd.DataFrame, wanted: str | None, known: tuple[str, ...], flag: str) -> str | None:
    """The column the user named, or the first of the `known` names that exists, or None."""
    if wanted is not None:
        require_columns(path, table, [wanted])
        return wanted
    return next((name for name in known if name in table.columns), None)


def main(
    dataset: str,
    input_dir: str,
    output_path: str,
    user_k: int = 5,
    item_k: int = 5,
    st_year: int | None = None,
    st_month: int | None = None,
    ed_year: int | None = None,
    ed_month: int | None = None,
    split: str = "chronological",
    max_history: int = 10,
    min_rating: float | None = None,
    user_field: str = "user_id",
    item_field: str = "item_id",
    time_field: str = "timestamp",
    rating_field: str = "rating",
    title_field: str | None = None,
    category_field: str | None = None,
    force: bool = False,
) -> None:
    """Filter a RecBole dataset and write its items and its train, valid and test samples.

    dataset: name of the files, INPUT_DIR/DATASET.inter and .item, and of the outputs OUTPUT_PATH/DATASET.*
    st_year, st_month, ed_year, ed_month: time window [start, end) in UTC; the end month is excluded
    split: chronological (one global 8:1:1 cut) or leave_one_out
    min_rating: interactions rated lower are dropped
    title_field, category_field: columns of the .item file; found by their usual names when not given
    """
    settings = dict(locals())
    if split not in SPLITTERS:
        raise InputError(f"--split {split}: expected one of {', '.join(SPLITTERS)}")
    bounds = window_bounds(st_year, st_month, ed_year, ed_month)
    inter_file = require_file(Path(input_dir) / f"{dataset}.inter", "input_dir")
    item_file = require_file(Path(input_dir) / f"{dataset}.item", "input_dir")
    stage = Stage(
        "data_process",
        settings,
        [inter_file, item_file],
        output_files(output_path, dataset),
        Path(output_path) / f"{dataset}.data_process.stage.json",
        force,
    )
    if stage.finished:
        return

    raw_items, kinds = read_atomic(item_file)
    require_columns(item_file, raw_items, [item_field])
    title = pick(item_file, raw_items, title_field, TITLE_FIELDS, "title_field")
    if title is None:
        raise InputError(
            f"{item_file}: no title column ({', '.join(TITLE_FIELDS)}); its columns are "
            f"{', '.join(raw_items.columns)}; name one with --title_field"
        )
    twice = raw_items[item_field].duplicated()
    if twice.any():
        row = twice.idxmax()
        raise InputError(f"{item_file}, line {row + 2}: item {raw_items.loc[row, item_field]!r} is here twice")
    category = pick(item_file, raw_items, category_field, CATEGORY_FIELDS, "category_field")
    records = item_records(raw_items, kinds, item_field, title, category)

    raw, _ = read_atomic(inter_file)
    rating = [] if min_rating is None else [rating_field]
    require_columns(inter_file, raw, [user_field, item_field, time_field, *rating])
    table = pd.DataFrame(
        {
            "user": raw[user_field],
            "item": raw[item_field],
            "timestamp": numbers(inter_file, raw, time_field),
        }
    )
    total = len(table)
    if min_rating is not None:
        table = table[numbers(inter_file, raw, rating_field) >= min_rating]
    table = time_window(table, *bounds)
    with_title = {name for name, record in records.items() if record["title"]}
    known = table["item"].isin(with_title)
    untitled = int((~known).sum())
    table = k_core(table[known], user_k, item_k)
    counts = write_dataset(table, records, output_path, dataset, split, max_history)
    stage.done(raw_interactions=total, without_title=untitled, **counts)


if __name__ == "__main__":
    run(main)
