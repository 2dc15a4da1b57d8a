"""Any Hugging Face model as the scorer of a search: every prefix a row of the model's own forward pass.

For models whose attention the search does not know: windows shorter than the prompts, biases of positions, layers that
are no attention. A prompt is computed once, alone and unpadded; its cache is copied for the prefixes of one level.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from minionerec.search.output_head import OutputHead
from minionerec.search.scorer import Scorer
from minionerec.search.trie import SidTrie


class RowScorer(Scorer):
    """A model that runs here, in evaluation mode and without gradients, with its own attention and cache.

    Args:
        model: any decoder-only HF model.
        trie: what is searched, on the model's device.
        prompts: n token-id lists of any lengths.

    Attributes:
        appended: [n, W, level], tokens of the running prefixes.
        states: [n, W, ...], what the output head reads after each of them.

    Raises:
        ValueError: no prompt, or an empty one.
    """

    def __init__(self, model: PreTrainedModel, trie: SidTrie, prompts: Sequence[Sequence[int]]):
        super().__init__(trie, len(prompts))
        if not len(prompts) or min(len(prompt) for prompt in prompts) == 0:
            raise ValueError("every prompt needs at least one token")
        self.output_head = OutputHead(model)
        self.appended = torch.zeros(*self.nodes.shape, 0, dtype=torch.long, device=trie.device)
        self.prompts = [torch.tensor([list(prompt)], device=trie.device) for prompt in prompts]
        self._caches, states = [], []
        for prompt in self.prompts:
            after, output = self.output_head.run(input_ids=prompt, use_cache=True)
            states.append(after[:, -1])
            self._caches.append(output.get("past_key_values"))
        self.states = torch.stack(states)

    def score_children(self, child: torch.Tensor, legal: torch.Tensor, relative: bool = False) -> torch.Tensor:
        return self.output_head.score(self.states, self.trie, child, self.level + 1, relative)

    def _append(self, parent: torch.Tensor) -> None:
        before = self.appended.gather(1, parent.unsqueeze(-1).expand(-1, -1, self.level - 1))
        token = self.trie.tokens(self.nodes, self.level)
        self.appended = torch.cat((before, token.unsqueeze(-1)), dim=-1)
        self.states = torch.stack([self._compute(number) for number in range(len(self.prompts))])

    def _compute(self, number: int) -> torch.Tensor:
        """What the head reads [W, ...] after the running prefixes of one prompt."""
        rows = self.appended[number]
        if self._caches[number] is None:
            rows = torch.cat((self.prompts[number].expand(len(rows), -1), rows), dim=1)
            return self.output_head.capture(input_ids=rows, use_cache=False)[:, -1]
        cache = copy.deepcopy(self._caches[number])
        cache.reorder_cache(torch.zeros(len(rows), dtype=torch.long, device=rows.device))
        # One token at a time, as `generate` does: layers that keep a state take no more.
        for column in rows.unsqueeze(-1).unbind(1):
            states = self.output_head.capture(input_ids=column, past_key_values=cache, use_cache=True)
        return states[:, -1]
