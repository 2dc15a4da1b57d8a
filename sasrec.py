r"""Item-id baselines that learn: SASRec or GRU4Rec, trained with cross-entropy over all items.

    python sasrec.py --model sasrec --train_file ... --valid_file ... --test_data_path ... --info_file ... \
        --output_dir output/sasrec

The published SASRec learns from one random negative an item; cross-entropy over the catalogue makes it a much stronger
baseline (Klenitskiy and Vasilev 2023, arXiv 2309.07602).
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, run_command
from minionerec.recommenders.settings import SASRecFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(SASRecFlags)

from pathlib import Path

from minionerec.common.embeddings import side_file_path
from minionerec.common.files import write_json
from minionerec.common.processes import is_main_process, process_state, say
from minionerec.common.records import Catalogue, Row, check_rows, read_info, read_rows
from minionerec.common.stage import open_stage
from minionerec.evaluation.metrics import format_metrics
from minionerec.evaluation.network_runs import (
    CHECKPOINT,
    part_train_users,
    resolve_sasrec_flags,
    train_folds,
    train_on_rows,
)
from minionerec.evaluation.predictions import RankedItems, write_item_predictions
from minionerec.evaluation.seen_items import check_seen_flags, extend_length, leave_out, list_excluded
from minionerec.recommenders.folds import FOLDS_FOLDER
from minionerec.recommenders.network_training import rank_with_network
from minionerec.recommenders.networks import load_network, save_network

SPLIT_FLAGS = ("train_file", "valid_file", "test_data_path")


def read_sasrec_data(flags: SASRecFlags) -> tuple[Catalogue, list[list[Row]]]:
    """(the catalogue with its popularity in the train rows, the train, validation and test rows)."""
    catalogue = read_info(flags.info_file, flags.shared_sids)
    splits = []
    for name in SPLIT_FLAGS:
        path = getattr(flags, name)
        rows = read_rows(path, name)
        check_rows(rows, catalogue, path, flags.info_file)
        splits.append(rows)
    return catalogue.with_counts(splits[0]), splits


def sasrec(flags: SASRecFlags) -> None:
    """Train an item-id model, choose the epoch on the validation split, measure on the test split."""
    flags = resolve_sasrec_flags(flags)
    check_seen_flags(flags)
    output = Path(flags.output_dir)
    model_folder, predictions_file, metrics_file, epochs_file = outputs = [
        output / name for name in ("model", "test.json", "test.metrics.json", "epochs.json")
    ]
    outputs += [output / FOLDS_FOLDER] if flags.folds else []
    inputs = [*(getattr(flags, name) for name in SPLIT_FLAGS), flags.info_file]
    inputs += [flags.item_init, side_file_path(flags.item_init)] if flags.item_init else []
    stage = open_stage(flags.model, flags, inputs, outputs, output / "sasrec.stage.json", trains_in=output)
    if stage.finished and not flags.dry_run:
        return
    catalogue, (train_rows, valid_rows, test_rows) = read_sasrec_data(flags)
    parts = part_train_users(flags, train_rows)

    network, epochs = train_on_rows(flags, catalogue, train_rows, valid_rows, stage.tick, stage.resuming)
    if flags.dry_run:
        if flags.folds:
            say(f"  these are the network's and those of {flags.folds} more, each without a part of the users")
        return
    if is_main_process():
        save_network(network, model_folder)
        write_json(epochs_file, epochs)
    process_state().wait_for_everyone()  # until the folder is there
    train_folds(flags, catalogue, train_rows, valid_rows, parts, stage.tick, stage.resuming)

    excluded = list_excluded(flags, test_rows, catalogue)
    network = load_network(model_folder).to(process_state().device)
    whole = rank_with_network(network, test_rows, extend_length(flags.K, excluded))
    if not is_main_process():
        return
    rankings, scores = leave_out(*whole, excluded, flags.K)
    ranked = map(RankedItems, rankings, scores)
    metrics = write_item_predictions(predictions_file, test_rows, ranked, catalogue, flags.K)
    write_json(metrics_file, metrics)
    say(format_metrics({flags.model: metrics}))
    best = max(epochs, key=lambda epoch: epoch["NDCG@10"])
    chosen = {f"validation {name}": round(best[name], 6) for name in ("HR@10", "NDCG@10")}
    stage.done(epoch=best["epoch"], **chosen)
    (output / CHECKPOINT).unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(sasrec, FLAGS, shared=True)
