"""What a search asks of a model: the log-probabilities of the children of running prefixes, whatever computes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from minionerec.search.trie import SidTrie


class Scorer(ABC):
    """A model after n prompts and what a search has appended to them.

    At first one prefix runs in every prompt, the empty one, which stands at the root of the trie.

    Args:
        trie: what is searched; all tensors are on its device.

    Attributes:
        nodes: [n, W], where the running prefixes stand.
        level: of these nodes.
    """

    def __init__(self, trie: SidTrie, prompts: int):
        self.trie, self.level = trie, 0
        self.nodes = torch.zeros(prompts, 1, dtype=torch.long, device=trie.device)

    @abstractmethod
    def score_children(self, child: torch.Tensor, legal: torch.Tensor, relative: bool = False) -> torch.Tensor:
        """Score the tokens that may follow the running prefixes.

        Args:
            child: [n, W, F], the children of every running prefix in the trie.
            legal: [n, W, F] bool, which of them count.
            relative: only differences between the children of one prefix will be used.

        Returns:
            Gains [n, W, F] float32: log-probabilities over the full vocabulary, or, where `relative`, plus a constant
            of each prefix. Where a child is not legal they hold no meaning.
        """

    def follow(self, nodes: torch.Tensor, parent: torch.Tensor) -> None:
        """Go on with other prefixes, each one token longer than one that runs now.

        Args:
            nodes: [n, W'], where they stand; some may be continued no further.
            parent: [n, W'], the running prefix that each continues.
        """
        self.nodes, self.level = nodes, self.level + 1
        self._append(parent)

    @abstractmethod
    def _append(self, parent: torch.Tensor) -> None:
        """Append the tokens on the edges into `nodes` [n, W'] to the prefixes `parent` [n, W']."""

    def score_forced(
        self, nodes: torch.Tensor, parent: torch.Tensor, alive: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """Score the tokens that must follow prefixes with one way left; nothing may be asked afterwards.

        Args:
            nodes, parent: [n, W'], as for `follow`.
            alive: [n, W'] bool, which of them count.
            longest: L, tokens of the longest way.

        Returns:
            Log-probabilities [n, W', L] float32; columns past the end of a shorter way hold no meaning.
        """
        gains, itself = [], torch.arange(nodes.shape[1], device=nodes.device).expand_as(nodes)
        for _ in range(longest):
            self.follow(nodes, parent)
            child, legal = self.trie.children(nodes, 1)
            alive = alive & legal[..., 0]
            gains.append(self.score_children(child, alive.unsqueeze(-1)))
            nodes, parent = child[..., 0], itself
        return torch.cat(gains, dim=-1)


class Engine(ABC):
    """A model that runs elsewhere, for example in processes of its own, and can be searched like one that runs here.

    Attributes:
        config: of the model, where it is known.
    """

    config: object | None = None

    @abstractmethod
    def open_scorer(self, trie: SidTrie, prompts: Sequence[Sequence[int]]) -> AbstractContextManager[Scorer]:
        """A scorer of n prompts, for one search.

        Raises:
            ValueError: no prompt, an empty one, or a trie of another vocabulary.
        """


def check_vocabulary(trie: SidTrie, vocabulary: int) -> None:
    """Stop at a trie whose tokens a model with `vocabulary` tokens does not know.

    Raises:
        ValueError: saying so.
    """
    if trie.max_token >= vocabulary:
        raise ValueError(
            f"the trie holds token {trie.max_token}, but the model knows {vocabulary} tokens: another tokenizer?"
        )
