"""Interactions and semantic IDs into the CSV splits and the info file that training reads.

python convert_dataset.py --dataset_name NAME --data_dir DIR --output_dir DIR

Writes OUTPUT_DIR/train|valid|test/CATEGORY.csv and OUTPUT_DIR/info/CATEGORY.txt.
"""

from __future__ import annotations

from pathlib import Path

from data_process.settings import ConvertFlags
from minionerec.common.cli import parse_flags, run_command

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(ConvertFlags)

import csv
import random
from collections.abc import Collection, Iterable

from data_process.interactions import SPLITS
from minionerec.common.files import InputError, atomic_write
from minionerec.common.interactions import read_inter
from minionerec.common.items import read_item_ids, read_item_records
from minionerec.common.records import read_index
from minionerec.common.row_files import CSV_COLUMNS
from minionerec.common.stage import open_stage

Sample = tuple[str, list[int], int]  # user, history (oldest first), target


def read_sids(path: str | Path, n_items: int, shared_sids: bool) -> list[str]:
    """The SID of items 0..n_items-1 as one text each, from `{ds}.index.json`.

    Raises:
        InputError: an item without SID, a SID that is no list of tokens, an item that the item file lacks, and, unless
            `shared_sids`, two items of one SID.
    """
    index = read_index(path)
    sids: list[str] = []
    first_item: dict[str, int] = {}
    for item in range(n_items):
        if item not in index:
            raise InputError(f"{path}: item {item} has no SID (the item file has {n_items} items)")
        sid = "".join(index[item])
        if sid in first_item and not shared_sids:
            raise InputError(
                f"{path}: items {first_item[sid]} and {item} share the SID {sid}; "
                "make the index with --collisions nearest_free, or allow it with --shared_sids True"
            )
        first_item.setdefault(sid, item)
        sids.append(sid)
    surplus = next((item for item in index if not 0 <= item < n_items), None)
    if surplus is not None:
        raise InputError(f"{path}: item {surplus} is not among the {n_items} items of the item file")
    return sids


def keep_longest(samples: list[Sample]) -> list[Sample]:
    """One sample per user: that with the longest history, of equally long ones the first.

    Users keep the order of their first samples.
    """
    longest: dict[str, Sample] = {}
    for sample in samples:
        user, history, _ = sample
        if user not in longest or len(history) > len(longest[user][1]):
            longest[user] = sample
    return list(longest.values())


def draw_samples(samples: list[Sample], count: int | None, seed: int) -> list[Sample]:
    """`count` random samples in their order; all of them where there are no more, or count is None."""
    if count is None or len(samples) <= count:
        return samples
    rows = random.Random(seed).sample(range(len(samples)), count)
    return [samples[row] for row in sorted(rows)]


def read_samples(paths: dict[str, Path], n_items: int, flags: ConvertFlags) -> dict[str, list[Sample]]:
    """The samples of every split that the flags keep."""
    splits = {split: list(zip(*read_inter(path, n_items), strict=True)) for split, path in paths.items()}
    if flags.keep_longest_only:
        splits["train"] = keep_longest(splits["train"])
    splits["valid"] = draw_samples(splits["valid"], flags.max_valid_samples, flags.seed)
    splits["test"] = draw_samples(splits["test"], flags.max_test_samples, flags.seed)
    return splits


def check_listed(splits: dict[str, list[Sample]], listed: Collection[int], path: str) -> None:
    """Every item of the samples must be listed.

    Raises:
        InputError: one is not in the file `path`.
    """
    known = set(listed)
    for split, samples in splits.items():
        for number, (_, history, target) in enumerate(samples, 1):
            unknown = next((item for item in (*history, target) if item not in known), None)
            if unknown is not None:
                raise InputError(f"--only_items {path}: lacks item {unknown} of sample {number} of the {split} split")


def write_table(path: Path, samples: Iterable[Sample], titles: list[str], sids: list[str]) -> None:
    """Write the CSV of a split; titles and SIDs are those of the items by number."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for user, history, target in samples:
            history_titles, history_sids = [titles[item] for item in history], [sids[item] for item in history]
            writer.writerow((user, history_titles, titles[target], history, target, history_sids, sids[target]))


def convert_dataset(flags: ConvertFlags) -> None:
    """Write the CSV splits and the info file of a dataset.

    Raises:
        InputError: a file that is missing or malformed, or files that do not fit each other.
    """
    for name in ("max_valid_samples", "max_test_samples"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise InputError(f"--{name} {getattr(flags, name)}: expected 1 or more")
    data, output, dataset = Path(flags.data_dir), Path(flags.output_dir), flags.dataset_name
    category = flags.category or dataset
    items_path = Path(flags.item_file) if flags.item_file else data / f"{dataset}.item.json"
    index_path = Path(flags.index_file) if flags.index_file else data / f"{dataset}.index.json"
    inters = {split: data / f"{dataset}.{split}.inter" for split in SPLITS}
    tables = {split: output / split / f"{category}.csv" for split in SPLITS}
    info = output / "info" / f"{category}.txt"
    stage = open_stage(
        "convert_dataset",
        flags,
        inputs=[items_path, index_path, *inters.values(), flags.only_items],
        outputs=[*tables.values(), info],
        record=output / f"{category}.convert_dataset.stage.json",
    )
    if stage.finished:
        return
    items = read_item_records(items_path)
    titles = [" ".join(item["title"].split()) for item in items.values()]
    sids = read_sids(index_path, len(items), flags.shared_sids)
    splits = read_samples(inters, len(items), flags)
    listed = range(len(items))
    if flags.only_items:
        listed = sorted(set(read_item_ids(flags.only_items, listed)))
        check_listed(splits, listed, flags.only_items)
    for split, samples in splits.items():
        write_table(tables[split], samples, titles, sids)
    with atomic_write(info) as temporary:
        rows = (f"{sids[item]}\t{titles[item]}\t{item}\n" for item in listed)
        temporary.write_text("".join(rows), encoding="utf-8")
    stage.done(
        items=len(listed),
        distinct_sids=len({sids[item] for item in listed}),
        **{f"{split}_rows": len(samples) for split, samples in splits.items()},
    )


if __name__ == "__main__":
    run_command(convert_dataset, FLAGS)
