"""The unit of RL training: the prompt groups of a forward pass, and the order in which prompts make up steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.data import Sampler

from minionerec.language.examples import Example
from minionerec.search.prefix_tree import TreeBatch, batch_trees, pack_trees
from minionerec.search.shared_prompts import SharedPrompts
from minionerec.search.trie import SidTrie, pad_sequences
from minionerec.training.grpo_loss import compute_label_weights
from minionerec.training.rl_config import RLConfig
from minionerec.training.rollouts import find_legal_tokens


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


class GroupBatcher:
    """Merges groups of completions into the trees of a forward pass.

    Args:
        trie: the catalogue, on the policy's device.
        args: the configuration.
        pad_token_id: of the tokenizer.
        temperature: divides the policy's logits.

    Attributes:
        completion_tokens: the token ids of every sequence of the trie.
    """

    def __init__(self, trie: SidTrie, args: RLConfig, pad_token_id: int, temperature: float):
        self.trie, self.args, self.pad_token_id, self.temperature = trie, args, pad_token_id, temperature
        self.completion_tokens = trie.sequences()

    def build(
        self,
        examples: Sequence[Example],
        groups: Sequence[Sequence[int]],
        advantages: Sequence[torch.Tensor],
        numbers: Sequence[int],
        counts: Sequence[int],
        shared: SharedPrompts | None = None,
    ) -> GroupBatch:
        """The groups `numbers` merged into trees; labels come back group by group, completion by completion.

        Args:
            examples, groups, advantages: of the whole step.
            numbers: which of them take part.
            counts: (completions, tokens) of the step, over all processes.
            shared: the prompts of the whole step, where all take part.
        """
        device = self.trie.device
        rows = [
            [(examples[number].prompt_ids, self.completion_tokens[sequence]) for sequence in groups[number]]
            for number in numbers
        ]
        packed = pack_trees(rows, self.args.tree_tokens)
        order = [group for tree in packed for group in tree]
        tree = batch_trees([[row for group in part for row in rows[group]] for part in packed], self.pad_token_id)
        flat = [tokens for group in order for _, tokens in rows[group]]
        lengths = torch.tensor([len(tokens) for tokens in flat])
        legal = None
        if self.args.renormalize:
            matrix = torch.from_numpy(pad_sequences(flat)[0]).to(device)
            legal = find_legal_tokens(self.trie, matrix)[matrix >= 0]
        weight = compute_label_weights(lengths, self.args.loss_type, *counts, self.trie.depth)
        each = torch.cat([advantages[numbers[group]] for group in order]).repeat_interleave(lengths)
        batch = GroupBatch(tree.to(device), lengths.to(device), each.to(device), weight.to(device), legal)
        if shared is not None:
            completions = [[tokens for _, tokens in group] for group in rows]
            batch.first_pass = partial(shared.score, completions, order, legal, self.temperature)
        return batch


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
