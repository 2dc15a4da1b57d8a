"""Why an item is recommended, in a few words: what each baseline that speaks for it has seen in the history."""

from __future__ import annotations

from collections.abc import Sequence

from minionerec.recommenders.registry import BASELINES, SUM_SIGN, BuiltBaselines, Reasons


class ReasonFinder:
    """Reasons of registered baselines and sums, in words where a baseline has some, else by its name.

    Args:
        built: the baselines of the run.
    """

    def __init__(self, built: BuiltBaselines):
        self._built = built
        self._explain: dict[str, Reasons] = {}

    def explain(self, name: str, history: Sequence[int], items: Sequence[int]) -> list[str]:
        """Why the baseline or sum `name` speaks for each of the items after a history of item ids, oldest first.

        A sum speaks by the part in which the item has the largest share. What is no registered baseline has no words.
        """
        names = name.split(SUM_SIGN)
        if len(names) == 1 or not all(part in BASELINES for part in names):
            return self._explain_part(name, history, items)
        parts = [predict([history])[0] for predict in self._built.list_parts(name)]
        sums = [sum(part.values()) or 1.0 for part in parts]
        reasons = []
        for item in items:
            shares = [part.get(item, 0.0) / size for part, size in zip(parts, sums, strict=True)]
            reasons += self._explain_part(names[shares.index(max(shares))], history, [item])
        return reasons

    def _explain_part(self, name: str, history: Sequence[int], items: Sequence[int]) -> list[str]:
        build = BASELINES[name].explain if name in BASELINES else None
        if build is None:
            return [name] * len(items)
        if name not in self._explain:
            self._explain[name] = build(self._built.inputs)
        return [reason or name for reason in self._explain[name](history, items)]
