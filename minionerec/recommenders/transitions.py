"""Rankings by counting: item-to-item transitions, popularity, and the user's own last items again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from minionerec.common.records import Row


def sort_by_popularity(item_ids: Sequence[int], counts: dict[int, int]) -> list[int]:
    """Items by their count as a target in the train rows, ties by id."""
    return sorted(item_ids, key=lambda item: (-counts.get(item, 0), item))


def fill_with_popular(ranked: Iterable[int], by_popularity: Sequence[int], k: int) -> list[int]:
    """The first k distinct items of `ranked`, filled up with the most popular ones that it lacks."""
    chosen = dict.fromkeys(ranked)
    for item in by_popularity:
        if len(chosen) >= k:
            break
        chosen[item] = None
    return list(chosen)[:k]


def rank_by_transitions(
    history: Sequence[int], follows: dict[int, Counter], by_popularity: Sequence[int], k: int
) -> list[int]:
    """The k best items by `transition_scores`.

    Popularity breaks ties, and so also orders the items that never followed.
    """
    scores = score_transitions(history, follows)
    followed = [item for item in by_popularity if item in scores]
    return fill_with_popular(sorted(followed, key=lambda item: -scores[item]), by_popularity, k)


def rank_by_repeating(history: Sequence[int], by_popularity: Sequence[int], k: int) -> list[int]:
    """The distinct items of the history, newest first, then the most popular ones."""
    return fill_with_popular(reversed(history), by_popularity, k)


def count_transitions(rows: Sequence[Row]) -> dict[int, Counter]:
    """{item: how often each item was the target right after it in the train rows}."""
    follows: dict[int, Counter] = defaultdict(Counter)
    for row in rows:
        follows[row.history_ids[-1]][row.item_id] += 1
    return follows


def score_transitions(history: Sequence[int], follows: dict[int, Counter]) -> dict[int, float]:
    """{candidate: sum over the history, newest first (j = 0, 1, ...), of 0.5**j * count(item -> candidate)}."""
    scores: dict[int, float] = defaultdict(float)
    for age, item in enumerate(reversed(history)):
        for candidate, count in follows.get(item, {}).items():
            scores[candidate] += 0.5**age * count
    return scores
