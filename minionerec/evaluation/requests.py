"""Requests to a running model: their limits, and those that come together answered as one batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minionerec.common.files import InputError
from minionerec.evaluation.recommender import Recommender

LONGEST_HISTORY = 200  # items of a request; what the model is shown of them is --max_history
MOST_CATEGORIES = 50
LARGEST_WEIGHT = 100


@dataclass(frozen=True)
class Request:
    """What a client asks for, see `Recommender.recommend`."""

    history: tuple[str | int, ...]
    k: int = 10
    exclude_seen: bool = True
    categories: tuple[str, ...] = ()
    num_beams: int = 50
    fuse_weight: float | None = None


def read_request(
    history: Any, k: Any, exclude_seen: Any, categories: Any, num_beams: Any, most: int, fuse_weight: Any = None
) -> Request:
    """A request of a client, checked.

    Args:
        history: a list of item ids, titles or SIDs.
        k: length of the list, at most `num_beams`.
        exclude_seen: whether the history's items are left out.
        categories: a list of texts; empty or None for all.
        num_beams: of the search, at most `most`; 0 or None for as many.
        most: what this server allows.
        fuse_weight: of the baselines against the model, from 0 to LARGEST_WEIGHT; None for the recommender's own.

    Raises:
        InputError: which of them is wrong, and its limit.
    """
    if not isinstance(history, list) or not 1 <= len(history) <= LONGEST_HISTORY:
        raise InputError(f"history: expected a list of 1 to {LONGEST_HISTORY} item ids, titles or SIDs")
    if any(isinstance(name, bool) or not isinstance(name, str | int) or name == "" for name in history):
        raise InputError("history: expected item ids, titles or SIDs")
    num_beams = _read_number("num_beams", num_beams or most, most)
    k = _read_number("k", k, num_beams)
    if not isinstance(exclude_seen, bool):
        raise InputError("exclude_seen: expected true or false")
    categories = categories or []
    if not isinstance(categories, list) or len(categories) > MOST_CATEGORIES:
        raise InputError(f"categories: expected a list of at most {MOST_CATEGORIES} texts")
    if any(not isinstance(text, str) for text in categories):
        raise InputError("categories: expected texts")
    if fuse_weight is not None and (
        isinstance(fuse_weight, bool)
        or not isinstance(fuse_weight, int | float)
        or not 0 <= fuse_weight <= LARGEST_WEIGHT
    ):
        raise InputError(f"fuse_weight: expected a number from 0 to {LARGEST_WEIGHT}")
    return Request(tuple(history), k, exclude_seen, tuple(categories), num_beams, fuse_weight)


def _read_number(name: str, value: Any, most: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON does not tell 10 from 10.0
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InputError(f"{name}: expected a whole number from 1 to {most}")
    return value


def answer_requests(recommender: Recommender, requests: Sequence[Request | InputError]) -> list[dict[str, Any]]:
    """Answers in the order of the requests; those with the same filters are searched together.

    Returns:
        {"recommendations": [`Recommendation.to_json`, ...]} or {"error": text} each.
    """
    answers: list[dict[str, Any]] = [{} for _ in requests]
    groups: dict[tuple, list[tuple[int, Any]]] = defaultdict(list)
    for number, request in enumerate(requests):
        try:
            if isinstance(request, InputError):
                raise request
            history = recommender.finder.find_history(request.history)
            if request.categories:
                recommender.select_categories(request.categories)
            filters = (request.exclude_seen, request.categories, request.num_beams, request.fuse_weight)
            groups[filters].append((number, history))
        except InputError as error:
            answers[number] = {"error": str(error)}
    for (exclude_seen, categories, num_beams, fuse_weight), members in groups.items():
        histories = [history for _, history in members]
        fused = recommender.fused
        weights = None if fused is None or fuse_weight is None else [1.0, *[fuse_weight] * len(fused.likelihoods)]
        lists = recommender.rank_histories(histories, num_beams, exclude_seen, categories, num_beams, weights)
        for (number, _), items in zip(members, lists, strict=True):
            answers[number] = {"recommendations": [item.to_json() for item in items[: requests[number].k]]}
    return answers
