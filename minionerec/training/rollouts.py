"""Completions of prompts as sequence numbers of the trie: by beam search or sampling, and which of them are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.language.models import choose_dtype
from minionerec.search.beam_search import beam_search, sample
from minionerec.search.kept_head import KeptHead
from minionerec.search.scorer import Engine
from minionerec.search.shared_prompts import SharedPrompts
from minionerec.search.trie import SidTrie


def choose_rollout_dtype(
    requested: str | None, model: torch.nn.Module, device: torch.device, trains_in_bf16: bool
) -> torch.dtype | None:
    """The precision of rollouts, None where it is simply that of the training.

    Args:
        requested: --rollout_dtype, see `choose_dtype`.
        model: the policy.
        device: where it is.
        trains_in_bf16: whether the training computes under bf16 autocast.

    Raises:
        InputError: float32 where every forward pass of the policy is under bf16 autocast.
    """
    if requested is None:
        return None
    if trains_in_bf16:
        if requested == "float32":
            raise InputError("--rollout_dtype float32: training computes in bfloat16 here, and so do its rollouts")
        return None
    dtype = choose_dtype(requested, model, device)
    say(f"[rl] rollouts in {str(dtype).removeprefix('torch.')}")
    return None if dtype == torch.float32 else dtype


def compute_in(dtype: torch.dtype | None, model: PreTrainedModel) -> contextlib.AbstractContextManager:
    """Autocast to `dtype`; nothing changes where it is None.

    Autocast casts a trained weight once while it is entered and forgets the copy on leaving. So rollouts always see the
    newest weights, however they are wrapped or sharded, and pay for one cast a step.
    """
    return contextlib.nullcontext() if dtype is None else torch.autocast(model.device.type, dtype)


def keep_diverse(drawn: Sequence[int], target: int, count: int) -> list[int]:
    """`count` of the drawn completions, in their order: first the target, then distinct ones, then repeats."""
    first = {number: index for index, number in reversed(list(enumerate(drawn)))}
    kept = {first[target]} if target in first else set()
    for indices in (sorted(first.values()), range(len(drawn))):
        for index in indices:
            if len(kept) < count:
                kept.add(index)
    return [drawn[index] for index in sorted(kept)]


def roll_out(
    model: PreTrainedModel | Engine,
    trie: SidTrie,
    prompts: Sequence[Sequence[int]],
    *,
    targets: Sequence[int],
    count: int,
    batch_size: int,
    beams: bool = True,
    temperature: float = 1.0,
    dynamic: bool = False,
    add_target: bool = False,
    renormalize: bool = False,
    seed: str = "",
    shared: SharedPrompts | None = None,
) -> list[list[int]]:
    """Sequence numbers of every prompt's completions, best first (beams) or in order of drawing.

    Args:
        model, trie: the policy and the catalogue, on one device; or an engine that runs the policy, and the catalogue.
        prompts: token ids.
        targets: each prompt's sequence number.
        count: completions per prompt; fewer only where the catalogue is smaller.
        batch_size: prompts per forward pass.
        beams: the best `count` sequences, all distinct; otherwise independent draws at `temperature`.
        temperature: of the draws.
        dynamic: find half as many again and keep `keep_diverse` of them.
        add_target: put the target at the end of a group that lacks it.
        renormalize: rank beams by probabilities over the legal tokens.
        seed: what the draws are a function of, beside the prompts and the weights.
        shared: the prompts, where they are computed already.
    """
    width = count + count // 2 if dynamic else count
    generator = torch.Generator(trie.device).manual_seed(_hash_seed(seed))
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    groups: list[list[int]] = [[] for _ in prompts]
    kept = KeptHead()  # for this call alone: the weights change between steps
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = [prompts[number] for number in numbers]
        if shared is not None:
            batch = shared.prefill(numbers)
        if beams:
            result = beam_search(model, trie, batch, width, renormalize=renormalize, kept=kept)
        else:
            result = sample(model, trie, batch, width, temperature, generator)
        for number, sequences in zip(numbers, result.sequence.tolist(), strict=True):
            drawn = [sequence for sequence in sequences if sequence >= 0]
            groups[number] = keep_diverse(drawn, targets[number], count) if dynamic else drawn
    if add_target:
        for group, target in zip(groups, targets, strict=True):
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
    """Which tokens the trie allows at each position of completions.

    Args:
        trie: the catalogue.
        completions: [C, depth] token ids, -1 past a completion's end.

    Returns:
        Token ids [C, depth, most children], -1 where there are fewer and past a completion's end.
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
