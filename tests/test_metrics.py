"""Metrics: tables of hand-computed numbers, and slow twins for ties, splits, whole results and bootstrap intervals."""

import math
import random
from itertools import permutations, product

import numpy as np
import pytest
from scipy.stats import binom

from minionerec.common.records import Catalogue, Row
from minionerec.evaluation.metrics import (
    CUTOFFS,
    GAINS,
    bootstrap_intervals,
    compute_row_gains,
    find_item_rank,
    find_rank,
    format_metrics,
    hit_ratio,
    measure_by_bucket,
    name_buckets,
    ndcg,
    score_predictions,
    summarise,
    to_rank_array,
)

RANKS = [1, 3, None, 11]


def mean_reciprocal(ranks, k):
    return compute_row_gains("MRR", to_rank_array(ranks), k).mean()


def catalogue_of(sids, item_ids, counts):
    return Catalogue(list(sids), [""] * len(sids), list(item_ids), counts)


# ------------------------------------------------------------------------------------------------------- single ranks
@pytest.mark.parametrize(
    "k, hits, gain, reciprocal",
    [
        (1, 0.25, 0.25, 0.25),
        (2, 0.25, 0.25, 0.25),
        (3, 0.5, 0.375, 1 / 3),
        (10, 0.5, 0.375, 1 / 3),
        (11, 0.75, (1 + 1 / 2 + 1 / math.log2(12)) / 4, (1 + 1 / 3 + 1 / 11) / 4),
    ],
)
def test_hit_ratio_ndcg_and_mrr(k, hits, gain, reciprocal):
    assert hit_ratio(RANKS, k) == hits
    assert ndcg(RANKS, k) == pytest.approx(gain)
    assert mean_reciprocal(RANKS, k) == pytest.approx(reciprocal)


def test_values_by_hand():
    assert [round(ndcg([rank], 10), 4) for rank in (1, 2, 3, 4, 10)] == [1.0, 0.6309, 0.5, 0.4307, 0.2891]
    assert [round(mean_reciprocal([rank], 10), 4) for rank in (1, 2, 3, 4, 10)] == [1.0, 0.5, 0.3333, 0.25, 0.1]
    for metric in (hit_ratio, ndcg, mean_reciprocal):
        assert metric([11], 10) == metric([None], 10) == 0


def test_rank_of():
    assert [find_rank(target, ["a", "b", "a"]) for target in "abc"] == [1, 2, None]
    assert find_rank("a", []) is None


def test_popularity():
    rows = [Row("u", (), (), (), "", item, "") for item in (4, 2, 4, 4)]
    assert catalogue_of(["x"], [4], {}).with_counts(rows).counts == {4: 3, 2: 1}


# ---------------------------------------------------------------------------------------------- items that share a SID
SIDS, ITEMS = ["x", "x", "y", "x", "z"], [5, 2, 9, 7, 1]


def test_items_that_share_a_sid_stand_by_popularity_then_id():
    counted = catalogue_of(SIDS, ITEMS, {7: 3, 2: 1, 5: 1})
    assert counted.items_of_sid == {"x": [7, 2, 5], "y": [9], "z": [1]}
    assert catalogue_of(SIDS, ITEMS, {}).items_of_sid["x"] == [2, 5, 7]


@pytest.mark.parametrize(
    "item, ranked, rank",
    [
        (7, ["x", "y"], 1),
        (5, ["x", "y"], 3),
        (9, ["x", "y"], 4),  # the three items of x stand before it
        (9, ["y", "x"], 1),
        (2, ["y", "x"], 3),
        (1, ["y", "x"], None),
        (9, ["not in the catalogue", "y"], 2),  # an illegal recommendation takes a place
    ],
)
def test_item_rank(item, ranked, rank):
    assert find_item_rank(item, ranked, catalogue_of(SIDS, ITEMS, {7: 3, 2: 1, 5: 1}).items_of_sid) == rank


def gain_by_hand(name, rank, k):
    if rank is None or rank > k:
        return 0.0
    return {"HR": 1.0, "NDCG": 1 / math.log2(rank + 1), "MRR": 1 / rank}[name]


@pytest.mark.parametrize("ranked", [["x", "y", "z"], ["y", "x"], ["bad", "z", "y", "x"], ["y", "z"], ["x", "x", "z"]])
def test_expected_gain_is_the_mean_over_all_orders_of_the_items_that_share_a_sid(ranked):
    owners = {"x": [5, 2, 7], "y": [9, 3], "z": [1]}
    sids, item_ids = zip(*((sid, item) for sid, items in owners.items() for item in items), strict=True)
    catalogue = catalogue_of(sids, item_ids, {2: 4, 3: 1})
    orders = [dict(zip(owners, order, strict=True)) for order in product(*map(permutations, owners.values()))]
    assert len(orders) == 12
    for sid, items in owners.items():
        for target in items:
            rows = predictions((sid, target, ranked))
            expected = score_predictions(rows, catalogue, 5, [[]])["item_expected"]
            for name, k in product(GAINS, (1, 3, 5)):
                gains = [gain_by_hand(name, find_item_rank(target, ranked, order), k) for order in orders]
                assert expected[f"{name}@{k}"] == pytest.approx(sum(gains) / len(gains), abs=1e-6)


def test_row_gains_of_ranks_and_of_ties():
    ranks = to_rank_array([1, 2, None, 4])
    assert ranks.tolist() == [1, 2, 0, 4]
    assert compute_row_gains("MRR", ranks, 3).tolist() == pytest.approx([1, 1 / 2, 0, 0])
    # Place 1 of 1; places 2 to 4, of which two count; not found; place 4 or 5, too late.
    tied = compute_row_gains("MRR", ranks, 3, np.array([1, 3, 7, 2])).tolist()
    assert tied == pytest.approx([1, (1 / 2 + 1 / 3) / 3, 0, 0])


def test_summarise_stops_at_the_length_of_the_lists():
    assert set(summarise(to_rank_array([1]), 5)) == {f"{name}@{k}" for name in ("HR", "NDCG", "MRR") for k in (1, 3, 5)}
    assert summarise(to_rank_array([2, None]), 3) == {
        "HR@1": 0,
        "NDCG@1": 0,
        "MRR@1": 0,
        "HR@3": 0.5,
        "NDCG@3": pytest.approx(0.31546, abs=1e-5),
        "MRR@3": 0.25,
    }


# ------------------------------------------------------------------------------------------------------ whole results
def predictions(*rows):
    return [{"output": output, "item_id": item, "predict": ranked} for output, item, ranked in rows]


def test_score_predictions_by_hand():
    """Item 2 shares its SID with the more popular item 7: a hit at SID level, second place at item level."""
    scores = score_predictions(
        predictions(
            ("x", 2, ["x", "y", "z"]), ("y", 9, ["x", "y", "bad"]), ("z", 1, ["y", "y"]), ("y", 9, ["y"]), ("z", 1, [])
        ),
        catalogue_of(SIDS, ITEMS, {7: 3, 2: 1, 5: 1}),
        3,
        [["y"], ["x"], [], ["z", "z"], ["x"]],
    )
    # Row 1 loses nothing before its target, row 2 the x before it; the others stay.
    assert scores["item_unseen"] == pytest.approx({"HR@1": 0.4, "NDCG@1": 0.4, "MRR@1": 0.4}, abs=1e-6)
    assert scores["seen_in_top_10"] == 2 and scores["seen_in_top_10_share"] == pytest.approx(2 / 9, abs=1e-6)
    gain = 1 / math.log2(3)
    first = {"HR@1": 0.4, "NDCG@1": 0.4, "MRR@1": 0.4}
    assert scores["sid"] == pytest.approx({**first, "HR@3": 0.6, "NDCG@3": (2 + gain) / 5, "MRR@3": 0.5}, abs=1e-6)
    first = {"HR@1": 0.2, "NDCG@1": 0.2, "MRR@1": 0.2}
    assert scores["item"] == pytest.approx({**first, "HR@3": 0.4, "NDCG@3": (1 + gain) / 5, "MRR@3": 0.3}, abs=1e-6)
    assert scores["item_expected"]["HR@1"] == pytest.approx((1 / 3 + 1) / 5, abs=1e-6)
    # First three places at item level: 7, 2, 5 twice, 9 twice, 9 and nothing.
    assert scores["coverage@3"] == 4 / 5
    assert {key: scores[key] for key in ("rows", "illegal", "duplicates", "short_lists", "items_sharing_a_sid")} == {
        "rows": 5,
        "illegal": 1,
        "duplicates": 1,
        "short_lists": 3,
        "items_sharing_a_sid": 3,
    }
    # Too short for 10: no interval, and the buckets only count their rows.
    assert scores["item_interval_95"] == {}
    assert scores["by"] == {
        "history_length": {"0": {"rows": 1}, "1": {"rows": 3}, "2-3": {"rows": 1}},
        "target_popularity": {"0": {"rows": 4}, "1-4": {"rows": 1}},
    }


def random_case(seed, rows=60):
    """(predictions, SIDs, item ids, train counts, histories) with shared SIDs, illegal and repeated recommendations."""
    rng = random.Random(seed)
    item_ids = rng.sample(range(200), 40)
    sids = [f"<{rng.randrange(28)}>" for _ in item_ids]
    counts = {item: rng.choice([1, 3, 5, 20, 40]) for item in rng.sample(item_ids, 25)}
    made, histories = [], []
    for _ in range(rows):
        target = rng.randrange(40)
        ranked = rng.choices([*sids, "illegal"], k=20) if rng.random() < 0.2 else rng.sample(sorted(set(sids)), 20)
        made.append((sids[target], item_ids[target], ranked[: rng.choice([20, 20, 12])]))
        histories.append(rng.choices(sids, k=rng.choice([1, 2, 3, 5, 9])))
    return predictions(*made), sids, item_ids, counts, histories


def naive_list(ranked, sids, item_ids, counts):
    """Item ids, None for a SID outside the catalogue."""
    out = []
    for sid in ranked:
        owners = [item for item, own in zip(item_ids, sids, strict=True) if own == sid]
        out += sorted(owners, key=lambda item: (-counts.get(item, 0), item)) or [None]
    return out


def naive_mean(lists, targets, name, k):
    ranks = [
        ranked.index(target) + 1 if target in ranked else None for ranked, target in zip(lists, targets, strict=True)
    ]
    return pytest.approx(sum(gain_by_hand(name, rank, k) for rank in ranks) / len(ranks), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_score_predictions_equals_its_naive_twin(seed):
    rows, sids, item_ids, counts, histories = random_case(seed)
    scores = score_predictions(rows, catalogue_of(sids, item_ids, counts), 20, histories)
    targets = [row["item_id"] for row in rows]
    sid_lists = [row["predict"] for row in rows]
    lists = [naive_list(ranked, sids, item_ids, counts) for ranked in sid_lists]
    kept = [[sid for sid in row["predict"] if sid not in history] for row, history in zip(rows, histories, strict=True)]
    unseen = [naive_list(ranked, sids, item_ids, counts) for ranked in kept]
    shown = [k for k in CUTOFFS if k <= 20]
    assert set(scores["item"]) == set(scores["sid"]) == {f"{name}@{k}" for name in GAINS for k in shown}
    assert set(scores["item_unseen"]) == {f"{name}@{k}" for name in GAINS for k in (1, 3, 5, 10)}
    for name, k in product(GAINS, shown):
        key = f"{name}@{k}"
        assert scores["item"][key] == naive_mean(lists, targets, name, k)
        assert scores["sid"][key] == naive_mean(sid_lists, [row["output"] for row in rows], name, k)
        if key in scores["item_unseen"]:
            assert scores["item_unseen"][key] == naive_mean(unseen, targets, name, k)
    for k in (10, 20):
        covered = sum(any(item in ranked[:k] for ranked in lists) for item in item_ids)
        assert scores[f"coverage@{k}"] == pytest.approx(covered / 40)
    seen = [sid in history for row, history in zip(rows, histories, strict=True) for sid in row["predict"][:10]]
    assert scores["seen_in_top_10"] == sum(seen) > 0
    assert scores["seen_in_top_10_share"] == pytest.approx(sum(seen) / len(seen), abs=1e-6)
    assert scores["illegal"] == sum(sid not in sids for row in rows for sid in row["predict"]) > 0
    for key, low, high in [("1", 1, 1), ("2-3", 2, 3), ("4-6", 4, 6), ("7-10", 7, 10)]:
        inside = [row for row, history in enumerate(histories) if low <= len(history) <= high]
        assert_bucket(scores["by"]["history_length"][key], inside, lists, targets)
    for key, low, high in [("0", 0, 0), ("1-4", 1, 4), ("5-19", 5, 19), ("20+", 20, 99)]:
        inside = [row for row, target in enumerate(targets) if low <= counts.get(target, 0) <= high]
        assert_bucket(scores["by"]["target_popularity"][key], inside, lists, targets)
    for split in scores["by"].values():
        assert len(split) == 4 and sum(bucket["rows"] for bucket in split.values()) == 60


def assert_bucket(bucket, inside, lists, targets):
    assert bucket.pop("rows") == len(inside)
    assert set(bucket) == {"HR@10", "NDCG@10", "MRR@10"}
    for key, value in bucket.items():
        name = key.removesuffix("@10")
        assert value == naive_mean([lists[row] for row in inside], [targets[row] for row in inside], name, 10)
    bucket["rows"] = len(inside)


def test_a_list_as_long_as_the_catalogue_is_not_short():
    rows = predictions(("x", 2, ["x", "y", "z"]), ("x", 2, ["x", "y"]))
    scores = score_predictions(rows, catalogue_of(SIDS, ITEMS, {}), 50, [[], []])
    assert set(scores["by"]) == {"history_length"}  # popularity is not known
    assert scores["short_lists"] == 1 and scores["illegal"] == scores["duplicates"] == 0
    assert scores["coverage@10"] == scores["coverage@50"] == 1


def test_coverage_counts_the_places_of_items_not_of_sids():
    """The three items of x fill the list of 3; y does not stand in it, though its SID is the second of three."""
    scores = score_predictions(predictions(("x", 2, ["x", "y", "z"])), catalogue_of(SIDS, ITEMS, {}), 3, [[]])
    assert scores["coverage@3"] == 3 / 5


# ------------------------------------------------------------------------------------------------------------ splits
@pytest.mark.parametrize(
    "starts, names", [((0, 1, 5, 20), ["0", "1-4", "5-19", "20+"]), ((1, 2, 4), ["1", "2-3", "4+"]), ((3,), ["3+"])]
)
def test_bucket_names(starts, names):
    assert name_buckets(starts) == names


def test_split_by_hand():
    ranks = to_rank_array([1, None, 2, 11, 10])
    assert measure_by_bucket([1, 4, 2, 3, 100], (1, 2, 4), ranks, 20) == {
        "1": {"rows": 1, "HR@10": 1, "NDCG@10": 1, "MRR@10": 1},
        "2-3": {"rows": 2, "HR@10": 0.5, "NDCG@10": round(0.5 / math.log2(3), 6), "MRR@10": 0.25},
        "4+": {"rows": 2, "HR@10": 0.5, "NDCG@10": round(0.5 / math.log2(11), 6), "MRR@10": 0.05},
    }
    assert measure_by_bucket([1, 1, 1, 1, 1], (1, 2, 4), ranks, 5) == {"1": {"rows": 5}}


# --------------------------------------------------------------------------------------------------------- bootstrap
def naive_bootstrap(values, resamples, seed):
    """Rows drawn one by one, with replacement."""
    rng = random.Random(seed)
    rows = values.tolist()
    means = [np.mean(rng.choices(rows, k=len(rows)), axis=0) for _ in range(resamples)]
    return np.percentile(means, [2.5, 97.5], axis=0)


def test_bootstrap_equals_drawing_row_by_row():
    """Two Monte Carlo estimates of the same ends: apart by a small part of the interval's width."""
    ranks = np.random.default_rng(3).choice([0, 1, 2, 5, 9, 30], size=150, p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    values = np.stack([compute_row_gains(name, ranks, 10) for name in ("HR", "NDCG")], axis=1)
    fast, slow = bootstrap_intervals(values, resamples=20_000), naive_bootstrap(values, 6000, seed=1)
    width = slow[1] - slow[0]
    assert (width > 0.05).all()
    assert (np.abs(fast - slow) < 0.06 * width).all()
    assert (fast[0] < values.mean(axis=0)).all() and (values.mean(axis=0) < fast[1]).all()


def test_the_bootstrap_of_a_hit_ratio_is_binomial():
    values = np.repeat([0.0, 1.0], [700, 300])[:, None]
    ends = bootstrap_intervals(values, resamples=50_000)[:, 0]
    assert ends == pytest.approx(binom.ppf([0.025, 0.975], 1000, 0.3) / 1000, abs=0.0011)


def test_columns_share_their_resamples():
    """The second column is a function of the first, so its interval is too."""
    hits = np.repeat([0.0, 1.0], [70, 30])
    ends = bootstrap_intervals(np.stack([hits, 2 - 3 * hits], axis=1))
    assert ends[:, 1] == pytest.approx(2 - 3 * ends[::-1, 0])


def test_the_result_holds_the_interval_of_hr_and_ndcg():
    rows, sids, item_ids, counts, histories = random_case(7, rows=300)
    catalogue = catalogue_of(sids, item_ids, counts)
    scores = score_predictions(rows, catalogue, 20, histories)
    assert set(scores["item_interval_95"]) == {"HR@10", "NDCG@10"}
    lists = [naive_list(row["predict"], sids, item_ids, counts) for row in rows]
    ranks = [
        ranked.index(row["item_id"]) + 1 if row["item_id"] in ranked else None
        for ranked, row in zip(lists, rows, strict=True)
    ]
    values = np.array([[gain_by_hand(name, rank, 10) for name in ("HR", "NDCG")] for rank in ranks])
    slow = naive_bootstrap(values, 2000, seed=0)
    for column, key in enumerate(("HR@10", "NDCG@10")):
        low, high = slow[:, column]
        assert scores["item_interval_95"][key] == pytest.approx([low, high], abs=0.15 * (high - low))
        assert low < scores["item"][key] < high
    assert score_predictions(rows, catalogue, 20, histories) == scores  # the seed is fixed


# ------------------------------------------------------------------------------------------------------------- table
def test_table_shows_what_was_measured():
    short = {"item": {"HR@1": 0.25, "HR@3": 0.5}, "item_unseen": {}, "item_interval_95": {}, "illegal": 3}
    item = {"HR@1": 0.1, "HR@3": 0.2, "HR@5": 0.3, "HR@10": 0.4, "HR@50": 0.5, "NDCG@10": 0.6, "MRR@10": 0.7}
    long = {
        "item": item,
        "item_unseen": {"HR@10": 0.75, "NDCG@10": 0.55},
        "item_interval_95": {"HR@10": [0.375, 0.43]},
        "illegal": 0,
    }
    lines = format_metrics({"a short one": short, "long": long}).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    header = "item level HR@1 HR@3 HR@5 HR@10 HR@50 NDCG@10 MRR@10 +- HR@10 illegal HR@10 unseen NDCG@10 unseen"
    assert lines[0].split() == header.split()
    assert lines[1].split() == ["a", "short", "one", "0.2500", "0.5000", *["-"] * 6, "3", "-", "-"]
    assert lines[2].split() == ["long", *(f"{item[key]:.4f}" for key in item), "0.0275", "0", "0.7500", "0.5500"]


def test_table_fits_a_terminal():
    result = {"item": {}, "item_unseen": {}, "illegal": 123456}
    assert len(format_metrics({"a model's name of 25 long": result}).splitlines()[0]) <= 130


def test_table_of_a_file_without_intervals():
    assert format_metrics({"old": {"item": {"HR@10": 0.5}, "item_unseen": {}, "illegal": 0}}).splitlines()[1].split()[
        -4:
    ] == [
        *["-", "0"],
        *["-", "-"],
    ]
