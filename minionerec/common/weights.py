"""Flags that name things with weights, such as `next_sid,title2sid:0.5`."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from minionerec.common.files import InputError


def parse_weighted_names(
    flag: str, entries: Sequence[str], known: Collection[str], positive: bool = True
) -> dict[str, float]:
    """{name: weight} of entries that are a name, or a name and its weight after a colon; without one it is 1.

    Args:
        flag: the flag the entries come from, for the errors.
        entries: such as "title2sid:0.5".
        known: the names there are.
        positive: weights must be above 0; else they must not be 0.

    Raises:
        InputError: a name that is unknown or given twice, a weight that is no such number, or no entry.
    """
    weights: dict[str, float] = {}
    for entry in entries:
        name, colon, text = entry.partition(":")
        if name not in known:
            raise InputError(f"--{flag} {entry}: expected one of {', '.join(known)}")
        if name in weights:
            raise InputError(f"--{flag}: {name} is given twice; write {name}:2 to weigh it double")
        try:
            weight = float(text) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight) or not weight or (positive and weight < 0):
            kind = "a positive number" if positive else "a number other than 0"
            raise InputError(f"--{flag} {entry}: expected NAME or NAME:WEIGHT with {kind}, such as {name}:0.5")
        weights[name] = weight
    if not weights:
        raise InputError(f"--{flag}: expected one or more of {', '.join(known)}")
    return weights
