"""Prompts computed once with gradient: a search reads their keys and values, and the training pass continues from them.

A policy's rollout and the first update on it see the same weights, so that the prompts of both are one computation:
what is found behind them is all that the update has left to compute.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from minionerec.search.label_scores import score_labels
from minionerec.search.output_head import OutputHead
from minionerec.search.prefill import PrefilledPrompts
from minionerec.search.prefix_tree import (
    batch_trees,
    build_attention_mask,
    build_prefix_tree,
    build_tree_mask,
    fill_trees,
    restrict_logits,
)


class SharedPrompts:
    """n prompts, packed into R prefix trees of at most P tokens and computed with gradient.

    Args:
        model: a decoder-only model with full attention (sdpa or eager) and neither dropout nor gradient checkpointing.
        prompts: n token-id lists.
        tree_tokens: tokens of a tree with its completions, about.
        pad_token_id: fills the shorter trees.
        completion_tokens: of all completions of a prompt, about.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        tree_tokens: int,
        pad_token_id: int,
        completion_tokens: int,
    ):
        self.model, self.prompts, self.pad_token_id = model, prompts, pad_token_id
        head = len(os.path.commonprefix(list(prompts)))
        self._packed = fill_trees([len(prompt) - head + 1 + completion_tokens for prompt in prompts], tree_tokens)
        rows = [[(prompt, [pad_token_id])] for prompt in prompts]  # the label only says whose logits are wanted
        tree = batch_trees([[rows[number][0] for number in part] for part in self._packed], pad_token_id)
        order = [number for part in self._packed for number in part]
        length, last = tree.input_ids.shape[1], tree.node[tree.label_row]
        row, index = last // length, last % length
        slots = torch.arange(length)
        self._row, self._logit_row = torch.empty(len(prompts), dtype=torch.long), torch.empty_like(last)
        self._row[order], self._logit_row[order] = row, tree.label_row
        # [n, P] bool: a prompt's nodes are its last one and the ancestors of that.
        self._is_own = torch.empty(len(prompts), length, dtype=torch.bool)
        self._is_own[order] = (slots <= index[:, None]) & (index[:, None] < tree.end[row])
        tree, self._cache = tree.to(model.device), DynamicCache()
        with restrict_logits(model, tree.node) as read:
            logits = model(
                input_ids=tree.input_ids,
                position_ids=tree.position_ids,
                attention_mask=build_attention_mask(model, build_tree_mask(tree.end)),
                past_key_values=self._cache,
                use_cache=True,
            ).logits
        # The training pass computes these few logits again, so that the output layer has one backward pass, not two.
        self._logits, self._hidden = logits.detach(), read[0]

    def prefill(self, numbers: Sequence[int]) -> PrefilledPrompts:
        """Some of the prompts for one search, without gradient.

        Args:
            numbers: which of them.
        """
        device, own = self.model.device, self._is_own[numbers]
        lengths = own.sum(dim=1)
        # [n, longest]: the slots of each prompt's tokens in its row, in order, then any others.
        slots = own.int().argsort(dim=1, descending=True, stable=True)[:, : max(lengths.tolist())].to(device)
        row, state = self._row[numbers, None].to(device), self._logit_row[numbers].to(device)
        layers = [
            tuple(states.detach()[row, :, slots].transpose(1, 2).contiguous() for states in (whole.keys, whole.values))
            for whole in self._cache.layers
        ]
        head = OutputHead(self.model)
        states = head.choose(self._hidden.detach(), self._logits)[state]
        return PrefilledPrompts.from_keys(self.model, head, layers, lengths, states.unsqueeze(1))

    def score(
        self,
        completions: Sequence[Sequence[Sequence[int]]],
        order: Sequence[int],
        legal: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies [K] of the tokens of completions, as `score_labels` gives them.

        Can be called once: the tokens are added to the keys and values.

        Args:
            completions: token ids of each prompt's completions, end token included.
            order: the prompts in the order of the labels, which go on completion by completion, token by token.
            legal: [K, F], as in `score_labels`.
            temperature: divides the logits.
        """
        # Phase 1: the completions of each prompt as a tree whose root is the prompt's last token; all trees that belong
        # to one row of prompts side by side.
        trees = [
            build_prefix_tree([[prompt[-1], *tokens[:-1]] for tokens in group])
            for prompt, group in zip(self.prompts, completions, strict=True)
        ]
        width = max(sum(len(trees[number].tokens) - 1 for number in part) for part in self._packed)
        input_ids = np.full((len(self._packed), width), self.pad_token_id, dtype=np.int64)
        position_ids, owner = np.zeros_like(input_ids), np.full_like(input_ids, -1)
        end = np.tile(np.arange(1, width + 1), (len(self._packed), 1))  # a padding node sees only itself
        first = np.zeros(len(trees), dtype=np.int64)  # row * width + the place of a tree's first node behind the root
        for row, part in enumerate(self._packed):
            start = 0
            for number in part:
                tree, stop = trees[number], start + len(trees[number].tokens) - 1
                input_ids[row, start:stop] = tree.tokens[1:]
                position_ids[row, start:stop] = len(self.prompts[number]) - 1 + tree.depth[1:]
                end[row, start:stop] = start - 1 + tree.end[1:]
                owner[row, start:stop], first[number] = number, row * width + start
                start = stop

        # Phase 2: where labels are read: at the root, whose hidden states come first, or at a node behind it.
        rows, tokens, roots = [], [], len(self._hidden)
        for number in order:
            for row, completion in enumerate(completions[number]):
                node = trees[number].node[row, : len(completion)]
                behind = roots + first[number] + node - 1
                rows.append(np.where(node == 0, self._logit_row[number].item(), behind))
                tokens.append(completion)
        place, label_row = np.unique(np.concatenate([np.arange(roots), *rows]), return_inverse=True)
        device = self.model.device

        # Phase 3: the pass, in which every node sees its prompt and its ancestors.
        owner, end = torch.from_numpy(owner), torch.from_numpy(end).to(device)
        sees_prompt = (self._is_own[owner.clamp(min=0)] & (owner >= 0).unsqueeze(-1)).to(device).unsqueeze(1)
        visible = torch.cat((sees_prompt, build_tree_mask(end)), dim=-1)
        nodes = torch.from_numpy(place[roots:] - roots).to(device)
        with restrict_logits(self.model, nodes, self._hidden):
            logits = self.model(
                input_ids=torch.from_numpy(input_ids).to(device),
                position_ids=torch.from_numpy(position_ids).to(device),
                attention_mask=build_attention_mask(self.model, visible),
                past_key_values=self._cache,
                use_cache=True,
            ).logits
        label_row, tokens = torch.from_numpy(label_row[roots:]), torch.from_numpy(np.concatenate(tokens))
        return score_labels(logits, label_row.to(device), tokens.to(device), legal, temperature)
