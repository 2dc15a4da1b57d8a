"""Test users shown with titles: what they took, what they were recommended and why, and whether it was right."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from minionerec.common.records import Row
from minionerec.evaluation.metrics import expand_sids
from minionerec.evaluation.predictions import read_predictions
from minionerec.recommenders.content import explain_content
from minionerec.recommenders.transitions import count_transitions, explain_transitions
from minionerec.reports.figures import Ranked
from minionerec.reports.runs import RunData

SHOWN_USERS, SHOWN_ITEMS = 20, 10
FREQUENT = 100  # most frequent targets of the train split
POPULAR = f"among the {FREQUENT} most frequent targets"
UNEXPLAINED = "neither counted nor alike: the model’s own"


@dataclass(frozen=True)
class ListPlace:
    """One place of a list: title and SID, the model's score, why it may stand there, whether it is the target."""

    title: str
    sid: str
    score: str
    reason: str
    is_hit: bool


@dataclass(frozen=True)
class UserExample:
    """A test row: the history's titles, oldest first, the target, its rank (0: not found), and the list."""

    user: str
    history: list[str]
    target: str
    rank: int
    recommendations: list[ListPlace]


class WordFinder:
    """What in a history speaks for items, by what the train rows and the titles say; the model itself is not asked.

    Args:
        data: the train rows and the catalogue.
    """

    def __init__(self, data: RunData):
        self.catalogue = data.catalogue
        self.titles = dict(zip(data.catalogue.item_ids, data.catalogue.titles, strict=True))
        self.frequent = {item for item, _ in Counter(data.catalogue.counts).most_common(FREQUENT)}
        self._explainers = [
            explain_transitions(count_transitions(data.train_rows), data.catalogue),
            explain_content(data.catalogue, {}),
        ]

    def explain(self, items: Sequence[int], history: Sequence[int]) -> list[str]:
        """Why each of the items may follow a history, in a few words."""
        counted, alike = (explain(history, items) for explain in self._explainers)
        return [
            "in the history already"
            if item in history
            else after or like or (POPULAR if item in self.frequent else UNEXPLAINED)
            for item, after, like in zip(items, counted, alike, strict=True)
        ]


def format_score(score: float | None) -> str:
    """A log-probability as the probability; any other score as it is."""
    if score is None:
        return ""
    return f"{math.exp(score):.1%}" if score <= 0 else f"{score:.3g}"


def choose_examples(ranked: Ranked, data: RunData, seed: int = 0) -> list[UserExample]:
    """The same SHOWN_USERS users for every run over a test split, drawn at random, with their last rows."""
    last_row = {row.user_id: number for number, row in enumerate(data.test_rows)}
    users = sorted(last_row)
    chosen = random.Random(seed).sample(users, min(SHOWN_USERS, len(users)))
    words = WordFinder(data)
    numbers = {last_row[user] for user in chosen}
    rows = enumerate(read_predictions(str(ranked.model.predictions), "predictions"))
    predictions = {number: row for number, row in rows if number in numbers}
    return [
        _describe(data.test_rows[number], predictions[number], int(ranked.ranks[number]), words)
        for number in map(last_row.__getitem__, chosen)
    ]


def _describe(row: Row, prediction: dict, rank: int, words: WordFinder) -> UserExample:
    scores = prediction.get("score") or [None] * len(prediction["predict"])
    if "predict_items" in prediction:
        places = list(zip(prediction["predict_items"], prediction["predict"], scores, strict=True))
    else:
        groups = zip(prediction["predict"], scores, strict=True)
        items = words.catalogue.items_of_sid
        places = [(item, sid, score) for sid, score in groups for item in expand_sids([sid], items)]
    places = places[:SHOWN_ITEMS]
    known = [item for item, _, _ in places if item is not None]
    why = dict(zip(known, words.explain(known, row.history_ids), strict=True))
    shown = [
        ListPlace(
            title="not in the catalogue" if item is None else words.titles[item] or f"item {item}",
            sid=sid,
            score=format_score(score),
            reason=why.get(item, "illegal"),
            is_hit=item == row.item_id,
        )
        for item, sid, score in places
    ]
    history = [title or f"item {item}" for item, title in zip(row.history_ids, row.history_titles, strict=True)]
    return UserExample(row.user_id, history, row.title or f"item {row.item_id}", rank, shown)
