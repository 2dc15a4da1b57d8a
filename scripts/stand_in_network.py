"""A network with random weights in place of the one that a run of sasrec.py will train.

scripts/dry_run.sh makes one in a temporary folder, so that the stages that read the network can be planned before it is
trained. Flags are those of sasrec.py; the folder is OUTPUT_DIR/model, with --folds OUTPUT_DIR/folds too.
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, run_command
from minionerec.recommenders.settings import SASRecFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(SASRecFlags)

from pathlib import Path

from minionerec.common.records import read_info, read_rows
from minionerec.evaluation.network_runs import SHAPE_FLAGS, resolve_sasrec_flags
from minionerec.recommenders.folds import name_fold, part_users, write_parts
from minionerec.recommenders.networks import build_network, save_network


def write_network_stand_in(flags: SASRecFlags) -> None:
    """Write the folder, unless there is one already.

    Raises:
        InputError: a catalogue that cannot be read.
    """
    flags, folder = resolve_sasrec_flags(flags), Path(flags.output_dir) / "model"
    if (folder / "config.json").is_file():
        return
    items = read_info(flags.info_file, flags.shared_sids).item_ids
    network = build_network(items, {name: getattr(flags, name) for name in SHAPE_FLAGS})
    save_network(network, folder)
    for fold in range(flags.folds):
        save_network(network, name_fold(flags.output_dir, fold) / "model")
    if flags.folds:
        write_parts(flags.output_dir, part_users(read_rows(flags.train_file), flags.folds))


if __name__ == "__main__":
    run_command(write_network_stand_in, FLAGS)
