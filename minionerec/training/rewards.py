"""Rewards of a group of completions: one number per completion, from the row's own target.

The plain ones are pure functions `(completions, target) -> numbers`: `completions` are the SIDs a prompt produced, in
rank order for beam rollouts; `target` is the SID of the prompt's own row. The others also look at the row's item ids.
What the trainer calls are functions `(completions, example) -> numbers`; a group's reward is their weighted sum.

To add a reward, call `register_reward` with a function that builds it, here or in a file of --plugin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minionerec.common.embeddings import read_item_vectors
from minionerec.common.files import InputError
from minionerec.common.plugins import load_module
from minionerec.common.records import SID_TOKEN, Catalogue, Row
from minionerec.common.weights import parse_weighted_names
from minionerec.language.examples import Example
from minionerec.recommenders.registry import build_content, build_sasrec
from minionerec.recommenders.transitions import count_transitions, score_transitions

PlainReward = Callable[[Sequence[str], str], list[float]]
GroupReward = Callable[[Sequence[str], Example], list[float]]
DEFAULT_REWARDS = ("rule:0.5", "content", "transitions")


@dataclass(frozen=True)
class RewardInputs:
    """What rewards are built from.

    Attributes:
        catalogue: the items. train_rows: all rows of the train split.
        device: where networks compute.
        files: {flag: path} of the files that rewards may need.
    """

    catalogue: Catalogue
    train_rows: Sequence[Row]
    device: str
    files: dict[str, str | None]


@dataclass(frozen=True)
class Reward:
    """A kind of reward: how it is built, the flag of the file it needs, and whether it looks at item ids."""

    build: Callable[[RewardInputs], GroupReward]
    file_flag: str = ""
    uses_items: bool = True


REWARDS: dict[str, Reward] = {}


def register_reward(
    name: str, build: Callable[[RewardInputs], GroupReward], file_flag: str = "", uses_items: bool = True
) -> None:
    """Make a reward known to --reward_type.

    Args:
        name: of the reward.
        build: called once with the inputs of the run; returns the function `(completions, example) -> numbers`.
        file_flag: the flag of the file it cannot do without: ada_path, cf_path or reward_module.
        uses_items: whether it looks at the row's item ids, which must then be in the catalogue.

    Raises:
        InputError: a name that is taken.
    """
    if name in REWARDS:
        raise InputError(f"reward {name!r} is registered already")
    REWARDS[name] = Reward(build, file_flag, uses_items)


# ------------------------------------------------------------------------------------------------------ rewards by SIDs
def rule(completions: Sequence[str], target: str) -> list[float]:
    """1 for the target, else 0."""
    return [float(completion == target) for completion in completions]


def ranking_only(completions: Sequence[str], target: str) -> list[float]:
    """The rank penalty alone: 0 for the target; a miss at rank i (from 1) gets -w_i / sum(w), w_i = 1 / log2(i + 1).

    The better a wrong item is ranked, the more it costs; the weights are normalised over all ranks of the group. A
    group without the target gets no penalty at all, since there is nothing to prefer. Method: arXiv 2510.24431.
    """
    if target not in completions:
        return [0.0] * len(completions)
    weights = [1 / math.log2(rank + 1) for rank in range(1, len(completions) + 1)]
    total = sum(weights)
    pairs = zip(completions, weights, strict=True)
    return [0.0 if completion == target else -weight / total for completion, weight in pairs]


def ranking(completions: Sequence[str], target: str) -> list[float]:
    """`rule` plus the rank penalty of `ranking_only`."""
    penalties = ranking_only(completions, target)
    return [hit + penalty for hit, penalty in zip(rule(completions, target), penalties, strict=True)]


def prefix(completions: Sequence[str], target: str) -> list[float]:
    """Tokens that completion and target begin with alike / tokens of the target: 1 for the target, dense below.

    Groups without the target then still say which wrong items are nearer to it.
    """
    target_tokens = SID_TOKEN.findall(target)
    shares = []
    for completion in completions:
        shared = 0
        for token, wanted in zip(SID_TOKEN.findall(completion), target_tokens, strict=False):
            if token != wanted:
                break
            shared += 1
        shares.append(shared / len(target_tokens))
    return shares


PLAIN_REWARDS: dict[str, PlainReward] = {
    "rule": rule,
    "ranking": ranking,
    "ranking_only": ranking_only,
    "prefix": prefix,
}


def _build_plain(plain: PlainReward) -> Callable[[RewardInputs], GroupReward]:
    return lambda inputs: lambda completions, example: plain(completions, example.sid)


for _name, _plain in PLAIN_REWARDS.items():
    register_reward(_name, _build_plain(_plain), uses_items=False)


# ----------------------------------------------------------------------------------------------------- rewards by items
def build_semantic_reward(catalogue: Catalogue, vectors: dict[int, np.ndarray]) -> GroupReward:
    """Cosine between the embeddings of the completion's item and of the row's target item.

    A SID that several items share counts as the mean of their unit vectors; a zero vector is like nothing.

    Args:
        catalogue: the items.
        vectors: {item id: embedding [dim]}.
    """
    unit = {item: vector / max(float(np.linalg.norm(vector)), 1e-12) for item, vector in vectors.items()}
    means = {sid: np.mean([unit[item] for item in items], axis=0) for sid, items in catalogue.items_of_sid.items()}
    unit_of_sid = {sid: mean / max(float(np.linalg.norm(mean)), 1e-12) for sid, mean in means.items()}

    def semantic(completions: Sequence[str], example: Example) -> list[float]:
        target = unit[example.item_id]
        return [float(unit_of_sid[completion] @ target) for completion in completions]

    return semantic


def build_likelihood_reward(catalogue: Catalogue, predict: Callable[[Example], dict[int, float]]) -> GroupReward:
    """p(item | history) / p(likeliest item | history) of a baseline: 1 for its favourite, 0 for what it rules out.

    A SID that several items share counts as the likeliest of them. A prompt without a history (title2sid) gets 0 for
    everything.

    Args:
        catalogue: the items.
        predict: {item id: likelihood} after the history of a row; empty where the baseline knows nothing.
    """
    items_of_sid = catalogue.items_of_sid

    def likelihood(completions: Sequence[str], example: Example) -> list[float]:
        if not example.history_ids:
            return [0.0] * len(completions)
        scores = predict(example)
        highest = max(scores.values(), default=0.0) or 1.0
        return [max(scores.get(item, 0.0) for item in items_of_sid[completion]) / highest for completion in completions]

    return likelihood


def build_transitions_reward(train_rows: Sequence[Row], catalogue: Catalogue) -> GroupReward:
    """`build_likelihood_reward` of decayed transition counts, without the row's own transition.

    With it, every target would be its own evidence, which it never is for a new row.
    """
    transitions = count_transitions(train_rows)

    def predict(example: Example) -> dict[int, float]:
        history = example.history_ids
        scores = score_transitions(history, transitions)
        if scores.get(example.item_id):
            share = sum(0.5**age for age, item in enumerate(reversed(history)) if item == history[-1])
            scores[example.item_id] = max(0.0, scores[example.item_id] - share)
        return scores

    return build_likelihood_reward(catalogue, predict)


def load_module_reward(location: str) -> GroupReward:
    """The function `name` of a user's file, written path.py:name; it is called as (completions, example).

    Raises:
        InputError: no such file, a file that does not load, or one without that function.
    """
    path, colon, name = location.rpartition(":")
    if not colon or not path.endswith(".py") or not Path(path).is_file():
        raise InputError(f"--reward_module {location}: expected FILE.py:FUNCTION with a file that exists")
    function = getattr(load_module(path, "reward_module"), name, None)
    if not callable(function):
        raise InputError(f"--reward_module {path}: has no function {name!r}")
    return function


def _build_semantic(inputs: RewardInputs) -> GroupReward:
    vectors = read_item_vectors(inputs.files["ada_path"], inputs.catalogue, "ada_path")
    return build_semantic_reward(inputs.catalogue, dict(zip(inputs.catalogue.item_ids, vectors, strict=True)))


def _build_content(inputs: RewardInputs) -> GroupReward:
    predict = build_content(inputs.catalogue)
    return build_likelihood_reward(inputs.catalogue, lambda example: predict([example.history_ids])[0])


def _build_sasrec(inputs: RewardInputs) -> GroupReward:
    predict = build_sasrec(inputs.catalogue, inputs.files["cf_path"], inputs.device)
    return build_likelihood_reward(inputs.catalogue, lambda example: predict([example.history_ids])[0])


register_reward("semantic", _build_semantic, "ada_path")
register_reward("content", _build_content)
register_reward("transitions", lambda inputs: build_transitions_reward(inputs.train_rows, inputs.catalogue))
register_reward("sasrec", _build_sasrec, "cf_path")
register_reward("module", lambda inputs: load_module_reward(inputs.files["reward_module"]), "reward_module")


# --------------------------------------------------------------------------------------------------- the terms of a run
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
            wrong = next(number for number, value in enumerate(values) if not math.isfinite(value))
            raise InputError(f"reward {self.name}: {values[wrong]} for {completions[wrong]}, target {example.sid}")
        return values


def build_rewards(entries: Sequence[str], inputs: RewardInputs) -> list[NamedReward]:
    """The terms of --reward_type: names of REWARDS, each with a weight after a colon if it is not 1.

    Args:
        entries: such as ["ranking", "prefix:0.5"].
        inputs: what they are built from; each of its files that is given must have a term that needs it.

    Raises:
        InputError: an unknown or repeated name, a weight that is no number, a term without its file or the other way
            round, embeddings or a network of another catalogue.
    """
    weights = parse_weighted_names("reward_type", entries, REWARDS, positive=False)
    for name in weights:
        needed = REWARDS[name].file_flag
        if needed and not inputs.files.get(needed):
            raise InputError(f"--reward_type {name}: needs --{needed}")
    for name, path in inputs.files.items():
        users = [reward for reward, kind in REWARDS.items() if kind.file_flag == name]
        if path and not any(reward in weights for reward in users):
            raise InputError(f"--{name}: has an effect with --reward_type {' or '.join(users)} only")
    return [NamedReward(name, weight, REWARDS[name].build(inputs)) for name, weight in weights.items()]
