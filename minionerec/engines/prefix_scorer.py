"""Searches over an engine that knows prefixes and token ids only: one question per distinct prefix and level."""

from __future__ import annotations

import copy
import os
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

from minionerec.language.adapters import merge_adapters
from minionerec.search.scorer import Engine, Scorer, check_vocabulary
from minionerec.search.trie import SidTrie


class PrefixEngine(Engine):
    """An engine that gives log-probabilities of chosen tokens after a prefix, and can be given other weights.

    Attributes:
        vocabulary: how many tokens the model knows.
    """

    vocabulary: int

    @abstractmethod
    def score_tokens(self, prefixes: Sequence[list[int]], tokens: Sequence[list[int]]) -> list[list[float]]:
        """Log-probabilities over the full vocabulary.

        Args:
            prefixes: U token-id lists.
            tokens: U lists of token ids, those that may follow each prefix.

        Returns:
            U lists, as long as those of `tokens`.
        """

    @abstractmethod
    def load_file(self, path: str | Path) -> None:
        """Take the weights of a safetensors file, under the names that a Hugging Face checkpoint gives them."""

    def load_policy(self, model: PreTrainedModel | PeftModel) -> None:
        """Take the weights that a model has now; adapters are merged on a copy. All later scores are of these."""
        descriptor, path = tempfile.mkstemp(suffix=".safetensors", dir=find_memory_folder())
        os.close(descriptor)
        try:
            save_file(collect_weights(model), path)
            self.load_file(path)
        finally:
            os.unlink(path)

    @contextmanager
    def open_scorer(self, trie: SidTrie, prompts: Sequence[Sequence[int]]) -> Iterator[PrefixScorer]:
        """See `Engine.open_scorer`."""
        check_vocabulary(trie, self.vocabulary)
        if not len(prompts) or min(len(prompt) for prompt in prompts) == 0:
            raise ValueError("every prompt needs at least one token")
        yield PrefixScorer(self, trie, prompts)


def find_memory_folder() -> str | None:
    """A folder in memory, where the system has one; None stands for that of temporary files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def collect_weights(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """The weights of a model under the names of its checkpoint, on the CPU; what is tied to another is left out."""
    if isinstance(model, PeftModel):
        model = merge_adapters(copy.deepcopy(model))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name not in tied}


class PrefixScorer(Scorer):
    """The scorer of a `PrefixEngine`.

    Args:
        engine: what answers.
        trie: what is searched.
        prompts: n token-id lists.
    """

    def __init__(self, engine: PrefixEngine, trie: SidTrie, prompts: Sequence[Sequence[int]]):
        super().__init__(trie, len(prompts))
        self.engine, self.prompts = engine, [list(prompt) for prompt in prompts]
        self.appended = torch.zeros(*self.nodes.shape, 0, dtype=torch.long, device=trie.device)  # [n, W, level]

    def score_children(self, child: torch.Tensor, legal: torch.Tensor, relative: bool = False) -> torch.Tensor:
        tokens = self.trie.tokens(child, self.level + 1)
        # Samples of a prompt that have drawn the same tokens are one prefix; a prefix without a legal child is none.
        asked = legal.any(dim=-1)
        rows = torch.arange(len(child), device=child.device).unsqueeze(1).expand_as(asked)
        places = torch.stack((rows[asked], self.nodes[asked]), dim=1)
        distinct, which = torch.unique(places, dim=0, return_inverse=True)
        count = len(distinct)
        first = torch.full((count,), len(which), device=child.device)
        first.scatter_reduce_(0, which, torch.arange(len(which), device=child.device), "amin")
        allowed, ids = legal[asked][first], tokens[asked][first]
        appended = self.appended[asked][first].tolist()
        prefixes = [self.prompts[row] + new for row, new in zip(distinct[:, 0].tolist(), appended, strict=True)]
        children = [row[mask].tolist() for row, mask in zip(ids, allowed, strict=True)]
        scores = self.engine.score_tokens(prefixes, children) if count else []
        table = torch.zeros(allowed.shape, device=child.device)
        table[allowed] = torch.tensor([value for row in scores for value in row], device=child.device)
        gains = torch.zeros(child.shape, device=child.device)
        gains[asked] = table[which]
        return gains

    def _append(self, parent: torch.Tensor) -> None:
        before = self.appended.gather(1, parent.unsqueeze(-1).expand(-1, -1, self.level - 1))
        token = self.trie.tokens(self.nodes, self.level)
        self.appended = torch.cat((before, token.unsqueeze(-1)), dim=-1)
