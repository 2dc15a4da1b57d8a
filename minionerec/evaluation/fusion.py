"""A language model and baselines as one ranking: items by the weighted sum of what each of them says."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from minionerec.common.files import InputError, write_json
from minionerec.common.items import read_descriptions
from minionerec.common.processes import say
from minionerec.common.records import Catalogue, Row
from minionerec.evaluation.fusion_weights import Term, choose_weights, fuse_scores, list_terms
from minionerec.evaluation.likelihood_file import LikelihoodFile
from minionerec.evaluation.predictions import EvaluationFiles, RankedItems, write_item_predictions
from minionerec.evaluation.seen_items import find_excluded
from minionerec.evaluation.settings import EvaluateFlags, FuseFlags
from minionerec.language.prompts import Encoder
from minionerec.recommenders.likeliest import select_likeliest
from minionerec.recommenders.reasons import ReasonFinder
from minionerec.recommenders.registry import (
    BASELINES,
    SUM_SIGN,
    BaselineInputs,
    BuiltBaselines,
    check_baseline_files,
    is_baseline,
)
from minionerec.recommenders.sum_weights import choose_descriptions
from minionerec.search.legal_softmax import LegalTokens, compute_legal_log_probs, is_normalised_over_legal
from minionerec.search.prefix_tree import batch_trees, compute_tree_log_probs

# {item id: p} of the catalogue's items for rows by their numbers in a split; items that it leaves out have p = 0.
RowLikelihoods = Callable[[Sequence[int]], list[dict[int, float]]]

MODEL = "model"  # the name of the language model's term
EXPLAINED_ITEMS = 10  # of a list of evaluate.py
SMALLEST_SHARE = 0.2  # of a score, which a term must have to count as a reason


def split_names(fuse: str | None) -> list[str]:
    """The baselines and files of --fuse, in their order."""
    if not fuse:
        return []
    return [fuse] if Path(fuse).is_file() else fuse.split(",")


def name_terms(fuse: str) -> list[str]:
    """The names of all terms: the model and those of --fuse."""
    return [MODEL, *split_names(fuse)]


def resolve_weights(flags: FuseFlags) -> list[float] | None:
    """A weight for the model and for every baseline of --fuse; None where they are still to be chosen.

    Raises:
        InputError: another number of weights, or weights that are none.
    """
    names, weights = split_names(flags.fuse), flags.fuse_weight
    if weights is None:
        return None
    text = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) not in (len(names), len(names) + 1):
        raise InputError(
            f"--fuse_weight {text}: expected {len(names)}, one for every baseline of --fuse {flags.fuse}, or "
            f"{len(names) + 1}, that of the model first"
        )
    weights = [*weights] if len(weights) > len(names) else [1.0, *weights]
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise InputError(f"--fuse_weight {text}: must be 0 or more, and finite, and not all 0")
    return weights


def check_fuse_names(flags: FuseFlags, has_rows: bool, *, files: bool) -> None:
    """What --fuse names must exist and have the files that it needs. Plugins are loaded before.

    Args:
        flags: of the fusion.
        has_rows: there is something to build the baselines from.
        files: predictions files are allowed too.

    Raises:
        InputError: the first that does not.
    """
    names = split_names(flags.fuse)
    for name in names:
        if not is_baseline(name) and not (files and Path(name).is_file()):
            expected = f"one of {', '.join(BASELINES)}, or a sum of some" + (", or a predictions file" if files else "")
            raise InputError(f"--fuse {name}: expected {expected}")
        if names.count(name) > 1:
            raise InputError(f"--fuse {flags.fuse}: {name} is given twice")
    registered = [name for name in names if is_baseline(name)]
    if registered and not has_rows:
        raise InputError(f"--fuse {registered[0]}: needs --train_file")
    check_baseline_files("fuse", registered, {"cf_path": flags.cf_path})
    if flags.item_meta_path and not any("content" in name.split(SUM_SIGN) for name in registered):
        raise InputError("--item_meta_path: has an effect with --fuse content only")
    resolve_weights(flags)


def check_fusion_flags(flags: EvaluateFlags) -> None:
    """The flags of the fusion must fit each other, the search and the splits. Plugins are loaded before.

    Raises:
        InputError: the first that does not.
    """
    if flags.fuse_valid_sample != -1 and (flags.fuse_valid_file is None or flags.fuse_valid_sample < 1):
        raise InputError(f"--fuse_valid_sample {flags.fuse_valid_sample}: expected at least 1, with --fuse_valid_file")
    if flags.fuse is None:
        for name in ("fuse_weight", "fuse_valid_file", "cf_path", "item_meta_path"):
            if getattr(flags, name) is not None:
                raise InputError(f"--{name}: has an effect with --fuse only")
        return
    check_fuse_names(flags, bool(flags.train_file), files=True)
    if flags.length_penalty or flags.renormalize or flags.only_items:
        raise InputError("--fuse: adds probabilities, so it goes without --length_penalty, --renormalize, --only_items")
    if (flags.fuse_weight is None) == (flags.fuse_valid_file is None):
        raise InputError("--fuse: expected either --fuse_weight or --fuse_valid_file to choose it on")
    if flags.fuse_weight is None and not all(map(is_baseline, split_names(flags.fuse))):
        raise InputError(f"--fuse {flags.fuse}: a file has no validation rows; give --fuse_weight")
    for name in ("test_data_path", "train_file"):
        path = getattr(flags, name)
        if flags.fuse_valid_file and path and Path(flags.fuse_valid_file).resolve() == Path(path).resolve():
            raise InputError(f"--fuse_valid_file {path}: is --{name}; choose the weight on the validation split")


def read_baseline_inputs(
    flags: FuseFlags, info_file: str, catalogue: Catalogue, train_rows: Sequence[Row], valid_rows: Sequence[Row] = ()
) -> BaselineInputs:
    """What the baselines of --fuse are built from; descriptions unless validation rows speak against them."""
    inputs = BaselineInputs(train_rows, catalogue, files={"cf_path": flags.cf_path})
    if flags.fuse and flags.item_meta_path:
        descriptions = read_descriptions(flags.item_meta_path, catalogue.item_ids, info_file)
        inputs = replace(inputs, descriptions=descriptions)
        if valid_rows:
            inputs, tried = choose_descriptions(inputs, valid_rows)
            say(f"[fuse] content: HR@10 + NDCG@10 on {len(valid_rows):,} validation rows by texts: {tried}")
    return inputs


class Explainer:
    """Why the items of a fused list are there, from the terms that carried them.

    Args:
        built: the baselines of the run.
        names: of the terms, the model first.
        weights: of the terms.
    """

    def __init__(self, built: BuiltBaselines, names: Sequence[str], weights: Sequence[float]):
        self._finder, self.names, self.weights = ReasonFinder(built), names, weights

    def measure_shares(
        self, terms: Sequence[Term], item: int, weights: Sequence[float] | None = None
    ) -> dict[int, float]:
        """{number of a term: its share of the item's score}, largest first, of those with SMALLEST_SHARE or more."""
        weights = self.weights if weights is None else weights
        parts = [weight * term.get(item, 0.0) for weight, term in zip(weights, terms, strict=True)]
        total = sum(parts) or 1.0
        order = sorted(range(len(parts)), key=lambda number: -parts[number])
        return {number: parts[number] / total for number in order if parts[number] / total >= SMALLEST_SHARE}

    def explain(
        self,
        history: Sequence[int],
        terms: Sequence[Term],
        items: Sequence[int],
        weights: Sequence[float] | None = None,
    ) -> list[str]:
        """A text for every item, such as `bought after X (62 %), like Y (30 %)`; shares are those of the score.

        Args:
            history: item ids, oldest first.
            terms: of `list_terms`.
            items: of the fused list.
            weights: of the terms, where they are others than usual.
        """
        shares = {item: self.measure_shares(terms, item, weights) for item in items}
        words: dict[tuple[int, int], str] = {}
        for number, name in enumerate(self.names):
            carried = [item for item in items if number in shares[item]]
            texts = self._finder.explain(name, history, carried) if number else [MODEL] * len(carried)
            words |= {(number, item): text for item, text in zip(carried, texts, strict=True)}
        return [
            ", ".join(f"{words[number, item]} ({100 * share:.0f} %)" for number, share in shares[item].items())
            for item in items
        ]


class Fusion:
    """What --fuse adds to an evaluation; nothing where it is not given.

    Args:
        flags: of the evaluation, resolved.
        inputs: what the baselines are built from.

    Attributes:
        enabled: whether --fuse is given.
        weights: of the model and the baselines; None until they are chosen.
        tried: {weights as text: HR@10 + NDCG@10} they were chosen from, or None.

    Raises:
        InputError: a baseline that cannot be built.
    """

    def __init__(self, flags: EvaluateFlags, inputs: BaselineInputs):
        self.flags, self.catalogue = flags, inputs.catalogue
        self.enabled = flags.fuse is not None
        self.names = split_names(flags.fuse)
        self.weights = resolve_weights(flags)
        self.tried: dict[str, float] | None = None
        self._built = BuiltBaselines(inputs)
        self._predict = {name: self._built.combine(name) for name in self.names if is_baseline(name)}

    @property
    def lacks_weights(self) -> bool:
        """Whether the weights must still be chosen on the validation rows."""
        return self.enabled and self.weights is None

    def build_scorer(self, rows: Sequence[Row], model: PreTrainedModel, encoder: Encoder) -> CandidateScorer | None:
        """What the search of a split is to find out for the fusion, batch by batch; None without --fuse."""
        if not self.enabled:
            return None

        def predict_rows(name: str) -> RowLikelihoods:
            if name not in self._predict:
                return LikelihoodFile(name, rows, self.catalogue).read
            return lambda numbers: self._predict[name]([rows[number].history_ids for number in numbers])

        def predict_unseen(name: str) -> RowLikelihoods:
            """Without what the search may not find either."""
            predict, sid_of = predict_rows(name), self.catalogue.sid_of

            def leave_out(number: int, likelihoods: dict[int, float]) -> dict[int, float]:
                excluded = set(find_excluded(rows[number].history_sids, self.flags.repeat_newest))
                return {item: p for item, p in likelihoods.items() if sid_of[item] not in excluded}

            return lambda numbers: list(map(leave_out, numbers, predict(numbers)))

        predict = predict_unseen if self.flags.exclude_seen else predict_rows
        return CandidateScorer(model, encoder, self.catalogue, list(map(predict, self.names)), self.flags.K)

    def choose_weights(self, rows: Sequence[Row], results: Collection[dict]) -> None:
        """Choose the weights on validation rows and what `CandidateScorer` found of them."""
        self.weights, self.tried = choose_weights(rows, results, self.catalogue)
        chosen = self._name_weights()
        best = max(self.tried.values())
        say(
            f"[evaluate] --fuse {self.flags.fuse}: HR@10 + NDCG@10 on {len(rows):,} validation rows is {best} with "
            f"{chosen}, the best of {len(self.tried)} choices"
        )

    def _name_weights(self) -> dict[str, float]:
        return dict(zip(name_terms(self.flags.fuse), self.weights, strict=True))

    def write(self, rows: Sequence[Row], results: Collection[dict], files: EvaluationFiles) -> dict[str, dict]:
        """Write the fused lists with reasons for their first items and their metrics; remove those of an earlier run.

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
        explainer = Explainer(self._built, name_terms(self.flags.fuse), self.weights)

        def rank() -> Iterator[RankedItems]:
            for row, result in zip(rows, results, strict=True):
                terms = list_terms(result, self.catalogue)
                best = fuse_scores(terms, self.weights, self.catalogue)[: self.flags.K]
                items = [item for item, _ in best]
                reasons = explainer.explain(row.history_ids, terms, items[:EXPLAINED_ITEMS])
                yield RankedItems(items, [score for _, score in best], reasons)

        metrics = write_item_predictions(files.fused, rows, rank(), self.catalogue, self.flags.K)
        origin = {
            "fuse": self.flags.fuse,
            "weights": self._name_weights(),
            "chosen_on": self.tried and self.flags.fuse_valid_file,
            "tried": self.tried,
        }
        write_json(files.fused_metrics, {**metrics, **origin})
        shown = ":".join(f"{weight:g}" for weight in self.weights)
        return {f"with {self.flags.fuse}, weights {shown}": metrics}


class CandidateScorer:
    """What the fusion needs to know of the rows of a split, batch by batch.

    Args:
        model: the language model.
        encoder: its tokens.
        catalogue: the items.
        likelihoods: of every baseline, for the rows of this split.
        k: how many of the best items of each are candidates.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        catalogue: Catalogue,
        likelihoods: Sequence[RowLikelihoods],
        k: int,
    ):
        self.model, self.pad_token_id, self.likelihoods = model, encoder.pad_token_id, likelihoods
        self.catalogue, self.k = catalogue, k
        # Once: reading out a large vocabulary takes a tenth of a second.
        self.tokens_of = dict(zip(catalogue.sids, encoder.sid_ids(catalogue.sids), strict=True))
        self.legal = LegalTokens(list(self.tokens_of.values())) if is_normalised_over_legal(model) else None

    def __call__(
        self,
        numbers: Sequence[int],
        prompts: Sequence[Sequence[int]],
        rankings: Sequence[Sequence[str]],
        scores: Sequence[Sequence[float]],
    ) -> list[dict]:
        """What the fusion needs of every row of a batch, see `list_terms`.

        Args:
            numbers: of the rows in their split.
            prompts: their token ids.
            rankings: the SIDs of their beams.
            scores: the log-probabilities of these.

        Returns:
            Per row, `model` [(SID, log-probability), ...] of the beam and of the k best items of every baseline, and
            `baselines`, of each [(item, p), ...] of the items of these SIDs.
        """
        by_baseline = [predict(numbers) for predict in self.likelihoods]
        sid_of, items_of_sid, counts = self.catalogue.sid_of, self.catalogue.items_of_sid, self.catalogue.counts
        missed = []
        for ranked, *of_row in zip(rankings, *by_baseline, strict=True):
            wanted = {sid_of[item] for p in of_row for item in select_likeliest(p, self.k, counts)}
            missed.append(sorted(wanted - set(ranked)))
        sequences = [[self.tokens_of[sid] for sid in sids] for sids in missed]
        missed_scores = score_sids(self.model, prompts, sequences, self.pad_token_id, self.legal)
        results = []
        for row, of_row in enumerate(zip(*by_baseline, strict=True)):
            sids = (*rankings[row], *missed[row])
            items = [item for sid in sids for item in items_of_sid[sid]]
            results.append(
                {
                    "model": list(zip(sids, (*scores[row], *missed_scores[row]), strict=True)),
                    "baselines": [[(item, float(p[item])) for item in items if item in p] for p in of_row],
                }
            )
        return results


def score_sids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sequences: Sequence[Sequence[Sequence[int]]],
    pad_token_id: int,
    legal: LegalTokens | None = None,
) -> list[list[float]]:
    """Log-probability of every token sequence after its prompt, end token included, in one pass over prefix trees.

    Args:
        model: decoder-only HF model.
        prompts: n token-id lists.
        sequences: of each prompt, the token-id lists to score; may be empty.
        pad_token_id: fills the shorter trees.
        legal: what the model's probabilities are over; None is the vocabulary.
    """
    asked = [(prompt, group) for prompt, group in zip(prompts, sequences, strict=True) if group]
    if not asked:
        return [[] for _ in prompts]
    rows = [[(prompt, sequence, None) for sequence in group] for prompt, group in asked]
    if legal is not None:
        rows = [[legal.make_row(*row) for row in group] for group in rows]
    batch = batch_trees(rows, pad_token_id).to(model.device)
    with torch.no_grad():
        scores = compute_tree_log_probs(model, batch) if legal is None else compute_legal_log_probs(model, batch, legal)
    labels = iter(scores.tolist())
    counts = iter([len(target) if soft is None else len(soft.level) for group in rows for _, target, soft in group])
    return [[sum(next(labels) for _ in range(next(counts))) for _ in group] for group in sequences]
