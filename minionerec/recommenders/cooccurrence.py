"""Counting wider than transitions: items bought within a few steps of each other, in both directions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from minionerec.common.files import InputError
from minionerec.common.records import Catalogue, Row
from minionerec.common.texts import shorten_title


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
        self._item_ids, self._catalogue, self._settings = set(catalogue.item_ids), catalogue, settings
        self._weights: dict[int, dict[int, float]] = defaultdict(dict)
        for row in rows:
            for source, target, weight in self._list_pairs(row):
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
            for source, target, weight in self._list_pairs(row):
                own[source][target] += weight
            predictions.append(self._share(self._score(row.history_ids, own)))
        return predictions

    def explain(self, history: Sequence[int], items: Sequence[int]) -> list[str]:
        """`bought with X` for each item, X being the item of the history with the largest part; empty without one."""
        title_of = dict(zip(self._catalogue.item_ids, self._catalogue.titles, strict=True))
        parts: dict[int, dict[int, float]] = {item: defaultdict(float) for item in items}
        for age, source in enumerate(reversed(history)):
            scale = self._settings.history_decay**age / (self._sums.get(source, 0.0) + self._settings.smoothing)
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
            total = self._sums.get(source, 0.0) - sum(less.values()) + self._settings.smoothing
            for item, weight in self._weights.get(source, {}).items():
                weight -= less.get(item, 0.0)
                if weight > 1e-9:  # else nobody else bought the two together
                    scores[item] += self._settings.history_decay**age * weight / total
        return scores

    def _share(self, scores: dict[int, float]) -> dict[int, float]:
        kept = {item: score for item, score in scores.items() if item in self._item_ids}
        total = sum(kept.values())
        return {item: score / total for item, score in kept.items()}

    def _list_pairs(self, row: Row) -> list[tuple[int, int, float]]:
        """(source, target, weight) of every pair that a row adds to."""
        pairs = []
        for distance, item in enumerate(reversed(row.history_ids[-self._settings.farthest :])):
            weight = self._settings.step_decay**distance
            pairs.append((item, row.item_id, weight))
            pairs.append((row.item_id, item, self._settings.reverse_share * weight))
        return pairs
