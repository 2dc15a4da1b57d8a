"""Baselines: recommenders without a language model that say how likely each item is after a history.

Fusion (`evaluate.py --fuse NAME`) adds them to a language model, rewards look at them, and `baselines.py --names NAME`
ranks with them. To add one, call `register_baseline` with a function that builds it, here or in a file of --plugin;
docs/examples/baseline.py is a whole one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minionerec.common.files import InputError
from minionerec.common.records import Catalogue, Row
from minionerec.common.tfidf import compute_tfidf
from minionerec.recommenders.content import HISTORIES_AT_ONCE, find_similar_items
from minionerec.recommenders.transitions import (
    count_transitions,
    fill_with_popular,
    score_transitions,
    sort_by_popularity,
)

# Histories of item ids, oldest first -> {item id: p} of the catalogue's items; items that it leaves out have p = 0.
Likelihoods = Callable[[Sequence[Sequence[int]]], list[dict[int, float]]]


@dataclass(frozen=True)
class BaselineInputs:
    """What baselines are built from.

    Attributes:
        train_rows: all rows of the train split.
        catalogue: the items, with their popularity in the train rows.
        device: where networks compute.
        files: {flag: path} of the files that baselines may need.
    """

    train_rows: Sequence[Row]
    catalogue: Catalogue
    device: str = "cpu"
    files: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """A kind of baseline: how it is built, and the flag of the file that it needs."""

    build: Callable[[BaselineInputs], Likelihoods]
    file_flag: str = ""


BASELINES: dict[str, Baseline] = {}


def register_baseline(name: str, build: Callable[[BaselineInputs], Likelihoods], file_flag: str = "") -> None:
    """Make a baseline known to --fuse and to --names of baselines.py.

    Args:
        name: of the baseline.
        build: called once with the inputs of the run; returns the function from histories of item ids, oldest first, to
            one {item id: likelihood} each. Likelihoods are 0 or more and should add up to 1.
        file_flag: the flag of the file it cannot do without: cf_path.

    Raises:
        InputError: a name that is taken.
    """
    if name in BASELINES:
        raise InputError(f"baseline {name!r} is registered already")
    BASELINES[name] = Baseline(build, file_flag)


def check_baseline_files(flag: str, names: Sequence[str], files: dict[str, str | None]) -> None:
    """Every baseline must have the file that it needs, and every file a baseline that needs it.

    Args:
        flag: the flag that chose the baselines, for the errors.
        names: the chosen ones; names that are not registered need no file.
        files: {flag: path or None}.

    Raises:
        InputError: a file that is missing or useless.
    """
    needed = {BASELINES[name].file_flag: name for name in names if name in BASELINES and BASELINES[name].file_flag}
    for file_flag, name in needed.items():
        if not files.get(file_flag):
            raise InputError(f"--{flag} {name}: needs --{file_flag}")
    for file_flag, path in files.items():
        if path and file_flag not in needed:
            users = [name for name, baseline in BASELINES.items() if baseline.file_flag == file_flag]
            raise InputError(f"--{file_flag}: has an effect with --{flag} {' or '.join(users)} only")


def build_baseline(name: str, inputs: BaselineInputs) -> Likelihoods:
    """The likelihoods of the registered baseline `name`, checked whenever they are asked for.

    Raises:
        InputError: a broken file, or one of another catalogue; later, likelihoods that are none.
    """
    predict, item_ids = BASELINES[name].build(inputs), frozenset(inputs.catalogue.item_ids)

    def predict_checked(histories: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        predictions = predict(histories)
        if len(predictions) != len(histories):
            raise InputError(f"baseline {name}: {len(predictions)} predictions for {len(histories)} histories")
        for likelihoods in predictions:
            strangers = likelihoods.keys() - item_ids
            if strangers:
                raise InputError(f"baseline {name}: {min(strangers)} is not in the info file")
            if not all(0 <= p < math.inf for p in likelihoods.values()):
                raise InputError(f"baseline {name}: the likelihoods must be finite numbers of 0 or more")
        return predictions

    return predict_checked


# -------------------------------------------------------------------------------------------------------- built-in ones
def build_transitions(train_rows: Sequence[Row], catalogue: Catalogue) -> Likelihoods:
    """Decayed transition counts of the train rows (`score_transitions`), as shares of their sum."""
    transitions, item_ids = count_transitions(train_rows), set(catalogue.item_ids)

    def predict(histories: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        shares = []
        for history in histories:
            scores = score_transitions(history, transitions)
            scores = {item: score for item, score in scores.items() if item in item_ids}
            total = sum(scores.values())
            shares.append({item: score / total for item, score in scores.items()})
        return shares

    return predict


def build_content(catalogue: Catalogue) -> Likelihoods:
    """Likeness of titles to those of the history, see `find_similar_items`."""
    texts = compute_tfidf(catalogue.titles)
    number_of = {item: number for number, item in enumerate(catalogue.item_ids)}

    def predict(histories: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        numbers, probabilities = find_similar_items(
            texts, [[number_of[item] for item in history] for history in histories]
        )
        pairs = zip(numbers.tolist(), probabilities.tolist(), strict=True)
        return [{catalogue.item_ids[number]: p for number, p in zip(*pair, strict=True) if p > 0} for pair in pairs]

    return predict


def build_sasrec(catalogue: Catalogue, cf_path: str, device: str = "cpu") -> Likelihoods:
    """The network in a model folder of sasrec.py: SASRec or GRU4Rec.

    Raises:
        InputError: no such folder, or a network of another catalogue.
    """
    from minionerec.recommenders.networks import load_network  # only here: the others need no torch

    network = load_network(cf_path).to(device)
    if set(network.item_ids) != set(catalogue.item_ids):
        raise InputError(f"--cf_path {cf_path}: its items are not those of the info file")

    def predict(histories: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        probabilities = network.score_histories(histories).exp().tolist()
        return [dict(zip(network.item_ids, row, strict=True)) for row in probabilities]

    return predict


register_baseline("transitions", lambda inputs: build_transitions(inputs.train_rows, inputs.catalogue))
register_baseline("content", lambda inputs: build_content(inputs.catalogue))
register_baseline(
    "sasrec", lambda inputs: build_sasrec(inputs.catalogue, inputs.files["cf_path"], inputs.device), "cf_path"
)


# -------------------------------------------------------------------------------------------------------------- ranking
def select_likeliest(likelihoods: dict[int, float], k: int, counts: dict[int, int]) -> list[int]:
    """The k most likely items, best first; ties by training popularity, then id."""
    return heapq.nsmallest(k, likelihoods, key=lambda item: (-likelihoods[item], -counts.get(item, 0), item))


def rank_by_likelihood(
    predict: Likelihoods, histories: Sequence[Sequence[int]], catalogue: Catalogue, k: int
) -> tuple[list[list[int]], list[list[float]]]:
    """(the k most likely items after every history, best first; their likelihoods).

    Ties fall by training popularity, then id; a list that is too short is filled up with the most popular items.
    """
    by_popularity = sort_by_popularity(catalogue)
    rankings, scores = [], []
    for start in range(0, len(histories), HISTORIES_AT_ONCE):
        for likelihoods in predict(histories[start : start + HISTORIES_AT_ONCE]):
            ranked = fill_with_popular(select_likeliest(likelihoods, k, catalogue.counts), by_popularity, k)
            # A plugin may use the numbers of another library, which JSON does not take.
            rankings.append([int(item) for item in ranked])
            scores.append([float(likelihoods.get(item, 0.0)) for item in ranked])
    return rankings, scores
