"""Item-id baselines that learn: SASRec or GRU4Rec, trained with cross-entropy over all items.

    python sasrec.py --model sasrec --train_file ... --valid_file ... --test_data_path ... --info_file ... \
        --output_dir output/sasrec

The published SASRec learns from one random negative an item; cross-entropy over the catalogue makes it a much stronger
baseline (Klenitskiy and Vasilev 2023, arXiv 2309.07602).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

import cli
from fileio import InputError, write_json
from item_lists import check_items, item_predictions, score_item_lists
from metrics import hit_ratio, ndcg, popularity, rank_of, table
from recommenders import MODELS, Recommender, build, load_recommender, save_recommender
from records import Row, read_info, read_rows

# Flags whose best values on the validation split differ between the two.
DEFAULTS = {"sasrec": {"num_layers": 2, "weight_decay": 0.1}, "gru4rec": {"num_layers": 1, "weight_decay": 0.0}}
SHAPE = ("model", "hidden_size", "num_layers", "num_heads", "dropout", "max_history")
COUNTS = ("hidden_size", "num_layers", "num_heads", "max_history", "batch_size", "num_epochs", "patience", "K")
RANKED_AT_ONCE = 512  # histories; bounds the memory of the scores over all items


@dataclass
class TrainSequence:
    """A history, and (position, item) for every train row whose history ends at that position of it."""

    history: tuple[int, ...]
    targets: list[tuple[int, int]] = field(default_factory=list)


def train_sequences(rows: Sequence[Row], max_history: int) -> list[TrainSequence]:
    """The rows with every history that begins a longer one folded into it, so that a user's timeline is computed once.

    The networks are causal: the state at a position is that of the history that ends there.
    """
    targets: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        targets.setdefault(row.history_ids[-max_history:], []).append(row.item_id)
    sequences: list[TrainSequence] = []
    # Backwards in lexicographic order, a history comes right after those that it begins.
    for history in sorted(targets, reverse=True):
        if not sequences or sequences[-1].history[: len(history)] != history:
            sequences.append(TrainSequence(history))
        sequences[-1].targets += [(len(history) - 1, item) for item in targets[history]]
    return sequences


def sequence_loss(model: Recommender, sequences: Sequence[TrainSequence]) -> Tensor:
    """Cross-entropy over all items, mean over the targets of the sequences; a scalar in nats."""
    columns, _ = model.pad([sequence.history for sequence in sequences])
    triples = [
        (place, position, model.column[item])
        for place, sequence in enumerate(sequences)
        for position, item in sequence.targets
    ]
    place, position, target = torch.tensor(triples, device=columns.device).T
    return functional.cross_entropy(model.logits(model.states(columns)[place, position]), target)


def random_batches(sequences: Sequence[TrainSequence], batch_size: int) -> list[list[TrainSequence]]:
    """The sequences in random order, cut so that the batches hold about batch_size targets each."""
    order = torch.randperm(len(sequences))
    targets = torch.tensor([len(sequence.targets) for sequence in sequences])[order].cumsum(0)
    _, sizes = ((targets - 1) // batch_size).unique_consecutive(return_counts=True)
    return [[sequences[place] for place in places.tolist()] for places in order.split(sizes.tolist())]


def rank_items(model: Recommender, rows: Sequence[Row], k: int) -> tuple[list[list[int]], list[list[float]]]:
    """(the k best items of every row, best first; their log-probabilities)."""
    items, scores = [], []
    for start in range(0, len(rows), RANKED_AT_ONCE):
        histories = [row.history_ids for row in rows[start : start + RANKED_AT_ONCE]]
        best = model.scores(histories).topk(min(k, len(model.item_ids)), dim=-1)
        items += [[model.item_ids[column] for column in columns] for columns in best.indices.tolist()]
        scores += best.values.tolist()
    return items, scores


def validate(model: Recommender, rows: Sequence[Row]) -> dict[str, float]:
    """{"HR@10", "NDCG@10"} at item level."""
    ranks = [rank_of(row.item_id, best) for row, best in zip(rows, rank_items(model, rows, 10)[0])]
    return {"HR@10": hit_ratio(ranks, 10), "NDCG@10": ndcg(ranks, 10)}


def train(
    model: Recommender,
    sequences: Sequence[TrainSequence],
    valid: Sequence[Row],
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    patience: int,
) -> list[dict]:
    """Train with AdamW and leave the model with the weights of the epoch that is best by validation NDCG@10.

    Returns:
        One {"epoch", "loss", "HR@10", "NDCG@10"} an epoch; it stops after `patience` epochs without a better one.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    epochs: list[dict] = []
    best, best_weights = None, {}
    rows = sum(len(sequence.targets) for sequence in sequences)
    bar = tqdm(total=num_epochs * rows, unit="row", disable=not cli.is_main_process(), mininterval=2.0)
    for epoch in range(1, num_epochs + 1):
        model.train()
        total = 0.0
        for batch in random_batches(sequences, batch_size):
            loss = sequence_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            targets = sum(len(sequence.targets) for sequence in batch)
            total += loss.item() * targets
            bar.update(targets)
        loss = total / rows
        epochs.append({"epoch": epoch, "loss": loss, **validate(model, valid)})
        bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}", ndcg=f"{epochs[-1]['NDCG@10']:.4f}", refresh=False)
        if best is None or epochs[-1]["NDCG@10"] > best["NDCG@10"]:
            best = epochs[-1]
            best_weights = {name: value.clone() for name, value in model.state_dict().items()}
        if epoch - best["epoch"] >= patience:
            break
    bar.close()
    model.load_state_dict(best_weights)
    return epochs


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
    if model not in MODELS:
        raise InputError(f"--model {model}: expected one of {', '.join(MODELS)}")
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
    stage = cli.Stage(model, settings, inputs, outputs, output / "sasrec.stage.json", force)
    if stage.finished:
        return

    catalogue = read_info(info_file, shared_sids)
    splits = {}
    for flag, path in (("train_file", train_file), ("valid_file", valid_file), ("test_data_path", test_data_path)):
        splits[flag] = read_rows(path, flag)
        check_items(splits[flag], path, catalogue, info_file)
    rows, valid, test = splits.values()

    torch.manual_seed(seed)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    network = build(catalogue.item_ids, {name: settings[name] for name in SHAPE}).to(device)
    sequences = train_sequences(rows, max_history)
    epochs = train(network, sequences, valid, num_epochs, batch_size, learning_rate, weight_decay, patience)
    save_recommender(network, output / "model")
    write_json(epochs_file, epochs)

    items, scores = rank_items(load_recommender(output / "model").to(device), test, K)
    predictions = item_predictions(test, items, catalogue, scores)
    results = score_item_lists(predictions, test, catalogue, popularity(row.item_id for row in rows), K)
    write_json(predictions_file, predictions, indent=None)
    write_json(metrics_file, results)
    cli.say(table({model: results}))
    best = max(epochs, key=lambda epoch: epoch["NDCG@10"])
    chosen = {f"validation {name}": round(best[name], 6) for name in ("HR@10", "NDCG@10")}
    stage.done(epoch=best["epoch"], **chosen)


if __name__ == "__main__":
    cli.run(sasrec)
