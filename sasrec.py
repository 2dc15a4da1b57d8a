"""Item-id baselines that learn: SASRec or GRU4Rec, trained with cross-entropy over all items.

    python sasrec.py --model sasrec --train_file ... --valid_file ... --test_data_path ... --info_file ... \
        --output_dir output/sasrec

The published SASRec learns from one random negative an item; cross-entropy over the catalogue makes it a much stronger
baseline (Klenitskiy and Vasilev 2023, arXiv 2309.07602).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from minionerec.common.cli import run
from minionerec.common.files import InputError, write_json
from minionerec.common.processes import say
from minionerec.common.records import Row, check_rows_against_catalogue, count_popularity, read_info, read_rows
from minionerec.common.stage import Stage
from minionerec.evaluation.metrics import find_rank, format_metrics, hit_ratio, ndcg
from minionerec.evaluation.predictions import build_item_predictions, score_item_predictions
from minionerec.recommenders.network_training import fold_histories, rank_with_network, train_network
from minionerec.recommenders.networks import NETWORKS, SequentialRecommender, build_network, load_network, save_network

# Flags whose best values on the validation split differ between the two.
DEFAULTS = {"sasrec": {"num_layers": 2, "weight_decay": 0.1}, "gru4rec": {"num_layers": 1, "weight_decay": 0.0}}


SHAPE = ("model", "hidden_size", "num_layers", "num_heads", "dropout", "max_history")


COUNTS = ("hidden_size", "num_layers", "num_heads", "max_history", "batch_size", "num_epochs", "patience", "K")


def validate(model: SequentialRecommender, rows: Sequence[Row]) -> dict[str, float]:
    """{"HR@10", "NDCG@10"} at item level."""
    ranks = [find_rank(row.item_id, best) for row, best in zip(rows, rank_with_network(model, rows, 10)[0])]
    return {"HR@10": hit_ratio(ranks, 10), "NDCG@10": ndcg(ranks, 10)}


def sasrec(
    train_file: str,
    valid_file: str,
    test_data_path: str,
    info_file: str,
    output_dir: str,
    model: str = "sasrec",
    hidden_size: int = 64,
    num_layers: int | None = None,
    num_heads: int = 2,
    dropout: float = 0.5,
    max_history: int = 10,
    learning_rate: float = 3e-3,
    weight_decay: float | None = None,
    batch_size: int = 128,
    num_epochs: int = 60,
    patience: int = 8,
    K: int = 50,
    shared_sids: bool = False,
    seed: int = 42,
    force: bool = False,
) -> None:
    """Train an item-id model on the train split, choose the epoch on the validation split, measure on the test split.

    Args:
        output_dir: model/ (for load_recommender), test.json, test.metrics.json and epochs.json are written there.
        model: sasrec or gru4rec. num_heads: of sasrec.
        num_layers: default 2 for sasrec, 1 for gru4rec. weight_decay: of AdamW; default 0.1 for sasrec, 0 for gru4rec.
        dropout: on the item embeddings and inside the network.
        max_history: items of the history that the model sees, the newest ones.
        batch_size: train rows a step, about.
        num_epochs: at most. patience: stop after that many epochs without a better validation NDCG@10; SASRec may stand
            still at the popularity ranking for the first few.
        K: length of the recommendation lists. shared_sids: accept an info file in which items share a SID.
    """
    if model not in NETWORKS:
        raise InputError(f"--model {model}: expected one of {', '.join(NETWORKS)}")
    num_layers = DEFAULTS[model]["num_layers"] if num_layers is None else num_layers
    weight_decay = DEFAULTS[model]["weight_decay"] if weight_decay is None else weight_decay
    settings = {key: value for key, value in locals().items() if key in sasrec.__annotations__ and key != "force"}
    for name in COUNTS:
        if settings[name] < 1:
            raise InputError(f"--{name} {settings[name]}: expected 1 or more")
    if not 0 <= dropout < 1:
        raise InputError(f"--dropout {dropout}: expected a share from 0 to below 1")
    if model == "sasrec" and hidden_size % num_heads:
        raise InputError(f"--hidden_size {hidden_size}: expected a multiple of --num_heads {num_heads}")
    output = Path(output_dir)
    predictions_file, metrics_file, epochs_file = (
        output / name for name in ("test.json", "test.metrics.json", "epochs.json")
    )
    inputs = [train_file, valid_file, test_data_path, info_file]
    outputs = [output / "model", predictions_file, metrics_file, epochs_file]
    stage = Stage(model, settings, inputs, outputs, output / "sasrec.stage.json", force)
    if stage.finished:
        return

    catalogue = read_info(info_file, shared_sids)
    splits = {}
    for flag, path in (("train_file", train_file), ("valid_file", valid_file), ("test_data_path", test_data_path)):
        splits[flag] = read_rows(path, flag)
        check_rows_against_catalogue(splits[flag], path, catalogue, info_file)
    rows, valid, test = splits.values()

    torch.manual_seed(seed)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    network = build_network(catalogue.item_ids, {name: settings[name] for name in SHAPE}).to(device)
    sequences = fold_histories(rows, max_history)
    epochs = train_network(network, sequences, lambda: validate(network, valid), num_epochs, batch_size, learning_rate, weight_decay, patience)
    save_network(network, output / "model")
    write_json(epochs_file, epochs)

    items, scores = rank_with_network(load_network(output / "model").to(device), test, K)
    predictions = build_item_predictions(test, items, catalogue, scores)
    results = score_item_predictions(predictions, test, catalogue, count_popularity(row.item_id for row in rows), K)
    write_json(predictions_file, predictions, indent=None)
    write_json(metrics_file, results)
    say(format_metrics({model: results}))
    best = max(epochs, key=lambda epoch: epoch["NDCG@10"])
    chosen = {f"validation {name}": round(best[name], 6) for name in ("HR@10", "NDCG@10")}
    stage.done(epoch=best["epoch"], **chosen)


if __name__ == "__main__":
    run(sasrec)
