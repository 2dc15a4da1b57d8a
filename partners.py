"""Second recommenders beside the language model: what each holds likely after a history, for fusion and for rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fileio import InputError
from item_lists import transition_counts, transition_scores
from recommenders import load_recommender
from records import Catalogue, Row
from similar_items import similar_items, tfidf_table

# Histories of item ids, oldest first -> {item id: p} of the catalogue's items; items that it leaves out have p = 0.
Likelihoods = Callable[[Sequence[Sequence[int]]], list[dict[int, float]]]

PARTNERS = ("transitions", "content", "sasrec")


def transitions(train: Sequence[Row], catalogue: Catalogue) -> Likelihoods:
    """Decayed transition counts of the train rows (`transition_scores`), as shares of their sum."""
    follows, known = transition_counts(train), set(catalogue.item_ids)

    def likelihoods(histories: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        shares = []
        for history in histories:
            scores = {item: score for item, score in transition_scores(history, follows).items() if item in known}
            total = sum(scores.values())
            shares.append({item: score / total for item, score in scores.items()})
        return shares

    return likelihoods


def content(catalogue: Catalogue) -> Likelihoods:
    """Likeness of titles to those of the history (`similar_items`)."""
    table, number = tfidf_table(catalogue.titles), {item: n for n, item in enumerate(catalogue.item_ids)}

    def likelihoods(histories: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        items, found = similar_items(table, [[number[item] for item in history] for history in histories])
        pairs = zip(items.tolist(), found.tolist())
        return [{catalogue.item_ids[i]: p for i, p in zip(*pair) if p > 0} for pair in pairs]

    return likelihoods


def sasrec(catalogue: Catalogue, cf_path: str, device: str = "cpu") -> Likelihoods:
    """A model folder of sasrec.py: SASRec or GRU4Rec.

    Raises:
        InputError: no such folder, or a model of another catalogue.
    """
    recommender = load_recommender(cf_path).to(device)
    if set(recommender.item_ids) != set(catalogue.item_ids):
        raise InputError(f"--cf_path {cf_path}: its items are not those of the info file")

    @torch.no_grad()
    def likelihoods(histories: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        found = recommender.scores(histories).exp().tolist()
        return [dict(zip(recommender.item_ids, own)) for own in found]

    return likelihoods


def make_likelihoods(kind: str, train: Sequence[Row], catalogue: Catalogue, cf_path: str | None) -> Likelihoods:
    """The partner of that name in `PARTNERS`; sasrec needs cf_path."""
    if kind == "transitions":
        return transitions(train, catalogue)
    return content(catalogue) if kind == "content" else sasrec(catalogue, cf_path)
