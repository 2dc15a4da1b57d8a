"""Training of SASRec and GRU4Rec with cross-entropy over all items, and their rankings.

Several processes share the sequences of every batch and the rows that are ranked; the main one writes.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minionerec.common.files import InputError, atomic_write
from minionerec.common.overflow import step_or_stop
from minionerec.common.processes import count_processes, is_main_process, say
from minionerec.common.progress import ProgressBar, foretell_epochs
from minionerec.common.records import Row
from minionerec.common.sharing import (
    add_up_number,
    broadcast_value,
    gather_on_main,
    separate_random_state,
    take_part,
    wrap_model,
)
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


def count_targets(sequences: Sequence[TrainSequence]) -> int:
    """How many train rows were folded into the sequences."""
    return sum(len(sequence.targets) for sequence in sequences)


def compute_sequence_loss(
    network: SequentialRecommender, sequences: Sequence[TrainSequence], wrapped: nn.Module | None = None
) -> Tensor:
    """Cross-entropy over all items, mean over the targets of the sequences; a scalar in nats.

    `wrapped` is the network as it computes where several processes share its gradients.
    """
    columns, _ = network.pad_histories([sequence.history for sequence in sequences])
    triples = [
        (number, position, network.column_of[item])
        for number, sequence in enumerate(sequences)
        for position, item in sequence.targets
    ]
    numbers, positions, targets = torch.tensor(triples, device=columns.device).T
    return functional.cross_entropy((wrapped or network)(columns, numbers, positions), targets)


def draw_batches(sequences: Sequence[TrainSequence], batch_size: int) -> list[list[TrainSequence]]:
    """The sequences in random order, cut so that the batches hold about batch_size targets each.

    The main process draws; the batches are the same on all.
    """
    order = broadcast_value(torch.randperm(len(sequences)))
    targets = torch.tensor([len(sequence.targets) for sequence in sequences])[order].cumsum(0)
    _, sizes = ((targets - 1) // batch_size).unique_consecutive(return_counts=True)
    return [[sequences[number] for number in numbers.tolist()] for numbers in order.split(sizes.tolist())]


def rank_with_network(
    network: SequentialRecommender, rows: Sequence[Row], k: int
) -> tuple[list[list[int]], list[list[float]]]:
    """(the k best items of every row, best first; their log-probabilities).

    Processes share the rows in whole batches, so that no score depends on their number. The main one gets all lists,
    the others none.
    """
    pairs = []
    for start in take_part(range(0, len(rows), RANKED_AT_ONCE)):
        histories = [row.history_ids for row in rows[start : start + RANKED_AT_ONCE]]
        best = network.score_histories(histories).topk(min(k, len(network.item_ids)), dim=-1)
        items = [[network.item_ids[column] for column in columns] for columns in best.indices.tolist()]
        pairs += zip(items, best.values.tolist(), strict=True)
    pairs = gather_on_main(pairs)
    return [items for items, _ in pairs], [scores for _, scores in pairs]


@dataclass
class NetworkTrainer:
    """Training with AdamW that keeps the weights of the epoch that is best by validation NDCG@10.

    Attributes:
        network: on its device.
        sequences: the train rows, folded.
        validate: measures the network after an epoch: {"HR@10", "NDCG@10"}, the same on every process.
        num_epochs: epochs, at most; it stops after `patience` of them without a better one.
        batch_size: train rows a step, about, of all processes together.
        seed: of what drops out on the processes other than the main one.
        checkpoint: a file that is written after every epoch; `resume` goes on from it.
        on_checkpoint: called when it was written.
        on_epoch: called with the number of an epoch and what was measured after it.
    """

    network: SequentialRecommender
    sequences: Sequence[TrainSequence]
    validate: Callable[[], dict[str, float]]
    num_epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    patience: int
    seed: int = 0
    checkpoint: Path | None = None
    on_checkpoint: Callable[[], None] | None = None
    on_epoch: Callable[[int, dict[str, float]], None] | None = None

    def __post_init__(self) -> None:
        self.wrapped = wrap_model(self.network)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        self.epochs: list[dict] = []
        self.best: dict | None = None
        self.best_weights: dict[str, Tensor] = {}

    def fit(self) -> list[dict]:
        """Train to the end. Returns one {"epoch", "loss", "HR@10", "NDCG@10"} an epoch."""
        rows = count_targets(self.sequences)
        bar = ProgressBar(
            desc="training",
            total=self.num_epochs * rows,
            initial=len(self.epochs) * rows,
            unit="rows",
            mininterval=2.0,
            shorter="--num_epochs, --patience",
        )
        while len(self.epochs) < self.num_epochs and not self._is_patience_spent():
            start = time.perf_counter()
            loss = self._train_epoch(bar) / rows
            seconds = time.perf_counter() - start
            measured = {"epoch": len(self.epochs) + 1, "loss": loss, **self.validate()}
            self.epochs.append(measured)
            if self.on_epoch:
                figures = {f"eval_{name}": measured[name] for name in ("HR@10", "NDCG@10")}
                self.on_epoch(measured["epoch"], {"loss": loss, **figures, "seconds_epoch": round(seconds, 4)})
            bar.set_postfix(
                epoch=measured["epoch"], loss=f"{loss:.3f}", ndcg=f"{measured['NDCG@10']:.4f}", refresh=False
            )
            if self.best is None or measured["NDCG@10"] > self.best["NDCG@10"]:
                self.best = measured
                self.best_weights = {name: value.clone() for name, value in self.network.state_dict().items()}
            self._save_checkpoint()
        bar.close()
        self.network.load_state_dict(self.best_weights)
        return self.epochs

    def foretell(self, networks: int = 1) -> None:
        """Print how long the training takes, by a few epochs of it, which change the network.

        Args:
            networks: how many such trainings there are to be.
        """
        with ProgressBar(disable=True) as bar:
            epochs = self.num_epochs * networks
            foretell_epochs(lambda: self._train_epoch(bar), epochs, "--num_epochs, --patience")

    def _is_patience_spent(self) -> bool:
        return self.best is not None and len(self.epochs) - self.best["epoch"] >= self.patience

    def _train_epoch(self, bar: ProgressBar) -> float:
        """One pass over the sequences; the sum of the losses of their targets."""
        self.network.train()
        separate_random_state(self.seed, len(self.epochs))
        total = 0.0
        for batch in draw_batches(self.sequences, self.batch_size):
            part = take_part(batch)
            # A process whose part is empty computes with a sequence of another that counts nothing.
            loss = compute_sequence_loss(self.network, part or batch[:1], self.wrapped)
            targets, whole = count_targets(part), count_targets(batch)
            self.optimizer.zero_grad()
            # The gradients of the parts are averaged; the mean over the targets of the batch is wanted.
            (loss * (targets * count_processes() / whole)).backward()
            value = loss.item()
            if not math.isfinite(value):
                self._stop_diverged(f"the loss is not finite ({value})")
            step_or_stop(self.optimizer, self._stop_diverged)
            total += value * targets
            bar.update(whole)
        if not all(bool(torch.isfinite(weight).all()) for weight in self.network.parameters()):
            self._stop_diverged("weights are not finite after it")
        return add_up_number(total)

    def _stop_diverged(self, what: str) -> None:
        raise InputError(
            f"training diverged in epoch {len(self.epochs) + 1}: {what}, at --learning_rate {self.learning_rate:g}; "
            "try a tenth of it; nothing is exported"
        )

    def _save_checkpoint(self) -> None:
        if self.checkpoint is None:
            return
        if is_main_process():
            on_device = self.network.embedding.weight.device.type == "cuda"
            state: dict[str, Any] = {
                "weights": self.network.state_dict(),
                "best_weights": self.best_weights,
                "best": self.best,
                "epochs": self.epochs,
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "random_device": torch.cuda.get_rng_state() if on_device else None,
            }
            with atomic_write(self.checkpoint) as temporary:
                torch.save(state, temporary)
        if self.on_checkpoint:
            self.on_checkpoint()

    def resume(self) -> bool:
        """Go on from the checkpoint; False where there is none."""
        if self.checkpoint is None or not broadcast_value(self.checkpoint.is_file()):
            return False
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            whole = isinstance(state, dict) and state.keys() >= {"weights", "optimizer", "random", "epochs"}
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            whole = False
        if not whole:
            say(f"[resume] {self.checkpoint}: cut off or damaged; training begins anew")
            return False
        self.network.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        device = self.network.embedding.weight.device
        self.best_weights = {name: value.to(device) for name, value in state["best_weights"].items()}
        self.best, self.epochs = state["best"], state["epochs"]
        torch.set_rng_state(state["random"])
        if device.type == "cuda" and state["random_device"] is not None:
            torch.cuda.set_rng_state(state["random_device"])
        return True
