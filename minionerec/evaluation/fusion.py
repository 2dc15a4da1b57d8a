"""A language model and a second recommender as one list: items by p_LM(item) + W * p_partner(item)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from minionerec.common.files import InputError, read_json
from minionerec.common.records import Catalogue, Row, group_items_by_sid
from minionerec.evaluation.metrics import find_rank, ndcg
from minionerec.language.prompts import Encoder
from minionerec.recommenders.registry import BASELINES, build_baseline
from minionerec.search.prefix_tree import batch_trees, compute_tree_log_probs

# {item id: p} of the catalogue's items, for rows by their places in a split; items that it leaves out have p = 0.
RowLikelihoods = Callable[[Sequence[int]], list[dict[int, float]]]

WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def select_top_items(likelihoods: dict[int, float], k: int, counts: dict[int, int]) -> list[int]:
    """The k most likely items, best first; ties by training popularity, then id."""
    return heapq.nsmallest(k, likelihoods, key=lambda item: (-likelihoods[item], -counts.get(item, 0), item))


def build_row_likelihoods(
    kind: str,
    rows: Sequence[Row],
    train: Sequence[Row],
    catalogue: Catalogue,
    cf_path: str | None,
) -> RowLikelihoods:
    """The second recommender for the rows of a split, for every item of the catalogue.

    Args:
        kind: of `PARTNERS` (sasrec needs cf_path), or a predictions file of these rows with log-probabilities as scores.

    Raises:
        InputError: a broken file or model folder, or one of another catalogue or other rows.
    """
    if kind in BASELINES:
        after = build_baseline(kind, train, catalogue, cf_path)
        return lambda places: after([rows[place].history_ids for place in places])
    likelihoods = read_likelihoods(kind, rows, catalogue)
    return lambda places: [likelihoods[place] for place in places]


def read_likelihoods(path: str, rows: Sequence[Row], catalogue: Catalogue) -> list[dict[int, float]]:
    """{item: p} per row of a predictions file with log-probabilities; by item ids where it has them, else by SIDs.

    Raises:
        InputError: not such a file, one of other rows, or one with an item outside the catalogue.
    """
    predictions, items = read_json(path, "fuse"), group_items_by_sid(catalogue.sids, catalogue.item_ids, {})
    known = set(catalogue.item_ids)
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
        if any(not isinstance(score, float | int) or not score <= 1e-6 for score in scores):
            raise InputError(f"{where}: the scores must be log-probabilities, which are never above 0")
        unknown = [name for name in names if name not in (known if "predict_items" in own else items)]
        if unknown:
            raise InputError(f"{where}: {unknown[0]} is not in the info file")
        owned = [[name] if "predict_items" in own else items[name] for name in names]
        found.append({item: math.exp(score) for group, score in zip(owned, scores) for item in group})
    return found


class CandidateScorer:
    """What `Fusion` needs to know of the rows of a split, batch by batch.

    Args:
        partner: of `make_partner`, for the rows of this split. k: how many of its best items are candidates.
        counts: training popularity.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        catalogue: Catalogue,
        counts: dict[int, int],
        partner: RowLikelihoods,
        k: int,
    ):
        self.model, self.pad_token_id, self.partner = model, encoder.pad_token_id, partner
        self.counts, self.k = counts, k
        # Once: reading out a large vocabulary takes a tenth of a second.
        self.tokens_of = dict(zip(catalogue.sids, encoder.sid_ids(catalogue.sids)))
        self.sid_of = dict(zip(catalogue.item_ids, catalogue.sids))
        self.items_of = group_items_by_sid(catalogue.sids, catalogue.item_ids, counts)

    def __call__(
        self,
        places: Sequence[int],
        prompts: Sequence[Sequence[int]],
        ranked: Sequence[Sequence[str]],
        scores: Sequence[Sequence[float]],
    ) -> list[dict]:
        """Per row, `language` [(SID, log-probability), ...] of the beam and of the partner's k best items, and `partner`
        [(item, p), ...] of the items of these SIDs.

        Args:
            places, prompts: of the rows in their split. ranked, scores: their beams, as `rank_sids` gives them.
        """
        likely = self.partner(places)
        tops = [select_top_items(own, self.k, self.counts) for own in likely]
        others = [sorted({self.sid_of[item] for item in top} - set(best)) for top, best in zip(tops, ranked)]
        sequences = [[self.tokens_of[sid] for sid in own] for own in others]
        scored = score_sids(self.model, prompts, sequences, self.pad_token_id)
        found = []
        for p, best, values, sids, more in zip(likely, ranked, scores, others, scored):
            owners = [item for sid in (*best, *sids) for item in self.items_of[sid]]
            language = [*zip(best, values), *zip(sids, more)]
            found.append({"language": language, "partner": [(item, p[item]) for item in owners if item in p]})
        return found


def score_sids(
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
        tokens = iter(compute_tree_log_probs(model, batch.to(model.device)).tolist())
    return [[sum(next(tokens) for _ in own) for own in sequences[place]] for place in range(len(prompts))]


def fuse_scores(
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
        self.items = group_items_by_sid(catalogue.sids, catalogue.item_ids, counts)

    def __call__(self, place: int, weight: float) -> list[tuple[int, float]]:
        own = self.found[place]
        return fuse_scores(dict(own["language"]), dict(own["partner"]), weight, self.items, self.counts)


def choose_weight(rows: Sequence[Row], fused: Fusion) -> tuple[float, dict[float, float]]:
    """(the weight of WEIGHTS with the best NDCG@10 over `rows`, {weight: NDCG@10}); the smaller one of equals."""
    grid = {}
    for weight in WEIGHTS:
        ranks = [find_rank(row.item_id, (item for item, _ in fused(n, weight))) for n, row in enumerate(rows)]
        grid[weight] = round(ndcg(ranks, 10), 6)
    return max(WEIGHTS, key=lambda weight: (grid[weight], -weight)), grid
