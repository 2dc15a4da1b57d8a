"""Counting wider than transitions: items bought within a few steps of each other, in both directions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from minionerec.common.files import InputError
from minionerec.common.records import Catalogue, Row
from minionerec.common.texts import shorten_title

STEP_DECAY = 0.3  # of a pair's weight with every item between the two
FARTHEST = 4  # steps between the items of a pair; farther ones would count less than a hundredth
REVERSE_SHARE = 0.1  # of a pair's weight, for the way back
SMOOTHING = 3.0  # added to an item's sum, so that few pairs say little
HISTORY_DECAY = 0.5  # of a history item's say with every newer item


class Cooccurrences:
    """Weights of ordered pairs of items, and what they say comes next.

    A row adds 1, .3, .09 and .027 to the pairs (history item, target), newest item first, and a tenth of that to
    (target, history item). An item's weights are divided by their sum + 3; after a history those of its items are added
    up, newest first times 1, .5, .25, ..., and divided by their sum.

    Args:
        rows: of the train split.
        catalogue: the items.

    Raises:
        InputError: there are no rows.
    """

    def __init__(self, rows: Sequence[Row], catalogue: Catalogue):
        if not len(rows):
            raise InputError("baseline cooccurrence: counts the histories of the train split; --train_file is missing")
        self._item_ids, self._catalogue = set(catalogue.item_ids), catalogue
        self._weights: dict[int, dict[int, float]] = defaultdict(dict)
        for row in rows:
            for source, target, weight in _list_pairs(row.history_ids, row.item_id):
                following = self._weights[source]
                following[target] = following.get(target, 0.0) + weight
        self._sums = {source: sum(following.values()) for source, following in self._weights.items()}

    def predict(self, histories: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        """{item: likelihood} after every history of item ids, oldest first."""
        return [self._share(self._score(history, {})) for history in histories]

    def predict_without_row(self, rows: Sequence[Row]) -> list[dict[int, float]]:
        """The same after the history of every train row, as if that row were none."""
        predictions = []
        for row in rows:
            own: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
            for source, target, weight in _list_pairs(row.history_ids, row.item_id):
                own[source][target] += weight
            predictions.append(self._share(self._score(row.history_ids, own)))
        return predictions

    def explain(self, history: Sequence[int], items: Sequence[int]) -> list[str]:
        """`bought with X` for each item, X being the item of the history with the largest part; empty without one."""
        title_of = dict(zip(self._catalogue.item_ids, self._catalogue.titles, strict=True))
        parts: dict[int, dict[int, float]] = {item: defaultdict(float) for item in items}
        for age, source in enumerate(reversed(history)):
            scale = HISTORY_DECAY**age / (self._sums.get(source, 0.0) + SMOOTHING)
            for item in items:
                parts[item][source] += scale * self._weights.get(source, {}).get(item, 0.0)
        best = [max(of_item, key=of_item.__getitem__) for of_item in (parts[item] for item in items)]
        return [
            f"bought with {shorten_title(title_of[source])}" if parts[item][source] > 0 else ""
            for item, source in zip(items, best, strict=True)
        ]

    def _score(self, history: Sequence[int], own: dict[int, dict[int, float]]) -> dict[int, float]:
        """{item: score} after a history, by weights without those of `own`."""
        scores: dict[int, float] = defaultdict(float)
        for age, source in enumerate(reversed(history)):
            less = own.get(source, {})
            total = self._sums.get(source, 0.0) - sum(less.values()) + SMOOTHING
            for item, weight in self._weights.get(source, {}).items():
                weight -= less.get(item, 0.0)
                if weight > 1e-9:  # else nobody else bought the two together
                    scores[item] += HISTORY_DECAY**age * weight / total
        return scores

    def _share(self, scores: dict[int, float]) -> dict[int, float]:
        kept = {item: score for item, score in scores.items() if item in self._item_ids}
        total = sum(kept.values())
        return {item: score / total for item, score in kept.items()}


def _list_pairs(history: Sequence[int], target: int) -> list[tuple[int, int, float]]:
    """(source, target, weight) of every pair that a row adds to."""
    pairs = []
    for distance, item in enumerate(reversed(history[-FARTHEST:])):
        weight = STEP_DECAY**distance
        pairs += [(item, target, weight), (target, item, REVERSE_SHARE * weight)]
    return pairs
