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

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minionerec.common.files import InputError, write_json
from minionerec.common.processes import is_main_process, process_state, say
from minionerec.common.records import Catalogue, Row, check_rows, read_info, read_rows
from minionerec.common.sharing import broadcast_value
from minionerec.common.stage import Stage, open_stage
from minionerec.evaluation.metrics import find_rank, format_metrics, hit_ratio, ndcg
from minionerec.evaluation.predictions import build_item_predictions, score_item_predictions
from minionerec.recommenders.network_training import NetworkTrainer, fold_histories, rank_with_network
from minionerec.recommenders.networks import SequentialRecommender, build_network, load_network, save_network

PUBLISHED_MODELS = {"SASRec": "sasrec", "GRU": "gru4rec"}
# Flags whose best values on the validation split differ between the two.
DEFAULTS = {"sasrec": {"num_layers": 2, "weight_decay": 0.1}, "gru4rec": {"num_layers": 1, "weight_decay": 0.0}}
SHAPE_FLAGS = ("model", "hidden_size", "num_layers", "num_heads", "dropout", "max_history")
COUNT_FLAGS = ("hidden_size", "num_layers", "num_heads", "max_history", "batch_size", "num_epochs", "patience", "K")
SPLIT_FLAGS = ("train_file", "valid_file", "test_data_path")
CHECKPOINT = "checkpoint.pth"  # of a run that is not finished


def resolve_sasrec_flags(flags: SASRecFlags) -> SASRecFlags:
    """The flags with every default worked out, checked.

    Raises:
        InputError: numbers out of range.
    """
    model = PUBLISHED_MODELS.get(flags.model, flags.model)
    missing = {name: value for name, value in DEFAULTS[model].items() if getattr(flags, name) is None}
    flags = replace(flags, model=model, **missing)
    for name in COUNT_FLAGS:
        if getattr(flags, name) < 1:
            raise InputError(f"--{name} {getattr(flags, name)}: expected 1 or more")
    if not 0 <= flags.dropout < 1:
        raise InputError(f"--dropout {flags.dropout}: expected a share from 0 to below 1")
    if model == "sasrec" and flags.hidden_size % flags.num_heads:
        raise InputError(f"--hidden_size {flags.hidden_size}: expected a multiple of --num_heads {flags.num_heads}")
    return flags


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


def validate(network: SequentialRecommender, rows: Sequence[Row]) -> dict[str, float]:
    """{"HR@10", "NDCG@10"} at item level, the same on every process."""
    rankings, _ = rank_with_network(network, rows, 10)
    if not is_main_process():
        return broadcast_value({})
    ranks = [find_rank(row.item_id, ranked) for row, ranked in zip(rows, rankings, strict=True)]
    return broadcast_value({"HR@10": hit_ratio(ranks, 10), "NDCG@10": ndcg(ranks, 10)})


def train_on_rows(
    flags: SASRecFlags, catalogue: Catalogue, train_rows: Sequence[Row], valid_rows: Sequence[Row], stage: Stage
) -> tuple[SequentialRecommender, list[dict]]:
    """(the network of the best epoch on its device, what was measured each epoch); a run that was cut off goes on."""
    torch.manual_seed(flags.seed)
    network = build_network(catalogue.item_ids, {name: getattr(flags, name) for name in SHAPE_FLAGS})
    network.to(process_state().device)
    trainer = NetworkTrainer(
        network=network,
        sequences=fold_histories(train_rows, flags.max_history),
        validate=lambda: validate(network, valid_rows),
        num_epochs=flags.num_epochs,
        batch_size=flags.batch_size,
        learning_rate=flags.learning_rate,
        weight_decay=flags.weight_decay,
        patience=flags.patience,
        seed=flags.seed,
        checkpoint=Path(flags.output_dir) / CHECKPOINT,
        on_checkpoint=stage.tick,
    )
    if stage.resuming and trainer.resume():
        say(f"  from epoch {len(trainer.epochs)}")
    return network, trainer.fit()


def sasrec(flags: SASRecFlags) -> None:
    """Train an item-id model, choose the epoch on the validation split, measure on the test split."""
    flags = resolve_sasrec_flags(flags)
    output = Path(flags.output_dir)
    model_folder, predictions_file, metrics_file, epochs_file = outputs = [
        output / name for name in ("model", "test.json", "test.metrics.json", "epochs.json")
    ]
    inputs = [*(getattr(flags, name) for name in SPLIT_FLAGS), flags.info_file]
    stage = open_stage(flags.model, flags, inputs, outputs, output / "sasrec.stage.json")
    if stage.finished:
        return
    catalogue, (train_rows, valid_rows, test_rows) = read_sasrec_data(flags)

    network, epochs = train_on_rows(flags, catalogue, train_rows, valid_rows, stage)
    if is_main_process():
        save_network(network, model_folder)
        write_json(epochs_file, epochs)
    process_state().wait_for_everyone()  # until the folder is there

    rankings, scores = rank_with_network(load_network(model_folder).to(process_state().device), test_rows, flags.K)
    if not is_main_process():
        return
    predictions = build_item_predictions(test_rows, rankings, catalogue, scores)
    metrics = score_item_predictions(predictions, test_rows, catalogue, flags.K)
    write_json(predictions_file, predictions, indent=None)
    write_json(metrics_file, metrics)
    say(format_metrics({flags.model: metrics}))
    best = max(epochs, key=lambda epoch: epoch["NDCG@10"])
    chosen = {f"validation {name}": round(best[name], 6) for name in ("HR@10", "NDCG@10")}
    stage.done(epoch=best["epoch"], **chosen)
    (output / CHECKPOINT).unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(sasrec, FLAGS, shared=True)
