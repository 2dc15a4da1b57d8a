"""Interactions and semantic IDs into the CSV splits and the info file that training reads.

python convert_dataset.py --dataset_name NAME --data_dir DIR --output_dir DIR
"""

from __future__ import annotations

import csv
from pathlib import Path

from data_process.interactions import SPLITS, read_inter
from minionerec.common.cli import run
from minionerec.common.files import InputError, atomic_write, read_json
from minionerec.common.items import read_item_records
from minionerec.common.records import CSV_COLUMNS
from minionerec.common.stage import Stage


def read_sids(path: str | Path, n_items: int, shared_sids: bool) -> list[str]:
    """The SID of items 0..n_items-1 as one text each, from `{ds}.index.json`.

    Raises InputError for an item without SID, a SID that is no list of tokens, and, unless `shared_sids`, two items of
    one SID.
    """
    index = read_json(path)
    if not isinstance(index, dict):
        raise InputError(f'{path}: expected an object {{"0": ["<a_1>", "<b_2>"], ...}}')
    sids: list[str] = []
    owner: dict[str, int] = {}
    for item in range(n_items):
        tokens = index.get(str(item))
        if tokens is None:
            raise InputError(f"{path}: item {item} has no SID (the item file has {n_items} items)")
        if (
            not isinstance(tokens, list)
            or not tokens
            or not all(isinstance(token, str) and token and not any(c.isspace() for c in token) for token in tokens)
        ):
            raise InputError(f"{path}, item {item}: expected a list of tokens, got {str(tokens)[:60]}")
        sid = "".join(tokens)
        if sid in owner and not shared_sids:
            raise InputError(
                f"{path}: items {owner[sid]} and {item} share the SID {sid}; "
                "make the index with --collisions nearest_free, or allow it with --shared_sids True"
            )
        owner.setdefault(sid, item)
        sids.append(sid)
    unknown = next((item for item in index if not (item.isdigit() and int(item) < n_items)), None)
    if unknown is not None:
        raise InputError(f"{path}: item {unknown!r} is not among the {n_items} items of the item file")
    return sids


def main(
    dataset_name: str,
    data_dir: str,
    output_dir: str,
    category: str | None = None,
    index_file: str | None = None,
    item_file: str | None = None,
    shared_sids: bool = False,
    force: bool = False,
) -> None:
    """Write OUTPUT_DIR/train|valid|test/CATEGORY.csv and OUTPUT_DIR/info/CATEGORY.txt.

    data_dir: folder with DATASET_NAME.train.inter, .valid.inter, .test.inter, .item.json and .index.json
    category: name of the output files; default dataset_name
    index_file, item_file: when they are elsewhere
    shared_sids: allow several items to have one SID
    """
    settings = dict(locals())
    data, output, name = Path(data_dir), Path(output_dir), category or dataset_name
    items_path = Path(item_file) if item_file else data / f"{dataset_name}.item.json"
    index_path = Path(index_file) if index_file else data / f"{dataset_name}.index.json"
    inters = {split: data / f"{dataset_name}.{split}.inter" for split in SPLITS}
    tables = {split: output / split / f"{name}.csv" for split in SPLITS}
    info = output / "info" / f"{name}.txt"
    stage = Stage(
        "convert_dataset",
        settings,
        [items_path, index_path, *inters.values()],
        [*tables.values(), info],
        output / f"{name}.convert_dataset.stage.json",
        force,
    )
    if stage.finished:
        return
    items = read_item_records(items_path)
    titles = [" ".join(item["title"].split()) for item in items.values()]
    sids = read_sids(index_path, len(items), shared_sids)
    splits = {split: read_inter(path, len(items)) for split, path in inters.items()}
    for split, (users, histories, targets) in splits.items():
        with atomic_write(tables[split]) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(CSV_COLUMNS)
            for user, history, target in zip(users, histories, targets):
                writer.writerow(
                    (
                        user,
                        [titles[i] for i in history],
                        titles[target],
                        history,
                        target,
                        [sids[i] for i in history],
                        sids[target],
                    )
                )
    with atomic_write(info) as temporary:
        rows = (f"{sid}\t{title}\t{item}\n" for item, (sid, title) in enumerate(zip(sids, titles)))
        temporary.write_text("".join(rows), encoding="utf-8")
    stage.done(
        items=len(items),
        distinct_sids=len(set(sids)),
        **{f"{split}_rows": len(users) for split, (users, _, _) in splits.items()},
    )


if __name__ == "__main__":
    run(main)
