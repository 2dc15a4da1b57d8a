"""Rewards of a group of completions, as pure functions `(completions, target) -> one number per completion`.

`completions` are the SIDs a prompt produced, in rank order for beam rollouts; `target` is the SID of the prompt's own row.
"""

from __future__ import annotations

import math
from typing import Callable, Sequence

Reward = Callable[[Sequence[str], str], list[float]]


def rule(completions: Sequence[str], target: str) -> list[float]:
    """1 for the target, else 0."""
    return [float(completion == target) for completion in completions]


def ranking_only(completions: Sequence[str], target: str) -> list[float]:
    """The rank penalty alone: 0 for the target; a miss at rank i (from 1) gets -w_i / sum(w), w_i = 1 / log2(i + 1).

    The better a wrong item is ranked, the more it costs; the weights are normalised over all places of the group. A group
    without the target gets no penalty at all, since there is nothing to prefer. Method: arXiv 2510.24431.
    """
    if target not in completions:
        return [0.0] * len(completions)
    weights = [1 / math.log2(place + 1) for place in range(1, len(completions) + 1)]
    total = sum(weights)
    return [0.0 if completion == target else -weight / total for completion, weight in zip(completions, weights)]


def ranking(completions: Sequence[str], target: str) -> list[float]:
    """`rule` plus the rank penalty of `ranking_only`."""
    return [hit + penalty for hit, penalty in zip(rule(completions, target), ranking_only(completions, target))]


REWARDS: dict[str, Reward] = {"rule": rule, "ranking": ranking, "ranking_only": ranking_only}
