"""Weights of the parts of a sum of baselines, chosen on validation rows by HR@10 + NDCG@10."""

from __future__ import annotations

import math
from collections.abc import Sequence

from minionerec.common.records import Row
from minionerec.recommenders.content import HISTORIES_AT_ONCE
from minionerec.recommenders.registry import SUM_SIGN, BaselineInputs, add_likelihoods, build_baseline

SUM_WEIGHTS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of a part, where the first one has 1
ROUNDS = 2  # over the parts


def find_target_rank(likelihoods: dict[int, float], target: int, counts: dict[int, int]) -> int | None:
    """The place of an item, from 1, in the order of `select_likeliest`; None where its likelihood is 0."""
    p = likelihoods.get(target, 0.0)
    if not p:
        return None
    key = (-p, -counts.get(target, 0), target)
    return 1 + sum(
        other > p or (other == p and (-other, -counts.get(item, 0), item) < key) for item, other in likelihoods.items()
    )


def choose_sum_weights(name: str, inputs: BaselineInputs, rows: Sequence[Row]) -> tuple[list[float], dict[str, float]]:
    """The weights of a sum's parts with the best HR@10 + NDCG@10.

    One part after the other tries SUM_WEIGHTS while the others stay; all begin with 1, and the first keeps it.

    Args:
        name: of the sum.
        inputs: what its parts are built from.
        rows: validation rows.

    Returns:
        (a weight for every part, {the weights that were tried, as text: HR@10 + NDCG@10}).
    """
    parts = [build_baseline(part, inputs) for part in name.split(SUM_SIGN)]
    histories, counts = [row.history_ids for row in rows], inputs.catalogue.counts
    predictions: list[tuple[dict[int, float], ...]] = []
    for start in range(0, len(rows), HISTORIES_AT_ONCE):
        chunk = histories[start : start + HISTORIES_AT_ONCE]
        predictions += zip(*(part(chunk) for part in parts), strict=True)
    tried: dict[str, float] = {}

    def measure(weights: list[float]) -> float:
        key = ":".join(f"{weight:g}" for weight in weights)
        if key not in tried:
            gains = 0.0
            for row, of_parts in zip(rows, predictions, strict=True):
                rank = find_target_rank(add_likelihoods(of_parts, weights), row.item_id, counts)
                gains += 1 + 1 / math.log2(rank + 1) if rank and rank <= 10 else 0.0
            tried[key] = round(gains / len(rows), 6)
        return tried[key]

    weights = [1.0] * len(parts)
    measure(weights)
    for _ in range(ROUNDS if len(parts) > 2 else 1):
        for number in range(1, len(parts)):
            choices = [[*weights[:number], weight, *weights[number + 1 :]] for weight in SUM_WEIGHTS]
            # Of equals the nearest to 1.
            weights = max(choices, key=lambda choice: (measure(choice), -abs(math.log(choice[number]))))
    return weights, tried
