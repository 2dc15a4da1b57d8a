"""Ranking metrics as pure functions, at SID level and at item level."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Iterable, Sequence

CUTOFFS = (1, 3, 5, 10, 20, 50)


def hit_ratio(ranks: Sequence[int | None], k: int) -> float:
    """Share of rows whose target stands among the first k. Ranks count from 1; None is a target not found."""
    return sum(rank is not None and rank <= k for rank in ranks) / len(ranks)


def ndcg(ranks: Sequence[int | None], k: int) -> float:
    """Mean of 1 / log2(rank + 1) for targets among the first k, 0 for the others (one relevant item per row)."""
    return sum(1 / math.log2(rank + 1) for rank in ranks if rank is not None and rank <= k) / len(ranks)


def rank_of(target, ranked: Iterable) -> int | None:
    """1-based place of `target` in `ranked`, None if it is not there."""
    return next((place for place, value in enumerate(ranked, 1) if value == target), None)


def popularity(train_targets: Iterable[int]) -> dict[int, int]:
    """{item id: times it is a target of a train row}."""
    counts: dict[int, int] = defaultdict(int)
    for item in train_targets:
        counts[item] += 1
    return counts


def items_by_sid(sids: Sequence[str], item_ids: Sequence[int], counts: dict[int, int]) -> dict[str, list[int]]:
    """{SID: its items}, most popular first and then by id: how a list of SIDs is read as a list of items."""
    table: dict[str, list[int]] = defaultdict(list)
    for sid, item in sorted(zip(sids, item_ids), key=lambda pair: (-counts.get(pair[1], 0), pair[1])):
        table[sid].append(item)
    return dict(table)


def item_rank(target_item: int, ranked_sids: Sequence[str], items: dict[str, list[int]]) -> int | None:
    """Rank of an item where each SID of the list stands for all its items, in the order of `items_by_sid`.

    A SID outside the catalogue takes one place, so that an illegal recommendation never improves the ranks after it.
    """
    return rank_of(target_item, (item for sid in ranked_sids for item in items.get(sid, (None,))))


def summarise(
    sid_ranks: Sequence[int | None], item_ranks: Sequence[int | None], longest: int
) -> dict[str, dict[str, float]]:
    """{"item": {"HR@1": ..., "NDCG@1": ...}, "sid": {...}} at the CUTOFFS up to `longest`, the length of the lists."""
    return {
        level: {
            f"{name}@{k}": round(function(ranks, k), 6)
            for name, function in (("HR", hit_ratio), ("NDCG", ndcg))
            for k in CUTOFFS
            if k <= longest
        }
        for level, ranks in (("item", item_ranks), ("sid", sid_ranks))
    }


def score_predictions(
    predictions: Sequence[dict],
    sids: Sequence[str],
    item_ids: Sequence[int],
    counts: dict[int, int],
    longest: int,
    histories: Sequence[Sequence[str]],
) -> dict:
    """Metrics and counts of a predictions list (each with `output`, `item_id`, `predict`).

    Item level is the honest one: a hit on a SID shared by several items counts for one of them only, the most popular
    first. `illegal` counts recommendations outside the catalogue, `duplicates` repeated ones, `short_lists` the rows with
    fewer recommendations than asked for. `item_unseen` is the item level of the same lists with the SIDs of the row's
    history left out, at the cutoffs that the shortened lists still fill: where users never take an item twice, a repeat
    is a lost place. `seen_in_top_10` counts those repeats.

    Args:
        histories: SIDs of each row's history.
    """
    items = items_by_sid(sids, item_ids, counts)
    predicted = [row["predict"] for row in predictions]
    summary = summarise(
        [rank_of(row["output"], row["predict"]) for row in predictions],
        [item_rank(row["item_id"], row["predict"], items) for row in predictions],
        longest,
    )
    seen = [set(history) for history in histories]
    unseen = [
        item_rank(target, [sid for sid in ranked if sid not in known], items)
        for target, ranked, known in zip((row["item_id"] for row in predictions), predicted, seen, strict=True)
    ]
    return {
        **summary,
        "item_unseen": summarise(unseen, unseen, longest - max(map(len, seen)))["item"],
        "seen_in_top_10": sum(sid in known for ranked, known in zip(predicted, seen) for sid in ranked[:10]),
        "rows": len(predictions),
        "illegal": sum(sid not in items for ranked in predicted for sid in ranked),
        "duplicates": sum(len(ranked) - len(set(ranked)) for ranked in predicted),
        "short_lists": sum(len(ranked) < min(longest, len(items)) for ranked in predicted),
        "items_sharing_a_sid": sum(len(shared) for shared in items.values() if len(shared) > 1),
    }


def table(columns: dict[str, dict], keys: Sequence[str] = ("HR@1", "HR@3", "HR@5", "HR@10", "HR@50", "NDCG@10")) -> str:
    """A text table, one line per model: item-level metrics, and the number of illegal recommendations.

    The last two columns are those of the lists without the history's items (`item_unseen`).
    """
    width = max(len(name) for name in (*columns, "item level"))
    unseen = ("HR@10", "NDCG@10")
    lines = [
        f"{'item level':<{width}}"
        + "".join(f"{key:>9}" for key in keys)
        + "  illegal"
        + "".join(f"{key + ' unseen':>16}" for key in unseen)
    ]
    for name, result in columns.items():
        cells = [f"{result['item'][key]:>9.4f}" if key in result["item"] else f"{'-':>9}" for key in keys]
        more = [
            f"{result['item_unseen'][key]:>16.4f}" if key in result["item_unseen"] else f"{'-':>16}" for key in unseen
        ]
        lines.append(f"{name:<{width}}{''.join(cells)}{result['illegal']:>9}{''.join(more)}")
    return "\n".join(lines)
