"""Many sequences as one row: every distinct prefix is computed once, with exactly the logits of the separate sequences.

The tokens of a prefix tree stand in depth-first order in one row; `position_ids` is the depth of a token in its
sequence, and `end[k]` is the index after the subtree of node k. Query q sees key k iff k <= q < end[k]: its ancestors
and itself.
Causal attention makes a token's hidden state a function of its prefix alone, so nothing else changes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from minionerec.search.label_scores import score_labels
from minionerec.search.trie import pad_sequences, sort_rows

FLEX_BLOCK = 128  # what flex_attention's kernels are tuned for


@dataclass
class PrefixTree:
    """The tree of N sequences with L distinct prefixes, in depth-first order.

    Attributes:
        tokens: [L] token ids.
        depth: [L], the position of each token in its sequence.
        end: [L], the index after each subtree.
        node: [N, longest], the node of every token of every sequence, in the order given; -1 past a sequence's end.
    """

    tokens: np.ndarray
    depth: np.ndarray
    end: np.ndarray
    node: np.ndarray


def build_prefix_tree(sequences: Sequence[Sequence[int]]) -> PrefixTree:
    """Merge token sequences into their prefix tree. Sorting them *is* the depth-first order; no Python per token.

    Args:
        sequences: N token-id lists of any lengths, in any order.
    """
    matrix, lengths = pad_sequences(sequences)
    rows, width = matrix.shape
    order, lcp = sort_rows(matrix)
    column = np.arange(width)
    is_new = (column >= lcp[:, None]) & (column < lengths[order][:, None])
    # Row-major numbering of the new cells is depth-first order; an inherited cell has the last number above it.
    number = np.where(is_new, np.cumsum(is_new).reshape(rows, width) - 1, -1)
    inherited = np.maximum.accumulate(number, axis=0)
    node = np.empty((rows, width), dtype=np.int64)
    node[order] = np.where(column < lengths[order][:, None], inherited, -1)
    # A subtree in column j ends at the first later row that shares at most j columns with the row before it.
    row_start = np.concatenate(([0], np.cumsum(is_new.sum(axis=1))))
    breaks = np.where(lcp[:, None] <= column, np.arange(rows)[:, None], rows)
    next_break = np.full((rows + 1, width), rows)
    next_break[:-1] = np.minimum.accumulate(breaks[::-1], axis=0)[::-1]
    new_row, new_column = np.nonzero(is_new)
    return PrefixTree(
        tokens=matrix[order][new_row, new_column],
        depth=new_column,
        end=row_start[next_break[new_row + 1, new_column]],
        node=node,
    )


def build_tree_mask(end: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Attention mask [n, 1, L, L] from `end` [n, L]: bool, or additive in `dtype` if one is given."""
    index = torch.arange(end.shape[1], device=end.device)
    query, key = index[:, None], index[None, :]
    visible = ((key <= query) & (query < end[:, None, :])).unsqueeze(1)
    return visible if dtype is None else to_additive_mask(visible, dtype)


def to_additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where `visible`, the lowest number of `dtype` elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def build_block_mask(end: torch.Tensor) -> BlockMask:
    """A mask for flex_attention, which skips blocks of 128 x 128 pairs without a visible one.

    Made from `end` alone, block by block: no L x L mask is ever there. Left of the diagonal every key stands before
    every query of a block, so that the last subtree to end says whether any pair is visible, and the first one whether
    all are.

    Args:
        end: [n, L], the index after each subtree.
    """
    rows, length = end.shape
    blocks = -(-length // FLEX_BLOCK)
    # A key past L ends nowhere, in either sense: no query may see it.
    padded = torch.nn.functional.pad(end, (0, blocks * FLEX_BLOCK - length)).view(rows, 1, 1, blocks, FLEX_BLOCK)
    start = FLEX_BLOCK * torch.arange(blocks, device=end.device)
    query, key = start[:, None], start[None, :]
    some = (key < query) & (padded.amax(-1) > query)
    whole = (key < query) & (padded.amin(-1) >= query + FLEX_BLOCK)
    # On the diagonal every query sees itself, and none what comes after it.
    partial = (some & ~whole) | (key == query)

    def sees(row, _head, query, key):
        return (key <= query) & (query < end[row, key])

    return BlockMask.from_kv_blocks(
        *_list_blocks(partial), *_list_blocks(whole), FLEX_BLOCK, sees, seq_lengths=(length, length)
    )


def _list_blocks(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many blocks of keys each block of queries has [n, 1, Q], their numbers, then the others' [n, 1, Q, K])."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.int()


def build_attention_mask(model: PreTrainedModel, visible: torch.Tensor) -> torch.Tensor:
    """A dense mask in the form the model's attention reads: sdpa takes bool, eager is only right with floats.

    Args:
        model: whose attention is asked.
        visible: [n, 1, Q, K] bool, which keys each query sees.
    """
    return visible if model.config._attn_implementation == "sdpa" else to_additive_mask(visible, model.dtype)


@contextmanager
def restrict_logits(
    model: torch.nn.Module, flat_nodes: torch.Tensor, more: torch.Tensor | None = None, logits_of: int | None = None
) -> Iterator[list[torch.Tensor]]:
    """Inside, a forward pass returns only the logits [K, vocab] of some hidden states.

    A hook on the output layer keeps the call through the model's own forward, so that wrappers (DDP, PEFT, autocast)
    work.

    Args:
        model: plain or wrapped.
        flat_nodes: [K], row * L + node of each hidden state.
        more: hidden states [M, width] of another pass, whose logits come first.
        logits_of: compute the logits of that many of them only; None is all.

    Yields:
        A list to which a forward pass adds the hidden states of the nodes, `more` in front.
    """
    head = getattr(model, "module", model).get_output_embeddings()
    read: list[torch.Tensor] = []

    def select(_module, arguments):
        hidden = arguments[0]
        hidden = hidden.reshape(-1, hidden.shape[-1])[flat_nodes]
        read.append(hidden if more is None else torch.cat((more, hidden)))
        return (read[-1][:logits_of],)

    handle = head.register_forward_pre_hook(select)
    try:
        yield read
    finally:
        handle.remove()


@dataclass(frozen=True)
class SoftLabels:
    """What the nodes along one target predict, where that is more than the target's own tokens.

    Attributes:
        level: [M] int64, tokens of the target before the predicted one.
        token: [M] int64, a predicted token; several at one level share its weight.
        weight: [M] float, of each in the loss.
        group: [M] int64, the group of tokens that its probability is over, see `LegalTokens`; None is the vocabulary.
    """

    level: np.ndarray
    token: np.ndarray
    weight: np.ndarray
    group: np.ndarray | None = None


@dataclass
class TreeBatch:
    """Several prefix trees side by side, padded to one length L, with what they are to predict.

    A node can predict several next tokens (two sequences, same prefix), so labels are triples (node, token, weight).

    Attributes:
        input_ids, position_ids: [n, L].
        end: [n, L], or None when every row is one sequence, padded on the right, for which causal attention is enough.
        node: [U] int64, row * L + the index of each node that predicts; ascending.
        label_row: [K] int64, the place of each label's node in `node`.
        label_token: [K] int64, what it is to predict.
        label_weight: [K] float32.
        label_group: [K] int64, see `SoftLabels`; None where no label has one.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    end: torch.Tensor | None
    node: torch.Tensor
    label_row: torch.Tensor
    label_token: torch.Tensor
    label_weight: torch.Tensor
    label_group: torch.Tensor | None = None

    @cached_property
    def block_mask(self) -> BlockMask:
        """`build_block_mask` of these trees, made once for all layers, the policy and its reference."""
        return build_block_mask(self.end)

    def build_mask(self, model: PreTrainedModel) -> torch.Tensor | BlockMask | None:
        """The trees' mask in the form the model's attention reads; None where causal attention is enough."""
        if self.end is None:
            return None
        if model.config._attn_implementation == "flex_attention":
            return self.block_mask
        # Not kept: L x L of every batch of a step would pile up.
        return build_attention_mask(model, build_tree_mask(self.end))

    def to(self, device: str | torch.device) -> TreeBatch:
        """A copy on another device."""
        moved = (getattr(self, name) for name in self.__dataclass_fields__)
        return TreeBatch(*(value if value is None else value.to(device) for value in moved))


def batch_trees(groups: Sequence[Sequence[tuple]], pad_token_id: int) -> TreeBatch:
    """One tree per group of (prompt, target) rows; every target token is a label at the node before it.

    Labels keep the order of the rows: group by group, row by row, token by token, so that a caller who needs per-row
    log-probabilities can split them by the target lengths. A target's last token is a label only, never a node.

    Args:
        groups: (prompt, target) token ids of each row, group by group. A row may be a triple that ends in the
            `SoftLabels` which stand for its target's own tokens, or in None.
        pad_token_id: fills the shorter trees.

    Raises:
        ValueError: an empty prompt or target (nothing would predict, or be predicted).
    """
    trees = []
    for rows in groups:
        for prompt, target, *_ in rows:
            if not len(prompt) or not len(target):
                raise ValueError("every row needs a prompt of at least one token and a target of at least one token")
        trees.append(build_prefix_tree([[*prompt, *target[:-1]] for prompt, target, *_ in rows]))
    length = max(len(tree.tokens) for tree in trees)
    input_ids = np.full((len(trees), length), pad_token_id, dtype=np.int64)
    position_ids = np.zeros((len(trees), length), dtype=np.int64)
    end = np.tile(np.arange(1, length + 1), (len(trees), 1))  # a padding node sees only itself
    label_node, label_token, label_weight, label_group = [], [], [], []
    for index, (tree, rows) in enumerate(zip(trees, groups, strict=True)):
        size = len(tree.tokens)
        input_ids[index, :size], position_ids[index, :size], end[index, :size] = tree.tokens, tree.depth, tree.end
        for row, (prompt, target, *soft) in enumerate(rows):
            predicting = index * length + tree.node[row, len(prompt) - 1 : len(prompt) - 1 + len(target)]
            labels = soft[0] if soft else None
            if labels is None:
                labels = SoftLabels(np.arange(len(target)), np.asarray(target), np.ones(len(target)))
            label_node.append(predicting[labels.level])
            label_token.append(labels.token)
            label_weight.append(labels.weight)
            label_group += [] if labels.group is None else [labels.group]
    node, label_row = np.unique(np.concatenate(label_node), return_inverse=True)
    return TreeBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(end),
        torch.from_numpy(node),
        torch.from_numpy(label_row),
        torch.from_numpy(np.concatenate(label_token)),
        torch.from_numpy(np.concatenate(label_weight).astype(np.float32)),
        torch.from_numpy(np.concatenate(label_group)) if label_group else None,
    )


def fill_bins(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Distribute groups over bins of like loads: largest first, into the emptiest bin (Graham 1969).

    Args:
        sizes: of the groups.
        count: number of bins; none is empty if there are as many groups.

    Returns:
        The group numbers of each bin.
    """
    bins = [(0, number, []) for number in range(count)]
    for group in sorted(range(len(sizes)), key=lambda group: -sizes[group]):
        load, number, members = heapq.heappop(bins)
        heapq.heappush(bins, (load + sizes[group], number, [*members, group]))
    return [members for _, _, members in sorted(bins, key=lambda entry: entry[1])]


def count_shared_tokens(first: list[int], second: list[int]) -> int:
    """Length of the longest common prefix."""
    if second[: len(first)] == first:
        return len(first)
    pairs = zip(first, second, strict=False)  # as far as both go
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def pack_trees(groups: Sequence[Sequence[tuple]], tree_tokens: int) -> list[list[int]]:
    """Choose which groups are merged into one tree.

    What their prompts begin with is then computed once a tree, and trees of like size need little padding.

    Args:
        groups: (prompt, target) token ids of each row, group by group; what stands behind them is ignored.
        tree_tokens: tokens of a tree, about.

    Returns:
        The group numbers of each tree.
    """
    # What all prompts begin with stands in a merged tree once.
    first = groups[0][0][0]
    head = min(count_shared_tokens(first, prompt) for rows in groups for prompt, *_ in rows)
    sizes = [
        len(build_prefix_tree([[*prompt, *target[:-1]] for prompt, target, *_ in rows]).tokens) - head + 1
        for rows in groups
    ]
    return fill_trees(sizes, tree_tokens)


def fill_trees(sizes: Sequence[int], tree_tokens: int) -> list[list[int]]:
    """The group numbers of each tree, for groups of `sizes` tokens and trees of about `tree_tokens`."""
    return fill_bins(sizes, min(len(sizes), max(1, round(sum(sizes) / max(tree_tokens, *sizes)))))


def compute_label_logits(model: torch.nn.Module, batch: TreeBatch) -> torch.Tensor:
    """Compute the logits [U, vocab] that the labels of a batch are read from, differentiably.

    Labels often share a node, whose logits are computed once. They come in the dtype that the model computes in.

    Args:
        model: plain or wrapped.
        batch: labels at U distinct nodes.
    """
    inner = getattr(model, "module", model)
    with restrict_logits(model, batch.node):
        return model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.build_mask(inner),
            use_cache=False,
        ).logits


def compute_tree_log_probs(model: torch.nn.Module, batch: TreeBatch) -> torch.Tensor:
    """Log-probabilities [K] (float32, over the vocabulary) of the labels of a batch, differentiable."""
    return score_labels(compute_label_logits(model, batch), batch.label_row, batch.label_token)[0]
