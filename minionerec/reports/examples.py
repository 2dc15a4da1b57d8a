"""Test users shown with titles: what they took, what they were recommended and why, and whether it was right."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from scipy import sparse

from minionerec.common.records import Row
from minionerec.evaluation.metrics import expand_sids
from minionerec.recommenders.content import compute_item_texts
from minionerec.recommenders.transitions import count_transitions
from minionerec.reports.figures import Ranked
from minionerec.reports.runs import RunData

SHOWN_USERS, SHOWN_ITEMS = 20, 10
LIKE = 0.3  # cosine of two titles that are called alike
OFTEN = 2  # transitions that are a reason before the likeness of titles is
FREQUENT = 100  # most frequent targets of the train split


@dataclass(frozen=True)
class Recommendation:
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
    recommendations: list[Recommendation]


class Reasons:
    """What in a history speaks for an item, by what the train rows and the titles say; the model itself is not asked.

    Args:
        data: the train rows and the catalogue.
    """

    def __init__(self, data: RunData):
        self.catalogue = data.catalogue
        self.titles = dict(zip(data.catalogue.item_ids, data.catalogue.titles, strict=True))
        self.row_of = {item: row for row, item in enumerate(data.catalogue.item_ids)}
        self.transitions = count_transitions(data.train_rows)
        self.frequent = {item for item, _ in Counter(data.catalogue.counts).most_common(FREQUENT)}

    @cached_property
    def texts(self) -> sparse.csr_matrix:
        """The items' titles as vectors."""
        titles = self.catalogue.titles
        return compute_item_texts(titles, [""] * len(titles))

    def explain(self, item: int, history: Sequence[int]) -> str:
        """Why an item may follow a history, in a few words."""
        if item in history:
            return "in the history already"
        newest = list(dict.fromkeys(reversed(history)))
        counts = {other: self.transitions.get(other, {}).get(item, 0) for other in newest}
        before = max(newest, key=lambda other: counts[other], default=None)
        times = counts[before] if before is not None else 0
        followed = f"came next after “{self.titles.get(before, '?')}” {times} time{'s' * (times > 1)}"
        if times >= OFTEN:
            return followed
        similar, cosine = self._find_most_similar(item, newest)
        if cosine >= LIKE:
            return f"title like “{self.titles[similar]}”"
        if times:
            return followed
        if item in self.frequent:
            return f"among the {FREQUENT} most frequent targets"
        return "neither counted nor alike: the model’s own"

    def _find_most_similar(self, item: int, others: Sequence[int]) -> tuple[int, float]:
        known = [other for other in others if other in self.row_of]
        if not known or item not in self.row_of:
            return item, 0.0
        cosines = (self.texts[[self.row_of[other] for other in known]] @ self.texts[self.row_of[item]].T).toarray()
        best = int(cosines.argmax())
        return known[best], float(cosines[best, 0])


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
    reasons = Reasons(data)
    return [_describe(ranked, data.test_rows[last_row[user]], last_row[user], reasons) for user in chosen]


def _describe(ranked: Ranked, row: Row, number: int, reasons: Reasons) -> UserExample:
    prediction = ranked.predictions[number]
    scores = prediction.get("score") or [None] * len(prediction["predict"])
    if "predict_items" in prediction:
        places = list(zip(prediction["predict_items"], prediction["predict"], scores, strict=True))
    else:
        groups = zip(prediction["predict"], scores, strict=True)
        items = reasons.catalogue.items_of_sid
        places = [(item, sid, score) for sid, score in groups for item in expand_sids([sid], items)]
    shown = [
        Recommendation(
            title=reasons.titles.get(item) or f"item {item}" if item is not None else "not in the catalogue",
            sid=sid,
            score=format_score(score),
            reason=reasons.explain(item, row.history_ids) if item is not None else "illegal",
            is_hit=item == row.item_id,
        )
        for item, sid, score in places[:SHOWN_ITEMS]
    ]
    history = [title or f"item {item}" for item, title in zip(row.history_ids, row.history_titles, strict=True)]
    return UserExample(row.user_id, history, row.title or f"item {row.item_id}", int(ranked.ranks[number]), shown)
