"""The closed list of semantic IDs as a trie on the model's device, and the processor that keeps HF `generate` inside it."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor


def pad_sequences(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(matrix [N, longest] int64 padded with -1, lengths [N])."""
    lengths = np.fromiter((len(sequence) for sequence in sequences), dtype=np.int64, count=len(sequences))
    matrix = np.full((len(sequences), int(lengths.max(initial=0))), -1, dtype=np.int64)
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = np.fromiter(
        (token for sequence in sequences for token in sequence), dtype=np.int64, count=int(lengths.sum())
    )
    return matrix, lengths


def sort_and_compare(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order [N] that sorts the rows lexicographically, lcp [N]: columns each sorted row shares with the one before)."""
    order = np.lexsort(matrix.T[::-1]) if matrix.shape[1] else np.arange(len(matrix))
    ordered = matrix[order]
    different = ordered[1:] != ordered[:-1]
    lcp = np.zeros(len(matrix), dtype=np.int64)
    lcp[1:] = np.where(different.any(axis=1), different.argmax(axis=1), matrix.shape[1]) if matrix.shape[1] else 0
    return order, lcp


class SidTrie:
    """All legal token sequences as a trie in flat tensors.

    Nodes are numbered level by level and, within a level, in lexicographic order, so the children of node v are the nodes
    first_child[v] .. first_child[v + 1] - 1 and every look-up is an index, with no Python per node. Node 0 is the root.

    Args:
        sequences: N token-id sequences, each a SID's tokens followed by the end token(s). Lengths may differ. Equal
            sequences are one path (items that share a SID).
        device: where the tensors live.

    Attributes (V nodes, S distinct sequences):
        token [V]: the token on the edge into a node (-1 for the root).
        first_child [V + 1]: see above.
        sequence [V]: the number (0..S-1, lexicographic) of the sequence that ends in a node, or -1.
        forced [V]: tokens left to the end where only one way is left; -1 where there is a choice.
        row_sequence [N]: the sequence number of each input row.
        sequence_tokens [S, depth], sequence_length [S]: the sequences themselves, padded with -1.
        fanout: list of the largest number of children at each depth.

    Raises:
        ValueError: an empty list or an empty sequence, or a sequence that continues another (no end token).
    """

    def __init__(self, sequences: Sequence[Sequence[int]], device: str | torch.device = "cpu"):
        if not len(sequences):
            raise ValueError("a SidTrie needs at least one sequence")
        matrix, lengths = pad_sequences(sequences)
        if lengths.min() == 0:
            raise ValueError(f"sequence {int(lengths.argmin())} is empty")
        rows, depth = matrix.shape
        order, lcp = sort_and_compare(matrix)
        ordered, ordered_lengths = matrix[order], lengths[order]
        distinct = np.ones(rows, dtype=bool)
        distinct[1:] = lcp[1:] < depth
        continues = np.flatnonzero(distinct[1:] & (lcp[1:] == ordered_lengths[:-1]))
        if len(continues):
            short, long = (ordered[continues[0] + i] for i in (0, 1))
            raise ValueError(
                f"sequence {long[long >= 0].tolist()} continues {short[short >= 0].tolist()}: end tokens are missing"
            )
        sequence_of_sorted = np.cumsum(distinct) - 1

        # Phase 1: one node per (level, distinct prefix), numbered level by level.
        column = np.arange(depth)
        is_new = (column >= lcp[:, None]) & (column < ordered_lengths[:, None])
        level_counts = is_new.sum(axis=0)
        level_start = 1 + np.concatenate(([0], np.cumsum(level_counts)))
        number = np.cumsum(is_new, axis=0) - 1 + level_start[:-1]  # the node of every (row, level), new or inherited
        num_nodes = int(level_start[-1])

        # Phase 2: tokens, parents, and through their counts the child ranges.
        token = np.full(num_nodes, -1, dtype=np.int64)
        parent = np.zeros(num_nodes, dtype=np.int64)
        new_row, new_level = np.nonzero(is_new)
        new_node = number[new_row, new_level]
        token[new_node] = ordered[new_row, new_level]
        parent[new_node] = np.where(new_level > 0, number[new_row, np.maximum(new_level - 1, 0)], 0)
        num_children = np.bincount(parent[1:], minlength=num_nodes)
        first_child = 1 + np.concatenate(([0], np.cumsum(num_children)))

        # Phase 3: where sequences end, and how many tokens are forced before that (deepest level first).
        sequence = np.full(num_nodes, -1, dtype=np.int64)
        first_rows = np.flatnonzero(distinct)
        sequence[number[first_rows, ordered_lengths[first_rows] - 1]] = np.arange(len(first_rows))
        forced = np.where(num_children == 0, 0, -1)
        for level in range(depth - 1, -1, -1):
            nodes = np.arange(level_start[level - 1], level_start[level]) if level else np.zeros(1, dtype=np.int64)
            below = forced[np.minimum(first_child[nodes], num_nodes - 1)]
            forced[nodes] = np.where((num_children[nodes] == 1) & (below >= 0), below + 1, forced[nodes])

        row_sequence = np.empty(rows, dtype=np.int64)
        row_sequence[order] = sequence_of_sorted
        bounds = [(0, 1)] + [(int(level_start[i]), int(level_start[i + 1])) for i in range(depth)]
        self.fanout = [int(num_children[low:high].max(initial=0)) for low, high in bounds]
        self.depth = depth
        self.num_nodes = num_nodes
        self.num_sequences = len(first_rows)
        self.max_token = int(matrix.max())
        self.token = torch.from_numpy(token)
        self.first_child = torch.from_numpy(first_child)
        self.sequence = torch.from_numpy(sequence)
        self.forced = torch.from_numpy(forced)
        self.row_sequence = torch.from_numpy(row_sequence)
        self.sequence_tokens = torch.from_numpy(ordered[first_rows])
        self.sequence_length = torch.from_numpy(ordered_lengths[first_rows])
        # Edges sorted by (parent, token), as one integer each: advance() is a binary search in them.
        self._edge_stride = self.max_token + 1
        self._edges = torch.from_numpy(parent[1:] * self._edge_stride + token[1:])
        self.to(device)

    def to(self, device: str | torch.device) -> "SidTrie":
        """Move all tensors; returns self."""
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(self, name, value.to(device))
        self.device = torch.device(device)
        return self

    def children(self, nodes: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The children of `nodes` [...]: (nodes [..., width], legal [..., width] bool); `width` >= the largest fan-out."""
        child = self.first_child[nodes].unsqueeze(-1) + torch.arange(width, device=nodes.device)
        legal = child < self.first_child[nodes + 1].unsqueeze(-1)
        return torch.where(legal, child, 0), legal

    def advance(self, nodes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The child of each node along `tokens` (same shape), or -1 where there is none; a node of -1 stays -1."""
        known = (nodes >= 0) & (tokens >= 0) & (tokens <= self.max_token)
        key = torch.where(known, nodes * self._edge_stride + tokens, -1)
        position = torch.searchsorted(self._edges, key).clamp(max=len(self._edges) - 1)
        return torch.where(self._edges[position] == key, position + 1, -1)

    def mask(self, nodes: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Legal next tokens of `nodes` [n] as a bool matrix [n, vocab_size]; all False for a node of -1 or an end."""
        child, legal = self.children(nodes.clamp(min=0), max(self.fanout))
        legal = legal & (nodes >= 0).unsqueeze(-1)
        row, _ = torch.nonzero(legal, as_tuple=True)
        allowed = torch.zeros(len(nodes), vocab_size, dtype=torch.bool, device=nodes.device)
        allowed[row, self.token[child[legal]]] = True
        return allowed


class ConstrainedLogitsProcessor(LogitsProcessor):
    """Keeps HF `generate` (greedy, beam or sampling) inside a `SidTrie`.

    A pure function of the tokens generated so far, so that one instance can serve several generations.

    Args:
        trie: the legal sequences, end token included.
        prompt_length: columns of `input_ids` that are prompt (padding included).
        end_token_id: what a finished row repeats until the batch is finished.
    """

    def __init__(self, trie: SidTrie, prompt_length: int, end_token_id: int):
        self.trie, self.prompt_length, self.end_token_id = trie, prompt_length, end_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores` [n, vocab] with every illegal token at -inf.

        Raises:
            ValueError: no row can go on, which means the prompt length or the trie does not belong to this generation.
        """
        generated = input_ids[:, self.prompt_length :]
        nodes = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        finished = torch.zeros_like(nodes, dtype=torch.bool)
        for column in generated.T:
            nodes = torch.where(finished, nodes, self.trie.advance(nodes, column))
            finished = finished | ((nodes >= 0) & (self.trie.sequence[nodes.clamp(min=0)] >= 0))
        allowed = self.trie.mask(nodes, scores.shape[-1])
        allowed[finished, self.end_token_id] = True
        # Beams beyond the number of legal continuations are dead on purpose: only all rows at once is a mistake.
        if not allowed.any():
            raise ValueError(
                f"dead end: after {generated.shape[1]} generated tokens no row is inside the trie; "
                f"is prompt_length={self.prompt_length} right and was the trie built with this tokenizer?"
            )
        return scores.masked_fill(~allowed, float("-inf"))
