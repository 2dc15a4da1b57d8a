"""Paired significance tests: is one model better than another on the same test rows?

A difference of two metrics on the same rows is far more certain than their separate intervals suggest: both models find
the same rows hard. So every figure here comes from the differences of single rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import zip_longest

import numpy as np
from scipy.stats import binomtest

from minionerec.common.files import InputError
from minionerec.common.records import Catalogue
from minionerec.evaluation.metrics import (
    CUTOFFS,
    GAINS,
    bootstrap_intervals,
    compute_row_gains,
    find_item_rank,
    find_rank,
)

PERMUTATIONS = 10_000
PRINTED_METRICS = ("HR@1", "HR@3", "HR@5", "HR@10", "HR@20", "HR@50", "NDCG@5", "NDCG@10", "NDCG@50", "MRR@10")


def check_same_rows(a: Iterable[dict], b: Iterable[dict], path_a: str, path_b: str) -> int:
    """Both files must hold the same test rows in the same order; returns how many.

    Raises:
        InputError: at the first row with another user or target, or at the end of the shorter file.
    """
    rows = [0, 0]
    for number, pair in enumerate(zip_longest(a, b), 1):
        rows = [number if row else count for row, count in zip(pair, rows, strict=True)]
        first, second = pair
        if first and second and (first["user_id"], first["item_id"]) != (second["user_id"], second["item_id"]):
            raise InputError(
                f"row {number} differs: user {first['user_id']}, item {first['item_id']} in {path_a}, but "
                f"user {second['user_id']}, item {second['item_id']} in {path_b}; only predictions for the same test "
                "rows can be compared"
            )
    if rows[0] != rows[1]:
        raise InputError(
            f"{path_a} has {rows[0]} rows, but {path_b} has {rows[1]}; only predictions for the same test rows can be "
            "compared"
        )
    return rows[0]


def compute_item_ranks(rows: Iterable[dict], catalogue: Catalogue, path: str, info_file: str) -> tuple[np.ndarray, int]:
    """(item-level ranks [rows], 0 for a target not found; the length of the longest list).

    Ranks are those of `predict_items` where a row has it, else of its SIDs.

    Args:
        rows: the predictions read from `path`.
        catalogue: read from `info_file`, with the popularity of its items.

    Raises:
        InputError: a target that the catalogue does not have under this SID.
    """
    items = catalogue.items_of_sid
    ranks, longest = array("q"), 0
    for number, row in enumerate(rows, 1):
        if catalogue.sid_of.get(row["item_id"]) != row["output"]:
            raise InputError(
                f"{path}, row {number}: item {row['item_id']} with SID {row['output']} is not in {info_file}; "
                "is it the catalogue of this model?"
            )
        rank = (
            find_rank(row["item_id"], row["predict_items"])
            if "predict_items" in row
            else find_item_rank(row["item_id"], row["predict"], items)
        )
        ranks.append(rank or 0)
        longest = max(longest, len(row["predict"]))
    return np.array(ranks), longest


def mcnemar_test(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value that a hit of one model alone is as likely as one of the other alone (McNemar, 1947).

    Args:
        only_a: rows that only the first model hits. Rows that both or none hit say nothing.
        only_b: rows that only the second model hits.
    """
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def sign_flip_test(differences: np.ndarray, seed: int = 0, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p-value of a mean difference [rows] under swapping the two models in every row by a fair coin.

    Fisher's randomisation test, as recommended for retrieval metrics (Smucker, Allan and Carterette, CIKM 2007). The
    observed order counts as one of the permutations, so p is never 0 (Phipson and Smyth, 2010). Rows with differences
    of the same size share one binomial draw: the number of them that keep a plus.

    Args:
        differences: [rows], what the second model gains more than the first.
        seed: of the drawing.
        permutations: how many are drawn.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    positive = np.random.default_rng(seed).binomial(counts, 0.5, size=(permutations, len(counts)))
    totals = np.abs(2 * (positive @ sizes) - counts @ sizes)
    # Sums in another order differ in the last bits; without the margin, ties with the observed total would be lost.
    as_far = (totals >= np.abs(differences.sum()) - 1e-9).sum()
    return float((as_far + 1) / (permutations + 1))


def compare_paired(ranks_a: np.ndarray, ranks_b: np.ndarray, longest: int, seed: int = 0) -> dict[str, dict]:
    """{"HR@1": {"a", "b", "difference", "interval_95", "p", "wins", "losses"}, ...} at the CUTOFFS up to `longest`.

    difference is b - a, its interval a paired bootstrap over rows; wins are the rows in which b gains more than a,
    losses those in which it gains less. p is of `mcnemar_test` for HR and of `sign_flip_test` for NDCG and MRR, which
    at 1 equal HR@1 and are left out.

    Args:
        ranks_a: [rows] of the first model, as `to_rank_array` gives them.
        ranks_b: [rows] of the second model.
        longest: length of the shorter lists.
        seed: of the resampling.
    """
    keys = [(name, k) for name in GAINS for k in CUTOFFS if k <= longest and (name == "HR" or k > 1)]
    a, b = (np.stack([compute_row_gains(name, ranks, k) for name, k in keys], axis=1) for ranks in (ranks_a, ranks_b))
    differences = b - a
    intervals = bootstrap_intervals(differences, seed).T.tolist()
    result = {}
    for column, ((name, k), interval) in enumerate(zip(keys, intervals, strict=True)):
        difference = differences[:, column]
        wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
        result[f"{name}@{k}"] = {
            "a": float(a[:, column].mean()),
            "b": float(b[:, column].mean()),
            "difference": float(difference.mean()),
            "interval_95": interval,
            "p": mcnemar_test(losses, wins) if name == "HR" else sign_flip_test(difference, seed),
            "wins": wins,
            "losses": losses,
        }
    return result


def format_comparison(result: dict[str, dict]) -> str:
    """The metrics of `compare_paired` as text, one line each."""
    lines = [
        f"{'item level':<10}{'a':>9}{'b':>9}{'b - a':>10}{'95 % interval':>21}{'p':>9}{'b better':>10}{'a better':>10}"
    ]
    for key in PRINTED_METRICS:
        if key in result:
            row = result[key]
            interval = "[{:+.4f}, {:+.4f}]".format(*row["interval_95"])
            p = f"{row['p']:.4f}" if row["p"] >= 1e-4 else "<0.0001"
            lines.append(
                f"{key:<10}{row['a']:>9.4f}{row['b']:>9.4f}{row['difference']:>+10.4f}{interval:>21}{p:>9}"
                f"{row['wins']:>10}{row['losses']:>10}"
            )
    return "\n".join(lines)
