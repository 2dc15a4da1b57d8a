"""Items of a row's own history that its list may not hold: --exclude_seen and --repeat_newest."""

from __future__ import annotations

from collections.abc import Sequence

from minionerec.common.files import InputError
from minionerec.common.records import Catalogue, Row
from minionerec.recommenders.settings import SeenFlags


def check_seen_flags(flags: SeenFlags) -> None:
    """The two must fit together.

    Raises:
        InputError: they do not.
    """
    if flags.repeat_newest < 0 or (flags.repeat_newest and not flags.exclude_seen):
        raise InputError(f"--repeat_newest {flags.repeat_newest}: expected 0 or more, with --exclude_seen True")


def find_excluded(history: Sequence[str], repeat_newest: int) -> list[str]:
    """The SIDs of a history, oldest first, without those of its newest items."""
    newest = set(history[-repeat_newest:]) if repeat_newest else set()
    return [sid for sid in history if sid not in newest]


def list_excluded(flags: SeenFlags, rows: Sequence[Row], catalogue: Catalogue) -> list[set[int]]:
    """The items that the list of each row may not hold: those of excluded SIDs, none without --exclude_seen."""
    if not flags.exclude_seen:
        return [set() for _ in rows]
    items_of_sid = catalogue.items_of_sid
    return [
        {item for sid in find_excluded(row.history_sids, flags.repeat_newest) for item in items_of_sid[sid]}
        for row in rows
    ]


def extend_length(k: int, excluded: Sequence[set[int]]) -> int:
    """How long the lists of a ranking must be for k of their items to be left over by `leave_out`."""
    return k + max(map(len, excluded), default=0)


def leave_out(
    rankings: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]] | None,
    excluded: Sequence[set[int]],
    k: int,
) -> tuple[list[list[int]], list[list[float]] | None]:
    """The first k items of every list that are not excluded, with their scores.

    Args:
        rankings: items, best first, `extend_length` of them.
        scores: theirs, or None.
        excluded: of `list_excluded`.
        k: length of the lists.
    """
    kept = [
        [place for place, item in enumerate(ranked) if item not in unwanted][:k]
        for ranked, unwanted in zip(rankings, excluded, strict=True)
    ]
    items = [[ranked[place] for place in places] for ranked, places in zip(rankings, kept, strict=True)]
    if scores is None:
        return items, None
    return items, [[values[place] for place in places] for values, places in zip(scores, kept, strict=True)]
