"""Several datasets of examples as one: one after the other, or the tasks of a run with their weights."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from minionerec.common.files import InputError
from minionerec.language.examples import Example, Groups, PromptDataset, TokenRow


class JoinedExamples(Dataset):
    """The examples of several datasets, one dataset after the other.

    Args:
        datasets: those with `set_epoch` are told the epoch.
    """

    def __init__(self, datasets: Sequence[PromptDataset | JoinedExamples]):
        self.datasets = list(datasets)
        self._chosen: list[np.ndarray | None] = [None] * len(self.datasets)  # which of each one's examples; None: all
        self._starts = np.zeros(1, np.int64)

    def set_epoch(self, epoch: int) -> None:
        """Tell the datasets the epoch."""
        for dataset in self.datasets:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
        self._count()

    def _count(self) -> None:
        pairs = zip(self.datasets, self._chosen, strict=True)
        sizes = [len(dataset) if chosen is None else len(chosen) for dataset, chosen in pairs]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, place: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, place, side="right")) - 1
        number, chosen = place - int(self._starts[part]), self._chosen[part]
        return part, number if chosen is None else int(chosen[number])

    def __getitem__(self, index: int) -> Example:
        part, number = self._locate(range(len(self))[index])
        return self.datasets[part][number]

    def read_tokens(self, places: Sequence[int]) -> list[TokenRow]:
        """As `PromptDataset.read_tokens`."""
        located = [self._locate(int(place)) for place in places]
        tokens = {}
        for part in {part for part, _ in located}:
            numbers = [number for other, number in located if other == part]
            tokens[part] = iter(self.datasets[part].read_tokens(numbers))
        return [next(tokens[part]) for part, _ in located]

    def _collect(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        pairs = zip(values, self._chosen, strict=True)
        return [value if chosen is None else value[chosen] for value, chosen in pairs]

    def count_prompt_tokens(self) -> np.ndarray:
        """As `PromptDataset.count_prompt_tokens`."""
        return np.concatenate(self._collect([dataset.count_prompt_tokens() for dataset in self.datasets]))

    def list_sids(self) -> set[str]:
        """As `PromptDataset.list_sids`, of all examples, whether or not this epoch has them."""
        return set().union(*(dataset.list_sids() for dataset in self.datasets))

    def list_groups(self) -> list[Groups]:
        """As `PromptDataset.list_groups`."""
        result = []
        for dataset, chosen in zip(self.datasets, self._chosen, strict=True):
            groups = dataset.list_groups()
            if chosen is not None:
                (whole,) = groups
                pieces = None if whole.pieces is None else whole.pieces[chosen]
                groups = [Groups(whole.names, whole.codes[chosen], pieces)]
            result += groups
        return result


class TaskMixture(JoinedExamples):
    """The datasets of several tasks as one, each with a weight.

    A weight of 0.5 takes a fresh random half of a task's examples in every epoch, 2 takes all of them twice. Every
    epoch has the same number of examples, at least one of every task.

    Args:
        weights: {task: weight}. datasets: of the tasks, in the same order. seed: of the random halves.

    Raises:
        InputError: a task without any example.
    """

    def __init__(self, weights: dict[str, float], datasets: Sequence[PromptDataset], seed: int):
        super().__init__(datasets)
        self.weights, self.seed = weights, seed
        for task, dataset in zip(weights, self.datasets, strict=True):
            if not len(dataset):
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in dataset.left_out.items())
                raise InputError(f"--tasks: {task} has no example (left out: {reasons})")
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the examples of this epoch; a function of the seed and the epoch alone."""
        super().set_epoch(epoch)
        for number, (task, weight) in enumerate(self.weights.items()):
            rows = len(self.datasets[number])
            copies, rest = divmod(max(1, round(weight * rows)), rows)
            drawn = random.Random(f"{self.seed}-{task}-{epoch}").sample(range(rows), rest)
            if (copies, rest) != (1, 0):
                numbers = [np.arange(rows)] * copies + [np.array(drawn, dtype=np.int64)]
                self._chosen[number] = np.sort(np.concatenate(numbers))
        self._count()

    def report(self) -> list[str]:
        """One line a task: its weight, its examples, and what was left out."""
        return [
            f"{task} x {weight:g}: {len(dataset):,} examples"
            + "".join(f", {count:,} left out {reason}" for reason, count in sorted(dataset.left_out.items()))
            for (task, weight), dataset in zip(self.weights.items(), self.datasets, strict=True)
        ]
