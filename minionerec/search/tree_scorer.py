"""A Hugging Face model as the scorer of a search: every prompt computed once, all prefixes of a prompt in one row."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from transformers import PreTrainedModel

from minionerec.common.processes import say
from minionerec.search.attention_check import find_obstacle
from minionerec.search.kept_head import KeptHead
from minionerec.search.modes import evaluation_mode, use_attention
from minionerec.search.output_head import OutputHead
from minionerec.search.prefill import ATTENTION, PrefilledPrompts
from minionerec.search.products import fast_products
from minionerec.search.row_scorer import RowScorer
from minionerec.search.scorer import Scorer, check_vocabulary
from minionerec.search.trie import SidTrie


@functools.cache  # once a run
def _announce(family: str, obstacle: str) -> None:
    say(f"[search] {family}: {obstacle}; every beam is a row of its own forward pass, which is slower")


@contextmanager
def open_model_scorer(
    model: PreTrainedModel,
    trie: SidTrie,
    prompts: Sequence[Sequence[int]] | PrefilledPrompts,
    kept: KeptHead | None = None,
) -> Iterator[TreeScorer | RowScorer]:
    """The fastest scorer that gives what the model's own forward pass gives; and, as long as it is in use,
    `evaluation_mode`, and the attention of `PrefilledPrompts` where the model takes it.

    Args:
        model: decoder-only HF model.
        trie: what is searched, on the model's device.
        prompts: n token-id lists of any lengths, or the prompts prefilled, which serve one search.
        kept: what earlier prompts of the same weights began with, or None.

    Raises:
        ValueError: an empty prompt, a trie of another vocabulary.
    """
    check_vocabulary(trie, model.get_output_embeddings().weight.shape[0])
    if not isinstance(prompts, PrefilledPrompts):
        obstacle = find_obstacle(model, max(map(len, prompts), default=0) + trie.depth)
        if obstacle is not None:
            _announce(model.config.model_type, obstacle)
            with evaluation_mode(model), fast_products(model):
                yield RowScorer(model, trie, prompts)
            return
    with evaluation_mode(model), use_attention(model, ATTENTION), fast_products(model):
        yield TreeScorer(model, trie, prompts, kept)


class TreeScorer(Scorer):
    """A model that runs here, in evaluation mode and without gradients: see `open_model_scorer`.

    Args:
        model, trie, prompts, kept: as for `open_model_scorer`.

    Attributes:
        states: [n, W, ...], what the output head reads after the last token of every running prefix.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trie: SidTrie,
        prompts: Sequence[Sequence[int]] | PrefilledPrompts,
        kept: KeptHead | None = None,
    ):
        super().__init__(trie, len(prompts))
        if not isinstance(prompts, PrefilledPrompts):
            prompts = PrefilledPrompts(model, prompts, OutputHead(model), kept)
        self.prefilled, self.output_head, self.states = prompts, prompts.output_head, prompts.states

    def score_children(self, child: torch.Tensor, legal: torch.Tensor, relative: bool = False) -> torch.Tensor:
        return self.output_head.score(self.states, self.trie, child, self.level + 1, relative)

    def _append(self, parent: torch.Tensor) -> None:
        tokens = self.trie.tokens(self.nodes, self.level).unsqueeze(-1)
        self.states = self.prefilled.extend(tokens, parent, self.level - 1).squeeze(2)

    def score_forced(
        self, nodes: torch.Tensor, parent: torch.Tensor, alive: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """As `Scorer.score_forced`, all tokens in one pass."""
        level = self.level + 1
        chain = [nodes]
        for _ in range(longest):
            below = self.trie.first_child[nodes].long()
            # Where a shorter sequence has ended, anything may stand: its later columns are not read.
            nodes = torch.where(self.trie.first_child[nodes + 1] > below, below, 0)
            chain.append(nodes)
        fed = [self.trie.tokens(nodes, level + step) for step, nodes in enumerate(chain[:-1])]
        states = self.prefilled.extend(torch.stack(fed, dim=-1), parent, self.level)
        gains = [
            self.output_head.score(states[:, :, step], self.trie, nodes.unsqueeze(-1), level + 1 + step)
            for step, nodes in enumerate(chain[1:])
        ]
        return torch.cat(gains, dim=-1)


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
    heads = getattr(config, "num_attention_heads", None) or 1  # not every layer is an attention
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    slots, element = longest_prompt + num_beams * trie.depth, model.dtype.itemsize
    queries = max(longest_prompt, num_beams * trie.depth)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    cache = 2 * config.num_hidden_layers * key_heads * width * slots * element
    # Attention weights of one layer, their mask, and the widest hidden states.
    activations = queries * (slots * (heads * element + 5) + 4 * inner * element)
    rows = num_beams * max(1, trie.depth - 1)  # the forced tail has the most rows of logits
    logits = rows * model.get_output_embeddings().weight.shape[0] * (element + 8)
    candidates = num_beams * max(trie.fanout) * 48
    if on_cpu:
        free = psutil.virtual_memory().available
    else:
        free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else 2**32
    return max(1, min(32 if on_cpu else 256, int(free / 2 / (cache + activations + logits + candidates))))
