"""The parts of a trie that single prompts may search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from minionerec.search.trie import SidTrie


class SubTries:
    """Which sequences each of n prompts may end in: all but some, or only some.

    Args:
        trie: the catalogue.
        excluded: sequence numbers per prompt that are not allowed, whether included or not; None excludes nothing.
        included: sequence numbers per prompt that alone are allowed; None, also as an entry, allows all.

    Raises:
        ValueError: lists for different numbers of prompts, a number that is not in the trie, or a prompt that is left
            without any sequence.
    """

    def __init__(
        self,
        trie: SidTrie,
        excluded: Sequence[Sequence[int]] | None,
        included: Sequence[Sequence[int] | None] | None,
    ):
        rows = len(excluded if excluded is not None else included)
        excluded = excluded if excluded is not None else [()] * rows
        included = included if included is not None else [None] * rows
        if len(excluded) != len(included):
            raise ValueError(f"{len(excluded)} lists of excluded sequences, but {len(included)} of included ones")
        numbers = []
        for row, (not_allowed, only_allowed) in enumerate(zip(excluded, included, strict=True)):
            listed = np.unique(np.asarray(not_allowed, dtype=np.int64))
            if only_allowed is not None:
                listed = np.setdiff1d(np.asarray(only_allowed, dtype=np.int64), listed)
            if len(listed) and not 0 <= listed[0] <= listed[-1] < trie.num_sequences:
                raise ValueError(f"prompt {row}: sequence numbers must lie in 0..{trie.num_sequences - 1}")
            if len(listed) == (trie.num_sequences if only_allowed is None else 0):
                raise ValueError(f"prompt {row}: no sequence is left that may be found")
            numbers.append(listed)
        table = np.full((rows, max(map(len, numbers))), trie.num_sequences, dtype=np.int64)
        for row, listed in enumerate(numbers):
            table[row, : len(listed)] = listed
        self.trie = trie
        self.listed = torch.from_numpy(table).to(trie.device)
        self.only_listed = torch.tensor([numbers is not None for numbers in included], device=trie.device)

    def alive(self, nodes: torch.Tensor, level: int) -> torch.Tensor:
        """Which of `nodes` [n, ...], all of `level`, have an allowed sequence of their prompt below; bool [n, ...]."""
        first, stop = (bound.flatten(1).long() for bound in self.trie.sequence_range(nodes, level))
        listed = torch.searchsorted(self.listed, stop) - torch.searchsorted(self.listed, first)
        allowed = torch.where(self.only_listed[:, None], listed, stop - first - listed)
        return (allowed > 0).view_as(nodes)
