"""Hugging Face `generate` held inside the catalogue: the logits processor, and the textbook search it makes possible.

The closed list of semantic IDs is a `SidTrie`, which stays importable from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from minionerec.language.catalogue_trie import CatalogueTrie
from minionerec.language.examples import Example
from minionerec.search.beam_search import NEGATIVE, BrokenLogitsError, SearchResult
from minionerec.search.modes import evaluation_mode
from minionerec.search.trie import SidTrie

__all__ = ["ConstrainedLogitsProcessor", "SidTrie", "generate_beams", "hf_beam_search", "hf_rank_sids", "pad_left"]


class ConstrainedLogitsProcessor(LogitsProcessor):
    """Keeps HF `generate` (greedy, beam or sampling) inside a `SidTrie`.

    A pure function of the tokens generated so far, so that one instance can serve several generations.

    Args:
        trie: the legal sequences, end token included.
        prompt_length: columns of `input_ids` that are prompt (padding included).
        end_token_id: what a finished row repeats until the batch is finished.
    """

    def __init__(self, trie: SidTrie, prompt_length: int, end_token_id: int):
        self.trie, self.prompt_length, self.end_token_id = trie, prompt_length, end_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores` [n, vocab] with every illegal token at -inf.

        Args:
            input_ids: [n, prompt_length + generated].
            scores: [n, vocab], logits or log-probabilities of the next token.

        Raises:
            ValueError: no row can go on, which means the prompt length or the trie does not belong to this generation.
        """
        generated = input_ids[:, self.prompt_length :]
        nodes = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        finished = torch.zeros_like(nodes, dtype=torch.bool)
        for level, column in enumerate(generated.T):
            nodes = torch.where(finished, nodes, self.trie.advance(nodes, column, level))
            finished = finished | ((nodes >= 0) & (self.trie.sequence[nodes.clamp(min=0)] >= 0))
        allowed = self.trie.mask(nodes.masked_fill(finished, -1), scores.shape[-1], generated.shape[1])
        allowed[finished, self.end_token_id] = True
        # Beams beyond the number of legal continuations are dead on purpose: only all rows at once is a mistake.
        if not allowed.any():
            raise ValueError(
                f"dead end: after {generated.shape[1]} generated tokens no row is inside the trie; "
                f"is prompt_length={self.prompt_length} right and was the trie built with this tokenizer?"
            )
        return scores.masked_fill(~allowed, float("-inf"))


@contextmanager
def _default_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills whatever an explicit config leaves open from the model's, so that one steps aside."""
    config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config


def pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token-id lists side by side.

    Returns:
        (token ids [n, longest], attention mask [n, longest]), padded on the left.
    """
    length = max(map(len, prompts))
    ids = [[pad_token_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def generate_beams(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num_beams: int,
    processors: Sequence[LogitsProcessor],
    *,
    max_new_tokens: int,
    end_token_id: int,
    length_penalty: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search by `model.generate`, every beam a row of the batch; nothing of the model's generation config is read.

    Args:
        model: any causal LM.
        prompts: n token-id lists of any lengths; they are padded on the left to the longest.
        num_beams: B, at least 2.
        processors: what keeps the beams inside a catalogue.
        max_new_tokens: length of the longest sequence.
        end_token_id: where a beam ends; finished ones repeat it.
        length_penalty: as in HF.

    Returns:
        (generated token ids [n, B, T], scores [n, B] float32), best first. `generate` starts all beams but the first at
        -1e9 and fills a short list up with what became of them: scores that low belong to no sequence.

    Raises:
        ValueError: fewer than two beams, which `generate` takes for a greedy search without scores; an empty prompt;
            NaN logits.
    """
    if num_beams < 2:
        raise ValueError(f"num_beams must be 2 or more for generate, got {num_beams}")
    if not len(prompts) or min(map(len, prompts)) == 0:
        raise ValueError("every prompt needs at least one token")
    ids, mask = pad_left(prompts, end_token_id)
    n, length = ids.shape
    config = GenerationConfig(
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        early_stopping=False,
        length_penalty=length_penalty,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_token_id,
        pad_token_id=end_token_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with evaluation_mode(model), _default_generation_config(model):
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
        )
    score = output.sequences_scores.float()
    if bool(torch.isnan(score).any()):
        raise BrokenLogitsError
    return output.sequences[:, length:].view(n, num_beams, -1), score.view(n, num_beams)


def hf_beam_search(
    model: PreTrainedModel,
    trie: SidTrie,
    prompts: Sequence[Sequence[int]],
    num_beams: int,
    end_token_id: int,
    length_penalty: float = 0.0,
) -> SearchResult:
    """What `minionerec.search.beam_search.beam_search` returns, by the textbook: `generate` and a processor.

    Args:
        model: any causal LM.
        trie: legal sequences, end token included, on the model's device.
        prompts: n token-id lists of any lengths.
        num_beams: B, at least 2.
        end_token_id: the last token of every sequence of the trie.
        length_penalty: exponent p of the final score, sum / length ** p.

    Raises:
        ValueError: see `generate_beams`.
    """
    longest = max(map(len, prompts), default=0)
    tokens, score = generate_beams(
        model,
        prompts,
        num_beams,
        [ConstrainedLogitsProcessor(trie, longest, end_token_id)],
        max_new_tokens=trie.depth,
        end_token_id=end_token_id,
        length_penalty=length_penalty,
    )
    nodes = torch.zeros_like(tokens[:, :, 0])
    sequence, lengths = torch.full_like(nodes, -1), torch.ones_like(nodes)
    for level in range(tokens.shape[2]):
        nodes = trie.advance(nodes, tokens[:, :, level], level)
        ended = (nodes >= 0) & (trie.sequence[nodes.clamp(min=0)] >= 0)
        sequence = torch.where(ended, trie.sequence[nodes.clamp(min=0)], sequence)
        lengths = torch.where(ended, level + 1, lengths)
    dead = (sequence < 0) | (score * lengths**length_penalty < -1e8)
    return SearchResult(sequence.masked_fill(dead, -1), score.masked_fill(dead, NEGATIVE))


def hf_rank_sids(
    model: PreTrainedModel,
    catalogue_trie: CatalogueTrie,
    examples: Sequence[Example],
    num_beams: int,
    end_token_id: int,
    length_penalty: float = 0.0,
) -> tuple[list[list[str]], list[list[float]]]:
    """What `minionerec.evaluation.ranking.rank_sids` returns, for one batch of examples, by `hf_beam_search`.

    Returns:
        (the SIDs of every example, best first; their scores).
    """
    prompts = [example.prompt_ids for example in examples]
    result = hf_beam_search(model, catalogue_trie.trie, prompts, num_beams, end_token_id, length_penalty)
    ranked = [
        [catalogue_trie.sids[number] for number in numbers if number >= 0] for numbers in result.sequence.tolist()
    ]
    scores = result.score.tolist()
    return ranked, [values[: len(sids)] for sids, values in zip(ranked, scores, strict=True)]
