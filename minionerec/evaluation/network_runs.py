"""Training of SASRec and GRU4Rec as the flags of sasrec.py say, the epoch chosen on validation rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minionerec.common.cli import recorded_settings
from minionerec.common.embeddings import is_made_from_behaviour, read_item_vectors
from minionerec.common.files import InputError
from minionerec.common.processes import is_main_process, process_state, say
from minionerec.common.records import Catalogue, Row
from minionerec.common.sharing import broadcast_value
from minionerec.common.step_log import TrainingLog
from minionerec.evaluation.metrics import find_rank, hit_ratio, ndcg
from minionerec.recommenders.folds import FOLDS_FOLDER, leave_out_users, name_fold, part_users, write_parts
from minionerec.recommenders.network_training import NetworkTrainer, fold_histories, rank_with_network
from minionerec.recommenders.networks import SequentialRecommender, build_network, save_network
from minionerec.recommenders.settings import SASRecFlags

PUBLISHED_MODELS = {"SASRec": "sasrec", "GRU": "gru4rec"}
# Flags whose best values on the validation split differ between the two.
DEFAULTS = {"sasrec": {"num_layers": 2, "weight_decay": 0.1}, "gru4rec": {"num_layers": 1, "weight_decay": 0.0}}
SHAPE_FLAGS = ("model", "hidden_size", "num_layers", "num_heads", "dropout", "max_history")
COUNT_FLAGS = ("hidden_size", "num_layers", "num_heads", "max_history", "batch_size", "num_epochs", "patience", "K")
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
    if flags.folds < 0 or flags.folds == 1:
        raise InputError(f"--folds {flags.folds}: expected 2 or more, or 0 for none")
    if flags.folds and flags.item_init and is_made_from_behaviour(flags.item_init):
        raise InputError(
            f"--item_init {flags.item_init}: was made from the rows of all users, so that no network of --folds would "
            "be without any; give embeddings of texts alone, such as NAME.emb-tfidf-td.npy"
        )
    if not 0 <= flags.dropout < 1:
        raise InputError(f"--dropout {flags.dropout}: expected a share from 0 to below 1")
    if model == "sasrec" and flags.hidden_size % flags.num_heads:
        raise InputError(f"--hidden_size {flags.hidden_size}: expected a multiple of --num_heads {flags.num_heads}")
    return flags


def validate_network(network: SequentialRecommender, rows: Sequence[Row]) -> dict[str, float]:
    """{"HR@10", "NDCG@10"} at item level, the same on every process."""
    rankings, _ = rank_with_network(network, rows, 10)
    if not is_main_process():
        return broadcast_value({})
    ranks = [find_rank(row.item_id, ranked) for row, ranked in zip(rows, rankings, strict=True)]
    return broadcast_value({"HR@10": hit_ratio(ranks, 10), "NDCG@10": ndcg(ranks, 10)})


def train_on_rows(
    flags: SASRecFlags,
    catalogue: Catalogue,
    train_rows: Sequence[Row],
    valid_rows: Sequence[Row],
    on_checkpoint: Callable[[], None] | None = None,
    resuming: bool = False,
) -> tuple[SequentialRecommender, list[dict]]:
    """Train a network; OUTPUT_DIR/checkpoint.pth and steps.csv are written after every epoch.

    Args:
        flags: resolved; of the files that they name only those of --item_init are read.
        catalogue: the items.
        train_rows: to learn from.
        valid_rows: that the epoch is chosen on.
        on_checkpoint: called when the checkpoint was written.
        resuming: go on from the checkpoint, if there is one.

    Returns:
        (the network of the best epoch on its device, what was measured each epoch); with --dry_run a few epochs are
        timed, and nothing is written.

    Raises:
        InputError: embeddings that are broken or lack an item; training that diverged.
    """
    torch.manual_seed(flags.seed)
    network = build_network(catalogue.item_ids, {name: getattr(flags, name) for name in SHAPE_FLAGS})
    if flags.item_init:
        network.start_from_vectors(read_item_vectors(flags.item_init, catalogue, "item_init"), flags.seed)
    network.to(process_state().device)
    trainer = NetworkTrainer(
        network=network,
        sequences=fold_histories(train_rows, flags.max_history),
        validate=lambda: validate_network(network, valid_rows),
        num_epochs=flags.num_epochs,
        batch_size=flags.batch_size,
        learning_rate=flags.learning_rate,
        weight_decay=flags.weight_decay,
        patience=flags.patience,
        seed=flags.seed,
        checkpoint=Path(flags.output_dir) / CHECKPOINT,
        on_checkpoint=on_checkpoint,
    )
    if flags.dry_run:
        # Each of N folds has N - 1 parts of the users: together as much work as N - 1 networks more.
        trainer.foretell(max(1, flags.folds))
        return network, []
    if resuming and trainer.resume():
        say(f"  from epoch {len(trainer.epochs)}")
    log = TrainingLog(flags.output_dir, flags, recorded_settings(flags), len(trainer.epochs))
    trainer.on_epoch = log.add
    epochs = trainer.fit()
    log.close()
    return network, epochs


def part_train_users(flags: SASRecFlags, train_rows: Sequence[Row]) -> list[list[str]]:
    """The users that each network of --folds is trained without.

    Raises:
        InputError: fewer users than parts.
    """
    parts = part_users(train_rows, flags.folds)
    if not all(parts):
        raise InputError(f"--folds {flags.folds}: {flags.train_file} has {sum(map(len, parts))} users only")
    return parts


def train_folds(
    flags: SASRecFlags,
    catalogue: Catalogue,
    train_rows: Sequence[Row],
    valid_rows: Sequence[Row],
    parts: Sequence[Sequence[str]],
    on_checkpoint: Callable[[], None] | None = None,
    resuming: bool = False,
) -> None:
    """Train a network without each part of the users into OUTPUT_DIR/folds.

    Args:
        flags, catalogue, train_rows, valid_rows, on_checkpoint: as of `train_on_rows`.
        parts: of the users of the train rows; none: what stands in the folder is removed.
        resuming: go on with what a run that was cut off has made; otherwise it is removed.
    """
    folder = Path(flags.output_dir) / FOLDS_FOLDER
    if is_main_process() and not resuming:
        shutil.rmtree(folder, ignore_errors=True)
    for fold, users in enumerate(parts):
        own = name_fold(flags.output_dir, fold)
        if broadcast_value((own / "model").is_dir()):
            continue
        rows = leave_out_users(train_rows, users)
        say(f"[{flags.model}] part {fold + 1} of {len(parts)}: without {len(users):,} users, {len(rows):,} rows")
        of_fold = replace(flags, output_dir=str(own), report_to=None)
        network, _ = train_on_rows(of_fold, catalogue, rows, valid_rows, on_checkpoint, resuming)
        if is_main_process():
            save_network(network, own / "model")
            (own / CHECKPOINT).unlink(missing_ok=True)
        process_state().wait_for_everyone()
    if is_main_process() and parts:
        write_parts(flags.output_dir, parts)
