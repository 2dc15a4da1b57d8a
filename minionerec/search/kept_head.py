"""What the prompts of a run begin with, computed for one batch and kept for the next."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from minionerec.search.prefix_tree import count_shared_tokens


class KeptHead:
    """What the prompts of a run begin with, kept from batch to batch.

    Whoever owns it vouches that the weights stay what they are, or calls `clear`. In-place changes are noticed as far
    as torch counts them; an optimizer that writes through `Parameter.data` goes unnoticed.

    Attributes:
        tokens: token ids of the head; empty where nothing is kept.
        keys, values: of each layer, [1, key heads, tokens, width].
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Keep nothing."""
        self.tokens: list[int] = []
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._weights: list[tuple[int, int]] = []

    def begin(self, model: PreTrainedModel, head: list[int]) -> int:
        """How many of the tokens `head` need not be computed for this model; 0 after its weights have changed."""
        weights = [(weight.data_ptr(), weight._version) for weight in model.parameters()]
        if weights != self._weights:
            self.clear()
            self._weights = weights
        return count_shared_tokens(self.tokens, head)

    def keep(self, tokens: list[int], keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        """Keep the head of a batch instead of what was kept before."""
        self.tokens = tokens
        self.keys, self.values = ([states.clone() for states in layers] for layers in (keys, values))
