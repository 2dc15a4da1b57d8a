"""The numbers of a report: metrics with intervals, paired tests, and metrics of groups of rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from minionerec.common.files import InputError
from minionerec.common.records import Row
from minionerec.common.texts import list_categories
from minionerec.evaluation.metrics import (
    HISTORY_BUCKETS,
    POPULARITY_BUCKETS,
    bootstrap_intervals,
    compute_row_gains,
    name_buckets,
)
from minionerec.evaluation.predictions import read_predictions
from minionerec.evaluation.significance import compute_item_ranks, mcnemar_test, sign_flip_test
from minionerec.reports.runs import Model, RunData

CUTOFFS = (5, 10, 20, 50)
METRICS = tuple((name, k) for name in ("HR", "NDCG") for k in CUTOFFS)
MAIN = (("HR", 10), ("NDCG", 10))
FEW_ROWS = 50  # below them a group says little
CATEGORIES = 12  # groups of the split by category, at most


@dataclass
class Ranked:
    """A model with the rank of every row's target.

    Attributes:
        model: what ranked; its predictions file is there.
        ranks: int64 [rows], 0 for a target not found.
        longest: length of its lists.
    """

    model: Model
    ranks: np.ndarray
    longest: int


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How much more a model has of a metric than another on the same rows, its interval and the test's p."""

    value: float
    low: float
    high: float
    p: float


@dataclass
class Group:
    """Rows that have something in common, and HR@10 of every model on them."""

    name: str
    rows: int
    estimates: dict[str, Estimate]

    @property
    def is_small(self) -> bool:
        """Whether there are too few rows to say much."""
        return self.rows < FEW_ROWS


def rank_models(models: Sequence[Model], data: RunData) -> tuple[list[Ranked], list[str]]:
    """(the models whose predictions are there for the test rows, why the others are left out)."""
    ranked, left_out = [], []
    for model in models:
        if model.predictions is None:
            left_out.append(f"{model.name}: its predictions file is gone")
            continue
        path = str(model.predictions)
        try:
            rows = _check_same_test_rows(read_predictions(path, "predictions"), data.test_rows)
            ranks, longest = compute_item_ranks(rows, data.catalogue, path, str(data.files["info_file"]))
        except InputError as error:
            left_out.append(f"{model.name}: {error}")
            continue
        ranked.append(Ranked(model, ranks, longest))
    return ranked, left_out


def _check_same_test_rows(predictions: Iterable[dict], rows: Sequence[Row]) -> Iterator[dict]:
    """The predictions one by one, which must be for these rows.

    Raises:
        InputError: they are for others.
    """
    number = 0
    for number, prediction in enumerate(predictions, 1):
        target = (str(prediction["user_id"]), prediction["item_id"])
        if number > len(rows) or target != (rows[number - 1].user_id, rows[number - 1].item_id):
            raise InputError("was measured on other rows")
        yield prediction
    if number != len(rows):
        raise InputError(f"was measured on {number:,} rows, and not on all {len(rows):,}")


def measure_model(ranked: Ranked) -> dict[str, Estimate]:
    """{"HR@5": ..., "NDCG@5": ..., ...} of the METRICS that the lists are long enough for, intervals by bootstrap."""
    keys = [(name, k) for name, k in METRICS if k <= ranked.longest]
    if not keys:
        return {}
    gains = np.stack([compute_row_gains(name, ranked.ranks, k) for name, k in keys], axis=1)
    low, high = bootstrap_intervals(gains)
    return {
        f"{name}@{k}": Estimate(float(gains[:, number].mean()), float(low[number]), float(high[number]))
        for number, (name, k) in enumerate(keys)
    }


def compare_with(ranked: Ranked, other: Ranked) -> dict[str, Difference]:
    """{"HR@10", "NDCG@10"}: how much more `ranked` has than `other`, row by row (see evaluation.significance)."""
    result = {}
    for name, k in MAIN:
        if k > min(ranked.longest, other.longest):
            continue
        difference = compute_row_gains(name, ranked.ranks, k) - compute_row_gains(name, other.ranks, k)
        low, high = bootstrap_intervals(difference[:, None])[:, 0]
        wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
        p = mcnemar_test(losses, wins) if name == "HR" else sign_flip_test(difference)
        result[f"{name}@{k}"] = Difference(float(difference.mean()), float(low), float(high), p)
    return result


def choose_reference(ranked: Sequence[Ranked]) -> Ranked | None:
    """The strongest of the baselines and networks by HR@10 + NDCG@10, which the others are compared with."""
    candidates = [entry for entry in ranked if entry.model.kind in ("baseline", "network")]
    return max(candidates, key=_sum_main, default=None)


def choose_shown(ranked: Sequence[Ranked], reference: Ranked | None) -> list[Ranked]:
    """The few models that pictures show: the reference, SFT, RL and what is fused with the last of these."""
    trained = [entry for entry in ranked if entry.model.kind in ("sft", "rl", "other")][-3:]
    fused = [entry for entry in ranked if entry.model.kind == "fused"][-1:]
    shown = [*([reference] if reference else []), *trained, *fused]
    return shown or list(ranked[:4])


def _sum_main(ranked: Ranked) -> float:
    return sum(float(compute_row_gains(name, ranked.ranks, k).mean()) for name, k in MAIN)


def estimate_share(hits: int, rows: int) -> Estimate:
    """A share of rows with its 95 % interval by Wilson (1927), which holds for few rows too."""
    interval = binomtest(hits, rows).proportion_ci(method="wilson")
    return Estimate(hits / rows, float(interval.low), float(interval.high))


def split_rows(data: RunData) -> dict[str, list[tuple[str, np.ndarray]]]:
    """{title of a split: [(name of a group, bool [rows])]}; empty groups are left out.

    By history length, popularity of the target, whether the history holds the target, and its categories, where the
    items have any: a row counts in each of them, and the CATEGORIES most frequent are there.
    """
    rows, counts = data.test_rows, data.catalogue.counts
    splits = {
        "History length": _split_by_number([len(row.history_ids) for row in rows], HISTORY_BUCKETS, "items"),
        "Popularity of the target": _split_by_number(
            [counts.get(row.item_id, 0) for row in rows], POPULARITY_BUCKETS, "train rows"
        ),
        "Repeated or new": _split_by_truth(rows, lambda row: row.item_id in row.history_ids, "in the history", "new"),
    }
    categories = _split_by_category(data)
    return splits | ({"Category of the target": categories} if categories else {})


def _split_by_number(values: Sequence[int], starts: Sequence[int], unit: str) -> list[tuple[str, np.ndarray]]:
    buckets = np.searchsorted(starts, values, side="right") - 1
    names = name_buckets(starts)
    return [
        (f"{names[bucket]} {unit.removesuffix('s') if names[bucket] == '1' else unit}", buckets == bucket)
        for bucket in np.unique(buckets)
    ]


def _split_by_truth(
    rows: Sequence[Row], test: Callable[[Row], bool], true: str, false: str
) -> list[tuple[str, np.ndarray]]:
    inside = np.array([test(row) for row in rows])
    return [(name, mask) for name, mask in ((true, inside), (false, ~inside)) if mask.any()]


def _split_by_category(data: RunData) -> list[tuple[str, np.ndarray]]:
    members: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(data.test_rows):
        for name in list_categories(data.items.get(row.item_id, {}).get("categories")):
            members[name].append(number)
    groups = sorted(members.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    # What all rows have in common splits nothing.
    groups = [(name, numbers) for name, numbers in groups if len(numbers) < len(data.test_rows)][:CATEGORIES]
    result = []
    for name, numbers in groups:
        mask = np.zeros(len(data.test_rows), dtype=bool)
        mask[numbers] = True
        result.append((name, mask))
    return result


def measure_groups(shown: Sequence[Ranked], data: RunData) -> dict[str, list[Group]]:
    """{title of a split: its groups} with HR@10 of the shown models."""
    hits = {entry.model.name: (entry.ranks > 0) & (entry.ranks <= 10) for entry in shown}
    return {
        title: [
            Group(
                name,
                int(mask.sum()),
                {model: estimate_share(int(found[mask].sum()), int(mask.sum())) for model, found in hits.items()},
            )
            for name, mask in groups
        ]
        for title, groups in split_rows(data).items()
    }
