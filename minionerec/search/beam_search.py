"""Exact constrained beam search and sampling over a `SidTrie`, with every prompt prefilled once.

All beams of a prompt are query tokens of the *same* row: a [n, 1, W, P + generated] mask lets each beam see the prompt and
its own ancestors, so the KV cache is never copied, expanded or reordered. Candidates are the legal children only. The
result equals Hugging Face `generate(num_beams=B)` with a prefix-constraining processor, the finished-beam pool and the
length penalty included; a checkpoint's `generation_config` is never read. What all prompts of a batch begin with is
prefilled once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel

from minionerec.search.prefill import PrefilledPrompts
from minionerec.search.prefix_tree import check_tree_attention
from minionerec.search.trie import SidTrie, SubTries

NEGATIVE = float("-inf")


@dataclass
class SearchResult:
    """Sequences found per prompt.

    Attributes:
        sequence [n, B] int64: number of the sequence in the trie (`SidTrie.sequence_tokens`), -1 for an empty place.
        score [n, B] float32: sum of full-vocabulary log-probabilities, end token included, divided by
            length ** length_penalty; -inf for an empty place.
    """

    sequence: torch.Tensor
    score: torch.Tensor


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
def _inference(model: PreTrainedModel, trie: SidTrie) -> Iterator[None]:
    """`evaluation_mode` with an attention for a few queries, once it is checked that model and trie belong together."""
    check_tree_attention(model)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if trie.max_token >= vocabulary:
        raise ValueError(
            f"the trie holds token {trie.max_token}, but the model knows {vocabulary} tokens: another tokenizer?"
        )
    attention = model.config._attn_implementation
    # flex_attention pays for long rows of queries, and would be compiled anew for the widths of a search.
    if attention == "flex_attention":
        model.set_attn_implementation("sdpa")
    try:
        with evaluation_mode(model):
            yield
    finally:
        if attention == "flex_attention":
            model.set_attn_implementation(attention)


def stable_topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, places) [n, k] of the largest of each row of [n, m], best first; of equal ones the first place comes first.

    `torch.topk` leaves open which of equal values it takes. Ties are common in bf16.
    """
    # A float's bits, read as an integer, order positive floats; flipping those of negative ones orders all of them.
    bits = (values + 0.0).view(torch.int32)  # + 0.0: there is only one zero
    bits ^= (bits >> 31) & 0x7FFFFFFF
    last = values.shape[1] - 1
    keys = bits.long().bitwise_left_shift_(32).add_(torch.arange(last, -1, -1, device=values.device))
    places = last - (keys.topk(k, dim=1).values & 0xFFFFFFFF)
    return values.gather(1, places), places


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """`logsumexp` [n, W] over the last dimension, prompt by prompt: at once it would write another array of their size."""
    return torch.stack([row.logsumexp(dim=-1) for row in logits])


def choose_batch_size(model: PreTrainedModel, trie: SidTrie, longest_prompt: int, num_beams: int) -> int:
    """Prompts a batch of `beam_search` can hold: what half of the free memory takes, at most 32 on CPU and 256 elsewhere.

    More does not make a CPU faster. Counted are keys and values, masks and attention weights, logits and candidates.
    """
    config, on_cpu = model.config.get_text_config(), model.device.type == "cpu"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slots, element = longest_prompt + num_beams * trie.depth, model.dtype.itemsize
    queries = max(longest_prompt, num_beams * trie.depth)
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    kept = 2 * config.num_hidden_layers * key_heads * width * slots * element
    # Attention weights of one layer, the mask beside them, and the widest hidden states.
    passing = queries * (slots * (config.num_attention_heads * element + 5) + 4 * inner * element)
    rows = num_beams * max(1, trie.depth - 1)  # the forced tail has the most rows of logits
    logits = rows * model.get_output_embeddings().weight.shape[0] * (element + 8)
    candidates = num_beams * max(trie.fanout) * 48
    if on_cpu:
        free = psutil.virtual_memory().available
    else:
        free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else 2**32
    return max(1, min(32 if on_cpu else 256, int(free / 2 / (kept + passing + logits + candidates))))


def beam_search(
    model: PreTrainedModel,
    trie: SidTrie,
    prompts: Sequence[Sequence[int]],
    num_beams: int,
    length_penalty: float = 0.0,
    renormalize: bool = False,
    excluded: Sequence[Sequence[int]] | None = None,
    included: Sequence[Sequence[int] | None] | None = None,
) -> SearchResult:
    """The `num_beams` best sequences of `trie` after each prompt, best first.

    Args:
        model: decoder-only HF model with full attention (sdpa or eager; flex_attention is set to sdpa meanwhile).
        trie: legal sequences, end token included, on the model's device.
        prompts: n token-id lists of any lengths.
        num_beams: B; more than the legal continuations is fine and leaves empty places.
        length_penalty: exponent p of the final score, sum / length ** p, as in HF.
        renormalize: score with probabilities over the legal tokens (HF's `renormalize_logits`), not over the vocabulary.
        excluded: per prompt, numbers of sequences that may not be found. included: per prompt, the only ones that may, or
            None for all. A prefix is legal as long as a sequence below it may be found: what a processor built from the
            allowed sequences of each prompt would do.

    Returns:
        `Ranked` with [n, B] places. Of equal scores, the lexicographically first sequence stands first.

    Raises:
        ValueError: an empty prompt, a model whose attention cannot follow a tree, a trie of another vocabulary, NaN logits.
    """
    with _inference(model, trie):
        rows = PrefilledPrompts(model, prompts, room=num_beams * trie.depth)
        n, device = len(prompts), model.device
        logits = rows.logits
        nodes = torch.zeros(n, 1, dtype=torch.long, device=device)
        score = torch.zeros(n, 1, device=device)
        seen = torch.zeros(n, 1, 0, dtype=torch.bool, device=device)  # slots each running beam sees
        done_score = torch.full((n, num_beams), NEGATIVE, device=device)
        done_sequence = torch.full((n, num_beams), -1, dtype=torch.long, device=device)
        open_row = torch.ones(n, 1, dtype=torch.bool, device=device)
        broken = torch.zeros((), dtype=torch.bool, device=device)
        tail = None  # log-probabilities [n, W, L] of forced tokens, once every running beam has one way left
        if excluded is not None or included is not None:
            sub_tries = SubTries(trie, excluded, included)
            if len(sub_tries.listed) != n:
                raise ValueError(f"{n} prompts, but {len(sub_tries.listed)} lists of excluded or included sequences")
        else:
            sub_tries = None

        for step in range(trie.depth):
            # Phase 1: score the legal children of every running beam.
            width = 1 if tail is not None else trie.fanout[step]
            child, legal = trie.children(nodes, width)
            if tail is None:
                if sub_tries:
                    legal &= sub_tries.alive(child, step + 1)
                gain = logits.gather(-1, trie.tokens(child, step + 1))
                if renormalize:
                    gain = gain.masked_fill(~legal, NEGATIVE)
                normaliser = _logsumexp(gain if renormalize else logits).unsqueeze(-1)
                broken |= (torch.isnan(normaliser) & (score > NEGATIVE).unsqueeze(-1)).any()
                gain = gain - normaliser
            else:
                gain, tail = tail[:, :, :1], tail[:, :, 1:]
            total = (score.unsqueeze(-1) + gain).masked_fill(~legal, NEGATIVE).flatten(1)
            best, index = stable_topk(total, min(2 * num_beams, total.shape[1]))
            reached = child.flatten(1).gather(1, index)
            ends = (trie.sequence[reached] >= 0) & (best > NEGATIVE)

            # Phase 2: among the best B candidates, those that end join the pool of finished sequences.
            in_reach = torch.arange(best.shape[1], device=device) < num_beams
            finished = (best / (step + 1) ** length_penalty).masked_fill(~(ends & in_reach & open_row), NEGATIVE)
            done_score, order = stable_topk(torch.cat((done_score, finished), dim=1), num_beams)
            done_sequence = torch.cat((done_sequence, trie.sequence[reached]), dim=1).gather(1, order)
            if step + 1 == trie.depth:
                break

            # Phase 3: the best B of the others run on.
            running = best.masked_fill(ends, NEGATIVE)
            score, order = stable_topk(running, min(num_beams, running.shape[1]))
            index, nodes = index.gather(1, order), reached.gather(1, order)
            parent = index // width
            # As in HF, a row is closed once its pool is full and no running beam promises a better score.
            full = (done_score > NEGATIVE).all(dim=1, keepdim=True)
            promise = score[:, :1] / (step + 1) ** length_penalty
            open_row = open_row & ~(full & (promise <= done_score[:, -1:]))
            if tail is not None:
                tail = tail.gather(1, parent.unsqueeze(-1).expand(-1, -1, tail.shape[-1]))
                continue
            seen = seen.gather(1, parent.unsqueeze(-1).expand(-1, -1, seen.shape[-1]))

            # Phase 4: feed the new tokens; once every beam has a single way left, all forced tokens go in one pass.
            alive = score > NEGATIVE
            forced = trie.forced[nodes].masked_fill(~alive, 0)
            longest = int(forced.max()) if bool((forced >= 0).all()) else 0
            if longest >= 2:
                # A forced token is certain where only legal tokens count, and need not be computed.
                tail = (
                    score.new_zeros(*nodes.shape, longest)
                    if renormalize
                    else _score_forced(rows, trie, nodes, seen, step + 1, longest)
                )
            else:
                beams = nodes.shape[1]
                own = torch.eye(beams, dtype=torch.bool, device=device).expand(n, -1, -1)
                seen = torch.cat((seen, own), dim=-1)
                depth = torch.full((beams,), step, device=device)
                logits = rows.extend(trie.tokens(nodes, step + 1), depth, seen)

        if bool(broken):
            raise ValueError(
                "the model's logits are NaN: its weights are broken or the numbers overflow in this precision"
            )
        return SearchResult(done_sequence.masked_fill(done_score == NEGATIVE, -1), done_score)


def _score_forced(
    rows: PrefilledPrompts, trie: SidTrie, nodes: torch.Tensor, seen: torch.Tensor, depth: int, longest: int
) -> torch.Tensor:
    """Log-probabilities [n, W, longest] of the tokens that must follow `nodes` [n, W] (at `depth`), in one pass."""
    n, beams = nodes.shape
    device = nodes.device
    tokens = [trie.tokens(nodes, depth)]
    for level in range(depth + 1, depth + longest + 1):
        below = trie.first_child[nodes].long()
        # Where a shorter sequence has ended, anything may stand: its later columns are not read.
        nodes = torch.where(trie.first_child[nodes + 1] > below, below, 0)
        tokens.append(trie.tokens(nodes, level))
    tokens = torch.stack(tokens, dim=-1)  # [n, W, longest + 1]
    slot = torch.arange(beams * longest, device=device)
    own = (slot[:, None] // longest == slot[None, :] // longest) & (slot[None, :] <= slot[:, None])
    visible = torch.cat((seen.repeat_interleave(longest, dim=1), own.expand(n, -1, -1)), dim=-1)
    logits = rows.extend(tokens[:, :, :-1].flatten(1), depth - 1 + slot % longest, visible).view(n, beams, longest, -1)
    return logits.gather(-1, tokens[:, :, 1:].unsqueeze(-1)).squeeze(-1) - _logsumexp(logits)


def sample(
    model: PreTrainedModel,
    trie: SidTrie,
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> SearchResult:
    """`num_samples` independent draws per prompt from the model's distribution restricted to the trie.

    Each token is drawn from softmax(logits / temperature) renormalised over the legal children. The samples of a prompt
    share its prefill, as beams do.

    Returns:
        `Ranked` [n, num_samples] in order of drawing; `score` is the full-vocabulary log-probability at temperature 1.

    Raises:
        ValueError: as `beam_search`, or a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    with _inference(model, trie):
        rows = PrefilledPrompts(model, prompts, room=num_samples * trie.depth)
        n, device = len(prompts), model.device
        nodes = torch.zeros(n, num_samples, dtype=torch.long, device=device)
        score = torch.zeros(n, num_samples, device=device)
        finished = torch.zeros(n, num_samples, dtype=torch.bool, device=device)
        own = torch.eye(num_samples, dtype=torch.bool, device=device).expand(n, -1, -1)
        seen = own[:, :, :0]
        logits = rows.logits.expand(-1, num_samples, -1)
        for step in range(trie.depth):
            child, legal = trie.children(nodes, trie.fanout[step])
            normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
            gain = logits.gather(-1, trie.tokens(child, step + 1)) - normaliser
            if bool(torch.isnan(gain).any()):
                raise ValueError(
                    "the model's logits are NaN: its weights are broken or the numbers overflow in this precision"
                )
            # A finished sample has no children; a uniform row keeps the draw defined and is discarded below.
            weight = torch.softmax((gain / temperature).masked_fill(~legal, NEGATIVE), dim=-1).nan_to_num(1.0)
            drawn = torch.multinomial(weight.flatten(0, 1), 1, generator=generator).view(n, num_samples, 1)
            score = torch.where(finished, score, score + gain.gather(-1, drawn).squeeze(-1))
            nodes = torch.where(finished, nodes, child.gather(-1, drawn).squeeze(-1))
            finished = trie.sequence[nodes] >= 0
            if step + 1 == trie.depth or bool(finished.all()):
                break
            seen = torch.cat((seen, own), dim=-1)
            depth = torch.full((num_samples,), step, device=device)
            logits = rows.extend(trie.tokens(nodes, step + 1), depth, seen)
        return SearchResult(trie.sequence[nodes], score)
