"""Exact constrained beam search and sampling over a `SidTrie`, whatever scores the prefixes.

Candidates are the legal children only; a `Scorer` gives their log-probabilities. The result equals Hugging Face
`generate(num_beams=B)` with a prefix-constraining processor, the finished-beam pool and the length penalty included; a
checkpoint's `generation_config` is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from minionerec.common.files import InputError
from minionerec.search.kept_head import KeptHead
from minionerec.search.legal_softmax import is_normalised_over_legal
from minionerec.search.prefill import PrefilledPrompts
from minionerec.search.scorer import Engine, Scorer
from minionerec.search.sub_tries import SubTries
from minionerec.search.tree_scorer import open_model_scorer
from minionerec.search.trie import SidTrie

NEGATIVE = float("-inf")


class BrokenLogitsError(InputError, ValueError):
    """A model says nothing that could be ranked. For people, too: its weights are what somebody gave."""

    def __init__(self):
        super().__init__("the model's logits are NaN: its weights are broken or numbers overflow in this precision")


@dataclass
class SearchResult:
    """The best sequences of n prompts, or drawn ones.

    Attributes:
        sequence: [n, B] int64, the number of each sequence in the trie (its row in `SidTrie.sequences()`); -1 where a
            prompt has fewer than B.
        score: [n, B] float32, the sum of full-vocabulary log-probabilities in nats, end token included, divided by
            length ** length_penalty; -inf where there is no sequence.
    """

    sequence: torch.Tensor
    score: torch.Tensor


def stable_topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values of each row, best first; of equal ones the one with the smallest index comes first.

    `torch.topk` leaves open which of equal values it takes. Ties are common in bf16.

    Args:
        values: [n, m] float32.
        k: how many of each row, at most m.

    Returns:
        (values [n, k], their indices [n, k]).
    """
    # A float's bits, read as an integer, order positive floats; flipping those of negative ones orders all of them.
    bits = (values + 0.0).view(torch.int32)  # + 0.0: there is only one zero
    bits ^= (bits >> 31) & 0x7FFFFFFF
    last = values.shape[1] - 1
    keys = bits.long().bitwise_left_shift_(32).add_(torch.arange(last, -1, -1, device=values.device))
    indices = last - (keys.topk(k, dim=1).values & 0xFFFFFFFF)
    return values.gather(1, indices), indices


def _open_scorer(
    model: PreTrainedModel | Engine,
    trie: SidTrie,
    prompts: Sequence[Sequence[int]] | PrefilledPrompts,
    kept: KeptHead | None = None,
) -> AbstractContextManager[Scorer]:
    """What scores prefixes of each prompt: the model where it runs here, or the engine that runs it."""
    if isinstance(model, Engine):
        return model.open_scorer(trie, prompts)
    return open_model_scorer(model, trie, prompts, kept)


def beam_search(
    model: PreTrainedModel | Engine,
    trie: SidTrie,
    prompts: Sequence[Sequence[int]] | PrefilledPrompts,
    num_beams: int,
    *,
    length_penalty: float = 0.0,
    renormalize: bool = False,
    excluded: Sequence[Sequence[int]] | None = None,
    included: Sequence[Sequence[int] | None] | None = None,
    kept: KeptHead | None = None,
) -> SearchResult:
    """Find the `num_beams` best sequences of a trie after each prompt.

    A prefix is legal as long as an allowed sequence lies below it: what a processor built from the allowed sequences of
    each prompt would do.

    Args:
        model: decoder-only HF model, or an engine that runs it elsewhere. The search replaces the model's attention
            by its own meanwhile, where that gives the same.
        trie: legal sequences, end token included, on the model's device.
        prompts: n token-id lists of any lengths, or the prompts prefilled, which serve one search.
        num_beams: B; it may exceed the number of legal sequences.
        length_penalty: exponent p of the final score, sum / length ** p, as in HF.
        renormalize: score with probabilities over the legal tokens (HF's `renormalize_logits`), not the vocabulary;
            always so for a model that was trained on them.
        excluded: per prompt, the numbers of sequences that are not allowed.
        included: per prompt, the numbers of the only sequences that are allowed, or None for all.
        kept: what earlier prompts of the same weights began with, so that it is not computed again; see `KeptHead`.

    Returns:
        B sequences per prompt, best first. Of equal scores, the lexicographically first sequence stands first.

    Raises:
        ValueError: an empty prompt, a trie of another vocabulary, lists for another number of prompts or that leave a
            prompt nothing, NaN logits.
    """
    sub_tries = _restrict(trie, len(prompts), excluded, included)
    renormalize = renormalize or is_normalised_over_legal(model)
    with _open_scorer(model, trie, prompts, kept) as scorer:
        search = _BeamSearch(scorer, trie, sub_tries, num_beams, length_penalty, renormalize)
        for step in range(trie.depth):
            candidates = search.rank_candidates(step)
            search.collect_finished(step, candidates)
            if step + 1 < trie.depth:
                search.continue_best(step, candidates)
        return search.get_result()


def _restrict(
    trie: SidTrie,
    count: int,
    excluded: Sequence[Sequence[int]] | None,
    included: Sequence[Sequence[int] | None] | None,
) -> SubTries | None:
    """The parts of the trie that `count` prompts may search; None where all may search all of it."""
    if excluded is None and included is None:
        return None
    sub_tries = SubTries(trie, excluded, included)
    if len(sub_tries.listed) != count:
        raise ValueError(f"{count} prompts, but {len(sub_tries.listed)} lists of excluded or included sequences")
    return sub_tries


@dataclass
class _Candidates:
    """The best C candidates of a step, best first.

    Attributes:
        score: [n, C], sums of log-probabilities; -inf for what is illegal.
        node: [n, C], where each candidate stands in the trie.
        parent: [n, C], the running beam each candidate continues.
        ends: [n, C] bool, which of them are legal and end a sequence.
    """

    score: torch.Tensor
    node: torch.Tensor
    parent: torch.Tensor
    ends: torch.Tensor


class _BeamSearch:
    """The state of one search over n prompts: W <= B running beams and up to B finished sequences each.

    Attributes:
        nodes, score: [n, W], where each running beam stands in the trie, and its sum of log-probabilities.
        tail: [n, W, L], the log-probabilities of forced tokens, once every running beam has one way left; before, None.
        finished_score, finished_sequence: [n, B], the pool of finished sequences; -inf and -1 where it is not full.
        is_open: [n, 1] bool, whether a prompt's pool still accepts sequences.
        is_broken: [] bool, whether a running beam's logits were NaN; read once, at the end, as reading it waits for the
            device.
    """

    def __init__(
        self,
        scorer: Scorer,
        trie: SidTrie,
        sub_tries: SubTries | None,
        num_beams: int,
        length_penalty: float,
        renormalize: bool,
    ):
        self.scorer, self.trie, self.sub_tries = scorer, trie, sub_tries
        self.num_beams, self.length_penalty, self.renormalize = num_beams, length_penalty, renormalize
        self.nodes = scorer.nodes
        n, device = len(self.nodes), self.nodes.device
        self.score = torch.zeros(n, 1, device=device)
        self.tail: torch.Tensor | None = None
        self.finished_score = torch.full((n, num_beams), NEGATIVE, device=device)
        self.finished_sequence = torch.full((n, num_beams), -1, dtype=torch.long, device=device)
        self.is_open = torch.ones(n, 1, dtype=torch.bool, device=device)
        self.is_broken = torch.zeros((), dtype=torch.bool, device=device)

    def rank_candidates(self, step: int) -> _Candidates:
        """Phase 1: score the legal children of every running beam, and take the best 2 B of a prompt."""
        trie = self.trie
        width = 1 if self.tail is not None else trie.fanout[step]
        child, legal = trie.children(self.nodes, width)
        legal &= (self.score > NEGATIVE).unsqueeze(-1)
        if self.tail is None:
            if self.sub_tries:
                legal &= self.sub_tries.alive(child, step + 1)
            gain = self.scorer.score_children(child, legal, relative=self.renormalize)
            if self.renormalize:
                gain = gain.masked_fill(~legal, NEGATIVE)
                gain = gain - gain.logsumexp(dim=-1, keepdim=True)
        else:
            gain, self.tail = self.tail[:, :, :1], self.tail[:, :, 1:]
        total = (self.score.unsqueeze(-1) + gain).masked_fill(~legal, NEGATIVE).flatten(1)
        self.is_broken |= torch.isnan(total).any()
        best, index = stable_topk(total, min(2 * self.num_beams, total.shape[1]))
        node = child.flatten(1).gather(1, index)
        return _Candidates(best, node, index // width, (trie.sequence[node] >= 0) & (best > NEGATIVE))

    def collect_finished(self, step: int, candidates: _Candidates) -> None:
        """Phase 2: among the best B candidates, those that end join the pool of finished sequences."""
        in_reach = torch.arange(candidates.score.shape[1], device=candidates.score.device) < self.num_beams
        joins = candidates.ends & in_reach & self.is_open
        score = (candidates.score / (step + 1) ** self.length_penalty).masked_fill(~joins, NEGATIVE)
        self.finished_score, order = stable_topk(torch.cat((self.finished_score, score), dim=1), self.num_beams)
        sequence = torch.cat((self.finished_sequence, self.trie.sequence[candidates.node]), dim=1)
        self.finished_sequence = sequence.gather(1, order)

    def continue_best(self, step: int, candidates: _Candidates) -> None:
        """Phase 3: the best B of the candidates that do not end become the running beams."""
        running = candidates.score.masked_fill(candidates.ends, NEGATIVE)
        self.score, order = stable_topk(running, min(self.num_beams, running.shape[1]))
        self.nodes, parent = candidates.node.gather(1, order), candidates.parent.gather(1, order)
        # As in HF, a prompt is closed once its pool is full and no running beam promises a better score.
        is_full = (self.finished_score > NEGATIVE).all(dim=1, keepdim=True)
        promise = self.score[:, :1] / (step + 1) ** self.length_penalty
        self.is_open = self.is_open & ~(is_full & (promise <= self.finished_score[:, -1:]))
        self._score_next(parent)

    def _score_next(self, parent: torch.Tensor) -> None:
        """Give the scorer the new tokens; once every beam has a single way left, all forced tokens are scored together.

        Args:
            parent: [n, W], the beam that each of the new running beams continues.
        """
        if self.tail is not None:
            self.tail = self.tail.gather(1, parent.unsqueeze(-1).expand(-1, -1, self.tail.shape[-1]))
            return
        alive = self.score > NEGATIVE
        longest = self._count_forced(alive)
        if longest < 2:
            self.scorer.follow(self.nodes, parent)
        elif self.renormalize:
            # A forced token is certain where only legal tokens count, and need not be computed.
            self.tail = self.score.new_zeros(*self.score.shape, longest)
        else:
            self.tail = self.scorer.score_forced(self.nodes, parent, alive, longest)

    def _count_forced(self, alive: torch.Tensor) -> int:
        """Tokens left to the end of the longest running beam where all have one way left; 0 where one has a choice.

        The nodes are only read, which waits for the device, where the level holds both kinds or different lengths.
        """
        least, most = self.trie.forced_range[self.scorer.level + 1]
        if most < 2:
            return 0
        if least == most:
            return most
        forced = self.trie.forced[self.nodes].masked_fill(~alive, 0)
        return int(torch.where((forced >= 0).all(), forced.max(), 0))

    def get_result(self) -> SearchResult:
        """The pools of finished sequences.

        Raises:
            ValueError: NaN logits.
        """
        if bool(self.is_broken):
            raise BrokenLogitsError
        sequence = self.finished_sequence.masked_fill(self.finished_score == NEGATIVE, -1)
        return SearchResult(sequence, self.finished_score)


def sample(
    model: PreTrainedModel | Engine,
    trie: SidTrie,
    prompts: Sequence[Sequence[int]] | PrefilledPrompts,
    num_samples: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> SearchResult:
    """Draw sequences of a trie independently from the model's distribution restricted to it.

    Each token is drawn from softmax(logits / temperature) renormalised over the legal children. The samples of a prompt
    share its prefill, as beams do.

    Args:
        model: as for `beam_search`.
        trie: as for `beam_search`.
        prompts: as for `beam_search`.
        num_samples: draws per prompt; a sequence may be drawn several times.
        temperature: divides the logits.
        generator: of the random numbers; default torch's own.

    Returns:
        num_samples sequences per prompt in order of drawing; `score` is the full-vocabulary log-probability at
        temperature 1.

    Raises:
        ValueError: as `beam_search`, or a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    with _open_scorer(model, trie, prompts) as scorer:
        n, device = len(prompts), trie.device
        nodes = torch.zeros(n, num_samples, dtype=torch.long, device=device)
        score = torch.zeros(n, num_samples, device=device)
        finished = torch.zeros(n, num_samples, dtype=torch.bool, device=device)
        parent = torch.zeros_like(nodes)  # all samples continue the empty prefix
        itself = torch.arange(num_samples, device=device).expand(n, -1)
        is_broken = torch.zeros((), dtype=torch.bool, device=device)
        for step in range(trie.depth):
            # One row of children for the empty prefix, then one for every sample.
            child, legal = trie.children(scorer.nodes, trie.fanout[step])
            gain = scorer.score_children(child, legal)
            is_broken |= (torch.isnan(gain) & legal).any()
            child, legal, gain = (table.expand(-1, num_samples, -1) for table in (child, legal, gain))
            # A finished sample has no children; a uniform row keeps the draw defined and is discarded below.
            weight = torch.softmax((gain / temperature).masked_fill(~legal, NEGATIVE), dim=-1).nan_to_num(1.0)
            drawn = torch.multinomial(weight.flatten(0, 1), 1, generator=generator).view(n, num_samples, 1)
            score = torch.where(finished, score, score + gain.gather(-1, drawn).squeeze(-1))
            nodes = torch.where(finished, nodes, child.gather(-1, drawn).squeeze(-1))
            finished = trie.sequence[nodes] >= 0
            # Asking waits for the device, so only where a sequence may have ended.
            if step + 1 == trie.depth or (trie.ends[step + 1] and bool(finished.all())):
                break
            scorer.follow(nodes, parent)
            parent = itself
        if bool(is_broken):
            raise BrokenLogitsError
        return SearchResult(trie.sequence[nodes], score)
