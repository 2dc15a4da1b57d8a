"""Counting wider than transitions: items bought within a few steps of each other, in both directions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from scipy import sparse

from minionerec.common.files import InputError
from minionerec.common.records import Catalogue, Row
from minionerec.common.texts import shorten_title
from minionerec.recommenders.content import HISTORIES_AT_ONCE

PAIR = np.dtype([("source", np.int64), ("target", np.int64), ("weight", np.float64)])
ROUNDING = 1e-12  # of a score: what is left of a pair that the row alone has made


@dataclass(frozen=True)
class CooccurrenceSettings:
    """How pairs of items are counted.

    Attributes:
        step_decay: of a pair's weight with every item between the two.
        farthest: steps between the items of a pair at most.
        reverse_share: of a pair's weight, for the way back.
        smoothing: added to an item's sum, so that few pairs say little.
        history_decay: of what a history item says, with every newer item.
    """

    step_decay: float
    farthest: int
    reverse_share: float
    smoothing: float
    history_decay: float


# For shops, where the last item says most, and for long histories of one taste, such as films.
NEAR = CooccurrenceSettings(step_decay=0.3, farthest=4, reverse_share=0.1, smoothing=3.0, history_decay=0.5)
WIDE = CooccurrenceSettings(step_decay=0.8, farthest=10, reverse_share=0.3, smoothing=10.0, history_decay=0.8)


class Cooccurrences:
    """Weights of ordered pairs of items, and what they say comes next.

    A row adds 1, d, d^2, ... (d: step_decay) to the pairs (history item, target), newest item first, and a share of
    that to (target, history item). An item's weights are divided by their sum + smoothing; after a history those of its
    items are added up, newest first times 1, h, h^2, ... (h: history_decay), and divided by their sum.

    Args:
        rows: of the train split.
        catalogue: the items.
        settings: how pairs are counted.

    Raises:
        InputError: there are no rows.
    """

    def __init__(self, rows: Sequence[Row], catalogue: Catalogue, settings: CooccurrenceSettings = NEAR):
        if not len(rows):
            raise InputError("baseline cooccurrence: counts the histories of the train split; --train_file is missing")
        self._settings, self._titles = settings, catalogue.titles
        self._item_ids = np.array(catalogue.item_ids)
        self._number_of = {item: number for number, item in enumerate(catalogue.item_ids)}
        size = len(self._item_ids)
        pairs = np.fromiter(chain.from_iterable(map(self._list_pairs, rows)), PAIR)
        where = (pairs["source"], pairs["target"])
        self._weights = sparse.csr_matrix((pairs["weight"], where), shape=(size, size))
        self._sums = np.asarray(self._weights.sum(axis=1)).ravel()

    def predict(self, histories: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        """{item: likelihood} after every history of item ids, oldest first."""
        return self._in_parts(histories, lambda part: self._weigh(part, [{}] * len(part)) @ self._weights)

    def predict_without_row(self, rows: Sequence[Row]) -> list[dict[int, float]]:
        """The same after the history of every train row, as if that row were none."""
        return self._in_parts(rows, self._score_without_row)

    def explain(self, history: Sequence[int], items: Sequence[int]) -> list[str]:
        """`bought with X` for each item, X being the item of the history with the largest part; empty without one."""
        if not items:
            return []
        shares = self._weigh([history], [{}])
        weights = self._weights[shares.indices][:, [self._number_of[item] for item in items]].toarray()
        parts = shares.data[:, None] * weights
        best = [shorten_title(self._titles[shares.indices[source]]) for source in parts.argmax(axis=0)]
        return [f"bought with {title}" if p > 0 else "" for title, p in zip(best, parts.max(axis=0), strict=True)]

    def _in_parts(self, asked: Sequence, score: Callable[[Sequence], sparse.csr_matrix]) -> list[dict[int, float]]:
        """The likelihoods of some histories or rows, whose scores [asked, items] are held for a few of them only."""
        predictions = []
        for start in range(0, len(asked), HISTORIES_AT_ONCE):
            scores = score(asked[start : start + HISTORIES_AT_ONCE])
            for low, high in pairwise(scores.indptr):
                values, items = scores.data[low:high], self._item_ids[scores.indices[low:high]]
                kept = values > ROUNDING
                total = values[kept].sum()
                predictions.append(dict(zip(items[kept].tolist(), (values[kept] / total).tolist(), strict=True)))
        return predictions

    def _weigh(self, histories: Sequence[Sequence[int]], less: Sequence[dict[int, float]]) -> sparse.csr_matrix:
        """[histories, items] what a pair's weight counts after each history, by sums without `less` of each item."""
        rows, numbers, shares = [], [], []
        for row, (history, without) in enumerate(zip(histories, less, strict=True)):
            for age, item in enumerate(reversed(history)):
                number = self._number_of.get(item)
                if number is not None:
                    total = self._sums[number] - without.get(number, 0.0) + self._settings.smoothing
                    rows.append(row)
                    numbers.append(number)
                    shares.append(self._settings.history_decay**age / total)
        return sparse.csr_matrix((shares, (rows, numbers)), shape=(len(histories), len(self._item_ids)))

    def _score_without_row(self, rows: Sequence[Row]) -> sparse.csr_matrix:
        pairs = [self._list_pairs(row) for row in rows]
        less: list[dict[int, float]] = [defaultdict(float) for _ in rows]
        for own, of_row in zip(less, pairs, strict=True):
            for source, _, weight in of_row:
                own[source] += weight
        shares = self._weigh([row.history_ids for row in rows], less)
        own_pairs = [(number, *pair) for number, of_row in enumerate(pairs) for pair in of_row]
        if not own_pairs:
            return shares @ self._weights
        row, source, target, weight = (np.array(column) for column in zip(*own_pairs, strict=True))
        own_part = np.asarray(shares[row, source]).ravel() * weight
        scores = shares @ self._weights - sparse.csr_matrix((own_part, (row, target)), shape=shares.shape)
        return scores.tocsr()

    def _list_pairs(self, row: Row) -> list[tuple[int, int, float]]:
        """(source, target, weight) of every pair that a row adds to, items by their numbers in the catalogue."""
        target = self._number_of.get(row.item_id)
        pairs = []
        for distance, item in enumerate(reversed(row.history_ids[-self._settings.farthest :])):
            number = self._number_of.get(item)
            if number is not None and target is not None:
                weight = self._settings.step_decay**distance
                pairs.append((number, target, weight))
                pairs.append((target, number, self._settings.reverse_share * weight))
        return pairs
