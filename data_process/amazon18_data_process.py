"""Amazon Reviews dumps (2014, 2018, 2023) into items and next-item samples.

python -m data_process.amazon18_data_process --dataset Office_Products --metadata_file meta_Office_Products.json.gz \\
    --reviews_file Office_Products.json.gz --st_year 2016 --st_month 10 --ed_year 2018 --ed_month 11 --output_path DIR

Both files are read as streams, so memory grows with the reviews that are kept and the items that have a title, not with the
files. In this order:
1. Items without a valid title are left out: titles are cleaned of HTML, then must not be empty, a piece of a web page, or
   longer than --max_title_words (`amazon_files.plain_title` has the details). Of several records of one item the first with
   a valid title counts.
2. Reviews outside the window, rated too low, or of left-out items are dropped, then duplicates.
3. Rounds of k-core until every user has user_k and every item item_k reviews; samples, split and files as everywhere.
Reviews of one time keep their order in the file. Nothing is random: the same input gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from data_process.amazon_files import Dump, read_reviews, read_texts, read_titles
from data_process.interactions import SPLITTERS, k_core, output_files, window_bounds, write_dataset
from minionerec.common.cli import run
from minionerec.common.files import InputError
from minionerec.common.stage import Stage

DUPLICATES = ("same_time", "user_item")


def drop_duplicates(table: pd.DataFrame, duplicates: str) -> pd.DataFrame:
    """`table` (integer user and item, timestamp) without duplicate reviews; the rows that stay keep their order.

    same_time: of reviews with equal user, item and time the first row stays; a review at another time is a repeat purchase.
    user_item: of reviews with equal user and item the earliest stays, of equally early ones the first row.
    """
    user, item, time = (table[name].to_numpy() for name in ("user", "item", "timestamp"))
    order = np.lexsort((time, item, user))
    user, item, time = user[order], item[order], time[order]
    repeated = (user[1:] == user[:-1]) & (item[1:] == item[:-1])
    if duplicates == "same_time":
        repeated &= time[1:] == time[:-1]
    keep = np.ones(len(table), dtype=bool)
    keep[order[1:][repeated]] = False
    return table[keep]


def named(numbers: np.ndarray, names: list[str]) -> pd.Categorical:
    """`names[number]` for each of `numbers`, four bytes each."""
    used, codes = np.unique(numbers, return_inverse=True)
    return pd.Categorical.from_codes(codes, [names[number] for number in used])


def main(
    dataset: str,
    metadata_file: str,
    reviews_file: str,
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
    max_title_words: int = 20,
    duplicates: str = "same_time",
    max_bad_lines: int = 100,
    force: bool = False,
) -> None:
    """Filter an Amazon Reviews dump and write its items and its train, valid and test samples.

    dataset: name of the outputs, OUTPUT_PATH/DATASET.*
    metadata_file, reviews_file: JSON lines or Python literals, plain or gzip, of 2014, 2018 or 2023
    st_year, st_month, ed_year, ed_month: time window [start, end) in UTC; the end month is excluded
    split: chronological (one global 8:1:1 cut) or leave_one_out
    min_rating: reviews rated lower are dropped
    max_title_words: items with a longer title are left out
    duplicates: same_time (equal user, item and time count once) or user_item (only a user's first review of an item
        counts, among those in the window and rated high enough)
    max_bad_lines: more malformed lines in a file stop the run
    """
    settings = dict(locals())
    for flag, value, choices in (("split", split, SPLITTERS), ("duplicates", duplicates, DUPLICATES)):
        if value not in choices:
            raise InputError(f"--{flag} {value}: expected one of {', '.join(choices)}")
    least = {"user_k": 0, "item_k": 0, "max_history": 1, "max_title_words": 1, "max_bad_lines": 0}
    for flag, minimum in least.items():
        if settings[flag] < minimum:
            raise InputError(f"--{flag} {settings[flag]}: expected {minimum} or more")
    bounds = window_bounds(st_year, st_month, ed_year, ed_month)
    metadata = Dump(metadata_file, "metadata_file", max_bad_lines)
    dump = Dump(reviews_file, "reviews_file", max_bad_lines)
    stage = Stage(
        "data_process",
        settings,
        [metadata.path, dump.path],
        output_files(output_path, dataset),
        Path(output_path) / f"{dataset}.data_process.stage.json",
        force,
    )
    if stage.finished:
        return

    items, lines = read_titles(metadata, max_title_words)
    if not items:
        raise InputError(f"{metadata.path}: none of its {metadata.lines} lines is an item with a valid title")
    reviews = read_reviews(dump, items, *bounds, min_rating)
    left_out = {
        "outside_window": reviews.outside_window,
        "low_rating": reviews.low_rating,
        "without_title": reviews.without_title,
    }
    if not len(reviews.table):
        reasons = ", ".join(f"{name} {count}" for name, count in left_out.items())
        raise InputError(
            f"{dump.path}: none of its {dump.lines} reviews is left ({reasons}, malformed {dump.bad_lines})"
        )
    table = drop_duplicates(reviews.table, duplicates)
    left_out["duplicates"] = len(reviews.table) - len(table)
    table = k_core(table, user_k, item_k)
    table = pd.DataFrame(
        {
            "user": named(table["user"].to_numpy(), reviews.users),
            "item": named(table["item"].to_numpy(), list(items)),
            "timestamp": table["timestamp"].to_numpy(),
        }
    )
    texts = read_texts(metadata, {lines[items[item]]: item for item in table["item"].cat.categories})
    counts = write_dataset(table, texts, output_path, dataset, split, max_history)
    stage.done(
        metadata_lines=metadata.lines,
        malformed_metadata=metadata.bad_lines,
        items_with_title=len(items),
        raw_reviews=dump.lines,
        malformed_reviews=dump.bad_lines,
        **left_out,
        **counts,
    )


if __name__ == "__main__":
    run(main)
