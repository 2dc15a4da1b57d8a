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


def compute_sequence_loss(network: SequentialRecommender, sequences: Sequence[TrainSequence]) -> Tensor:
    """Cross-entropy over all items, mean over the targets of the sequences; a scalar in nats."""
    columns, _ = network.pad_histories([sequence.history for sequence in sequences])
    triples = [
        (number, position, network.column_of[item])
        for number, sequence in enumerate(sequences)
        for position, item in sequence.targets
    ]
    numbers, positions, targets = torch.tensor(triples, device=columns.device).T
    states = network.compute_states(columns)[numbers, positions]
    return functional.cross_entropy(network.compute_logits(states), targets)


def draw_batches(sequences: Sequence[TrainSequence], batch_size: int) -> list[list[TrainSequence]]:
    """The sequences in random order, cut so that the batches hold about batch_size targets each."""
    order = torch.randperm(len(sequences))
    targets = torch.tensor([len(sequence.targets) for sequence in sequences])[order].cumsum(0)
    _, sizes = ((targets - 1) // batch_size).unique_consecutive(return_counts=True)
    return [[sequences[number] for number in numbers.tolist()] for numbers in order.split(sizes.tolist())]


def rank_with_network(
    network: SequentialRecommender, rows: Sequence[Row], k: int
) -> tuple[list[list[int]], list[list[float]]]:
    """(the k best items of every row, best first; their log-probabilities)."""
    items, scores = [], []
    for start in range(0, len(rows), RANKED_AT_ONCE):
        histories = [row.history_ids for row in rows[start : start + RANKED_AT_ONCE]]
        best = network.score_histories(histories).topk(min(k, len(network.item_ids)), dim=-1)
        items += [[network.item_ids[column] for column in columns] for columns in best.indices.tolist()]
        scores += best.values.tolist()
    return items, scores


def train_network(
    network: SequentialRecommender,
    sequences: Sequence[TrainSequence],
    validate: Callable[[], dict[str, float]],
    *,
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    patience: int,
) -> list[dict]:
    """Train with AdamW and leave the network with the weights of the epoch that is best by validation NDCG@10.

    Args:
        sequences: the train rows, folded.
        validate: measures the network after an epoch: {"HR@10", "NDCG@10"}.
        num_epochs: epochs, at most; it stops after `patience` of them without a better one.
        batch_size: train rows a step, about.

    Returns:
        One {"epoch", "loss", "HR@10", "NDCG@10"} an epoch.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    epochs: list[dict] = []
    best, best_weights = None, {}
    rows = sum(len(sequence.targets) for sequence in sequences)
    bar = tqdm(total=num_epochs * rows, unit="row", disable=not is_main_process(), mininterval=2.0)
    for epoch in range(1, num_epochs + 1):
        network.train()
        total = 0.0
        for batch in draw_batches(sequences, batch_size):
            loss = compute_sequence_loss(network, batch)
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
            best_weights = {name: value.clone() for name, value in network.state_dict().items()}
        if epoch - best["epoch"] >= patience:
            break
    bar.close()
    network.load_state_dict(best_weights)
    return epochs
