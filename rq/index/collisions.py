"""Items that share a semantic ID: how many, and how they are told apart.

Codes are integer arrays [n, levels]; the first levels - 1 columns are an item's prefix. Distances are to the last
level's codes, [items asked for, K], smaller is nearer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from minionerec.common.files import InputError
from minionerec.common.progress import ProgressBar
from rq.models.vq import sinkhorn
from rq.settings import RepairFlags

Distances = Callable[[np.ndarray], torch.Tensor]
STEPS = (
    ["none"],
    ["sinkhorn"],
    ["nearest_free"],
    ["extra_token"],
    ["own_token"],
    ["sinkhorn", "nearest_free"],
    ["sinkhorn", "extra_token"],
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def group_by_sid(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bucket number of each row [n], size of each bucket): rows with equal codes share a bucket."""
    _, inverse, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return inverse.reshape(-1), sizes


def compute_collision_rate(codes: np.ndarray) -> float:
    """1 - distinct codes / items; 0 when every item has its own."""
    return 1 - len(group_by_sid(codes)[1]) / len(codes)


def find_colliding_rows(codes: np.ndarray) -> np.ndarray:
    """Numbers of the rows that share their codes with another row, ascending."""
    inverse, sizes = group_by_sid(codes)
    return np.flatnonzero(sizes[inverse] > 1)


def _group_rows(codes: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """`rows` grouped by equal codes, each group ascending."""
    inverse, _ = group_by_sid(codes[rows])
    order = np.argsort(inverse, kind="stable")
    return np.split(rows[order], np.flatnonzero(np.diff(inverse[order])) + 1)


def spread_by_sinkhorn(
    codes: np.ndarray, distances: Distances, epsilon: float, iterations: int, rounds: int
) -> tuple[np.ndarray, int]:
    """Spread each bucket of colliding items over the last level by Sinkhorn, in up to `rounds` rounds.

    Each bucket is its own transport problem; buckets of one size are solved together. An item may land on a code that
    is taken, which the next round sees. Stops early when a round changes nothing: it would repeat itself.

    Args:
        codes: [n, levels].
        distances: of rows to the codes of the last level.
        epsilon, iterations: regularisation and scalings of `sinkhorn`.
        rounds: at most.

    Returns:
        The codes of the round with the fewest collisions, and the number of rounds done.
    """
    codes = codes.copy()
    best, fewest = codes.copy(), compute_collision_rate(codes)
    n_codes = distances(np.arange(1)).shape[-1]
    for done in range(rounds):
        rows = find_colliding_rows(codes)
        if not len(rows):
            return codes, done
        before = codes[rows, -1]
        groups = _group_rows(codes, rows)
        sizes = sorted({len(group) for group in groups})
        for size in ProgressBar(sizes, f"sinkhorn round {done + 1}", unit="bucket size", leave=False):
            together = np.stack([group for group in groups if len(group) == size])
            # At most about 16 million plan entries (128 MB of float64) at a time.
            step = max(1, 16_000_000 // (size * n_codes))
            for start in range(0, len(together), step):
                part = together[start : start + step]
                problem = distances(part.reshape(-1)).reshape(len(part), size, -1)
                codes[part, -1] = sinkhorn(problem, epsilon, iterations).argmax(-1).cpu().numpy()
        if compute_collision_rate(codes) < fewest:
            best, fewest = codes.copy(), compute_collision_rate(codes)
        if np.array_equal(before, codes[rows, -1]):
            return best, done + 1
    return best, rounds


def move_to_free_codes(codes: np.ndarray, distances: Distances) -> tuple[np.ndarray, np.ndarray]:
    """Give colliding items free last-level codes of their prefix.

    In each bucket the item nearest to the shared code keeps it (the lower row on a tie); the others of a prefix go to
    its free codes, matched at least total distance. With too few free codes some stay where they are.

    Returns:
        The codes [n, levels] and the numbers of the rows that moved, ascending.
    """
    codes, moved = codes.copy(), []
    colliding = find_colliding_rows(codes)
    if not len(colliding):
        return codes, np.empty(0, dtype=np.int64)
    prefix, _ = group_by_sid(codes[:, :-1]) if codes.shape[1] > 1 else (np.zeros(len(codes), dtype=np.int64), None)
    by_prefix = np.argsort(prefix, kind="stable")
    bounds = np.searchsorted(prefix[by_prefix], np.arange(prefix.max() + 2))
    for number in ProgressBar(np.unique(prefix[colliding]), "free codes", unit="prefix", leave=False):
        members = by_prefix[bounds[number] : bounds[number + 1]]
        table = distances(members).double().cpu().numpy()
        to_code = table[np.arange(len(members)), codes[members, -1]]
        # Nearest first within a code: all but the first of each code are displaced.
        order = np.lexsort((members, to_code, codes[members, -1]))
        ordered = codes[members[order], -1]
        displaced = np.sort(order[1:][ordered[1:] == ordered[:-1]])
        free = np.setdiff1d(np.arange(table.shape[1]), ordered)
        if not len(displaced) or not len(free):
            continue
        rows, columns = linear_sum_assignment(table[np.ix_(displaced, free)])
        codes[members[displaced[rows]], -1] = free[columns]
        moved.append(members[displaced[rows]])
    return codes, np.sort(np.concatenate(moved)) if moved else np.empty(0, dtype=np.int64)


def add_extra_level(codes: np.ndarray) -> np.ndarray:
    """[n] a number from 0 that tells the members of a colliding bucket apart, in row order; -1 for other items.

    Every member gets one, the first too, so no SID is the beginning of another.
    """
    extra = np.full(len(codes), -1, dtype=np.int64)
    rows = find_colliding_rows(codes)
    if len(rows):
        for group in _group_rows(codes, rows):
            extra[group] = np.arange(len(group))
    return extra


def check_repair_flags(flags: RepairFlags) -> None:
    """Refuse values that no repair can have.

    Raises:
        InputError: other steps than those of STEPS, or a number out of range.
    """
    if flags.collisions not in STEPS:
        choices = " | ".join(",".join(steps) for steps in STEPS)
        raise InputError(f"--collisions {','.join(flags.collisions)}: expected one of {choices}")
    if flags.sk_epsilon <= 0 or flags.sk_iters < 1 or flags.repair_rounds < 0:
        raise InputError("expected --sk_epsilon above 0, --sk_iters >= 1 and --repair_rounds >= 0")


def resolve_collisions(
    codes: np.ndarray, distances: Distances, flags: RepairFlags
) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """Do the steps of flags.collisions in turn.

    none: nothing. sinkhorn: `spread_by_sinkhorn`, which may leave collisions. nearest_free: `move_to_free_codes`, and
    an extra token where a prefix is full. extra_token: `add_extra_level`. own_token: a last token for every item that
    no other has. The last three leave no collision.

    Args:
        codes: [n, levels].
        distances: of rows to the codes of the last level.
        flags: the steps, one of STEPS, and the numbers of the sinkhorn step.

    Returns:
        The codes, the extra tokens of `add_extra_level` or None, and the counts to report.
    """
    counts: dict[str, Any] = {"collision_rate_before": round(compute_collision_rate(codes), 6)}
    extra = None
    for step in flags.collisions:
        if step == "sinkhorn":
            codes, rounds = spread_by_sinkhorn(codes, distances, flags.sk_epsilon, flags.sk_iters, flags.repair_rounds)
            counts |= {"sinkhorn_rounds": rounds, "collision_rate_sinkhorn": round(compute_collision_rate(codes), 6)}
        elif step == "nearest_free":
            codes, moved = move_to_free_codes(codes, distances)
            counts["moved_to_free_codes"] = len(moved)
        if step == "own_token":
            extra = np.arange(len(codes))
        if step in ("nearest_free", "extra_token"):
            extra = add_extra_level(codes)
        if extra is not None:
            counts["items_with_extra_token"] = int((extra >= 0).sum())
    left = find_colliding_rows(codes) if extra is None else []
    rate = compute_collision_rate(codes) if extra is None else 0.0
    counts |= {"collision_rate_after": round(rate, 6), "items_sharing_a_sid": len(left)}
    return codes, extra, counts


def make_sid_tokens(codes: np.ndarray, extra: np.ndarray | None = None) -> list[list[str]]:
    """`["<a_12>", "<b_7>", "<c_200>"]` per row, with `"<d_0>"` behind it where `extra` is not -1.

    Raises:
        ValueError: more levels than letters.
    """
    levels = codes.shape[1]
    if levels + (extra is not None and bool((extra >= 0).any())) > len(LETTERS):
        raise ValueError(f"{levels} levels: token letters run from a to z")
    tokens = [[f"<{LETTERS[level]}_{code}>" for level, code in enumerate(row)] for row in codes.tolist()]
    if extra is not None:
        for row in np.flatnonzero(extra >= 0):
            tokens[row].append(f"<{LETTERS[levels]}_{extra[row]}>")
    return tokens
