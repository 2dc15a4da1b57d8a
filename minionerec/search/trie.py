"""The closed list of semantic IDs as a trie in flat tensors on the model's device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minionerec.common.files import InputError, atomic_write


def pad_sequences(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token sequences side by side.

    Returns:
        (matrix [N, longest] int64, padded with -1 on the right; lengths [N]).
    """
    lengths = np.fromiter((len(sequence) for sequence in sequences), dtype=np.int64, count=len(sequences))
    matrix = np.full((len(sequences), int(lengths.max(initial=0))), -1, dtype=np.int64)
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = np.fromiter(
        (token for sequence in sequences for token in sequence), dtype=np.int64, count=int(lengths.sum())
    )
    return matrix, lengths


def sort_rows(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort rows lexicographically.

    Returns:
        (order [N] that sorts the rows; lcp [N], the leading columns each sorted row shares with the one before).
    """
    order = np.lexsort(matrix.T[::-1]) if matrix.shape[1] else np.arange(len(matrix))
    return order, count_common_columns(matrix[order])


def count_common_columns(ordered: np.ndarray) -> np.ndarray:
    """[N]: how many leading columns each row shares with the row before; 0 for the first."""
    lcp = np.zeros(len(ordered), dtype=np.int64)
    all_equal = np.ones(max(len(ordered) - 1, 0), dtype=bool)
    for column in ordered.T:
        all_equal &= column[1:] == column[:-1]
        lcp[1:] += all_equal
    return lcp


def sort_codes(codes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The order that sorts the rows of `codes` [N, depth] (column j below sizes[j]) lexicographically, ties by row.

    As many columns as fit are packed into one integer, so that ten million rows are one sort and not one per column.
    """
    keys, key_values = [np.zeros(len(codes), dtype=np.int64)], 1
    for column, size in zip(codes.T, sizes, strict=True):
        if key_values * size >= 2**63:
            keys.append(np.zeros(len(codes), dtype=np.int64))
            key_values = 1
        keys[-1] = keys[-1] * size + column
        key_values *= size
    return np.argsort(keys[0], kind="stable") if len(keys) == 1 else np.lexsort(keys[::-1])


def _encode_levels(matrix: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """(token ids of each level, ascending; codes [N, depth] int32: 1 + a token's index among them, 0 for padding)."""
    level_tokens, codes = [], np.empty(matrix.shape, dtype=np.int32, order="F")
    for level, column in enumerate(matrix.T):
        occurs = np.zeros(int(column.max()) + 2, dtype=bool)
        occurs[column + 1] = True
        occurs[0] = True
        codes[:, level] = (np.cumsum(occurs, dtype=np.int32) - 1)[column + 1]
        level_tokens.append(np.flatnonzero(occurs)[1:] - 1)
    return level_tokens, codes


def _check_ends(level_tokens: list[np.ndarray], codes: np.ndarray, lengths: np.ndarray, lcp: np.ndarray) -> None:
    """Stop at a sequence that goes on where the one before it, in lexicographic order, has ended."""
    continues = np.flatnonzero(lcp[1:] == lengths[:-1])
    if len(continues):
        short, long = (
            [int(level_tokens[level][code - 1]) for level, code in enumerate(codes[row]) if code]
            for row in (continues[0], continues[0] + 1)
        )
        raise ValueError(f"sequence {long} continues {short}: end tokens are missing")


def _count_forced_tokens(starts: list[int], children: list[np.ndarray], first_child: np.ndarray) -> np.ndarray:
    """[V] int8: tokens from each node to the end where there is only one way, else -1; deepest level first.

    Args:
        starts: the first node of each level, and the number of nodes V.
        children: per level, the number of children of each of its nodes.
        first_child: [V + 1], see `SidTrie`.
    """
    forced = np.full(starts[-1], -1, dtype=np.int8)
    for level in range(len(children) - 1, -1, -1):
        low, high = starts[level], starts[level + 1]
        below = forced[np.minimum(first_child[low:high], starts[-1] - 1)]
        one_way = (children[level] == 1) & (below >= 0)
        forced[low:high] = np.where(children[level] == 0, 0, np.where(one_way, below + 1, -1))
    return forced


class SidTrie:
    """All legal token sequences as a trie in flat tensors.

    Nodes are numbered level by level and, within a level, in lexicographic order, so the children of node v are the
    nodes first_child[v] .. first_child[v + 1] - 1 and every look-up is an index, with no Python per node. Node 0 is the
    root; a node of level j stands for j tokens. A token is kept as its code, its index among the tokens of its level.

    Args:
        sequences: N token-id sequences, each a SID's tokens followed by the end token(s), or a matrix [N, longest]
            padded with -1 on the right. Lengths may differ. Equal sequences are one path (items that share a SID).
        device: where the tensors live.

    Attributes:
        code: [V] of V nodes, the index in level_tokens of the token on the edge into a node; 0 for the root.
        first_child: [V + 1], see above.
        sequence: [V], the number of the sequence that ends in a node, or -1. The S distinct sequences are numbered
            0..S-1 in lexicographic order.
        forced: [V], tokens left to the end where only one way is left; -1 where there is a choice.
        leaf: [S], the node where each sequence ends.
        row_sequence: [N], the sequence number of each input row.
        level_tokens: per level 1..depth, the token ids that occur there, ascending.
        fanout: the largest number of children of a node, per level 0..depth.
        forced_range: (smallest, largest) of `forced` among the nodes of each level 0..depth.
        ends: whether a sequence ends in a node of each level 0..depth.

    Raises:
        ValueError: an empty list or sequence, padding before a token, more than 127 tokens, or a sequence that
            continues another (no end token).
    """

    TENSORS = ("code", "first_child", "sequence", "forced", "leaf", "row_sequence")

    def __init__(self, sequences: Sequence[Sequence[int]] | np.ndarray, device: str | torch.device = "cpu"):
        if not len(sequences):
            raise ValueError("a SidTrie needs at least one sequence")
        if isinstance(sequences, np.ndarray):
            matrix, lengths = sequences, (sequences >= 0).sum(axis=1)
        else:
            matrix, lengths = pad_sequences(sequences)
        if lengths.min() == 0:
            raise ValueError(f"sequence {int(lengths.argmin())} is empty")
        if (depth := int(lengths.max())) > 127:
            raise ValueError(f"a sequence has {depth} tokens; a SID of more than 127 is surely a mistake")
        self._build(matrix[:, :depth], lengths)
        self.to(device)

    def _build(self, matrix: np.ndarray, lengths: np.ndarray) -> None:
        """Fill all tables from token ids [N, depth], padded with -1, and their lengths [N]."""
        # Phase 1: the rows as codes in lexicographic order, equal ones once.
        level_tokens, codes = _encode_levels(matrix)
        if (np.count_nonzero(codes, axis=1) != lengths).any() or (codes[np.arange(len(codes)), lengths - 1] == 0).any():
            raise ValueError("padding (-1) stands before a token")
        order = sort_codes(codes, [len(tokens) + 1 for tokens in level_tokens])
        codes, lengths = codes[order], lengths[order]
        lcp = count_common_columns(codes)
        distinct = lcp < codes.shape[1]
        distinct[0] = True
        row_sequence = np.empty(len(order), dtype=np.int32)
        row_sequence[order] = np.cumsum(distinct, dtype=np.int32) - 1
        codes, lengths, lcp = codes[distinct], lengths[distinct], lcp[distinct]
        _check_ends(level_tokens, codes, lengths, lcp)

        # Phase 2: level by level, one node per distinct prefix.
        widest = max(map(len, level_tokens))
        starts = [0, 1]
        code = [np.zeros(1, dtype=np.int16 if widest < 2**15 else np.int32)]
        children, sequence = [], [np.full(1, -1, dtype=np.int32)]
        node = np.zeros(len(codes), dtype=np.int32)  # of every sequence, on the level before
        leaf = np.empty(len(codes), dtype=np.int32)
        for level in range(codes.shape[1]):
            is_new = (lcp <= level) & (level < lengths)
            new_rows = np.flatnonzero(is_new)
            children.append(np.bincount(node[new_rows] - starts[-2], minlength=starts[-1] - starts[-2]))
            node = (np.cumsum(is_new, dtype=np.int32) - 1) + np.int32(starts[-1])
            code.append((codes[new_rows, level] - 1).astype(code[0].dtype))
            ended_rows = np.flatnonzero(lengths == level + 1)
            leaf[ended_rows] = node[ended_rows]
            sequence.append(np.full(len(new_rows), -1, dtype=np.int32))
            sequence[-1][node[ended_rows] - starts[-1]] = ended_rows
            starts.append(starts[-1] + len(new_rows))
        children.append(np.zeros(starts[-1] - starts[-2], dtype=np.int64))
        self.fanout = [int(counts.max(initial=0)) for counts in children]
        first_child = np.ones(starts[-1] + 1, dtype=np.int32)
        np.cumsum(np.concatenate(children), out=first_child[1:])
        first_child[1:] += 1

        # Phase 3: how many tokens are forced before the end.
        forced = _count_forced_tokens(starts, children, first_child)

        self.code = torch.from_numpy(np.concatenate(code))
        self.first_child = torch.from_numpy(first_child)
        self.sequence = torch.from_numpy(np.concatenate(sequence))
        self.forced = torch.from_numpy(forced)
        self.leaf = torch.from_numpy(leaf)
        self.row_sequence = torch.from_numpy(row_sequence)
        self.level_tokens = [torch.from_numpy(tokens) for tokens in level_tokens]
        self._summarise_levels(starts)

    def _summarise_levels(self, starts: list[int]) -> None:
        """Note what a search would otherwise have to read from the device at every level."""
        levels = [slice(*bounds) for bounds in pairwise(starts)]
        self.forced_range = [tuple(map(int, self.forced[level].aminmax())) for level in levels]
        self.ends = [bool((self.sequence[level] >= 0).any()) for level in levels]

    def _find_starts(self) -> list[int]:
        """The first node of each level 0..depth, and the number of nodes."""
        starts = [0, 1]
        while starts[-1] < self.num_nodes:
            starts.append(int(self.first_child[starts[-1]]))
        return starts

    def to(self, device: str | torch.device) -> SidTrie:
        """Move all tensors; returns self."""
        for name in self.TENSORS:
            setattr(self, name, getattr(self, name).to(device))
        self.level_tokens = [tokens.to(device) for tokens in self.level_tokens]
        bounds = [(int(tokens[0]), int(tokens[-1]), len(tokens)) for tokens in self.level_tokens]
        self._first_token = [first if last - first + 1 == count else None for first, last, count in bounds]
        self.max_token = max(last for _, last, _ in bounds)
        self.device = torch.device(device)
        return self

    @property
    def depth(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.level_tokens)

    @property
    def num_nodes(self) -> int:
        """V, the root included."""
        return len(self.code)

    @property
    def num_sequences(self) -> int:
        """S, the number of distinct sequences."""
        return len(self.leaf)

    @property
    def num_bytes(self) -> int:
        """Memory of all tables, in bytes."""
        return sum(table.nbytes for table in (*(getattr(self, name) for name in self.TENSORS), *self.level_tokens))

    def children(self, nodes: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The children of nodes.

        Args:
            nodes: [...], all of one level.
            width: at least their largest fan-out.

        Returns:
            (children [..., width] int64, node 0 past the last child; which of them are children [..., width] bool).
        """
        child = self.first_child[nodes].unsqueeze(-1) + torch.arange(width, device=nodes.device)
        legal = child < self.first_child[nodes + 1].unsqueeze(-1)
        return torch.where(legal, child, 0), legal

    def codes(self, nodes: torch.Tensor, level: int) -> torch.Tensor:
        """What `tokens` returns, as indices [...] int64 in level_tokens[level - 1]."""
        return self.code[nodes].long().clamp_(max=len(self.level_tokens[level - 1]) - 1)

    def tokens(self, nodes: torch.Tensor, level: int) -> torch.Tensor:
        """The token ids [...] on the edges into `nodes` [...], all of one level >= 1.

        Where a node is the root, which stands for no child, any token of the level is returned.
        """
        tokens, code = self.level_tokens[level - 1], self.codes(nodes, level)
        # The tokens of a level are usually numbered without gaps: then no second look-up is needed.
        first = self._first_token[level - 1]
        return tokens[code] if first is None else code.add_(first)

    def advance(self, nodes: torch.Tensor, tokens: torch.Tensor, level: int) -> torch.Tensor:
        """The child of each node along a token.

        Args:
            nodes: [...], all of `level`, or -1.
            tokens: [...], one token id per node.
            level: of the nodes.

        Returns:
            The children [...], -1 where there is none.
        """
        if level >= self.depth:
            return torch.full_like(nodes, -1)
        level_tokens = self.level_tokens[level]
        code = torch.searchsorted(level_tokens, tokens.contiguous()).clamp(max=len(level_tokens) - 1)
        start = nodes.clamp(min=0)
        low, stop = self.first_child[start].long(), self.first_child[start + 1].long()
        high = stop
        # The children of a node are sorted by code: a bisection over all of them at once.
        for _ in range(self.fanout[level].bit_length()):
            middle = (low + high) // 2
            below = (middle < high) & (self.code[middle.clamp(max=self.num_nodes - 1)] < code)
            low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
        possible = (low < stop) & (nodes >= 0) & (level_tokens[code] == tokens)
        child = low.clamp(max=self.num_nodes - 1)
        return torch.where(possible & (self.code[child] == code), child, -1)

    def mask(self, nodes: torch.Tensor, vocab_size: int, level: int) -> torch.Tensor:
        """Legal next tokens [n, vocab_size] bool of `nodes` [n], all of `level` or -1; all False for -1 or an end."""
        allowed = torch.zeros(len(nodes), vocab_size + 1, dtype=torch.bool, device=nodes.device)
        if level < self.depth:
            child, legal = self.children(nodes.clamp(min=0), self.fanout[level])
            legal = legal & (nodes >= 0).unsqueeze(-1)
            # What is no child writes to one more column, which is cut off.
            allowed.scatter_(1, torch.where(legal, self.tokens(child, level + 1), vocab_size), True)
        return allowed[:, :vocab_size]

    def sequence_range(self, nodes: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of the sequences below nodes, which follow one another.

        Args:
            nodes: [...], all of `level`.
            level: of the nodes.

        Returns:
            (first number [...], one past the last number [...]).
        """
        first, last = nodes, nodes
        for _ in range(self.depth - level):
            low, stop = self.first_child[first].long(), self.first_child[first + 1]
            first = torch.where(stop > low, low, first)
            low, stop = self.first_child[last], self.first_child[last + 1].long()
            last = torch.where(stop > low, stop - 1, last)
        return self.sequence[first], self.sequence[last] + 1

    def sequences(self) -> list[list[int]]:
        """The token ids of every sequence, by number."""
        return [row[row >= 0].tolist() for row in self.matrix()]

    def matrix(self) -> np.ndarray:
        """All sequences [S, depth] as token ids, by number, padded with -1."""
        first_child, node = self.first_child.cpu().numpy(), self.leaf.cpu().numpy().copy()
        code = self.code.cpu().numpy()
        starts = self._find_starts()
        lengths = np.searchsorted(starts, node, side="right") - 1
        out = np.full((len(node), self.depth), -1, dtype=np.int64)
        for level in range(self.depth, 0, -1):
            rows = np.flatnonzero(lengths >= level)
            out[rows, level - 1] = self.level_tokens[level - 1].cpu().numpy()[code[node[rows]]]
            # The parent is the last node whose children begin at or before this one.
            first_children = first_child[starts[level - 1] : starts[level]]
            node[rows] = starts[level - 1] + np.searchsorted(first_children, node[rows], side="right") - 1
        return out

    def add(self, sequences: Sequence[Sequence[int]]) -> SidTrie:
        """A trie that also holds `sequences`, on the same device; they are its last rows (`row_sequence`).

        It is built anew, which takes as long as for all of them at once. Sequence numbers change, as they are
        lexicographic; numbers of rows do not.

        Raises:
            ValueError: as for a new trie.
        """
        new, _ = pad_sequences(sequences)
        old = self.matrix()
        joined = np.full((len(old) + len(new), max(old.shape[1], new.shape[1])), -1, dtype=np.int64)
        joined[: len(old), : old.shape[1]] = old
        joined[len(old) :, : new.shape[1]] = new
        trie = SidTrie(joined)
        rows = trie.row_sequence
        trie.row_sequence = torch.cat((rows[: len(old)][self.row_sequence.cpu().long()], rows[len(old) :]))
        return trie.to(self.device)

    def save(self, path: str | Path) -> None:
        """Write the tables as one safetensors file."""
        tables = {name: getattr(self, name).cpu() for name in self.TENSORS}
        tables |= {f"level_tokens.{level}": tokens.cpu() for level, tokens in enumerate(self.level_tokens)}
        with atomic_write(path) as temporary:
            save_file(tables | {"fanout": torch.tensor(self.fanout)}, temporary, {"format": "sid trie 1"})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> SidTrie:
        """Read what `save` wrote.

        Raises:
            InputError: a file that is missing or holds something else.
        """
        trie = cls.__new__(cls)
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("format") != "sid trie 1":
                    raise InputError(f"{path}: not a trie written by SidTrie.save")
                for name in cls.TENSORS:
                    setattr(trie, name, file.get_tensor(name))
                trie.fanout = file.get_tensor("fanout").tolist()
                trie.level_tokens = [file.get_tensor(f"level_tokens.{level}") for level in range(len(trie.fanout) - 1)]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a trie written by SidTrie.save ({error})") from None
        trie._summarise_levels(trie._find_starts())
        return trie.to(device)
