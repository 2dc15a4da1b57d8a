"""Training of SASRec and GRU4Rec with cross-entropy over all items, and their rankings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from minionerec.common.processes import is_main_process
from minionerec.common.records import Row
from minionerec.recommenders.networks import SequentialRecommender

RANKED_AT_ONCE = 512  # histories; bounds the memory of the scores over all items


@dataclass
class TrainSequence:
    """A history, and (position, item) for every train row whose history ends at that position of it."""

    history: tuple[int, ...]
    targets: list[tuple[int, int]] = field(default_factory=list)


def fold_histories(rows: Sequence[Row], max_history: int) -> list[TrainSequence]:
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


def compute_sequence_loss(model: SequentialRecommender, sequences: Sequence[TrainSequence]) -> Tensor:
    """Cross-entropy over all items, mean over the targets of the sequences; a scalar in nats."""
    columns, _ = model.pad([sequence.history for sequence in sequences])
    triples = [
        (place, position, model.column[item])
        for place, sequence in enumerate(sequences)
        for position, item in sequence.targets
    ]
    place, position, target = torch.tensor(triples, device=columns.device).T
    return functional.cross_entropy(model.logits(model.states(columns)[place, position]), target)


def draw_batches(sequences: Sequence[TrainSequence], batch_size: int) -> list[list[TrainSequence]]:
    """The sequences in random order, cut so that the batches hold about batch_size targets each."""
    order = torch.randperm(len(sequences))
    targets = torch.tensor([len(sequence.targets) for sequence in sequences])[order].cumsum(0)
    _, sizes = ((targets - 1) // batch_size).unique_consecutive(return_counts=True)
    return [[sequences[place] for place in places.tolist()] for places in order.split(sizes.tolist())]


def rank_with_network(
    model: SequentialRecommender, rows: Sequence[Row], k: int
) -> tuple[list[list[int]], list[list[float]]]:
    """(the k best items of every row, best first; their log-probabilities)."""
    items, scores = [], []
    for start in range(0, len(rows), RANKED_AT_ONCE):
        histories = [row.history_ids for row in rows[start : start + RANKED_AT_ONCE]]
        best = model.scores(histories).topk(min(k, len(model.item_ids)), dim=-1)
        items += [[model.item_ids[column] for column in columns] for columns in best.indices.tolist()]
        scores += best.values.tolist()
    return items, scores


def train_network(
    model: SequentialRecommender,
    sequences: Sequence[TrainSequence],
    validate: Callable[[], dict[str, float]],
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
    bar = tqdm(total=num_epochs * rows, unit="row", disable=not is_main_process(), mininterval=2.0)
    for epoch in range(1, num_epochs + 1):
        model.train()
        total = 0.0
        for batch in draw_batches(sequences, batch_size):
            loss = compute_sequence_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            targets = sum(len(sequence.targets) for sequence in batch)
            total += loss.item() * targets
            bar.update(targets)
        loss = total / rows
        epochs.append({"epoch": epoch, "loss": loss, **validate()})
        bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}", ndcg=f"{epochs[-1]['NDCG@10']:.4f}", refresh=False)
        if best is None or epochs[-1]["NDCG@10"] > best["NDCG@10"]:
            best = epochs[-1]
            best_weights = {name: value.clone() for name, value in model.state_dict().items()}
        if epoch - best["epoch"] >= patience:
            break
    bar.close()
    model.load_state_dict(best_weights)
    return epochs
