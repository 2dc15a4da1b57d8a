"""Amazon Reviews dumps (2014, 2018, 2023) into items and next-item samples.

python -m data_process.amazon18_data_process --dataset Office_Products --metadata_file meta_Office_Products.json.gz \\
    --reviews_file Office_Products.json.gz --st_year 2016 --st_month 10 --ed_year 2018 --ed_month 11 --output_path DIR

Both files are read as streams, so memory grows with the reviews that are kept and the items that have a title, not with
the files. In this order:
1. Items without a valid title are left out: titles are cleaned of HTML, then must not be empty, a piece of a web page,
   or longer than --max_title_words (`amazon_files.clean_title` has the details). Of several records of one item the
   first with a valid title counts.
2. Reviews outside the window, rated too low, or of left-out items are dropped, then duplicates.
3. Rounds of k-core until every user has user_k and every item item_k reviews; samples, split and files as everywhere.
Reviews of one time keep their order in the file. Nothing is random: the same input gives the same bytes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_process.settings import AmazonFlags
from minionerec.common.cli import parse_flags, run_command

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(AmazonFlags)

import numpy as np
import pandas as pd

from data_process.amazon_files import Dump, Reviews, read_item_texts, read_reviews, read_titles
from data_process.cleaning import LeftOut
from data_process.interactions import bound_window, filter_k_core, list_dataset_files, write_dataset
from minionerec.common.files import InputError
from minionerec.common.stage import open_stage

ENDINGS = (".json", ".json.gz", ".jsonl", ".jsonl.gz")  # of dumps, the published one first
LEAST = {"user_k": 0, "item_k": 0, "max_history": 1, "max_title_words": 1, "max_bad_lines": 0}


def drop_duplicates(table: pd.DataFrame, duplicates: str) -> pd.DataFrame:
    """Leave out duplicate reviews; the rows that stay keep their order.

    Args:
        table: integer user and item, timestamp.
        duplicates: same_time: of reviews with equal user, item and time the first row stays; a review at another time
            is a repeat purchase. user_item: of reviews with equal user and item the earliest stays, of equally early
            ones the first row.
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


def name_numbers(numbers: np.ndarray, names: list[str]) -> pd.Categorical:
    """`names[number]` for each of `numbers`, four bytes each."""
    used, codes = np.unique(numbers, return_inverse=True)
    return pd.Categorical.from_codes(codes, [names[number] for number in used])


def find_dump(flag: str, names: list[str]) -> str:
    """The first dump in the working folder that has one of the names.

    Raises:
        InputError: there is none.
    """
    candidates = [name + ending for name in names for ending in ENDINGS]
    path = next((path for path in candidates if Path(path).is_file()), None)
    if path is None:
        raise InputError(
            f"missing flag: --{flag}, and this folder has no {' or '.join(name + '.json' for name in names)}"
        )
    return path


def resolve_amazon_flags(flags: AmazonFlags) -> AmazonFlags:
    """The flags with both dumps named, as given or as the published script finds them.

    Raises:
        InputError: a number out of range, or a dump that is not given and not found.
    """
    for name, least in LEAST.items():
        if getattr(flags, name) < least:
            raise InputError(f"--{name} {getattr(flags, name)}: expected {least} or more")
    dataset = flags.dataset
    return replace(
        flags,
        metadata_file=flags.metadata_file or find_dump("metadata_file", [f"meta_{dataset}"]),
        reviews_file=flags.reviews_file or find_dump("reviews_file", [f"{dataset}_5", dataset]),
    )


def build_table(reviews: Reviews, items: dict[str, int], flags: AmazonFlags) -> tuple[pd.DataFrame, int]:
    """(interactions after k-core with the original ids, duplicate reviews that were dropped)."""
    table = drop_duplicates(reviews.table, flags.duplicates)
    dropped = len(reviews.table) - len(table)
    table = filter_k_core(table, flags.user_k, flags.item_k)
    table = pd.DataFrame(
        {
            "user": name_numbers(table["user"].to_numpy(), reviews.users),
            "item": name_numbers(table["item"].to_numpy(), list(items)),
            "timestamp": table["timestamp"].to_numpy(),
        }
    )
    return table, dropped


def process_amazon(flags: AmazonFlags) -> None:
    """Filter an Amazon Reviews dump and write its items and its train, valid and test samples.

    Raises:
        InputError: a flag out of range, a malformed dump, or no item or review left.
    """
    flags = resolve_amazon_flags(flags)
    window = bound_window(flags)
    metadata = Dump(flags.metadata_file, "metadata_file", flags.max_bad_lines)
    dump = Dump(flags.reviews_file, "reviews_file", flags.max_bad_lines)
    stage = open_stage(
        "data_process",
        flags,
        inputs=[metadata.path, dump.path],
        outputs=list_dataset_files(flags.output_path, flags.dataset),
        record=Path(flags.output_path) / f"{flags.dataset}.data_process.stage.json",
    )
    if stage.finished:
        return
    items, lines = read_titles(metadata, flags.max_title_words)
    if not items:
        raise InputError(f"{metadata.path}: none of its {metadata.lines} lines is an item with a valid title")
    reviews = read_reviews(dump, items, *window, flags.min_rating)
    left_out = LeftOut(
        outside_window=reviews.outside_window, low_rating=reviews.low_rating, without_title=reviews.without_title
    )
    nothing = f"{dump.path}: none of its {dump.lines} reviews is left ({{}}, malformed {dump.bad_lines})"
    if not len(reviews.table):
        raise InputError(nothing.format(left_out.describe()))
    table, left_out["duplicates"] = build_table(reviews, items, flags)
    left_out["k_core"] = len(reviews.table) - left_out["duplicates"] - len(table)
    if not len(table):
        raise InputError(nothing.format(left_out.describe()))
    texts = read_item_texts(metadata, {lines[items[item]]: item for item in table["item"].cat.categories})
    counts = write_dataset(table, texts, flags)
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
    run_command(process_amazon, FLAGS)
