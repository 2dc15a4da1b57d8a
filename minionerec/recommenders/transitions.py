"""Rankings by counting: item-to-item transitions, popularity, and the user's last items again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from minionerec.common.records import Catalogue, Row
from minionerec.common.texts import shorten_title


def sort_by_popularity(catalogue: Catalogue) -> list[int]:
    """The items of a catalogue by how often they are a target in the train rows, ties by id."""
    return sorted(catalogue.item_ids, key=lambda item: (-catalogue.counts.get(item, 0), item))


def fill_with_popular(ranked: Iterable[int], by_popularity: Sequence[int], k: int) -> list[int]:
    """The first k distinct items of `ranked`, filled up with the most popular ones that it lacks."""
    chosen = dict.fromkeys(ranked)
    for item in by_popularity:
        if len(chosen) >= k:
            break
        chosen[item] = None
    return list(chosen)[:k]


def rank_by_repeating(history: Sequence[int], by_popularity: Sequence[int], k: int) -> list[int]:
    """The distinct items of the history, newest first, then the most popular ones."""
    return fill_with_popular(reversed(history), by_popularity, k)


def count_transitions(rows: Sequence[Row]) -> dict[int, Counter]:
    """{item: how often each item was the target right after it in the train rows}."""
    transitions: dict[int, Counter] = defaultdict(Counter)
    for row in rows:
        transitions[row.history_ids[-1]][row.item_id] += 1
    return transitions


def score_transitions(history: Sequence[int], transitions: dict[int, Counter]) -> dict[int, float]:
    """{candidate: sum over the history, newest first (j = 0, 1, ...), of 0.5**j * count(item -> candidate)}.

    Args:
        history: item ids, oldest first.
        transitions: the result of `count_transitions`.
    """
    scores: dict[int, float] = defaultdict(float)
    for age, item in enumerate(reversed(history)):
        for candidate, count in transitions.get(item, {}).items():
            scores[candidate] += 0.5**age * count
    return scores


def leave_out_transition(scores: dict[int, float], history: Sequence[int], target: int) -> dict[int, float]:
    """What `score_transitions` would be without one transition from the newest item of the history to `target`.

    Args:
        scores: of the history, by counts that hold the transition; changed in place.
        history: item ids, oldest first.
        target: what came next.
    """
    part = sum(0.5**age for age, item in enumerate(reversed(history)) if item == history[-1])
    scores[target] = scores.get(target, 0.0) - part
    if scores[target] < 1e-9:  # nobody else made it
        del scores[target]
    return scores


def rank_by_transitions(
    history: Sequence[int], transitions: dict[int, Counter], by_popularity: Sequence[int], k: int
) -> list[int]:
    """The k best items by `score_transitions`.

    Popularity breaks ties, and so also orders the items that never followed an item of the history.
    """
    scores = score_transitions(history, transitions)
    candidates = [item for item in by_popularity if item in scores]
    return fill_with_popular(sorted(candidates, key=lambda item: -scores[item]), by_popularity, k)


def explain_transitions(
    transitions: dict[int, dict[int, int]], catalogue: Catalogue
) -> Callable[[Sequence[int], Sequence[int]], list[str]]:
    """Why `score_transitions` ranks items: `bought after X`, X being the item of the history with the largest part.

    Args:
        transitions: the result of `count_transitions`.
        catalogue: the items.

    Returns:
        (history of item ids, oldest first; items) -> a text for each item, empty where nobody bought it after one of
        the history.
    """
    title_of = dict(zip(catalogue.item_ids, catalogue.titles, strict=True))

    def explain(history: Sequence[int], items: Sequence[int]) -> list[str]:
        reasons = []
        for item in items:
            parts: dict[int, float] = {}
            for age, seen in enumerate(reversed(history)):
                parts[seen] = parts.get(seen, 0.0) + 0.5**age * transitions.get(seen, {}).get(item, 0)
            best = max(parts, key=parts.__getitem__)
            reasons.append(f"bought after {shorten_title(title_of[best])}" if parts[best] else "")
        return reasons

    return explain
