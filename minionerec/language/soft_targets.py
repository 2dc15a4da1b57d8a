"""Datasets whose targets are a teacher's: several items per history, each with its probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from minionerec.common.records import Catalogue, Row
from minionerec.language.examples import Example, PromptDataset, shorten_prompts
from minionerec.language.prompts import Encoder
from minionerec.search.prefix_tree import SoftLabels
from minionerec.search.trie import pad_sequences


class TaughtPaths:
    """The items of a catalogue as token sequences, along which a teacher's probabilities are added up.

    Args:
        sequences: the target token ids of every item, end token included.
        teach_end: label the end tokens too that nothing else could stand for. Another task that ends in the same way
            teaches them as well, and a tree is smaller by a node a label without them.

    Attributes:
        tokens: [N, depth] int64, -1 past the end of a sequence.
        prefix: [N, depth] int64, equal where two sequences agree in all tokens before that one.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], teach_end: bool = True):
        padded, lengths = pad_sequences(sequences)
        depth = padded.shape[1]
        self.sequences = [list(sequence) for sequence in sequences]
        self.tokens = np.where(np.arange(depth) < lengths[:, None], padded, -1).astype(np.int64)
        self.prefix = np.zeros_like(self.tokens)
        for level in range(1, depth):
            _, self.prefix[:, level] = np.unique(self.tokens[:, :level], axis=0, return_inverse=True)
        self._is_labelled = self.tokens >= 0
        if not teach_end:
            self._is_labelled &= ~self._find_forced_ends(lengths)

    def _find_forced_ends(self, lengths: np.ndarray) -> np.ndarray:
        """[N, depth] bool: the last token of a sequence, if all sequences with the same beginning have it there."""
        forced = np.arange(self.tokens.shape[1]) == lengths[:, None] - 1
        for level in range(self.tokens.shape[1]):
            branches = np.unique(np.stack((self.prefix[:, level], self.tokens[:, level])), axis=1)[0]
            forced[:, level] &= np.bincount(branches)[self.prefix[:, level]] == 1
        return forced

    def label(self, items: np.ndarray, probabilities: np.ndarray, drawn: np.ndarray) -> list[SoftLabels]:
        """The soft labels of every history along the path of one drawn item.

        At the first level these are the exact sums over all items of the teacher; at each deeper one the exact
        conditional sums over those that agree with the drawn item so far. Where the drawn item follows the teacher's
        probabilities, the expected cross-entropy is that of whole sequences.

        Args:
            items: [H, T] int64, the teacher's items.
            probabilities: [H, T] float, of these; every row has a positive one.
            drawn: [H] int64, the item whose path is taken.

        Returns:
            H labels.
        """
        rows, levels, tokens, weights = [], [], [], []
        for level in range(self.tokens.shape[1]):
            agree = self.prefix[items, level] == self.prefix[drawn, level][:, None]
            is_token = self.tokens[items, level] >= 0
            mass = np.where(agree & is_token & self._is_labelled[drawn, level][:, None], probabilities, 0.0)
            row, column = np.nonzero(mass)
            rows.append(row)
            levels.append(np.full(len(row), level))
            tokens.append(self.tokens[items[row, column], level])
            weights.append(mass[row, column] / mass.sum(axis=1)[row])
        row = np.concatenate(rows)
        order = np.argsort(row, kind="stable")
        bounds = np.searchsorted(row[order], np.arange(len(items) + 1))
        flat = [np.concatenate(part)[order] for part in (levels, tokens, weights)]
        return [
            SoftLabels(*(part[start:stop] for part in flat))
            for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]


def draw_columns(probabilities: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One column of every row, drawn by the probabilities [H, T]; every row has a positive one. Returns [H] int64."""
    cumulative = probabilities.cumsum(axis=1)
    draws = generator.random((len(probabilities), 1)) * cumulative[:, -1:]
    return np.minimum((draws >= cumulative).sum(axis=1), (probabilities > 0).cumsum(axis=1).argmax(axis=1))


class TaughtDataset(PromptDataset):
    """Prompts with soft labels, drawn along another path in every epoch.

    Args:
        catalogue: the items, whose numbers the teacher's targets are.
        encoder: tokenizer and templates; prompts and targets are those of next_sid.
        seed: of the draws, which are a function of the seed and the epoch alone.
        teach_end: see `TaughtPaths`.
    """

    task = "next_sid"

    def __init__(self, catalogue: Catalogue, encoder: Encoder, seed: int, teach_end: bool = True):
        super().__init__()
        self.catalogue, self.encoder, self.seed = catalogue, encoder, seed
        targets = [encoder.prompts.target(self.task, sid) for sid in catalogue.sids]
        encoder.check_boundary(self.task, targets[0])
        self._targets = targets
        self._paths = TaughtPaths(encoder.target_ids(self.task, targets), teach_end)

    @property
    def longest_target(self) -> int:
        """Tokens of the longest target."""
        return self._paths.tokens.shape[1]

    def _attach_targets(
        self, shown: Sequence[Example], items: np.ndarray, probabilities: np.ndarray, generator: np.random.Generator
    ) -> list[Example]:
        """The examples `shown`, each with the labels along the path of an item that is drawn for it."""
        if not shown:
            return []
        columns = draw_columns(probabilities, generator)
        drawn = items[np.arange(len(items)), columns]
        labels = self._paths.label(items, probabilities, drawn)
        return [
            replace(
                example,
                target=self._targets[item],
                target_ids=self._paths.sequences[item],
                sid=self.catalogue.sids[item],
                item_id=self.catalogue.item_ids[item],
                labels=label,
            )
            for example, item, label in zip(shown, drawn.tolist(), labels, strict=True)
        ]


class TaughtHistoryDataset(TaughtDataset):
    """Real histories -> what a teacher says comes next; also after the last item of every user's train rows.

    Args:
        histories: datasets whose H examples together show the histories, some with `set_epoch`.
        items, probabilities: [H, T], the teacher's targets of these examples.
        catalogue, encoder, seed, teach_end: see `TaughtDataset`.
    """

    def __init__(
        self,
        histories: Sequence[PromptDataset],
        items: np.ndarray,
        probabilities: np.ndarray,
        *,
        catalogue: Catalogue,
        encoder: Encoder,
        seed: int,
        teach_end: bool = True,
    ):
        super().__init__(catalogue, encoder, seed, teach_end)
        self._histories, self._items, self._probabilities = histories, items, probabilities
        self._taught = np.flatnonzero(probabilities.any(axis=1))
        for dataset in histories:
            self.left_out.update(dataset.left_out)
        if unknown := len(items) - len(self._taught):
            self.left_out["unknown to the teacher"] = unknown
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the paths of this epoch, and its cut histories."""
        for dataset in self._histories:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
        generator = np.random.default_rng([self.seed, epoch])
        examples = [dataset[number] for dataset in self._histories for number in range(len(dataset))]
        shown = [examples[number] for number in self._taught.tolist()]
        self._examples = self._attach_targets(
            shown, self._items[self._taught], self._probabilities[self._taught], generator
        )


# Walks of an epoch as histories of item numbers, and the teacher's targets after histories of item ids.
WalkSource = Callable[[np.random.Generator], list[list[int]]]
TargetSource = Callable[[Sequence[Sequence[int]]], tuple[np.ndarray, np.ndarray]]


class WalkDataset(TaughtDataset):
    """Synthetic histories -> what a teacher says after each of their items; other ones in every epoch.

    Walks are of random length. Every epoch has as many examples as the first nevertheless, for the steps of a training
    are planned once: random ones are left out or shown twice.

    Args:
        draw: makes the walks of an epoch.
        teach: gives the teacher's targets, ([H, T] items, [H, T] probabilities).
        catalogue, encoder, seed, teach_end: see `TaughtDataset`.
    """

    def __init__(
        self,
        draw: WalkSource,
        teach: TargetSource,
        *,
        catalogue: Catalogue,
        encoder: Encoder,
        seed: int,
        teach_end: bool = True,
    ):
        super().__init__(catalogue, encoder, seed, teach_end)
        self._draw, self._teach = draw, teach
        self._count: int | None = None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the walks of this epoch and the paths of their targets."""
        generator = np.random.default_rng([self.seed, epoch, 1])
        walks = self._draw(generator)
        pairs = [(number, walk[:length]) for number, walk in enumerate(walks) for length in range(1, len(walk) + 1)]
        ids = self.catalogue.item_ids
        items, probabilities = self._teach([[ids[item] for item in history] for _, history in pairs])
        taught = np.flatnonzero(probabilities.any(axis=1))
        if self._count is None:
            self._count = len(taught)
        taught = _fit_count(taught, self._count, generator)
        shown = self._show([pairs[number] for number in taught.tolist()])
        self._examples = self._attach_targets(shown, items[taught], probabilities[taught], generator)

    def _show(self, pairs: Sequence[tuple[int, list[int]]]) -> list[Example]:
        """Examples that show the histories, without a target; those of one walk are a group."""
        sids, ids = self.catalogue.sids, self.catalogue.item_ids
        budgets = [self.encoder.cutoff_len - self.longest_target] * len(pairs)
        prompts = shorten_prompts(self.task, [[sids[i] for i in walk] for _, walk in pairs], budgets, self.encoder)
        return [
            Example(prompt, tokens, [], f"walk/{number}", "", "", -1, history_ids=tuple(ids[item] for item in walk))
            for (number, walk), (_, prompt, tokens) in zip(pairs, prompts, strict=True)
        ]


def _fit_count(numbers: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` of some ascending numbers: without random ones, or with random ones twice."""
    if len(numbers) > count:
        return numbers[np.sort(generator.choice(len(numbers), count, replace=False))]
    if not len(numbers):
        return numbers
    return np.sort(np.concatenate((numbers, generator.choice(numbers, count - len(numbers)))))


def add_last_rows(rows: Sequence[Row], longest: int) -> list[Row]:
    """One more row for every user: the history that ends in the user's last target, whose own next item is unknown.

    Args:
        rows: train rows, in the order of time.
        longest: items of the longest history.

    Returns:
        Rows whose target repeats the last item of their history; they are for teachers alone.
    """
    last = {row.user_id: row for row in rows}
    return [
        replace(
            row,
            history_titles=(*row.history_titles, row.title)[-longest:],
            history_ids=(*row.history_ids, row.item_id)[-longest:],
            history_sids=(*row.history_sids, row.sid)[-longest:],
        )
        for row in last.values()
    ]
