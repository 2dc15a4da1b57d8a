"""The unit of RL training: the prompt groups of a forward pass, and the order in which prompts make up steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from minionerec.search.prefix_tree import TreeBatch


@dataclass
class GroupBatch:
    """The groups of one forward pass. C completions with K tokens together; labels are completion by completion.

    Attributes:
        tree: the prompts with their completions; None where no group takes part.
        lengths [C] int64: tokens of each completion.
        advantages, weight [K] float32: of each label; weight is what it counts in the mean over the step.
        legal [K, F]: tokens that may stand at each label, or None for the full vocabulary.
        old, reference [K]: log-probabilities of the rollout's policy and of the reference, once they are computed.
        first_pass: gives the policy's log-probabilities and entropies [K] once, where the rollout has computed the
            prompts already.
    """

    tree: TreeBatch | None
    lengths: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    legal: torch.Tensor | None = None
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    first_pass: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None


class StepSampler(Sampler[int]):
    """Random order, anew every epoch, in which the prompts of a step come `repeats` times: once for each of its
    updates.

    The last step of an epoch is filled up from the beginning of the same order, so that every step is whole and its
    prompts do not depend on how many processes share it.

    Args:
        size: prompts of the training set.
        step: prompts of a step over all processes.
        repeats: updates per rollout.
        seed: of the order.
        epoch: called for the number of the epoch; the order is a function of it and the seed.
    """

    def __init__(self, size: int, step: int, repeats: int, seed: int, epoch: Callable[[], int]):
        self.size, self.step, self.repeats, self.seed, self.epoch = size, step, repeats, seed, epoch
        self.steps = -(-size // step)

    def __len__(self) -> int:
        return self.steps * self.step * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        order = torch.randperm(self.size, generator=generator)
        for step in range(self.steps):
            prompts = order[torch.arange(step * self.step, (step + 1) * self.step) % self.size].tolist()
            for _ in range(self.repeats):
                yield from prompts
