"""Weights of a fusion: the model's own and one for every baseline, chosen on validation rows by HR@10 + NDCG@10."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from minionerec.common.records import Catalogue, Row

WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
Term = dict[int, float]  # {item: probability} of the model or of a baseline


def list_terms(result: dict, catalogue: Catalogue) -> list[Term]:
    """What `CandidateScorer` found of a row, item by item: of the model first, then of every baseline.

    Each of several items that share a SID has the model's probability of the SID.
    """
    model = {item: math.exp(score) for sid, score in result["model"] for item in catalogue.items_of_sid[sid]}
    return [model, *map(dict, result["baselines"])]


def order_candidates(terms: Sequence[Term], catalogue: Catalogue) -> list[int]:
    """The candidates of a row as they stand where their scores are equal.

    By what the baselines say together, then by training popularity, then by id.
    """
    counts = catalogue.counts
    baselines = {item: sum(term.get(item, 0.0) for term in terms[1:]) for item in terms[0]}
    return sorted(terms[0], key=lambda item: (-baselines[item], -counts.get(item, 0), item))


def fuse_scores(terms: Sequence[Term], weights: Sequence[float], catalogue: Catalogue) -> list[tuple[int, float]]:
    """[(item, sum of weight * p over the terms)], best first; ties as in `order_candidates`.

    A baseline of weight 0 still brings its items, by their other terms: the search may have missed some.

    Args:
        terms: of `list_terms`; all items stand in the first one.
        weights: one for every term.
        catalogue: the items, with their popularity.
    """
    scored = [
        (item, sum(weight * term.get(item, 0.0) for weight, term in zip(weights, terms, strict=True)))
        for item in order_candidates(terms, catalogue)
    ]
    return sorted(scored, key=lambda pair: -pair[1])


class CandidateTable:
    """The candidates of many rows as arrays, so that a choice of weights is measured in milliseconds.

    Rows whose target is no candidate have no part in any hit, so that they only count.

    Args:
        rows: validation rows.
        results: what `CandidateScorer` found of them.
        catalogue: the items, with their popularity.

    Attributes:
        terms: float64 [T, C], the probabilities of all C candidates, row by row; in a row as in `order_candidates`.
    """

    def __init__(self, rows: Sequence[Row], results: Collection[dict], catalogue: Catalogue):
        self.count = len(rows)
        columns: list[np.ndarray] = []
        sizes, targets, start = [], [], 0
        for row, result in zip(rows, results, strict=True):
            terms = list_terms(result, catalogue)
            if row.item_id not in terms[0]:
                continue
            items = order_candidates(terms, catalogue)
            columns.append(np.array([[term.get(item, 0.0) for item in items] for term in terms]))
            sizes.append(len(items))
            targets.append(start + items.index(row.item_id))
            start += len(items)
        self.terms = np.concatenate(columns, axis=1) if columns else np.zeros((1, 0))
        self._row_of = np.repeat(np.arange(len(sizes)), sizes)  # [C]
        self._targets = np.array(targets, dtype=np.int64)  # [rows with their target], its candidate
        self._is_before = np.arange(start) < self._targets[self._row_of]  # [C], the candidate stands before the target

    def rank_targets(self, weights: Sequence[float]) -> np.ndarray:
        """Ranks [rows whose target is a candidate], from 1, as `fuse_scores` orders them."""
        scores = np.zeros(self.terms.shape[1])
        for weight, term in zip(weights, self.terms, strict=True):
            scores += weight * term
        target = scores[self._targets][self._row_of]
        ahead = (scores > target) | ((scores == target) & self._is_before)
        return 1 + np.bincount(self._row_of, ahead, minlength=len(self._targets)).astype(np.int64)

    def measure(self, weights: Sequence[float]) -> float:
        """HR@10 + NDCG@10 of all rows."""
        if not len(self._targets):
            return 0.0
        ranks = self.rank_targets(weights)
        ranks = ranks[ranks <= 10]
        return round(float((1 + 1 / np.log2(ranks + 1)).sum()) / self.count, 6)


def choose_weights(
    rows: Sequence[Row], results: Collection[dict], catalogue: Catalogue
) -> tuple[list[float], dict[str, float]]:
    """The weights of model and baselines with the best HR@10 + NDCG@10, by coordinates.

    From the model alone and from all terms alike: one term after the other, the model among them, tries WEIGHTS while
    the others stay, until nothing gets better.

    Args:
        rows: validation rows.
        results: what `CandidateScorer` found of them.
        catalogue: the items, with their popularity.

    Returns:
        (a weight for the model and for every baseline; {the weights that were tried, as text: HR@10 + NDCG@10}).
    """
    table = CandidateTable(rows, results, catalogue)
    count = 1 + len(next(iter(results))["baselines"])
    tried: dict[tuple[float, ...], float] = {}

    def measure(weights: tuple[float, ...]) -> float:
        if weights not in tried:
            tried[weights] = table.measure(weights)
        return tried[weights]

    def climb(weights: tuple[float, ...]) -> tuple[float, ...]:
        while True:
            before = measure(weights)
            for number in reversed(range(count)):
                choices = [(*weights[:number], weight, *weights[number + 1 :]) for weight in WEIGHTS]
                # The first of equals is taken, so that what changes nothing stays as it is.
                weights = max((weights, *(choice for choice in choices if any(choice))), key=measure)
            if measure(weights) <= before:
                return weights

    alone, alike = (1.0, *[0.0] * (count - 1)), (1.0,) * count
    weights = max(map(climb, (alone, alike)), key=measure)
    return list(weights), {":".join(f"{weight:g}" for weight in choice): figure for choice, figure in tried.items()}
