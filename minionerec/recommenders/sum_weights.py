"""What baselines leave open, chosen on validation rows by HR@10 + NDCG@10: weights of sums, use of descriptions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from minionerec.common.records import Row
from minionerec.recommenders.content import HISTORIES_AT_ONCE
from minionerec.recommenders.likelihoods import add_likelihoods
from minionerec.recommenders.registry import (
    BaselineInputs,
    BuiltBaselines,
    Likelihoods,
    build_baseline,
)

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


def measure_likelihoods(predictions: Sequence[dict[int, float]], rows: Sequence[Row], counts: dict[int, int]) -> float:
    """HR@10 + NDCG@10 of the rows' targets in the order of the likelihoods predicted for them."""
    gains = 0.0
    for row, likelihoods in zip(rows, predictions, strict=True):
        rank = find_target_rank(likelihoods, row.item_id, counts)
        gains += 1 + 1 / math.log2(rank + 1) if rank and rank <= 10 else 0.0
    return round(gains / len(rows), 6)


def predict_rows(predict: Likelihoods, rows: Sequence[Row], excluded: Sequence[set[int]]) -> list[dict[int, float]]:
    """`predict` of the histories of many rows, HISTORIES_AT_ONCE at a time, without the excluded items of each."""
    predictions = []
    for start in range(0, len(rows), HISTORIES_AT_ONCE):
        part = slice(start, start + HISTORIES_AT_ONCE)
        for likelihoods, unwanted in zip(predict([row.history_ids for row in rows[part]]), excluded[part], strict=True):
            predictions.append({item: p for item, p in likelihoods.items() if item not in unwanted})
    return predictions


def choose_descriptions(
    inputs: BaselineInputs, rows: Sequence[Row], excluded: Sequence[set[int]] | None = None
) -> tuple[BaselineInputs, dict[str, float]]:
    """Whether `content` looks at descriptions beside titles: what finds more targets of validation rows, alone.

    Shops write descriptions of very different use; on some catalogues they only blur the titles.

    Args:
        inputs: with descriptions.
        rows: validation rows.
        excluded: items that the list of each row may not hold, as in `list_excluded`; None: there are none.

    Returns:
        (the inputs, without descriptions where titles alone are as good or better, {texts: HR@10 + NDCG@10}).
    """
    excluded = excluded or [set() for _ in rows]
    choices = {"titles": replace(inputs, descriptions={}), "titles and descriptions": inputs}
    tried = {
        texts: measure_likelihoods(
            predict_rows(build_baseline("content", choice), rows, excluded), rows, inputs.catalogue.counts
        )
        for texts, choice in choices.items()
    }
    return choices[max(choices, key=tried.__getitem__)], tried


def choose_sum_weights(
    name: str, built: BuiltBaselines, rows: Sequence[Row], excluded: Sequence[set[int]] | None = None
) -> tuple[list[float], dict[str, float]]:
    """The weights of a sum's parts with the best HR@10 + NDCG@10.

    One part after the other tries SUM_WEIGHTS while the others stay; all begin with 1, and the first keeps it.

    Args:
        name: of the sum.
        built: the baselines of the run.
        rows: validation rows.
        excluded: items that the list of each row may not hold, as in `list_excluded`; None: there are none.

    Returns:
        (a weight for every part, {the weights that were tried, as text: HR@10 + NDCG@10}).
    """
    parts = built.list_parts(name)
    excluded, counts = excluded or [set() for _ in rows], built.inputs.catalogue.counts
    predictions = list(zip(*(predict_rows(part, rows, excluded) for part in parts), strict=True))
    tried: dict[str, float] = {}

    def measure(weights: list[float]) -> float:
        key = ":".join(f"{weight:g}" for weight in weights)
        if key not in tried:
            tried[key] = measure_likelihoods([add_likelihoods(p, weights) for p in predictions], rows, counts)
        return tried[key]

    weights = [1.0] * len(parts)
    measure(weights)
    for _ in range(ROUNDS if len(parts) > 2 else 1):
        for number in range(1, len(parts)):
            choices = [[*weights[:number], weight, *weights[number + 1 :]] for weight in SUM_WEIGHTS]
            # Of equals the nearest to 1.
            weights = max(choices, key=lambda choice: (measure(choice), -abs(math.log(choice[number]))))
    return weights, tried
