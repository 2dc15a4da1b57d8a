"""Log-probabilities of a few tokens after hidden states, without the logits of all others side by side.

A search compares the children of a node: a hundred logits of 50,000 to 150,000. The whole vocabulary is only needed for
the normaliser, which is summed up block by block. So no array [states, vocabulary] is ever written.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from minionerec.search.modes import evaluation_mode
from minionerec.search.products import multiply
from minionerec.search.trie import SidTrie

# Logits of a block: what stays in a core's caches; on a GPU, what keeps it busy.
BLOCK = {"cpu": 2**19}
BLOCK_ELSEWHERE = 2**27

_plain_heads: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()  # of models asked before


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether a model's logits are a product with its output matrix and nothing else: no cap, no factor.

    The model is asked: once for each object, its logits of large hidden states are compared with the product.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return False
    if head not in _plain_heads:
        _plain_heads[head] = _ask_head(model, head)
    return _plain_heads[head]


def _ask_head(model: PreTrainedModel, head: torch.nn.Linear) -> bool:
    products: list[torch.Tensor] = []

    def replace(_module, inputs):
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(inputs[0].shape, generator=generator).to(inputs[0])
        # So large that a cap shows, and not too large for half precision.
        states *= 1000 / linear(states, head.weight).abs().amax().clamp(min=1e-6)
        products.append(linear(states, head.weight, head.bias).float())
        return (states,)

    handle = head.register_forward_pre_hook(replace)
    try:
        with evaluation_mode(model):
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False).logits
    finally:
        handle.remove()
    return len(products) == 1 and torch.allclose(logits.float(), products[0], rtol=1e-2, atol=1)


class OutputHead:
    """What turns hidden states into log-probabilities.

    Args:
        model: whose forward pass is run. Where its head is more than a product, its own logits are read.

    Attributes:
        is_plain: whether hidden states are read, and not logits.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._head = model.get_output_embeddings()
        self.is_plain = has_plain_head(model)

    def choose(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Which of hidden states and their logits `score` reads."""
        return hidden if self.is_plain else logits

    def capture(self, **arguments) -> torch.Tensor:
        """Run the model.

        Args:
            arguments: of its forward pass.

        Returns:
            What `score` reads, for every state that has logits: hidden states [..., hidden], or logits [..., vocab].
        """
        return self.run(**arguments)[0]

    def run(self, **arguments) -> tuple[torch.Tensor, ModelOutput]:
        """As `capture`, and with it the model's whole output."""
        if not self.is_plain:
            output = self.model(**arguments)
            return output.logits, output
        states = []

        def take(_module, inputs):
            states.append(inputs[0])
            return (inputs[0][..., :0, :],)  # nothing is left to be multiplied

        handle = self._head.register_forward_pre_hook(take)
        try:
            output = self.model(**arguments)
        finally:
            handle.remove()
        return states[0], output

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
        if self.is_plain:
            tokens = trie.level_tokens[level - 1]
            table, index = self._multiply(states, tokens), trie.codes(nodes, level)
        else:
            table, index = states.float(), trie.tokens(nodes, level)
        gains = table.gather(-1, index)
        return gains if relative else gains - self._sum_up(states).unsqueeze(-1)

    def _multiply(self, states: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """Logits float32 of some tokens."""
        bias = self._head.bias
        return multiply(states, self._head.weight[rows], None if bias is None else bias[rows]).float()

    def _sum_up(self, states: torch.Tensor) -> torch.Tensor:
        """logsumexp [...] of all logits."""
        block = BLOCK.get(states.device.type, BLOCK_ELSEWHERE)
        flat = states.flatten(0, -2)
        if self.is_plain:
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
