"""Prompts prefilled once, to which a search appends tokens as slots that see the prompt and chosen other slots.

What all prompts of a batch begin with is computed once, and prompts of like length together, so that little padding is
computed. The keys and values then stand in one buffer with capacity for the search, which is never copied, expanded or
reordered.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from minionerec.search.prefix_tree import build_attention_mask

SHORTEST_HEAD = 8  # tokens: a shorter common head is not worth a forward pass
# Nor are fewer tokens of padding; a GPU computes thousands in the time it takes to launch a pass.
LEAST_PADDING = {"cpu": 64}
LEAST_PADDING_ELSEWHERE = 4096


def group_by_length(lengths: Sequence[int], least: int) -> list[list[int]]:
    """Choose which rows are computed together.

    Args:
        lengths: tokens of each row.
        least: shorter rows get another pass where that saves a third of the width and so many tokens of padding.

    Returns:
        The row numbers of every pass, longest rows first.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups = [order[:1]]
    for index, row in enumerate(order[1:], 1):
        width = lengths[groups[-1][0]]
        if 3 * lengths[row] <= 2 * width and (width - lengths[row]) * (len(order) - index) >= least:
            groups.append([])
        groups[-1].append(row)
    return groups


class _PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in a buffer that also holds what will be generated: growing it copies nothing.

    Args:
        parts: (row numbers, layer of these rows). Their slots stand at the right end, zeros before them.
        capacity: slots to be appended, at most.
    """

    def __init__(self, parts: Sequence[tuple[list[int], DynamicLayer]], capacity: int):
        super().__init__()
        first = parts[0][1]
        self.lazy_initialization(first.keys, first.values)
        rows, length = sum(len(part) for part, _ in parts), max(layer.get_seq_length() for _, layer in parts)
        self._buffers = []
        for name in ("keys", "values"):
            _, heads, _, width = getattr(first, name).shape
            buffer = getattr(first, name).new_zeros(rows, heads, length + capacity, width)
            for part, layer in parts:
                buffer[part, :, length - layer.get_seq_length() : length] = getattr(layer, name)
            self._buffers.append(buffer)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values


def _repeat_layer(layer: DynamicLayer, rows: int) -> DynamicLayer:
    """The single row of `layer` as so many rows; nothing is copied yet."""
    copy = DynamicLayer()
    if layer.is_initialized:
        copy.lazy_initialization(layer.keys, layer.values)
        copy.keys, copy.values = (states.expand(rows, -1, -1, -1) for states in (layer.keys, layer.values))
    return copy


class PrefilledPrompts:
    """n prompts, prefilled, to which slots can be appended.

    Args:
        model: a decoder-only model with full attention.
        prompts: n token-id lists of any lengths.
        capacity: slots that can be appended to each prompt.

    Attributes:
        lengths: [n], tokens of each prompt.
        logits: [n, 1, vocab] float32, after each prompt.

    Raises:
        ValueError: no prompt, or an empty one.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], capacity: int):
        if not len(prompts) or min(len(prompt) for prompt in prompts) == 0:
            raise ValueError("every prompt needs at least one token")
        self.model = model
        n, device = len(prompts), model.device
        # Phase 1: what all prompts begin with, once. The last token of each prompt stays outside: it gives the logits.
        head = len(os.path.commonprefix([prompt[:-1] for prompt in prompts])) if n > 1 else 0
        head = head if head >= SHORTEST_HEAD else 0
        common = [DynamicLayer() for _ in range(model.config.get_text_config().num_hidden_layers)]
        if head:
            self._prefill([prompts[0][:head]], 0, common)

        # Phase 2: the rest of each, in groups of like length.
        least = LEAST_PADDING.get(device.type, LEAST_PADDING_ELSEWHERE)
        groups, caches, outputs = group_by_length([len(prompt) - head for prompt in prompts], least), [], []
        for rows in groups:
            caches.append([_repeat_layer(layer, len(rows)) for layer in common])
            outputs.append(self._prefill([prompts[row][head:] for row in rows], head, caches[-1]))

        self._join(groups, caches, outputs, capacity)

    @classmethod
    def from_caches(
        cls, model: PreTrainedModel, caches: Sequence[list[DynamicLayer]], logits: torch.Tensor, capacity: int
    ) -> PrefilledPrompts:
        """n prompts whose keys and values are there already, as the layers of one row each.

        Args:
            model, capacity: as above.
            caches: the layers of each prompt.
            logits: [n, 1, vocab] float32, after each prompt.
        """
        prefilled = cls.__new__(cls)
        prefilled.model = model
        lengths = [layers[0].get_seq_length() for layers in caches]
        is_token = [torch.ones(1, length, dtype=torch.bool, device=logits.device) for length in lengths]
        outputs = list(zip(is_token, logits.split(1), strict=True))
        prefilled._join([[row] for row in range(len(caches))], caches, outputs, capacity)
        return prefilled

    def _join(
        self,
        groups: Sequence[list[int]],
        caches: Sequence[list[DynamicLayer]],
        outputs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        capacity: int,
    ) -> None:
        """Phase 3: all prompts side by side, from the rows, layers and outputs of every pass."""
        n, device = sum(map(len, groups)), outputs[0][1].device
        width = max(is_token.shape[1] for is_token, _ in outputs)
        self._is_token = torch.zeros(n, width, dtype=torch.bool, device=device)
        self.logits = outputs[0][1].new_empty(n, *outputs[0][1].shape[1:])
        for rows, (is_token, logits) in zip(groups, outputs, strict=True):
            self._is_token[rows, -is_token.shape[1] :], self.logits[rows] = is_token, logits
        self.lengths = self._is_token.sum(dim=1)
        parts_of_layer = [list(zip(groups, layers, strict=True)) for layers in zip(*caches, strict=True)]
        self._cache = Cache(layers=[_PreallocatedLayer(parts, capacity) for parts in parts_of_layer])

    def _prefill(
        self, rests: Sequence[Sequence[int]], head: int, layers: list[DynamicLayer]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute some prompts and fill `layers` with their keys and values.

        Args:
            rests: the tokens behind the first `head` of each prompt, which are padded on the left.
            head: tokens that `layers` hold already.
            layers: a cache of these rows.

        Returns:
            (which slots hold a token [rows, head + longest], logits [rows, 1, vocab] after the last one).
        """
        rows, length, device = len(rests), max(map(len, rests)), self.model.device
        tokens = torch.zeros(rows, length, dtype=torch.long)
        is_token = torch.zeros(rows, head + length, dtype=torch.bool)
        is_token[:, :head] = True
        for row, rest in enumerate(rests):
            tokens[row, length - len(rest) :] = torch.as_tensor(rest)
            is_token[row, head + length - len(rest) :] = True
        is_token = is_token.to(device)
        position = (is_token.cumsum(dim=1) - 1).clamp(min=0)[:, head:]
        # A padding query sees only itself: a row without any visible key would be NaN under some kernels.
        itself = torch.eye(length, dtype=torch.bool, device=device)
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril() & is_token[:, None, head:] | itself
        visible = torch.cat((is_token.new_ones(rows, length, head), causal), dim=-1)
        return is_token, self._forward(tokens.to(device), position, visible, Cache(layers=layers), logits_to_keep=1)

    def _forward(self, tokens, position, visible, cache: Cache, **arguments) -> torch.Tensor:
        return self.model(
            input_ids=tokens,
            position_ids=position,
            attention_mask=build_attention_mask(self.model, visible.unsqueeze(1)),
            past_key_values=cache,
            use_cache=True,
            **arguments,
        ).logits.float()

    def __len__(self) -> int:
        return len(self.lengths)

    def extend(self, tokens: torch.Tensor, depth: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Append Q slots to every prompt.

        Args:
            tokens: [n, Q] token ids.
            depth: [Q], tokens generated before each slot.
            visible: [n, Q, appended slots + Q] bool, which slots behind the prompt each new one sees.

        Returns:
            Their logits [n, Q, vocab] float32.
        """
        prompt = self._is_token.unsqueeze(1).expand(-1, tokens.shape[1], -1)
        position = self.lengths[:, None] + depth
        return self._forward(tokens, position, torch.cat((prompt, visible), dim=-1), self._cache)
