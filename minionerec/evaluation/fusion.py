"""A language model and a baseline as one ranking: items by p_model(item) + W * p_baseline(item)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from minionerec.common.files import InputError, read_json, write_json
from minionerec.common.processes import say
from minionerec.common.records import Catalogue, Row
from minionerec.evaluation.metrics import find_rank, ndcg
from minionerec.evaluation.predictions import EvaluationFiles, build_item_predictions, score_item_predictions
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.language.prompts import Encoder
from minionerec.recommenders.registry import (
    BASELINES,
    BaselineInputs,
    build_baseline,
    check_baseline_files,
    is_baseline,
    select_likeliest,
)
from minionerec.search.prefix_tree import batch_trees, compute_tree_log_probs

# {item id: p} of the catalogue's items for rows by their numbers in a split; items that it leaves out have p = 0.
RowLikelihoods = Callable[[Sequence[int]], list[dict[int, float]]]

WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def check_fusion_flags(flags: EvaluateFlags) -> None:
    """The flags of the fusion must fit each other, the search and the splits. Plugins are loaded before.

    Raises:
        InputError: the first that does not.
    """
    if flags.fuse_valid_sample != -1 and (flags.fuse_valid_file is None or flags.fuse_valid_sample < 1):
        raise InputError(f"--fuse_valid_sample {flags.fuse_valid_sample}: expected at least 1, with --fuse_valid_file")
    if flags.fuse is None:
        for name in ("fuse_weight", "fuse_valid_file", "cf_path"):
            if getattr(flags, name) is not None:
                raise InputError(f"--{name}: has an effect with --fuse only")
        return
    registered = is_baseline(flags.fuse)
    if not registered and not Path(flags.fuse).is_file():
        expected = f"one of {', '.join(BASELINES)}, or a sum of some, or a predictions file"
        raise InputError(f"--fuse {flags.fuse}: expected {expected}")
    if registered and not flags.train_file:
        raise InputError(f"--fuse {flags.fuse}: needs --train_file")
    check_baseline_files("fuse", [flags.fuse], {"cf_path": flags.cf_path})
    if flags.length_penalty or flags.renormalize or flags.only_items or flags.exclude_seen:
        raise InputError(
            "--fuse: adds probabilities, so it goes without --length_penalty, --renormalize, --only_items and "
            "--exclude_seen"
        )
    if (flags.fuse_weight is None) == (flags.fuse_valid_file is None):
        raise InputError("--fuse: expected either --fuse_weight or --fuse_valid_file to choose it on")
    if not registered and flags.fuse_weight is None:
        raise InputError(f"--fuse {flags.fuse}: a file has no validation rows; give --fuse_weight")
    if flags.fuse_weight is not None and not 0 <= flags.fuse_weight < math.inf:
        raise InputError(f"--fuse_weight {flags.fuse_weight}: must be 0 or more, and finite")
    for name in ("test_data_path", "train_file"):
        path = getattr(flags, name)
        if flags.fuse_valid_file and path and Path(flags.fuse_valid_file).resolve() == Path(path).resolve():
            raise InputError(f"--fuse_valid_file {path}: is --{name}; choose the weight on the validation split")


class Fusion:
    """What --fuse adds to an evaluation; nothing where it is not given.

    Args:
        flags: of the evaluation, resolved.
        inputs: what the baseline is built from.

    Attributes:
        enabled: whether --fuse is given.
        weight: of the baseline; None until it is chosen.
        grid: {weight: NDCG@10} it was chosen from, or None.

    Raises:
        InputError: a baseline that cannot be built.
    """

    def __init__(self, flags: EvaluateFlags, inputs: BaselineInputs):
        self.flags, self.catalogue = flags, inputs.catalogue
        self.enabled = flags.fuse is not None
        self.weight: float | None = flags.fuse_weight
        self.grid: dict[float, float] | None = None
        self._predict = build_baseline(flags.fuse, inputs) if self.enabled and is_baseline(flags.fuse) else None

    @property
    def lacks_weight(self) -> bool:
        """Whether the weight must still be chosen on the validation rows."""
        return self.enabled and self.weight is None

    def build_scorer(self, rows: Sequence[Row], model: PreTrainedModel, encoder: Encoder) -> CandidateScorer | None:
        """What the search of a split is to find out for the fusion, batch by batch; None without --fuse."""
        if not self.enabled:
            return None
        predict, k = self._predict, self.flags.K
        if predict is None:
            of_rows = read_likelihoods(self.flags.fuse, rows, self.catalogue)
            return CandidateScorer(model, encoder, self.catalogue, lambda numbers: [of_rows[n] for n in numbers], k)

        def predict_rows(numbers: Sequence[int]) -> list[dict[int, float]]:
            return predict([rows[number].history_ids for number in numbers])

        return CandidateScorer(model, encoder, self.catalogue, predict_rows, k)

    def choose_weight(self, rows: Sequence[Row], results: Sequence[dict]) -> None:
        """Choose the weight on validation rows and what `CandidateScorer` found of them."""
        self.weight, self.grid = choose_weight(rows, results, self.catalogue)
        say(f"[evaluate] --fuse {self.flags.fuse}: NDCG@10 on {len(rows):,} validation rows by weight: {self.grid}")

    def write(self, rows: Sequence[Row], results: Sequence[dict], files: EvaluationFiles) -> dict[str, dict]:
        """Write the fused lists and their metrics, and remove those of an earlier run.

        Args:
            rows: the test rows.
            results: what `CandidateScorer` found of them.
            files: the output files of the evaluation.

        Returns:
            {name for tables and plots: metrics}; empty without --fuse.
        """
        for path in (files.fused, files.fused_metrics):
            path.unlink(missing_ok=True)
        if not self.enabled:
            return {}
        rankings, scores = [], []
        for result in results:
            best = fuse_scores(dict(result["model"]), dict(result["baseline"]), self.weight, self.catalogue)
            rankings.append([item for item, _ in best[: self.flags.K]])
            scores.append([score for _, score in best[: self.flags.K]])
        predictions = build_item_predictions(rows, rankings, self.catalogue, scores)
        metrics = score_item_predictions(predictions, rows, self.catalogue, self.flags.K)
        origin = {
            "fuse": self.flags.fuse,
            "fuse_weight": self.weight,
            "chosen_on": self.grid and self.flags.fuse_valid_file,
            "grid": self.grid,
        }
        write_json(files.fused, predictions, indent=None)
        write_json(files.fused_metrics, {**metrics, **origin})
        return {f"with {self.flags.fuse}, weight {self.weight:g}": metrics}


def read_likelihoods(path: str, rows: Sequence[Row], catalogue: Catalogue) -> list[dict[int, float]]:
    """{item: p} per row of a predictions file with log-probabilities; by item ids where it has them, else by SIDs.

    Raises:
        InputError: not such a file, one of other rows, or one with an item outside the catalogue.
    """
    predictions = read_json(path, "fuse")
    if not isinstance(predictions, list) or len(predictions) != len(rows):
        raise InputError(f"--fuse {path}: expected a predictions file of these {len(rows)} rows")
    likelihoods = []
    for number, (row, prediction) in enumerate(zip(rows, predictions, strict=True), 1):
        where = f"--fuse {path}, row {number}"
        target = (row.user_id, row.item_id)
        if not isinstance(prediction, dict) or (prediction.get("user_id"), prediction.get("item_id")) != target:
            raise InputError(f"{where}: expected user {row.user_id} and item {row.item_id}, as in the test file")
        names = prediction.get("predict_items", prediction.get("predict"))
        scores = prediction.get("score")
        if not isinstance(names, list) or not isinstance(scores, list) or len(scores) != len(names):
            raise InputError(f"{where}: expected a score for every recommendation")
        if any(not isinstance(score, float | int) or not score <= 1e-6 for score in scores):
            raise InputError(f"{where}: the scores must be log-probabilities, which are never above 0")
        by_item = "predict_items" in prediction
        unknown = [name for name in names if name not in (catalogue.sid_of if by_item else catalogue.items_of_sid)]
        if unknown:
            raise InputError(f"{where}: {unknown[0]} is not in the info file")
        groups = [[name] if by_item else catalogue.items_of_sid[name] for name in names]
        pairs = zip(groups, scores, strict=True)
        likelihoods.append({item: math.exp(score) for group, score in pairs for item in group})
    return likelihoods


class CandidateScorer:
    """What the fusion needs to know of the rows of a split, batch by batch.

    Args:
        model: the language model.
        encoder: its tokens.
        catalogue: the items.
        likelihoods: of the baseline, for the rows of this split.
        k: how many of its best items are candidates.
    """

    def __init__(
        self, model: PreTrainedModel, encoder: Encoder, catalogue: Catalogue, likelihoods: RowLikelihoods, k: int
    ):
        self.model, self.pad_token_id, self.likelihoods = model, encoder.pad_token_id, likelihoods
        self.catalogue, self.k = catalogue, k
        # Once: reading out a large vocabulary takes a tenth of a second.
        self.tokens_of = dict(zip(catalogue.sids, encoder.sid_ids(catalogue.sids), strict=True))

    def __call__(
        self,
        numbers: Sequence[int],
        prompts: Sequence[Sequence[int]],
        rankings: Sequence[Sequence[str]],
        scores: Sequence[Sequence[float]],
    ) -> list[dict]:
        """What `fuse_scores` needs of every row of a batch.

        Args:
            numbers: of the rows in their split.
            prompts: their token ids.
            rankings: the SIDs of their beams.
            scores: the log-probabilities of these.

        Returns:
            Per row, `model` [(SID, log-probability), ...] of the beam and of the baseline's k best items, and
            `baseline` [(item, p), ...] of the items of these SIDs.
        """
        likelihoods, sid_of = self.likelihoods(numbers), self.catalogue.sid_of
        missed = [
            sorted({sid_of[item] for item in select_likeliest(p, self.k, self.catalogue.counts)} - set(ranked))
            for p, ranked in zip(likelihoods, rankings, strict=True)
        ]
        sequences = [[self.tokens_of[sid] for sid in sids] for sids in missed]
        missed_scores = score_sids(self.model, prompts, sequences, self.pad_token_id)
        results = []
        for number, p in enumerate(likelihoods):
            sids = (*rankings[number], *missed[number])
            items = [item for sid in sids for item in self.catalogue.items_of_sid[sid]]
            results.append(
                {
                    "model": list(zip(sids, (*scores[number], *missed_scores[number]), strict=True)),
                    "baseline": [(item, float(p[item])) for item in items if item in p],
                }
            )
        return results


def score_sids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sequences: Sequence[Sequence[Sequence[int]]],
    pad_token_id: int,
) -> list[list[float]]:
    """Log-probability of every token sequence after its prompt, end token included, in one pass over prefix trees.

    Args:
        model: decoder-only HF model.
        prompts: n token-id lists.
        sequences: of each prompt, the token-id lists to score; may be empty.
        pad_token_id: fills the shorter trees.
    """
    asked = [(prompt, group) for prompt, group in zip(prompts, sequences, strict=True) if group]
    if not asked:
        return [[] for _ in prompts]
    batch = batch_trees([[(prompt, sequence) for sequence in group] for prompt, group in asked], pad_token_id)
    with torch.no_grad():
        tokens = iter(compute_tree_log_probs(model, batch.to(model.device)).tolist())
    return [[sum(next(tokens) for _ in sequence) for sequence in group] for group in sequences]


def fuse_scores(
    model: dict[str, float], baseline: dict[int, float], weight: float, catalogue: Catalogue
) -> list[tuple[int, float]]:
    """[(item, p_model + weight * p_baseline)], best first; ties by p_baseline, then training popularity, then id.

    With weight 0 the baseline's items still take part, by their p_model: the search may have missed some.

    Args:
        model: {SID: log-probability}, of the beam and of the baseline's items. Each of several items that share a SID
            has its probability.
        baseline: {item: likelihood}.
        weight: W.
        catalogue: the items, with their popularity.
    """
    counts = catalogue.counts
    p_model = {item: math.exp(score) for sid, score in model.items() for item in catalogue.items_of_sid[sid]}
    scored = [(item, p + weight * baseline.get(item, 0.0)) for item, p in p_model.items()]
    return sorted(scored, key=lambda pair: (-pair[1], -baseline.get(pair[0], 0.0), -counts.get(pair[0], 0), pair[0]))


def choose_weight(
    rows: Sequence[Row], results: Sequence[dict], catalogue: Catalogue
) -> tuple[float, dict[float, float]]:
    """(the weight of WEIGHTS with the best NDCG@10, {weight: NDCG@10}); the smaller one of equals.

    Args:
        rows: validation rows.
        results: what `CandidateScorer` found of them.
        catalogue: the items, with their popularity.
    """
    pairs = [(dict(result["model"]), dict(result["baseline"])) for result in results]
    grid = {}
    for weight in WEIGHTS:
        ranks = [
            find_rank(row.item_id, (item for item, _ in fuse_scores(*pair, weight, catalogue)))
            for row, pair in zip(rows, pairs, strict=True)
        ]
        grid[weight] = round(ndcg(ranks, 10), 6)
    return max(WEIGHTS, key=lambda weight: (grid[weight], -weight)), grid
