"""A Hugging Face model as the scorer of a search: every prompt prefilled once, all prefixes of a prompt in one row.

All running prefixes of a prompt are query tokens of the *same* row: a [n, 1, W, P + generated] mask lets each see the
prompt and its ancestors, so the KV cache is never copied, expanded or reordered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from transformers import PreTrainedModel

from minionerec.search.prefill import PrefilledPrompts
from minionerec.search.prefix_tree import check_tree_attention
from minionerec.search.scorer import Scorer, check_vocabulary
from minionerec.search.trie import SidTrie


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def open_tree_scorer(
    model: PreTrainedModel, trie: SidTrie, prompts: Sequence[Sequence[int]] | PrefilledPrompts, width: int
) -> Iterator[TreeScorer]:
    """A `TreeScorer` and, as long as it is in use, `evaluation_mode` and an attention for a few queries.

    Args:
        model: decoder-only HF model with full attention.
        trie: what is searched, on the model's device.
        prompts: n token-id lists of any lengths, or the prompts prefilled, with a capacity of `width` slots a level.
        width: prefixes that go on from one level to the next, at most.

    Raises:
        ValueError: an empty prompt, a model whose attention cannot follow a tree, a trie of another vocabulary.
    """
    check_tree_attention(model)
    check_vocabulary(trie, model.get_output_embeddings().weight.shape[0])
    attention = model.config._attn_implementation
    # flex_attention pays for long rows of queries, and would be compiled anew for the widths of a search.
    if attention == "flex_attention":
        model.set_attn_implementation("sdpa")
    try:
        with evaluation_mode(model):
            yield TreeScorer(model, trie, prompts, width)
    finally:
        if attention == "flex_attention":
            model.set_attn_implementation(attention)


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """`logsumexp` [n, W] over the last dimension, prompt by prompt: at once it would copy the array of all logits."""
    return torch.stack([row.logsumexp(dim=-1) for row in logits])


class TreeScorer(Scorer):
    """A model that runs here, in evaluation mode and without gradients: see `open_tree_scorer`.

    Args:
        model, trie, prompts, width: as for `open_tree_scorer`.

    Attributes:
        logits: [n, W, vocab] float32, after the last token of every running prefix.
        visible: [n, W, slots] bool, the slots each running prefix sees behind its prompt.
    """

    def __init__(
        self, model: PreTrainedModel, trie: SidTrie, prompts: Sequence[Sequence[int]] | PrefilledPrompts, width: int
    ):
        super().__init__(trie, len(prompts))
        if not isinstance(prompts, PrefilledPrompts):
            prompts = PrefilledPrompts(model, prompts, capacity=width * trie.depth)
        self.prefilled = prompts
        self.logits = self.prefilled.logits
        self.visible = torch.zeros(*self.nodes.shape, 0, dtype=torch.bool, device=trie.device)

    def score_children(self, child: torch.Tensor, legal: torch.Tensor, relative: bool = False) -> torch.Tensor:
        logits = self.logits.gather(-1, self.trie.tokens(child, self.level + 1))
        return logits if relative else logits - _logsumexp(self.logits).unsqueeze(-1)

    def _see_as(self, parent: torch.Tensor) -> torch.Tensor:
        """[n, W', slots] bool: what prefixes that continue `parent` [n, W'] see before tokens of their own."""
        return self.visible.gather(1, parent.unsqueeze(-1).expand(-1, -1, self.visible.shape[-1]))

    def _append(self, parent: torch.Tensor) -> None:
        width = parent.shape[1]
        itself = torch.eye(width, dtype=torch.bool, device=parent.device).expand(len(parent), -1, -1)
        self.visible = torch.cat((self._see_as(parent), itself), dim=-1)
        depth = torch.full((width,), self.level - 1, device=parent.device)
        self.logits = self.prefilled.extend(self.trie.tokens(self.nodes, self.level), depth, self.visible)

    def score_forced(
        self, nodes: torch.Tensor, parent: torch.Tensor, alive: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """As `Scorer.score_forced`, all tokens in one pass."""
        n, beams = nodes.shape
        depth, device = self.level + 1, nodes.device
        tokens = [self.trie.tokens(nodes, depth)]
        for level in range(depth + 1, depth + longest + 1):
            below = self.trie.first_child[nodes].long()
            # Where a shorter sequence has ended, anything may stand: its later columns are not read.
            nodes = torch.where(self.trie.first_child[nodes + 1] > below, below, 0)
            tokens.append(self.trie.tokens(nodes, level))
        tokens = torch.stack(tokens, dim=-1)  # [n, W', L + 1]
        slot = torch.arange(beams * longest, device=device)
        same_beam = (slot[:, None] // longest == slot[None, :] // longest) & (slot[None, :] <= slot[:, None])
        before = self._see_as(parent).repeat_interleave(longest, dim=1)
        visible = torch.cat((before, same_beam.expand(n, -1, -1)), dim=-1)
        logits = self.prefilled.extend(tokens[:, :, :-1].flatten(1), depth - 1 + slot % longest, visible)
        logits = logits.view(n, beams, longest, -1)
        return logits.gather(-1, tokens[:, :, 1:].unsqueeze(-1)).squeeze(-1) - _logsumexp(logits)


def choose_batch_size(model: PreTrainedModel, trie: SidTrie, longest_prompt: int, num_beams: int) -> int:
    """How many prompts `beam_search` can take at once: what half of the free memory holds.

    Counted are keys and values, masks and attention weights, logits and candidates. More prompts would not make a CPU
    faster.

    Args:
        model: the model that will search.
        trie: the trie that will be searched.
        longest_prompt: tokens of the longest prompt.
        num_beams: beams of each prompt.

    Returns:
        The number of prompts, 1 to 32 on a CPU, 1 to 256 elsewhere.
    """
    config, on_cpu = model.config.get_text_config(), model.device.type == "cpu"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slots, element = longest_prompt + num_beams * trie.depth, model.dtype.itemsize
    queries = max(longest_prompt, num_beams * trie.depth)
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    cache = 2 * config.num_hidden_layers * key_heads * width * slots * element
    # Attention weights of one layer, their mask, and the widest hidden states.
    activations = queries * (slots * (config.num_attention_heads * element + 5) + 4 * inner * element)
    rows = num_beams * max(1, trie.depth - 1)  # the forced tail has the most rows of logits
    logits = rows * model.get_output_embeddings().weight.shape[0] * (element + 8)
    candidates = num_beams * max(trie.fanout) * 48
    if on_cpu:
        free = psutil.virtual_memory().available
    else:
        free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else 2**32
    return max(1, min(32 if on_cpu else 256, int(free / 2 / (cache + activations + logits + candidates))))
