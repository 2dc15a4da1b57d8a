"""Two datasets with items in one numbering, so that both get semantic IDs out of one space.

python -m data_process.join_data_process --first A/data/A --second B/data/B --output_path OUT

Reads FIRST.item.json, FIRST.train.inter, ... and those of SECOND. Writes OUT/joint.item.json, which holds the items of
the first dataset and behind them those of the second, and for each of the two OUT/NAME.train.inter, .valid.inter and
.test.inter in the joint numbering and OUT/NAME.items.txt, its item ids.
"""

from __future__ import annotations

from pathlib import Path

from data_process.settings import JoinFlags
from minionerec.common.cli import parse_flags, run_command

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(JoinFlags)

from data_process.interactions import SPLITS, write_lines
from minionerec.common.files import InputError, write_json, write_text
from minionerec.common.interactions import INTER_COLUMNS, read_inter
from minionerec.common.items import read_item_records
from minionerec.common.stage import open_stage

JOINT = "joint"


def join_datasets(flags: JoinFlags) -> None:
    """Write two datasets in one numbering of items.

    Raises:
        InputError: datasets of one name, or a malformed file.
    """
    sources, output = [Path(flags.first), Path(flags.second)], Path(flags.output_path)
    names = [source.name for source in sources]
    if names[0] == names[1] or JOINT in names:
        raise InputError(f"--first {flags.first}, --second {flags.second}: expected two names, none of them {JOINT}")
    ends = [".item.json", *(f".{split}.inter" for split in SPLITS)]
    made = [output / f"{name}{end}" for name in names for end in (*ends[1:], ".items.txt")]
    items_file = output / f"{JOINT}.item.json"
    stage = open_stage(
        "join_data_process",
        flags,
        [Path(f"{source}{end}") for source in sources for end in ends],
        [items_file, *made],
        output / f"{JOINT}.join.stage.json",
    )
    if stage.finished:
        return
    joint: dict[str, dict[str, str]] = {}
    counts = {}
    for source, name in zip(sources, names, strict=True):
        items, start = read_item_records(Path(f"{source}.item.json")), len(joint)
        joint |= {str(start + number): record for number, record in enumerate(items.values())}
        for split in SPLITS:
            rows = zip(*read_inter(Path(f"{source}.{split}.inter"), len(items)), strict=True)
            lines = [
                f"{user}\t{' '.join(str(start + item) for item in history)}\t{start + target}"
                for user, history, target in rows
            ]
            write_lines(output / f"{name}.{split}.inter", list(INTER_COLUMNS), lines)
            counts[f"{name} {split}"] = len(lines)
        write_text(output / f"{name}.items.txt", "".join(f"{item}\n" for item in range(start, len(joint))))
        counts[f"{name} items"] = len(items)
    write_json(items_file, joint)
    stage.done(**counts)


if __name__ == "__main__":
    run_command(join_datasets, FLAGS)
