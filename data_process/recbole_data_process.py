"""RecBole atomic files (`NAME.inter`, `NAME.item`, typed header) into items and next-item samples.

python -m data_process.recbole_data_process --dataset ml-100k --input_dir DIR --output_path DIR
"""

from __future__ import annotations

from pathlib import Path

from data_process.settings import RecboleFlags
from minionerec.common.cli import parse_flags, run_command

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(RecboleFlags)

from data_process.cleaning import LeftOut
from data_process.interactions import bound_window, filter_k_core, list_dataset_files, write_dataset
from data_process.recbole_files import read_interaction_table, read_item_table
from minionerec.common.files import InputError, require_file
from minionerec.common.stage import open_stage


def process_recbole(flags: RecboleFlags) -> None:
    """Filter a RecBole dataset and write its items and its train, valid and test samples.

    Raises:
        InputError: a flag out of range, a malformed file, or an empty split.
    """
    bound_window(flags)  # a wrong window stops the run before any file is read
    inter_file = require_file(Path(flags.input_dir) / f"{flags.dataset}.inter", "input_dir")
    item_file = require_file(Path(flags.input_dir) / f"{flags.dataset}.item", "input_dir")
    stage = open_stage(
        "data_process",
        flags,
        inputs=[inter_file, item_file],
        outputs=list_dataset_files(flags.output_path, flags.dataset),
        record=Path(flags.output_path) / f"{flags.dataset}.data_process.stage.json",
    )
    if stage.finished:
        return
    records = read_item_table(item_file, flags)
    left_out = LeftOut()
    table, raw_count = read_interaction_table(inter_file, flags, records, left_out)
    core = filter_k_core(table, flags.user_k, flags.item_k)
    left_out["k_core"] = len(table) - len(core)
    if not len(core):
        raise InputError(f"{inter_file}: none of its {raw_count} interactions is left ({left_out.describe()})")
    counts = write_dataset(core, records, flags)
    stage.done(raw_interactions=raw_count, **left_out, **counts)


if __name__ == "__main__":
    run_command(process_recbole, FLAGS)
