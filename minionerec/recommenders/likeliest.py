"""From likelihoods to lists: the most likely items first, ties and gaps filled by popularity."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from minionerec.common.records import Catalogue
from minionerec.recommenders.content import HISTORIES_AT_ONCE
from minionerec.recommenders.likelihoods import split_likelihoods
from minionerec.recommenders.registry import Likelihoods
from minionerec.recommenders.transitions import fill_with_popular, sort_by_popularity

SORTED_AT_ONCE = 16  # items; fewer are sorted faster one by one


def select_likeliest(likelihoods: Mapping[int, float], k: int, counts: dict[int, int]) -> list[int]:
    """The k most likely items, best first; ties by training popularity, then id."""
    if len(likelihoods) < SORTED_AT_ONCE:
        return heapq.nsmallest(k, likelihoods, key=lambda item: (-likelihoods[item], -counts.get(item, 0), item))
    items, p = split_likelihoods(likelihoods)
    # Only what is at least as likely as the k-th, of which there may be more than k.
    kept = np.flatnonzero(p >= np.partition(p, -k)[-k]) if 0 < k < len(p) else np.arange(len(p))
    items = [items[place] for place in kept.tolist()]
    order = np.lexsort((items, [-counts.get(item, 0) for item in items], -p[kept]))
    return [items[place] for place in order[: max(k, 0)].tolist()]


def rank_by_likelihood(
    predict: Likelihoods, histories: Sequence[Sequence[int]], catalogue: Catalogue, k: int
) -> tuple[list[list[int]], list[list[float]]]:
    """(the k most likely items after every history, best first; their likelihoods).

    Ties fall by training popularity, then id; a list that is too short is filled up with the most popular items.
    """
    by_popularity = sort_by_popularity(catalogue)
    rankings, scores = [], []
    for start in range(0, len(histories), HISTORIES_AT_ONCE):
        for likelihoods in predict(histories[start : start + HISTORIES_AT_ONCE]):
            ranked = fill_with_popular(select_likeliest(likelihoods, k, catalogue.counts), by_popularity, k)
            # A plugin may use the numbers of another library, which JSON does not take.
            rankings.append([int(item) for item in ranked])
            scores.append([float(likelihoods.get(item, 0.0)) for item in ranked])
    return rankings, scores
