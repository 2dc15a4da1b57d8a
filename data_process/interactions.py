"""What every raw log goes through: time window, k-core, next-item samples, splits, and the files written.

An interaction table is a pandas DataFrame with the columns `user`, `item` (original ids, any hashable) and `timestamp`
(seconds since 1970-01-01 UTC). Times are never turned into local time, so results do not depend on the machine's zone.
"""

from __future__ import annotations

import calendar
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_process.settings import SampleFlags
from minionerec.common.files import InputError, atomic_write, write_json
from minionerec.common.interactions import INTER_COLUMNS
from minionerec.common.texts import MISSING

SPLITS = ("train", "valid", "test")


def start_of_month(year: int, month: int) -> int:
    """Seconds since 1970-01-01 UTC at which a month begins, in UTC.

    Raises:
        InputError: no such month.
    """
    if not 1 <= month <= 12:
        raise InputError(f"month {month}: expected 1 to 12")
    return calendar.timegm((year, month, 1, 0, 0, 0))


def bound_window(flags: SampleFlags) -> tuple[int | None, int | None]:
    """(start, end) of the time window in seconds UTC; None where that side is open.

    A year without a month means its January.

    Raises:
        InputError: a month without a year, or an empty window.
    """
    st_year, st_month, ed_year, ed_month = flags.st_year, flags.st_month, flags.ed_year, flags.ed_month
    if (st_month is not None and st_year is None) or (ed_month is not None and ed_year is None):
        raise InputError("--st_month / --ed_month need --st_year / --ed_year")
    start = None if st_year is None else start_of_month(st_year, 1 if st_month is None else st_month)
    end = None if ed_year is None else start_of_month(ed_year, 1 if ed_month is None else ed_month)
    if start is not None and end is not None and start >= end:
        raise InputError("the time window is empty: its start is not before its end (the end month is excluded)")
    return start, end


def filter_window(table: pd.DataFrame, start: float | None, end: float | None) -> pd.DataFrame:
    """The interactions with start <= timestamp < end; None leaves a side open."""
    keep = np.ones(len(table), dtype=bool)
    if start is not None:
        keep &= table["timestamp"].to_numpy() >= start
    if end is not None:
        keep &= table["timestamp"].to_numpy() < end
    return table[keep]


def select_interactions(
    table: pd.DataFrame,
    named: pd.Series,
    rated: pd.Series,
    window: tuple[float | None, float | None],
    items: dict[str, dict[str, str]],
    left_out: Counter,
) -> pd.DataFrame:
    """The interactions of a log that count: named, in the window, rated high enough, of an item with a title.

    Args:
        table: an interaction table.
        named: of every row, whether user and item can be ids; words for a missing value are none here either.
        rated: of every row, whether its rating is high enough.
        window: see `filter_window`.
        items: original item id -> title, ...
        left_out: takes the number of the others, each under the first reason that applies.
    """
    for column in ("user", "item"):
        named = named & ~table[column].str.lower().isin(MISSING)
    reasons = {
        "without_id": ~named,
        "outside_window": ~table.index.to_series().isin(filter_window(table, *window).index),
        "low_rating": ~rated,
        "not_in_item_file": ~table["item"].isin(items.keys()),
        "without_title": ~table["item"].isin({name for name, record in items.items() if record["title"]}),
    }
    keep = pd.Series(True, index=table.index)
    for reason, applies in reasons.items():
        left_out[reason] = int((keep & applies).sum())
        keep &= ~applies
    return table[keep]


def filter_k_core(table: pd.DataFrame, user_k: int, item_k: int) -> pd.DataFrame:
    """The largest subset in which every user has >= user_k and every item >= item_k interactions.

    Interactions are counted, repeats included. 0 or 1 switches a side off. Rounds go on until nothing changes; the
    result does not depend on the order of removal.

    Raises:
        InputError: a number below 0.
    """
    if user_k < 0 or item_k < 0:
        raise InputError(f"--user_k {user_k}, --item_k {item_k}: expected 0 or more")
    users, _ = pd.factorize(table["user"])
    items, _ = pd.factorize(table["item"])
    rows = np.arange(len(table))
    while len(rows):
        keep = np.bincount(users[rows])[users[rows]] >= user_k
        keep &= np.bincount(items[rows])[items[rows]] >= item_k
        if keep.all():
            break
        rows = rows[keep]
    return table.iloc[rows]


@dataclass
class Samples:
    """Next-item samples in time order of their targets; sample i's history is `log[begin[i]:end[i]]`.

    Attributes:
        user, target: mapped ids [n].
        log: mapped item ids [interactions], user by user, oldest first.
        begin, end: [n], where each history stands in it.
        after: [n], how many interactions the user has after the target (0 = the target is the user's last).
    """

    user: np.ndarray
    target: np.ndarray
    log: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    after: np.ndarray

    def __len__(self) -> int:
        return len(self.user)


def number_ids(table: pd.DataFrame) -> tuple[pd.DataFrame, list, list]:
    """Sort by time and number users and items from 0 in order of first appearance.

    Sorting is stable: equal timestamps keep the order of the log.

    Returns:
        The table with integer `user` and `item`, and the original user and item ids by number.
    """
    table = table.iloc[np.argsort(table["timestamp"].to_numpy(), kind="stable")]
    users, user_names = pd.factorize(table["user"])
    items, item_names = pd.factorize(table["item"])
    mapped = pd.DataFrame({"user": users, "item": items, "timestamp": table["timestamp"].to_numpy()})
    return mapped, list(user_names), list(item_names)


def build_samples(table: pd.DataFrame, max_history: int) -> Samples:
    """A sample for every interaction but a user's first, its item being the target.

    The history is the up to `max_history` items before it. `table` comes from `number_ids`, so it is in time order,
    and so are the samples.

    Raises:
        InputError: max_history below 1.
    """
    if max_history < 1:
        raise InputError(f"--max_history {max_history}: expected 1 or more")
    users, items = table["user"].to_numpy(), table["item"].to_numpy()
    by_user = np.argsort(users, kind="stable")
    counts = np.bincount(users)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    position = np.empty(len(users), dtype=np.int64)  # of each interaction in the log
    position[by_user] = np.arange(len(users))
    first_of_user = np.empty_like(position)
    first_of_user[by_user] = first
    rows = np.flatnonzero(position > first_of_user)
    end = position[rows]
    begin = np.maximum(end - max_history, first_of_user[rows])
    after = first_of_user[rows] + counts[users[rows]] - 1 - end
    return Samples(users[rows], items[rows], items[by_user], begin, end, after)


def split_chronological(samples: Samples) -> dict[str, np.ndarray]:
    """Sample numbers of one global cut in time: the first 80 %, the next 10 %, the last 10 %."""
    n = len(samples)
    train, valid = n * 8 // 10, n * 9 // 10
    order = np.arange(n)
    return {"train": order[:train], "valid": order[train:valid], "test": order[valid:]}


def split_leave_one_out(samples: Samples) -> dict[str, np.ndarray]:
    """Sample numbers by a user's own end: the last target is test, the second last valid, all before train."""
    return {
        "train": np.flatnonzero(samples.after >= 2),
        "valid": np.flatnonzero(samples.after == 1),
        "test": np.flatnonzero(samples.after == 0),
    }


SPLITTERS = {"chronological": split_chronological, "leave_one_out": split_leave_one_out}


def list_dataset_files(output_path: str | Path, dataset: str) -> list[Path]:
    """The files `write_dataset` makes."""
    ends = ["item.json", *(f"{split}.inter" for split in SPLITS), "user2id", "item2id"]
    return [Path(output_path) / f"{dataset}.{end}" for end in ends]


def write_lines(path: Path, header: list[str], rows: Iterable[str]) -> None:
    """Write a tab-separated table: its header, and rows that are lines already."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{row}\n" for row in itertools.chain(["\t".join(header)], rows))


def write_dataset(table: pd.DataFrame, items: dict[str, dict[str, str]], flags: SampleFlags) -> dict[str, int]:
    """Write the six files of a dataset.

    Args:
        table: interactions after window and k-core.
        items: original item id (as text) -> title, description, brand, categories.
        flags: name and folder of the files, split and longest history.

    Returns:
        The counts to report.

    Raises:
        InputError: a split is empty.
    """
    if not len(table):
        raise InputError("no interaction is left after the time window, the least rating and the k-core")
    mapped, user_names, item_names = number_ids(table)
    samples = build_samples(mapped, flags.max_history)
    parts = SPLITTERS[flags.split](samples)
    for name, part in parts.items():
        if not len(part):
            counts = f"{len(mapped)} interactions of {len(user_names)} users"
            raise InputError(f"the {name} split is empty: {counts} are left")
    folder, dataset = Path(flags.output_path), flags.dataset
    texts = samples.log.astype(str).tolist()
    for name, part in parts.items():
        columns = (column[part].tolist() for column in (samples.user, samples.begin, samples.end, samples.target))
        rows = (
            f"{user}\t{' '.join(texts[begin:end])}\t{target}" for user, begin, end, target in zip(*columns, strict=True)
        )
        write_lines(folder / f"{dataset}.{name}.inter", list(INTER_COLUMNS), rows)
    for kind, names in (("user", user_names), ("item", item_names)):
        rows = (f"{name}\t{number}" for number, name in enumerate(names))
        write_lines(folder / f"{dataset}.{kind}2id", [f"original_{kind}", f"{kind}_id"], rows)
    write_json(folder / f"{dataset}.item.json", {str(i): items[str(name)] for i, name in enumerate(item_names)})
    return {
        "users": len(user_names),
        "items": len(item_names),
        "interactions": len(mapped),
        **{f"{name}_rows": len(part) for name, part in parts.items()},
    }
