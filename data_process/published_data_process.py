"""Splits in the published format into items and next-item samples, to give their items SIDs of one's own.

python -m data_process.published_data_process --dataset Industrial_and_Scientific --splits_dir DIR --output_path OUT

Rows, users, item ids and their order stay what they are. Writes OUT/DATASET.item.json, .train.inter, .valid.inter and
.test.inter, which text embeddings, `rq` and convert_dataset.py read.
"""

from __future__ import annotations

from pathlib import Path

from data_process.settings import PublishedFlags
from minionerec.common.cli import parse_flags, run_command

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(PublishedFlags)

from data_process.interactions import SPLITS, write_lines
from minionerec.common.files import InputError, write_json
from minionerec.common.interactions import INTER_COLUMNS
from minionerec.common.items import read_item_records
from minionerec.common.records import read_rows
from minionerec.common.stage import open_stage


def find_split_file(folder: Path, pattern: str) -> Path:
    """The one file below the folder that matches; published names carry a suffix after the dataset's.

    Raises:
        InputError: none, or several.
    """
    matches = sorted(folder.glob(pattern))
    if len(matches) != 1:
        raise InputError(f"{folder / pattern}: {len(matches) or 'no'} files match, expected one")
    return matches[0]


def process_published(flags: PublishedFlags) -> None:
    """Write the items and samples of published splits.

    Raises:
        InputError: a file that is missing, malformed or of other items.
    """
    root, output = Path(flags.splits_dir), Path(flags.output_path)
    items_file = find_split_file(root, f"index/{flags.dataset}*.item.json")
    tables = {split: find_split_file(root, f"{split}/{flags.dataset}*.csv") for split in SPLITS}
    outputs = {split: output / f"{flags.dataset}.{split}.inter" for split in SPLITS}
    record = output / f"{flags.dataset}.data_process.stage.json"
    items_output = output / f"{flags.dataset}.item.json"
    stage = open_stage("data_process", flags, [items_file, *tables.values()], [items_output, *outputs.values()], record)
    if stage.finished:
        return
    items = read_item_records(items_file)
    counts = {}
    for split, table in tables.items():
        lines = []
        for number, row in enumerate(read_rows(table), 1):
            unknown = next((i for i in (*row.history_ids, row.item_id) if not 0 <= i < len(items)), None)
            if unknown is not None:
                raise InputError(f"{table}, row {number}: item {unknown} is not in {items_file}")
            if set(row.user_id) & set("\t\r\n"):
                raise InputError(f"{table}, row {number}: the user id has a tab or a line end")
            lines.append(f"{row.user_id}\t{' '.join(map(str, row.history_ids))}\t{row.item_id}")
        write_lines(outputs[split], list(INTER_COLUMNS), lines)
        counts[f"{split}_rows"] = len(lines)
    write_json(items_output, items)
    stage.done(items=len(items), **counts)


if __name__ == "__main__":
    run_command(process_published, FLAGS)
