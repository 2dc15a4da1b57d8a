"""Second recommenders beside the language model: what each holds likely after a history, for fusion and for rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from minionerec.common.files import InputError
from minionerec.common.records import Catalogue, Row
from minionerec.common.tfidf import compute_tfidf
from minionerec.recommenders.content import find_similar_items
from minionerec.recommenders.networks import load_network
from minionerec.recommenders.transitions import count_transitions, score_transitions

# Histories of item ids, oldest first -> {item id: p} of the catalogue's items; items that it leaves out have p = 0.
Likelihoods = Callable[[Sequence[Sequence[int]]], list[dict[int, float]]]

BASELINES = ("transitions", "content", "sasrec")


def build_transitions(train: Sequence[Row], catalogue: Catalogue) -> Likelihoods:
    """Decayed transition counts of the train rows (`transition_scores`), as shares of their sum."""
    follows, known = count_transitions(train), set(catalogue.item_ids)

    def likelihoods(histories: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        shares = []
        for history in histories:
            scores = {item: score for item, score in score_transitions(history, follows).items() if item in known}
            total = sum(scores.values())
            shares.append({item: score / total for item, score in scores.items()})
        return shares

    return likelihoods


def build_content(catalogue: Catalogue) -> Likelihoods:
    """Likeness of titles to those of the history (`similar_items`)."""
    table, number = compute_tfidf(catalogue.titles), {item: n for n, item in enumerate(catalogue.item_ids)}

    def likelihoods(histories: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        items, found = find_similar_items(table, [[number[item] for item in history] for history in histories])
        pairs = zip(items.tolist(), found.tolist())
        return [{catalogue.item_ids[i]: p for i, p in zip(*pair) if p > 0} for pair in pairs]

    return likelihoods


def build_sasrec(catalogue: Catalogue, cf_path: str, device: str = "cpu") -> Likelihoods:
    """A model folder of sasrec.py: SASRec or GRU4Rec.

    Raises:
        InputError: no such folder, or a model of another catalogue.
    """
    recommender = load_network(cf_path).to(device)
    if set(recommender.item_ids) != set(catalogue.item_ids):
        raise InputError(f"--cf_path {cf_path}: its items are not those of the info file")

    @torch.no_grad()
    def likelihoods(histories: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        found = recommender.scores(histories).exp().tolist()
        return [dict(zip(recommender.item_ids, own)) for own in found]

    return likelihoods


def build_baseline(kind: str, train: Sequence[Row], catalogue: Catalogue, cf_path: str | None) -> Likelihoods:
    """The partner of that name in `PARTNERS`; sasrec needs cf_path."""
    if kind == "transitions":
        return build_transitions(train, catalogue)
    return build_content(catalogue) if kind == "content" else build_sasrec(catalogue, cf_path)
