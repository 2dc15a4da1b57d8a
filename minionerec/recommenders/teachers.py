"""Teachers: baselines whose rankings a language model learns from, and synthetic histories to learn them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from minionerec.common.records import Row
from minionerec.recommenders.content import HISTORIES_AT_ONCE
from minionerec.recommenders.likeliest import select_likeliest
from minionerec.recommenders.registry import BaselineInputs, build_baseline, build_without_row

TAUGHT_ITEMS = 32  # of a history; further ones have hardly any weight
LONGEST_WALK = 6  # items of a synthetic history
REVERSED_SHARE = 0.6  # of the walks: they end in the item that they were drawn for


@dataclass(frozen=True)
class SoftTargets:
    """What a teacher says of H histories: T items each, most likely first.

    Attributes:
        items: [H, T] int64, numbers of items in the catalogue.
        probabilities: [H, T] float32, which add up to 1; all are 0 where the teacher says nothing.
    """

    items: np.ndarray
    probabilities: np.ndarray

    def select(self, numbers: Sequence[int] | np.ndarray) -> SoftTargets:
        """Those of some histories."""
        return SoftTargets(self.items[numbers], self.probabilities[numbers])


class Teacher:
    """A registered baseline, or a sum of some, that says what should come next.

    Args:
        name: of the baseline or sum.
        inputs: what it is built from; only train rows.
    """

    def __init__(self, name: str, inputs: BaselineInputs):
        self._name, self._inputs = name, inputs
        self._predict = build_baseline(name, inputs)
        self._counts = inputs.catalogue.counts
        self._number_of = {item: number for number, item in enumerate(inputs.catalogue.item_ids)}

    def teach_histories(self, histories: Sequence[Sequence[int]]) -> SoftTargets:
        """Soft targets after histories of item ids, oldest first, that are no train rows."""
        return self._select(self._predict, histories)

    def teach_rows(self, rows: Sequence[Row]) -> SoftTargets:
        """Soft targets of train rows; what each row says itself is left out, else the teacher would give it away.

        Raises:
            InputError: a baseline that cannot leave it out, see `build_without_row`.
        """
        return self._select(build_without_row(self._name, self._inputs), rows)

    def _select(self, predict: Callable[[Sequence], list[Mapping[int, float]]], asked: Sequence) -> SoftTargets:
        items = np.zeros((len(asked), TAUGHT_ITEMS), dtype=np.int64)
        probabilities = np.zeros((len(asked), TAUGHT_ITEMS), dtype=np.float32)
        # A few at a time, for there may be likelihoods of all items.
        parts = (
            predict([asked[number] for number in range(start, min(start + HISTORIES_AT_ONCE, len(asked)))])
            for start in range(0, len(asked), HISTORIES_AT_ONCE)
        )
        for number, likelihoods in enumerate(chain.from_iterable(parts)):
            best = select_likeliest(likelihoods, TAUGHT_ITEMS, self._counts)
            values = np.array([likelihoods[item] for item in best], dtype=np.float64)
            taught = int(np.count_nonzero(values))  # the first ones: those that are impossible stand last
            if taught:
                items[number, :taught] = [self._number_of[item] for item in best[:taught]]
                probabilities[number, :taught] = values[:taught] / values[:taught].sum()
        return SoftTargets(items, probabilities)


def draw_walks(steps: SoftTargets, generator: np.random.Generator) -> list[list[int]]:
    """One synthetic history for every item: a walk along what the teacher says after a single item.

    A walk begins at its item and has 1 to 6 items; it stops early at an item after which the teacher says nothing. The
    reversed ones end at the item that they were drawn for, so that items which nobody has bought stand last too.

    Args:
        steps: soft targets after each item of the catalogue alone, [N, T].
        generator: of all draws.

    Returns:
        N lists of item numbers, oldest first.
    """
    count = len(steps.items)
    lengths = generator.integers(1, LONGEST_WALK + 1, size=count)
    is_reversed = generator.random(count) < REVERSED_SHARE
    cumulative = steps.probabilities.cumsum(axis=1)
    walks = np.full((count, LONGEST_WALK), -1, dtype=np.int64)
    walks[:, 0] = np.arange(count)
    for step in range(1, LONGEST_WALK):
        here = walks[:, step - 1]
        goes_on = (here >= 0) & (step < lengths) & (cumulative[here, -1] > 0)
        draws = generator.random((count, 1)) * cumulative[here, -1:]
        column = np.minimum((draws >= cumulative[here]).sum(axis=1), cumulative.shape[1] - 1)
        walks[:, step] = np.where(goes_on, steps.items[here, column], -1)
    histories = [[item for item in walk if item >= 0] for walk in walks.tolist()]
    return [
        history[::-1] if backwards else history
        for history, backwards in zip(histories, is_reversed.tolist(), strict=True)
    ]
