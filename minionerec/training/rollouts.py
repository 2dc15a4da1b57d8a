"""Completions of a batch of prompts as sequence numbers of the trie: beam search or sampling, and what is kept of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from minionerec.search.beam_search import beam_search, sample
from minionerec.search.trie import SidTrie


def keep_diverse(drawn: Sequence[int], target: int, count: int) -> list[int]:
    """`count` of the drawn completions, in their order: the target if it was drawn, then distinct ones, then repeats."""
    first = {number: place for place, number in reversed(list(enumerate(drawn)))}
    kept = {first[target]} if target in first else set()
    for places in (sorted(first.values()), range(len(drawn))):
        for place in places:
            if len(kept) < count:
                kept.add(place)
    return [drawn[place] for place in sorted(kept)]


def roll_out(
    model: PreTrainedModel,
    trie: SidTrie,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[int],
    count: int,
    batch_size: int,
    beams: bool = True,
    temperature: float = 1.0,
    dynamic: bool = False,
    add_target: bool = False,
    renormalize: bool = False,
    seed: str = "",
) -> list[list[int]]:
    """Sequence numbers of every prompt's completions, best first (beams) or in order of drawing.

    Args:
        targets: each prompt's sequence number. count: completions per prompt; fewer only where the catalogue is smaller.
        batch_size: prompts per forward pass.
        beams: the best `count` sequences, all distinct; otherwise independent draws at `temperature`.
        dynamic: find half as many again and keep `keep_diverse` of them.
        add_target: put the target in the last place of a group that lacks it.
        renormalize: rank beams by probabilities over the legal tokens.
        seed: what the draws are a function of, beside the prompts and the weights.
    """
    wanted = count + count // 2 if dynamic else count
    generator = torch.Generator(model.device).manual_seed(_hash_seed(seed))
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    groups: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = [prompts[place] for place in places]
        if beams:
            found = beam_search(model, trie, batch, wanted, renormalize=renormalize)
        else:
            found = sample(model, trie, batch, wanted, temperature, generator)
        for place, numbers in zip(places, found.sequence.tolist()):
            drawn = [number for number in numbers if number >= 0]
            groups[place] = keep_diverse(drawn, targets[place], count) if dynamic else drawn
    if add_target:
        for group, target in zip(groups, targets):
            if target not in group:
                group[-1] = target
    return groups


def _hash_seed(seed: str) -> int:
    """A seed of 63 bits from a text, the same on every machine and in every run."""
    value = 0
    for byte in seed.encode():
        value = (value * 257 + byte + 1) % (2**63 - 25)
    return value


def find_legal_tokens(trie: SidTrie, completions: torch.Tensor) -> torch.Tensor:
    """Which tokens the trie allows at each place of completions: ids [C, depth, most children], -1 where there are fewer.

    completions: [C, depth] token ids, -1 past a completion's end; the rows there are all -1.
    """
    widest = max(trie.fanout)
    table = torch.full((*completions.shape, widest), -1, dtype=torch.long, device=completions.device)
    nodes = torch.zeros(len(completions), dtype=torch.long, device=completions.device)
    for level in range(completions.shape[1]):
        width = trie.fanout[level]
        child, legal = trie.children(nodes.clamp(min=0), width)
        legal &= (completions[:, level] >= 0).unsqueeze(-1)
        table[:, level, :width] = trie.tokens(child, level + 1).masked_fill(~legal, -1)
        nodes = trie.advance(nodes, completions[:, level], level).long()
    return table
