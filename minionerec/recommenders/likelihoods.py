"""How likely items are after a history: dicts where most have none, arrays where every item of a catalogue has one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np


class WholeLikelihoods(Mapping[int, float]):
    """Likelihoods of all items of a catalogue; reads as {item id: p} does, and is added up and sorted as an array.

    Args:
        item_ids: of the catalogue.
        column_of: {item id: where it stands in item_ids}; all histories share it.
        values: [N], in the order of item_ids.
    """

    def __init__(self, item_ids: Sequence[int], column_of: Mapping[int, int], values: np.ndarray):
        self.item_ids, self.column_of, self.values_array = item_ids, column_of, values

    def __getitem__(self, item: int) -> float:
        return float(self.values_array[self.column_of[item]])

    def __iter__(self) -> Iterator[int]:
        return iter(self.item_ids)

    def __len__(self) -> int:
        return len(self.item_ids)

    def __contains__(self, item: object) -> bool:
        return item in self.column_of

    # Those of Mapping would look up one item after the other.
    def items(self) -> Iterator[tuple[int, float]]:
        """(item, p) of every item."""
        return zip(self.item_ids, self.values(), strict=True)

    def values(self) -> list[float]:
        """Of every item."""
        return self.values_array.tolist()

    def sum_up(self) -> float:
        """The sum of all."""
        return float(self.values_array.sum(dtype=np.float64))


def split_likelihoods(likelihoods: Mapping[int, float]) -> tuple[Sequence[int], np.ndarray]:
    """(items, their likelihoods as float64)."""
    if isinstance(likelihoods, WholeLikelihoods):
        return likelihoods.item_ids, likelihoods.values_array.astype(np.float64)
    return list(likelihoods), np.fromiter(likelihoods.values(), np.float64, len(likelihoods))


def sum_likelihoods(likelihoods: Mapping[int, float]) -> float:
    """The sum of all likelihoods."""
    return likelihoods.sum_up() if isinstance(likelihoods, WholeLikelihoods) else sum(likelihoods.values())


def are_sound(likelihoods: Mapping[int, float]) -> bool:
    """Whether all are finite numbers of 0 or more."""
    if not len(likelihoods):
        return True
    if isinstance(likelihoods, WholeLikelihoods):
        return bool(likelihoods.values_array.min() >= 0) and likelihoods.sum_up() < math.inf
    # One that is no number makes the sum none, and with it both comparisons false.
    return min(likelihoods.values()) >= 0 and sum(likelihoods.values()) < math.inf


def add_likelihoods(
    parts: Sequence[Mapping[int, float]], weights: Sequence[float] | None = None
) -> Mapping[int, float]:
    """The weighted mean of several likelihoods of the same history, each divided by its sum first.

    A part that says nothing about the history is left out of the mean, so that the result adds up to 1 again.

    Args:
        parts: {item: likelihood} of each baseline.
        weights: of the parts; 1 each if not given.
    """
    sums = list(map(sum_likelihoods, parts))
    shares = [weight if size else 0.0 for weight, size in zip(weights or [1.0] * len(parts), sums, strict=True)]
    factors = [share / size / sum(shares) if share else 0.0 for share, size in zip(shares, sums, strict=True)]
    whole = next((part for part in parts if isinstance(part, WholeLikelihoods)), None)
    if whole is not None:
        return _add_to_whole(parts, factors, whole)
    total: dict[int, float] = {}
    for part, factor in zip(parts, factors, strict=True):
        if factor:
            for item, p in part.items():
                total[item] = total.get(item, 0.0) + factor * p
    return total


def _add_to_whole(
    parts: Sequence[Mapping[int, float]], factors: Sequence[float], whole: WholeLikelihoods
) -> WholeLikelihoods:
    """The sum of the parts times their factors, over the items of one of them, which are all."""
    total = np.zeros(len(whole))
    for part, factor in zip(parts, factors, strict=True):
        if not factor:
            continue
        items, values = split_likelihoods(part)
        if items is whole.item_ids:
            total += factor * values
        else:
            total[[whole.column_of[item] for item in items]] += factor * values
    return WholeLikelihoods(whole.item_ids, whole.column_of, total)
