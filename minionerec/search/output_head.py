"""Log-probabilities of a few tokens after hidden states, without the logits of all others side by side.

A search compares the children of a node: a hundred logits of 50,000 to 150,000. The whole vocabulary is only needed for
the normaliser, which is summed up block by block. So no array [states, vocabulary] is ever written.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from minionerec.search.trie import SidTrie

# Models whose logits are a product with the output matrix and nothing else: no cap, no factor.
PLAIN_HEADS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# Logits of a block: what stays in a core's caches; on a GPU, what keeps it busy.
BLOCK = {"cpu": 2**19}
BLOCK_ELSEWHERE = 2**27


class OutputHead:
    """What turns hidden states into log-probabilities.

    Args:
        model: whose forward pass is run. Where its head is more than a product, its own logits are read.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        head = model.get_output_embeddings()
        self._head = head
        self._is_plain = type(head) is torch.nn.Linear and model.config.get_text_config().model_type in PLAIN_HEADS

    def choose(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Which of hidden states and their logits `score` reads."""
        return hidden if self._is_plain else logits

    def capture(self, **arguments) -> torch.Tensor:
        """Run the model.

        Args:
            arguments: of its forward pass.

        Returns:
            What `score` reads, for every state that has logits: hidden states [..., hidden], or logits [..., vocab].
        """
        if not self._is_plain:
            return self.model(**arguments).logits
        states = []

        def take(_module, inputs):
            states.append(inputs[0])
            return (inputs[0][..., :0, :],)  # nothing is left to be multiplied

        handle = self._head.register_forward_pre_hook(take)
        try:
            self.model(**arguments)
        finally:
            handle.remove()
        return states[0]

    def score(
        self, states: torch.Tensor, trie: SidTrie, nodes: torch.Tensor, level: int, relative: bool = False
    ) -> torch.Tensor:
        """Score the tokens on the edges into nodes.

        Args:
            states: [..., hidden or vocab] of `capture`.
            trie: of the nodes.
            nodes: [..., F], candidates after each state, all of `level`.
            level: of the nodes.
            relative: leave out the normaliser.

        Returns:
            Log-probabilities [..., F] float32 over the full vocabulary; where `relative`, logits.
        """
        if self._is_plain:
            tokens = trie.level_tokens[level - 1]
            table, index = self._multiply(states, tokens), trie.codes(nodes, level)
        else:
            table, index = states.float(), trie.tokens(nodes, level)
        gains = table.gather(-1, index)
        return gains if relative else gains - self._sum_up(states).unsqueeze(-1)

    def _multiply(self, states: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """Logits float32 of some tokens."""
        bias = self._head.bias
        return linear(states, self._head.weight[rows], None if bias is None else bias[rows]).float()

    def _sum_up(self, states: torch.Tensor) -> torch.Tensor:
        """logsumexp [...] of all logits."""
        block = BLOCK.get(states.device.type, BLOCK_ELSEWHERE)
        flat = states.flatten(0, -2)
        if self._is_plain:
            vocabulary = self._head.weight.shape[0]
            step = max(1024, block // len(flat))
            parts = []
            for start in range(0, vocabulary, step):
                logits = self._multiply(flat, slice(start, start + step))
                largest = logits.amax(dim=-1, keepdim=True)
                # In place: `logsumexp` would write two more arrays of this size.
                parts.append(logits.sub_(largest).exp_().sum(dim=-1).log_().add_(largest[:, 0]))
            summed = torch.stack(parts).logsumexp(dim=0)
        else:
            # At once it would copy the array of all logits.
            rows = max(1, block // flat.shape[-1])
            summed = torch.cat([part.float().logsumexp(dim=-1) for part in flat.split(rows)])
        return summed.view(states.shape[:-1])
