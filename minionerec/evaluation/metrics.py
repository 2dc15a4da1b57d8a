"""Ranking metrics as pure functions, at SID level and at item level, with splits by bucket and bootstrap intervals."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from minionerec.common.records import Catalogue

CUTOFFS = (1, 3, 5, 10, 20, 50)
MAIN_CUTOFF = 10  # of the intervals and of the splits

# What a target at `rank` is worth. NDCG (Jarvelin and Kekalainen, 2002) has one relevant item a row, so the ideal is 1.
GAINS = {
    "HR": lambda rank: np.ones(rank.shape),
    "NDCG": lambda rank: 1 / np.log2(rank + 1),
    "MRR": lambda rank: 1 / rank,
}


# Smallest value of each bucket; the last one is open.
HISTORY_BUCKETS = (0, 1, 2, 4, 7, 11)
POPULARITY_BUCKETS = (0, 1, 5, 20)

RESAMPLES = 1000

TABLE_METRICS = ("HR@1", "HR@3", "HR@5", "HR@10", "HR@50", "NDCG@10", "MRR@10")


def to_rank_array(ranks: Iterable[int | None]) -> np.ndarray:
    """Ranks from 1, None for a target not found, as an int64 array [rows] in which 0 is a target not found."""
    return np.array([rank or 0 for rank in ranks], dtype=np.int64)


def compute_row_gains(name: str, ranks: np.ndarray, k: int, tied: np.ndarray | int = 1) -> np.ndarray:
    """What every row adds to a metric at k: float64 [rows], 0 where the target is not among the first k.

    With `tied`, the target's rank is any of ranks .. ranks + tied - 1 with equal chance, and the gain is the expected
    one (ties in ranking metrics: McSherry and Najork, ECIR 2008).

    Args:
        name: of GAINS.
        ranks: [rows], as `to_rank_array` gives them.
        k: the cutoff.
        tied: ranks that the target may have, [rows] or one number.
    """
    total = np.concatenate([[0.0], np.cumsum(GAINS[name](np.arange(1.0, k + 1)))])  # of the ranks 1 to k, summed up
    before = np.minimum(ranks - 1, k)
    gains = (total[np.minimum(before + tied, k)] - total[before]) / tied
    return np.where(ranks > 0, gains, 0.0)


def hit_ratio(ranks: Iterable[int | None], k: int) -> float:
    """Share of rows whose target stands among the first k. Ranks count from 1; None is a target not found."""
    return float(compute_row_gains("HR", to_rank_array(ranks), k).mean())


def ndcg(ranks: Iterable[int | None], k: int) -> float:
    """Mean of 1 / log2(rank + 1) for targets among the first k, 0 for the others (one relevant item per row)."""
    return float(compute_row_gains("NDCG", to_rank_array(ranks), k).mean())


def find_rank(target: int | str, ranked: Iterable[int | str | None]) -> int | None:
    """Rank of `target` in `ranked`, from 1; None if it is not there."""
    return next((rank for rank, value in enumerate(ranked, 1) if value == target), None)


def expand_sids(ranked_sids: Iterable[str], items: dict[str, list[int]]) -> Iterable[int | None]:
    """The items that a list of SIDs stands for, each SID for all its items in the order of `items`.

    A SID outside the catalogue takes one rank (None), so that an illegal recommendation never improves the ranks after
    it.

    Args:
        ranked_sids: the list.
        items: {SID: its items}, as `Catalogue.items_of_sid`.
    """
    return (item for sid in ranked_sids for item in items.get(sid, (None,)))


def find_item_rank(target_item: int, ranked_sids: Iterable[str], items: dict[str, list[int]]) -> int | None:
    """Rank of an item in the list that `expand_sids` reads off a list of SIDs, None if it is not there."""
    return find_rank(target_item, expand_sids(ranked_sids, items))


def summarise(ranks: np.ndarray, longest: int, tied: np.ndarray | int = 1) -> dict[str, float]:
    """{"HR@1": ..., "NDCG@1": ..., "MRR@1": ..., "HR@3": ...} at the CUTOFFS up to `longest`, the length of the lists.

    Args:
        ranks: [rows], as `to_rank_array` gives them.
        longest: length of the lists.
        tied: as in `compute_row_gains`.
    """
    return {
        f"{name}@{k}": round(float(compute_row_gains(name, ranks, k, tied).mean()), 6)
        for k in CUTOFFS
        if k <= longest
        for name in GAINS
    }


def name_buckets(starts: Sequence[int]) -> list[str]:
    """Names of the buckets that begin at `starts`: (1, 2, 4) gives 1, 2-3, 4+."""
    closed = [f"{low}" if low == high - 1 else f"{low}-{high - 1}" for low, high in pairwise(starts)]
    return [*closed, f"{starts[-1]}+"]


def measure_by_bucket(values: Sequence[int], starts: Sequence[int], ranks: np.ndarray, longest: int) -> dict[str, dict]:
    """{bucket: {"rows", "HR@10", "NDCG@10", "MRR@10"}} of the rows whose value falls into it; no empty buckets.

    Args:
        values: [rows], at least starts[0].
        starts: smallest value of each bucket.
        ranks: [rows], as `to_rank_array` gives them.
        longest: length of the lists; below 10 there are only the numbers of rows.
    """
    buckets = np.searchsorted(starts, values, side="right") - 1
    names = name_buckets(starts)
    result = {}
    for bucket in np.unique(buckets):
        inside = ranks[buckets == bucket]
        measured = summarise(inside, longest)
        shown = [f"{name}@{MAIN_CUTOFF}" for name in GAINS]
        result[names[bucket]] = {"rows": len(inside), **{key: measured[key] for key in shown if key in measured}}
    return result


def bootstrap_intervals(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """95 % percentile bootstrap intervals of the column means, over rows (Efron and Tibshirani, 1993, chapter 13).

    A resample is drawn as the number of times that each distinct row occurs in it, a multinomial draw: the same
    distribution as drawing rows one by one, but the cost is that of the distinct rows, and ranks make few of them.

    Args:
        values: float [rows, columns]; all columns share their resamples.
        seed: of the resampling.
        resamples: how many are drawn.

    Returns:
        float64 [2, columns]: the lower and the upper ends.
    """
    distinct, counts = np.unique(values, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    return np.percentile(draws @ distinct / len(values), [2.5, 97.5], axis=0)


class PredictionScorer:
    """Metrics and counts of predictions that come one by one; of each, a few numbers are kept.

    Item level is the honest one: a hit on a SID shared by several items counts for one of them only, the most popular
    first, then by id. Each level holds HR, NDCG and MRR at the CUTOFFS up to `longest`:
        item: item level. sid: SID level.
        item_expected: item level, expected over a random order of the items that share a SID.
        item_unseen: item level of the same lists with the SIDs of the row's history left out, at the cutoffs that the
        shortened lists still fill; where users never take an item twice, a repeat is a lost rank.

    The rest:
        item_interval_95: [low, high] of the item-level HR@10 and NDCG@10, by bootstrap over rows.
        by: `history_length` and, where the catalogue knows it, `target_popularity` (times a target in the train split),
        as `measure_by_bucket` gives them.
        coverage@10, coverage@K: share of the catalogue's items that are in the first 10 or K ranks of any list.
        seen_in_top_10, seen_in_top_10_share: number and share of the recommendations there that the history holds.
        illegal: recommendations outside the catalogue. duplicates: repeated ones. short_lists: rows with fewer
        recommendations than asked for. items_sharing_a_sid: of the catalogue.

    Args:
        catalogue: the items, with their popularity in the train split.
        longest: K, the length of the lists.
    """

    def __init__(self, catalogue: Catalogue, longest: int):
        self.catalogue, self.longest = catalogue, longest
        # Of every row; ranks as in `to_rank_array`.
        self._item_ranks, self._sid_ranks, self._unseen_ranks = array("q"), array("q"), array("q")
        self._targets, self._history_lengths = array("q"), array("q")
        self._covered: dict[int, set[int]] = {k: set() for k in sorted({min(10, longest), longest})}
        self._longest_history = 0  # in distinct SIDs
        self._in_top_10 = 0
        self._counts = dict.fromkeys(("seen_in_top_10", "illegal", "duplicates", "short_lists"), 0)

    def add(self, prediction: dict, history: Sequence[str]) -> None:
        """Take in one prediction.

        Args:
            prediction: with `output`, `item_id` and `predict`.
            history: SIDs of the row's history.
        """
        items, seen = self.catalogue.items_of_sid, set(history)
        ranked, target = prediction["predict"], prediction["item_id"]
        item_list = list(expand_sids(ranked, items))
        self._item_ranks.append(find_rank(target, item_list) or 0)
        self._sid_ranks.append(find_rank(prediction["output"], ranked) or 0)
        self._unseen_ranks.append(find_item_rank(target, (sid for sid in ranked if sid not in seen), items) or 0)
        self._targets.append(target)
        self._history_lengths.append(len(history))
        self._longest_history = max(self._longest_history, len(seen))
        for k, covered in self._covered.items():
            covered.update(item_list[:k])
        self._in_top_10 += len(ranked[:10])
        self._counts["seen_in_top_10"] += sum(sid in seen for sid in ranked[:10])
        self._counts["illegal"] += sum(sid not in items for sid in ranked)
        self._counts["duplicates"] += len(ranked) - len(set(ranked))
        self._counts["short_lists"] += len(ranked) < min(self.longest, len(items))

    def summarise(self) -> dict:
        """The metrics of what was taken in, as the class describes them."""
        items, longest = self.catalogue.items_of_sid, self.longest
        item_ranks, sid_ranks, unseen_ranks = map(np.array, (self._item_ranks, self._sid_ranks, self._unseen_ranks))
        repeats = self._counts["seen_in_top_10"]
        return {
            "item": summarise(item_ranks, longest),
            "sid": summarise(sid_ranks, longest),
            "item_expected": _summarise_ties(item_ranks, self._targets, items, longest),
            "item_unseen": summarise(unseen_ranks, longest - self._longest_history),
            "item_interval_95": _measure_intervals(item_ranks, longest),
            "by": _measure_buckets(item_ranks, self._targets, self._history_lengths, self.catalogue, longest),
            **{
                f"coverage@{k}": round(len(covered - {None}) / len(self.catalogue.item_ids), 6)
                for k, covered in self._covered.items()
            },
            "seen_in_top_10": repeats,
            "seen_in_top_10_share": round(repeats / max(self._in_top_10, 1), 6),
            "rows": len(item_ranks),
            **{name: self._counts[name] for name in ("illegal", "duplicates", "short_lists")},
            "items_sharing_a_sid": sum(len(shared) for shared in items.values() if len(shared) > 1),
        }


def score_predictions(
    predictions: Iterable[dict], catalogue: Catalogue, longest: int, histories: Iterable[Sequence[str]]
) -> dict:
    """`PredictionScorer.summarise` of predictions.

    Args:
        predictions: one per row.
        catalogue, longest: see `PredictionScorer`.
        histories: SIDs of each row's history.
    """
    scorer = PredictionScorer(catalogue, longest)
    for prediction, history in zip(predictions, histories, strict=True):
        scorer.add(prediction, history)
    return scorer.summarise()


def _summarise_ties(
    item_ranks: np.ndarray, targets: Sequence[int], items: dict[str, list[int]], longest: int
) -> dict[str, float]:
    """`summarise` of the item level, expected over a random order of the items that share a SID."""
    offset_of = {item: offset for shared in items.values() for offset, item in enumerate(shared)}
    tied = {item: len(shared) for shared in items.values() for item in shared}
    # The first rank of the target's SID; an unknown target is never found and stays at 0.
    first = np.where(item_ranks > 0, item_ranks - [offset_of.get(target, 0) for target in targets], 0)
    return summarise(first, longest, np.array([tied.get(target, 1) for target in targets]))


def _measure_intervals(item_ranks: np.ndarray, longest: int) -> dict[str, list[float]]:
    """{"HR@10": [low, high], "NDCG@10": [low, high]}; empty for lists that are shorter."""
    if longest < MAIN_CUTOFF:
        return {}
    names = ("HR", "NDCG")
    gains = [compute_row_gains(name, item_ranks, MAIN_CUTOFF) for name in names]
    intervals = bootstrap_intervals(np.stack(gains, axis=1)).T.round(6).tolist()
    return {f"{name}@{MAIN_CUTOFF}": ends for name, ends in zip(names, intervals, strict=True)}


def _measure_buckets(
    item_ranks: np.ndarray,
    targets: Sequence[int],
    history_lengths: Sequence[int],
    catalogue: Catalogue,
    longest: int,
) -> dict[str, dict]:
    """The splits by history length and, where it is known, by popularity of the target."""
    buckets = {"history_length": measure_by_bucket(history_lengths, HISTORY_BUCKETS, item_ranks, longest)}
    if catalogue.counts:
        counts = [catalogue.counts.get(target, 0) for target in targets]
        buckets["target_popularity"] = measure_by_bucket(counts, POPULARITY_BUCKETS, item_ranks, longest)
    return buckets


KEPT_WEIGHTS = "RL kept the SFT weights"


def format_metrics(columns: dict[str, dict]) -> str:
    """A text table, one line per model: item-level metrics, and the number of illegal recommendations.

    `+- HR@10` is half the width of its 95 % interval. The last two columns are those of the lists without the history's
    items (`item_unseen`). A dash stands for what the lists are too short for. A model that RL left as it was is named
    so.
    """
    unseen = ("HR@10", "NDCG@10")
    lines = [["item level", *TABLE_METRICS, "+- HR@10", "illegal", *(f"{key} unseen" for key in unseen)]]
    for name, result in columns.items():
        interval = result.get("item_interval_95", {}).get("HR@10")
        half_width = (interval[1] - interval[0]) / 2 if interval else None
        seen_values = [*(result["item"].get(key) for key in TABLE_METRICS), half_width]
        unseen_values = [result["item_unseen"].get(key) for key in unseen]
        seen_cells, unseen_cells = (
            [f"{value:.4f}" if value is not None else "-" for value in values]
            for values in (seen_values, unseen_values)
        )
        name = f"{name} ({KEPT_WEIGHTS})" if result.get("kept_weights") else name
        lines.append([name, *seen_cells, f"{result['illegal']}", *unseen_cells])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
