"""Prompts computed once, after which a search appends tokens that see the prompt and their own prefix.

All prompts of a batch stand in one packed row, so that nothing is padded, and what all of them begin with stands there
once. Prefixes of a prompt share its keys and values: those are never copied, expanded or reordered. What a prefix has
appended itself are a few keys, which go with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, PreTrainedModel

from minionerec.search.kept_head import KeptHead
from minionerec.search.output_head import OutputHead

SHORTEST_HEAD = 8  # tokens: a shorter common head is not worth an attention of its own
# Queries of padding in an attention that are worth another call; a GPU computes many in the time of a launch.
LEAST_PADDING = {"cpu": 64}
LEAST_PADDING_ELSEWHERE = 4096
ATTENTION = "prefilled_prompts"  # the name under which models find `_attend`
# What layers hand to any attention and what the search has arranged already: positions are in queries and keys.
HARMLESS = frozenset(
    {
        "dropout",
        "position_ids",
        "cache_position",
        "position_embeddings",
        "use_cache",
        "output_attentions",
        "output_router_logits",
    }
)


class UnknownAttentionError(ValueError):
    """A model's attention is not one that the search could replace by its own."""


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


@dataclass
class _Group:
    """Prompts of like length whose queries attend together.

    Attributes:
        rows: numbers of the prompts.
        queries: [rows, longest], where the tokens behind the head stand in the packed row; any token past the last.
        places: [tokens, 2], of every token of these prompts: its row in the group, and which token behind the head.
        packed: [tokens], where the same tokens stand in the packed row.
    """

    rows: torch.Tensor
    queries: torch.Tensor
    places: torch.Tensor
    packed: torch.Tensor


class PrefilledPrompts:
    """n prompts, computed, and the tokens appended to them.

    Args:
        model: a decoder-only model for which `find_obstacle` finds none, whose attention is set to ATTENTION.
        prompts: n token-id lists of any lengths.
        output_head: of the model.
        kept: a head that earlier batches have computed, or None; this batch's is kept there.

    Attributes:
        lengths: [n], tokens of each prompt.
        states: [n, 1, ...], what `output_head` keeps of the hidden states after each prompt.
        window: the smallest window of a layer's attention, longer than all sequences; None where there is none.

    Raises:
        ValueError: no prompt, or an empty one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        output_head: OutputHead,
        kept: KeptHead | None = None,
    ):
        if not len(prompts) or min(len(prompt) for prompt in prompts) == 0:
            raise ValueError("every prompt needs at least one token")
        self._begin(model, output_head, [len(prompt) for prompt in prompts])
        self._pack(prompts, kept)
        states = self._forward(self._tokens[None], self._positions[None], self._last)
        self.states = states.transpose(0, 1)
        if kept is not None and self._head and self._shared < self._head:
            heads = [[states[:1, :, : self._head] for states in layers] for layers in (self._keys, self._values)]
            kept.keep(list(prompts[0][: self._head]), *heads)
        self._groups, self._given = [], None  # the prefill's own

    @classmethod
    def from_keys(
        cls,
        model: PreTrainedModel,
        output_head: OutputHead,
        layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
        lengths: torch.Tensor,
        states: torch.Tensor,
    ) -> PrefilledPrompts:
        """n prompts whose keys and values are there already.

        Args:
            model, output_head: as above.
            layers: keys and values of each layer [n, key heads, longest, width], padded on the right.
            lengths: [n], tokens of each prompt, on the CPU.
            states: [n, 1, ...], what the head keeps of the hidden states after each prompt.
        """
        prefilled = cls.__new__(cls)
        prefilled._begin(model, output_head, lengths.tolist())
        # Under autocast, rotated keys are float32 and values are not.
        prefilled._keys = [keys.to(values.dtype) for keys, values in layers]
        prefilled._values = [values for _, values in layers]
        prefilled.states = states
        return prefilled

    def _begin(self, model: PreTrainedModel, output_head: OutputHead, lengths: list[int]) -> None:
        """Nothing is appended yet to n prompts of so many tokens."""
        self.model, self.output_head = model, output_head
        self.lengths = torch.tensor(lengths).to(model.device)
        self._keys: list[torch.Tensor] = []  # of each layer, [n, key heads, longest prompt, width]
        self._values: list[torch.Tensor] = []
        self._own_keys: list[torch.Tensor] = []  # of each layer, [n, prefixes, key heads, appended, width]
        self._own_values: list[torch.Tensor] = []
        self._parent: torch.Tensor | None = None
        self.window: int | None = None
        self._longest = max(lengths)  # tokens of the longest sequence
        index = torch.arange(self._longest, device=model.device)
        self._is_padding = (index >= self.lengths[:, None])[:, None, None]  # [n, 1, 1, longest]

    def __len__(self) -> int:
        return len(self.lengths)

    def _pack(self, prompts: Sequence[Sequence[int]], kept: KeptHead | None) -> None:
        """Lay out the packed row: the head all prompts have in common, then the rest of each.

        The last token of each prompt stays outside the head: it gives the logits. All indices are built here, on the
        CPU, for all layers.
        """
        device, n = self.model.device, len(prompts)
        common = os.path.commonprefix([prompt[:-1] for prompt in prompts])
        # One prompt alone has no head to share, unless it was kept.
        shared = kept.begin(self.model, list(common)) if kept is not None else 0
        head = len(common) if n > 1 else shared
        if head < SHORTEST_HEAD:
            head = shared = 0
        shared = min(shared, head)
        self._head, self._shared = head, shared
        self._given = (kept, shared) if shared else None
        tokens, positions = list(prompts[0][shared:head]), list(range(shared, head))
        # Indices into the packed row behind the `shared` given keys.
        places = torch.zeros(n, max(map(len, prompts)), dtype=torch.long)
        places[:, :head] = torch.arange(head)
        first = []
        for row, prompt in enumerate(prompts):
            first.append(len(tokens))
            places[row, head : len(prompt)] = torch.arange(
                shared + len(tokens), shared + len(tokens) + len(prompt) - head
            )
            tokens += prompt[head:]
            positions += range(head, len(prompt))
        rests = [len(prompt) - head for prompt in prompts]
        self._last = torch.tensor([start + length - 1 for start, length in zip(first, rests, strict=True)]).to(device)
        least = LEAST_PADDING.get(device.type, LEAST_PADDING_ELSEWHERE)
        self._groups = []
        for rows in group_by_length(rests, least):
            longest = rests[rows[0]]
            queries = torch.zeros(len(rows), longest, dtype=torch.long)
            for index, row in enumerate(rows):
                queries[index, : rests[row]] = torch.arange(first[row], first[row] + rests[row])
            is_token = torch.arange(longest) < torch.tensor([rests[row] for row in rows])[:, None]
            indices = (torch.tensor(rows), queries, is_token.nonzero(), queries[is_token])
            self._groups.append(_Group(*(index.to(device) for index in indices)))
        self._tokens, self._positions = (torch.tensor(values).to(device) for values in (tokens, positions))
        self._places = places.to(device)

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor | int) -> torch.Tensor:
        """What the head keeps of the hidden states [rows, keep, ...] after some tokens [rows, Q]."""
        return self.output_head.capture(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=keep,
            prefilled_prompts=self,
        )

    def extend(self, tokens: torch.Tensor, parent: torch.Tensor, level: int) -> torch.Tensor:
        """Append a chain of tokens to each of W prefixes.

        Args:
            tokens: [n, W, L] token ids.
            parent: [n, W], the prefix of the call before that each continues; of all zeros at first.
            level: tokens of these prefixes behind the prompt, before the new ones.

        Returns:
            What `output_head` keeps of the hidden states after each token, [n, W, L, ...].
        """
        n, width, length = tokens.shape
        self._parent, self._prefixes = parent, torch.arange(n, device=parent.device)[:, None]
        self._longest += length
        steps = torch.arange(level, level + length, device=tokens.device).repeat(width)
        states = self._forward(tokens.flatten(1), self.lengths[:, None] + steps, 0)
        return states.unflatten(1, (width, length))

    def check_window(self, window: int | None) -> None:
        """Stop at a layer that sees no more than so many keys, where there are more; note the smallest window.

        Raises:
            UnknownAttentionError: saying so.
        """
        if window is None:
            return
        self.window = min(self.window or window, window)
        if self._longest > window:
            raise UnknownAttentionError(f"its attention sees {window} tokens, and a sequence has {self._longest}")

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """The attention of one layer; its keys and values are stored.

        Args:
            layer: number of the layer; layers come in order.
            query: [rows, heads, Q, width].
            key, value: [rows, key heads, Q, width], of the same tokens.
            scaling: factor of the scores.

        Returns:
            [rows, Q, heads, width].
        """
        if self._parent is None:
            return self._attend_in_prompts(layer, query, key, value, scaling)
        return self._attend_behind_prompts(layer, query, key, value, scaling)

    def _attend_in_prompts(self, layer, query, key, value, scaling) -> torch.Tensor:
        """The packed row: each prompt sees the head and itself. Every row of keys is padded on the right."""
        if layer != len(self._keys):
            raise UnknownAttentionError("its layers do not come in order")
        if self._given:
            kept, shared = self._given
            key = torch.cat((kept.keys[layer][:, :, :shared], key), dim=2)
            value = torch.cat((kept.values[layer][:, :, :shared], value), dim=2)
        # [key heads, n, longest, width] -> [n, key heads, longest, width]
        keys, values = (states[0][:, self._places].transpose(0, 1).contiguous() for states in (key, value))
        self._keys.append(keys)
        self._values.append(values)
        head, shared, times = self._head, self._shared, query.shape[1] // key.shape[1]
        out = value.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        if shared < head:  # the head is computed in this row
            out[:, : head - shared] = _attend_causally(
                query[:, :, : head - shared], keys[:1, :, :head], values[:1, :, :head], times, scaling
            )
        for group in self._groups:
            longest = head + group.queries.shape[1]
            queries = query[0][:, group.queries].transpose(0, 1)
            attended = _attend_causally(
                queries, keys[group.rows, :, :longest], values[group.rows, :, :longest], times, scaling
            )
            out[0, group.packed] = attended[group.places[:, 0], group.places[:, 1]]
        return out

    def _attend_behind_prompts(self, layer, query, key, value, scaling) -> torch.Tensor:
        """Chains behind the prompts: each token sees its prompt, its prefix and its chain."""
        n, width = self._parent.shape
        (_, heads, queries, size), key_heads = query.shape, key.shape[1]
        length, times = queries // width, heads // key_heads
        # [n, key heads, W * L, width] -> [n, W, key heads, L, width], so that a prefix is one piece of memory.
        key, value = (states.unflatten(2, (width, length)).transpose(1, 2) for states in (key, value))
        if layer < len(self._own_keys):
            key = torch.cat((self._own_keys[layer][self._prefixes, self._parent], key), dim=3)
            value = torch.cat((self._own_values[layer][self._prefixes, self._parent], value), dim=3)
            self._own_keys[layer], self._own_values[layer] = key, value
        else:
            self._own_keys.append(key)
            self._own_values.append(value)
        prompt_keys, prompt_values = self._keys[layer], self._values[layer]
        longest = prompt_keys.shape[2]
        # All queries that share keys in one product: [n, key heads, times * W * L, width].
        together = (query * scaling).reshape(n, key_heads, times * queries, size)
        scores = (together @ prompt_keys.transpose(2, 3)).masked_fill_(self._is_padding, float("-inf"))
        by_prefix = (n, key_heads, times, width, length)
        # [n, W, key heads, times * L, appended] -> [n, key heads, times, W, L, appended]
        queries_of_prefix = together.view(*by_prefix, size).permute(0, 3, 1, 2, 4, 5)
        own = queries_of_prefix.flatten(3, 4) @ key.transpose(3, 4)
        own = own.unflatten(3, (times, length)).permute(0, 2, 3, 1, 4, 5)
        if length > 1:
            slot = torch.arange(key.shape[3], device=key.device)
            own = own.masked_fill(slot > slot[-length:, None], float("-inf"))
        weights = torch.cat((scores.view(*by_prefix, longest), own), dim=-1)
        weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        of_prompt, of_own = weights[..., :longest], weights[..., longest:]
        out = of_prompt.reshape(n, key_heads, times * queries, longest) @ prompt_values
        of_own = of_own.permute(0, 3, 1, 2, 4, 5).flatten(3, 4) @ value
        out = out.view(*by_prefix, -1) + of_own.unflatten(3, (times, length)).permute(0, 2, 3, 1, 4, 5)
        return out.reshape(n, heads, queries, -1).transpose(1, 2)


def _attend_causally(query, key, value, times: int, scaling: float) -> torch.Tensor:
    """[rows, Q, heads, width], where the last query of a row sees all its keys, the one before all but the last.

    Args:
        query: [rows, heads, Q, width].
        key, value: [rows, heads / times, K >= Q, width].
        times: heads that share keys.
        scaling: factor of the scores.
    """
    queries, keys = query.shape[2], key.shape[2]
    visible = None
    if queries < keys:
        index = torch.arange(keys, device=query.device)
        visible = index <= index[keys - queries :, None]
    attended = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(times, dim=1),
        value.repeat_interleave(times, dim=1),
        attn_mask=visible,
        is_causal=visible is None,
        scale=scaling,
    )
    return attended.transpose(1, 2)


def _attend(module, query, key, value, attention_mask, *, scaling=None, prefilled_prompts=None, **others):
    """What the layers of a model call; everything but the layout is in `PrefilledPrompts.attend`.

    Raises:
        UnknownAttentionError: the layer's attention is more than a softmax over the keys before a query.
    """
    if prefilled_prompts is None:
        raise UnknownAttentionError("its layers do not hand the prompts on")
    if attention_mask is not None:
        raise UnknownAttentionError("its attention has a mask of its own")
    window = others.pop("sliding_window", None)
    unknown = [name for name, value in others.items() if value is not None and name not in HARMLESS]
    if unknown:
        raise UnknownAttentionError(f"its attention has {', '.join(unknown)}")
    prefilled_prompts.check_window(window)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast, rotated queries and keys are float32 and values are not.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return prefilled_prompts.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, _attend)
