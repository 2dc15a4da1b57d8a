"""Rewards of a group of completions: one number per completion, from the row's own target.

The plain ones are pure functions `(completions, target) -> numbers`: `completions` are the SIDs a prompt produced, in rank
order for beam rollouts; `target` is the SID of the prompt's own row. `make_rewards` turns names with weights into what the
trainer calls: functions `(completions, example) -> numbers`, where `example` (data.Example) also has the row's item_id,
history_ids and user_id. A group's reward is the weighted sum.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minionerec.common.embeddings import load_embeddings
from minionerec.common.files import InputError
from minionerec.common.records import SID_TOKEN, Catalogue, Row, group_items_by_sid
from minionerec.language.examples import Example
from minionerec.recommenders import registry as partners
from minionerec.recommenders.transitions import count_transitions, score_transitions

PlainReward = Callable[[Sequence[str], str], list[float]]


GroupReward = Callable[[Sequence[str], Example], list[float]]


def rule(completions: Sequence[str], target: str) -> list[float]:
    """1 for the target, else 0."""
    return [float(completion == target) for completion in completions]


def ranking_only(completions: Sequence[str], target: str) -> list[float]:
    """The rank penalty alone: 0 for the target; a miss at rank i (from 1) gets -w_i / sum(w), w_i = 1 / log2(i + 1).

    The better a wrong item is ranked, the more it costs; the weights are normalised over all places of the group. A group
    without the target gets no penalty at all, since there is nothing to prefer. Method: arXiv 2510.24431.
    """
    if target not in completions:
        return [0.0] * len(completions)
    weights = [1 / math.log2(place + 1) for place in range(1, len(completions) + 1)]
    total = sum(weights)
    return [0.0 if completion == target else -weight / total for completion, weight in zip(completions, weights)]


def ranking(completions: Sequence[str], target: str) -> list[float]:
    """`rule` plus the rank penalty of `ranking_only`."""
    return [hit + penalty for hit, penalty in zip(rule(completions, target), ranking_only(completions, target))]


def prefix(completions: Sequence[str], target: str) -> list[float]:
    """Tokens that completion and target begin with alike / tokens of the target: 1 for the target, dense below.

    Groups without the target then still say which wrong items are nearer to it.
    """
    wanted = SID_TOKEN.findall(target)
    shares = []
    for completion in completions:
        shared = 0
        for ours, theirs in zip(SID_TOKEN.findall(completion), wanted):
            if ours != theirs:
                break
            shared += 1
        shares.append(shared / len(wanted))
    return shares


REWARDS: dict[str, PlainReward] = {
    "rule": rule,
    "ranking": ranking,
    "ranking_only": ranking_only,
    "prefix": prefix,
}


def build_semantic_reward(catalogue: Catalogue, vectors: dict[int, np.ndarray]) -> GroupReward:
    """Cosine between the embeddings of the completion's item and of the row's target item; vectors go by item id.

    A SID that several items share counts as the mean of their unit vectors; a zero vector is like nothing.
    """
    unit = {item: vector / max(float(np.linalg.norm(vector)), 1e-12) for item, vector in vectors.items()}
    of_sid = {
        sid: np.mean([unit[item] for item in items], axis=0)
        for sid, items in group_items_by_sid(catalogue.sids, catalogue.item_ids, {}).items()
    }
    of_sid = {sid: mean / max(float(np.linalg.norm(mean)), 1e-12) for sid, mean in of_sid.items()}

    def semantic(completions: Sequence[str], example: Example) -> list[float]:
        target = unit[example.item_id]
        return [float(of_sid[completion] @ target) for completion in completions]

    return semantic


def build_likelihood_reward(catalogue: Catalogue, after: Callable[[Example], dict[int, float]]) -> GroupReward:
    """p(item | history) / p(likeliest item | history) of a second recommender: 1 for its favourite, 0 for what it rules out.

    Args:
        after: what it holds likely for a row, by item id; all zeros or empty where it knows nothing. A SID that several
            items share counts as the likeliest of them. A prompt without a history (title2sid) gets 0 for everything.
    """
    items = group_items_by_sid(catalogue.sids, catalogue.item_ids, {})

    def likelihood(completions: Sequence[str], example: Example) -> list[float]:
        if not example.history_ids:
            return [0.0] * len(completions)
        found = after(example)
        highest = max(found.values(), default=0.0) or 1.0
        return [max(found.get(item, 0.0) for item in items[completion]) / highest for completion in completions]

    return likelihood


def build_transitions_reward(train: Sequence[Row], catalogue: Catalogue) -> GroupReward:
    """`likelihood_reward` of decayed transition counts, without the row's own transition: what other rows say of it.

    With it, every target would be its own evidence, which it never is for a new row.
    """
    follows = count_transitions(train)

    def after(example: Example) -> dict[int, float]:
        history = example.history_ids
        scores = score_transitions(history, follows)
        if scores.get(example.item_id):
            own = sum(0.5**age for age, item in enumerate(reversed(history)) if item == history[-1])
            scores[example.item_id] = max(0.0, scores[example.item_id] - own)
        return scores

    return build_likelihood_reward(catalogue, after)


def load_module_reward(place: str) -> GroupReward:
    """The function `name` of a user's file, written path.py:name; it is called as (completions, example).

    Raises:
        InputError: no such file, a file that does not load, or one without that function.
    """
    path, colon, name = place.rpartition(":")
    if not colon or not path.endswith(".py") or not Path(path).is_file():
        raise InputError(f"--reward_module {place}: expected FILE.py:FUNCTION with a file that exists")
    spec = importlib.util.spec_from_file_location(f"reward_module_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file may raise
        raise InputError(f"--reward_module {path}: does not load ({error!r})") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--reward_module {path}: has no function {name!r}")
    return function


@dataclass(frozen=True)
class NamedReward:
    """One term of the reward: weight * function(completions, example)."""

    name: str
    weight: float
    function: GroupReward

    def __call__(self, completions: Sequence[str], example: Example) -> list[float]:
        """The term without its weight, checked.

        Raises:
            InputError: not one finite number per completion.
        """
        try:
            values = [float(value) for value in self.function(completions, example)]
        except InputError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise InputError(f"reward {self.name}: expected a list of numbers, got {error!r}") from None
        if len(values) != len(completions):
            raise InputError(f"reward {self.name}: {len(values)} numbers for {len(completions)} completions")
        if not all(map(math.isfinite, values)):
            wrong = next(place for place, value in enumerate(values) if not math.isfinite(value))
            raise InputError(f"reward {self.name}: {values[wrong]} for {completions[wrong]}, target {example.sid}")
        return values


# Rewards that are no plain functions, and the flag of the file that each needs.
NEEDS = {"semantic": "ada_path", "content": "", "transitions": "", "sasrec": "cf_path", "module": "reward_module"}


def build_rewards(
    terms: Sequence[str], catalogue: Catalogue, train: Sequence[Row], device: str = "cpu", **files: str | None
) -> list[NamedReward]:
    """The terms of --reward_type: names, each with a weight after a colon if it is not 1.

    Args:
        terms: of REWARDS, or semantic (item embeddings, ada_path), content (likeness of titles to the history's),
            transitions (counts in the train rows), sasrec (a model folder of sasrec.py, cf_path), module (reward_module).
        files: those three, by flag; each that is given must have a term that needs it.

    Raises:
        InputError: an unknown or repeated name, a weight that is no number, a term without its file or the other way
            round, embeddings or a recommender of another catalogue.
    """
    known = [*REWARDS, *NEEDS]
    found: list[NamedReward] = []
    for term in terms:
        name, colon, text = term.partition(":")
        if name not in known:
            raise InputError(f"--reward_type {name}: expected one of {', '.join(known)}")
        if any(name == other.name for other in found):
            raise InputError(f"--reward_type: {name} stands there twice; write {name}:2 to weigh it")
        try:
            weight = float(text) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight) or not weight:
            raise InputError(f"--reward_type {term}: expected NAME or NAME:WEIGHT, such as {name}:0.5")
        if NEEDS.get(name) and not files.get(NEEDS[name]):
            raise InputError(f"--reward_type {name}: needs --{NEEDS[name]}")
        if name in REWARDS:
            plain = REWARDS[name]
            function: GroupReward = lambda completions, example, plain=plain: plain(completions, example.sid)
        elif name == "semantic":
            function = build_semantic_reward(catalogue, _read_vectors(files["ada_path"], catalogue))
        elif name == "transitions":
            function = build_transitions_reward(train, catalogue)
        elif name in ("content", "sasrec"):
            after = (
                partners.content(catalogue)
                if name == "content"
                else partners.sasrec(catalogue, files["cf_path"], device)
            )
            function = build_likelihood_reward(catalogue, lambda example, after=after: after([example.history_ids])[0])
        else:
            function = load_module_reward(files["reward_module"])
        found.append(NamedReward(name, weight, function))
    if not found:
        raise InputError(f"--reward_type: name a reward: {', '.join(known)}")
    for name, flag in NEEDS.items():
        if flag and files.get(flag) and not any(name == term.name for term in found):
            raise InputError(f"--{flag}: has an effect with --reward_type {name} only")
    return found


def _read_vectors(path: str, catalogue: Catalogue) -> dict[int, np.ndarray]:
    array, item_ids = load_embeddings(path, "ada_path")
    vectors = dict(zip(item_ids, array))
    missing = [item for item in catalogue.item_ids if str(item) not in vectors]
    if missing:
        raise InputError(f"{path}: has no row for item {missing[0]} of the info file")
    return {item: vectors[str(item)] for item in catalogue.item_ids}
