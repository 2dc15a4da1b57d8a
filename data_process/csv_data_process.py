"""A CSV of users, items and times (and one of titles, if there is one) into items and next-item samples.

python -m data_process.csv_data_process --dataset shop --interactions_file log.csv --items_file items.csv \\
    --output_path DATA

Beside the files of every dataset stands DATA/shop.users.csv, the newest items of every user of the log, by the ids of
the log: what `recommend.py --input` reads.
"""

from __future__ import annotations

from pathlib import Path

from data_process.settings import CsvFlags
from minionerec.common.cli import parse_flags, run_command

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(CsvFlags)

import csv
import json

import pandas as pd

from data_process.cleaning import LeftOut
from data_process.csv_files import read_csv_interactions, read_csv_items
from data_process.interactions import bound_window, filter_k_core, list_dataset_files, write_dataset
from minionerec.common.files import InputError, atomic_write, require_file
from minionerec.common.processes import say
from minionerec.common.stage import open_stage


def write_users(path: Path, table: pd.DataFrame, items: pd.Series, max_history: int) -> int:
    """Write `user_id,history` of every user who has an item of the catalogue, in order of their newest interaction.

    Args:
        path: of the CSV.
        table: the interactions before the k-core, so that users with few of them get recommendations as well.
        items: original ids of the items that are left after it.
        max_history: newest items of a history.

    Returns:
        How many users were written.
    """
    known = table[table["item"].isin(set(items))].sort_values("timestamp", kind="stable")
    histories: dict[str, list[str]] = {}
    for user, item in zip(known["user"], known["item"], strict=True):
        histories[user] = [*histories.pop(user, []), item][-max_history:]
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("user_id", "history"))
        writer.writerows((user, json.dumps(history, ensure_ascii=False)) for user, history in histories.items())
    return len(histories)


def process_csv(flags: CsvFlags) -> None:
    """Filter a log and write its items and its train, valid and test samples.

    Raises:
        InputError: a flag out of range, a malformed file, or an empty split.
    """
    bound_window(flags)  # a wrong window stops the run before any file is read
    inputs = [require_file(flags.interactions_file, "interactions_file")]
    if flags.items_file is not None:
        inputs.append(require_file(flags.items_file, "items_file"))
    users_file = Path(flags.output_path) / f"{flags.dataset}.users.csv"
    stage = open_stage(
        "data_process",
        flags,
        inputs=inputs,
        outputs=[*list_dataset_files(flags.output_path, flags.dataset), users_file],
        record=Path(flags.output_path) / f"{flags.dataset}.data_process.stage.json",
    )
    if stage.finished:
        return
    items = None if flags.items_file is None else read_csv_items(flags.items_file, flags)
    left_out = LeftOut()
    table, items, raw_count = read_csv_interactions(flags, items, left_out)
    core = filter_k_core(table, flags.user_k, flags.item_k)
    left_out["k_core"] = len(table) - len(core)
    if not len(core):
        raise InputError(
            f"{flags.interactions_file}: none of its {raw_count} interactions is left ({left_out.describe()}); "
            "--user_k 2 --item_k 2 keeps more of a small log"
        )
    if flags.items_file is None:
        say("[data_process] no --items_file: titles are item ids, so semantic IDs should know behaviour (rq.behaviour)")
    counts = write_dataset(core, items, flags)
    counts["users_with_histories"] = write_users(users_file, table, core["item"], flags.max_history)
    stage.done(raw_interactions=raw_count, **left_out, **counts)


if __name__ == "__main__":
    run_command(process_csv, FLAGS)
