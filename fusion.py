"""A language model and a second recommender as one list: items by p_LM(item) + W * p_partner(item)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from fileio import InputError, read_json
from item_lists import transition_counts, transition_scores
from metrics import items_by_sid, ndcg, rank_of
from prefix_tree import batch_trees, tree_log_probs
from recommenders import load_recommender
from records import Catalogue, Row
from similar_items import similar_items, tfidf_table

# {item id: p} of the partner's best items, for rows by their places in a split.
Partner = Callable[[Sequence[int]], list[dict[int, float]]]

PARTNERS = ("transitions", "content", "sasrec")
WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def largest(likelihoods: dict[int, float], k: int) -> dict[int, float]:
    """The k most likely items, ties by id."""
    return dict(sorted(likelihoods.items(), key=lambda pair: (-pair[1], pair[0]))[:k])


def make_partner(
    kind: str,
    k: int,
    rows: Sequence[Row],
    train: Sequence[Row],
    catalogue: Catalogue,
    cf_path: str | None,
) -> Partner:
    """The second recommender for the rows of a split, giving its k best items per row.

    Args:
        kind: transitions (decayed transition counts of the train rows, as shares of their sum), content (likeness of
            titles, `similar_items`), sasrec (a model folder of sasrec.py, cf_path), or a predictions file of these rows
            with log-probabilities as scores.

    Raises:
        InputError: a broken file or model folder, or one of another catalogue or other rows.
    """
    if kind == "transitions":
        follows = transition_counts(train)

        def transitions(places: Sequence[int]) -> list[dict[int, float]]:
            found = [transition_scores(rows[place].history_ids, follows) for place in places]
            return [largest({item: s / sum(scores.values()) for item, s in scores.items()}, k) for scores in found]

        return transitions
    if kind == "content":
        table, number = tfidf_table(catalogue.titles), {item: n for n, item in enumerate(catalogue.item_ids)}

        def content(places: Sequence[int]) -> list[dict[int, float]]:
            histories = [[number[item] for item in rows[place].history_ids] for place in places]
            items, likelihoods = similar_items(table, histories)
            pairs = zip(items.tolist(), likelihoods.tolist())
            return [largest({catalogue.item_ids[i]: p for i, p in zip(*pair) if p > 0}, k) for pair in pairs]

        return content
    if kind == "sasrec":
        recommender = load_recommender(cf_path)
        if set(recommender.item_ids) != set(catalogue.item_ids):
            raise InputError(f"--cf_path {cf_path}: its items are not those of the info file")

        def learned(places: Sequence[int]) -> list[dict[int, float]]:
            with torch.no_grad():
                scores = recommender.scores([rows[place].history_ids for place in places])
            best = scores.topk(min(k, scores.shape[1]), dim=1)
            return [
                {recommender.item_ids[place]: math.exp(value) for place, value in zip(*pair)}
                for pair in zip(best.indices.tolist(), best.values.tolist())
            ]

        return learned
    likelihoods = read_likelihoods(kind, rows, catalogue)
    return lambda places: [largest(likelihoods[place], k) for place in places]


def read_likelihoods(path: str, rows: Sequence[Row], catalogue: Catalogue) -> list[dict[int, float]]:
    """{item: p} per row of a predictions file with log-probabilities; by item ids where it has them, else by SIDs.

    Raises:
        InputError: not such a file, or one of other rows.
    """
    predictions, items = read_json(path, "fuse"), items_by_sid(catalogue.sids, catalogue.item_ids, {})
    if not isinstance(predictions, list) or len(predictions) != len(rows):
        raise InputError(f"--fuse {path}: expected a predictions file of these {len(rows)} rows")
    found = []
    for number, (row, own) in enumerate(zip(rows, predictions), 1):
        where = f"--fuse {path}, row {number}"
        if not isinstance(own, dict) or (own.get("user_id"), own.get("item_id")) != (row.user_id, row.item_id):
            raise InputError(f"{where}: expected user {row.user_id} and item {row.item_id}, as in the test file")
        names = own.get("predict_items", own.get("predict"))
        scores = own.get("score")
        if not isinstance(names, list) or not isinstance(scores, list) or len(scores) != len(names):
            raise InputError(f"{where}: expected a score for every recommendation")
        if any(not isinstance(score, float | int) or score > 1e-6 for score in scores):
            raise InputError(f"{where}: the scores must be log-probabilities, which are never above 0")
        owned = [[name] if "predict_items" in own else items.get(name, []) for name in names]
        found.append({item: math.exp(score) for group, score in zip(owned, scores) for item in group})
    return found


def sid_log_probs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sequences: Sequence[Sequence[Sequence[int]]],
    pad_token_id: int,
) -> list[list[float]]:
    """Log-probability of every token sequence after its prompt, end token included, in one pass over prefix trees.

    Args:
        prompts: n token-id lists. sequences: of each prompt, the token-id lists to score; may be empty.
    """
    wanted = [place for place, own in enumerate(sequences) if own]
    if not wanted:
        return [[] for _ in prompts]
    batch = batch_trees([[(prompts[p], own) for own in sequences[p]] for p in wanted], pad_token_id)
    with torch.no_grad():
        tokens = iter(tree_log_probs(model, batch.to(model.device)).tolist())
    return [[sum(next(tokens) for _ in own) for own in sequences[place]] for place in range(len(prompts))]


def fuse(
    language: dict[str, float],
    partner: dict[int, float],
    weight: float,
    items: dict[str, list[int]],
    counts: dict[int, int],
) -> list[tuple[int, float]]:
    """[(item, p_LM + weight * p_partner)], best first; ties by p_partner, then training popularity, then id.

    With weight 0 the partner's items still take part, by their p_LM: the search may have missed some.

    Args:
        language: {SID: log-probability}, of the beam and of the partner's items. partner: {item: likelihood}.
        items: {SID: its items}; each of several has the SID's probability. counts: popularity.
    """
    likely = {item: math.exp(score) for sid, score in language.items() for item in items[sid]}
    scored = [(item, p + weight * partner.get(item, 0.0)) for item, p in likely.items()]
    return sorted(scored, key=lambda x: (-x[1], -partner.get(x[0], 0.0), -counts.get(x[0], 0), x[0]))


class Fusion:
    """Fused rankings of a split: called with a row's place and a weight.

    Args:
        found: per row, `language` [[SID, log-probability], ...] and `partner` [[item, p], ...].
    """

    def __init__(self, found: Sequence[dict], catalogue: Catalogue, counts: dict[int, int]):
        self.found, self.counts = found, counts
        self.items = items_by_sid(catalogue.sids, catalogue.item_ids, counts)

    def __call__(self, place: int, weight: float) -> list[tuple[int, float]]:
        own = self.found[place]
        return fuse(dict(own["language"]), dict(own["partner"]), weight, self.items, self.counts)


def choose_weight(rows: Sequence[Row], fused: Fusion) -> tuple[float, dict[float, float]]:
    """(the weight of WEIGHTS with the best NDCG@10 over `rows`, {weight: NDCG@10}); the smaller one of equals."""
    grid = {}
    for weight in WEIGHTS:
        ranks = [rank_of(row.item_id, (item for item, _ in fused(n, weight))) for n, row in enumerate(rows)]
        grid[weight] = round(ndcg(ranks, 10), 6)
    return max(WEIGHTS, key=lambda weight: (grid[weight], -weight)), grid
