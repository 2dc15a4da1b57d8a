"""The closed list of semantic IDs as a trie on the model's device, and the processor that keeps HF `generate` inside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from minionerec.language.examples import Example
from minionerec.search.beam_search import NEGATIVE, SearchResult, evaluation_mode
from minionerec.search.trie import SidTrie


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
    """`generate` fills whatever an explicit config leaves open from the model's own, so that one steps aside."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids [n, longest], attention mask [n, longest]) of token-id lists."""
    length = max(map(len, prompts))
    ids = [[pad_token_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def hf_beam_search(
    model: PreTrainedModel,
    trie: SidTrie,
    prompts: Sequence[Sequence[int]],
    num_beams: int,
    end_token_id: int,
    length_penalty: float = 0.0,
) -> SearchResult:
    """What `beam_search.beam_search` returns, by `model.generate`: arguments and scores have the same meaning.

    end_token_id: the last token of every sequence of the trie.

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
        max_new_tokens=trie.depth,
        eos_token_id=end_token_id,
        pad_token_id=end_token_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with evaluation_mode(model), _default_generation_config(model):
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([ConstrainedLogitsProcessor(trie, length, end_token_id)]),
        )
    score = out.sequences_scores.float()
    if bool(torch.isnan(score).any()):
        raise ValueError("the model's logits are NaN: its weights are broken or the numbers overflow in this precision")

    nodes = torch.zeros(n * num_beams, dtype=torch.long, device=model.device)
    sequence, tokens = torch.full_like(nodes, -1), torch.ones_like(nodes)
    for level, column in enumerate(out.sequences[:, length:].T):
        nodes = trie.advance(nodes, column, level)
        ended = (nodes >= 0) & (trie.sequence[nodes.clamp(min=0)] >= 0)
        sequence = torch.where(ended, trie.sequence[nodes.clamp(min=0)], sequence)
        tokens = torch.where(ended, level + 1, tokens)
    # `generate` starts all beams but the first at -1e9 and fills up a short list with what became of them.
    total = score * tokens**length_penalty
    dead = (sequence < 0) | (total < -1e8)
    shape = (n, num_beams)
    return SearchResult(sequence.masked_fill(dead, -1).view(shape), score.masked_fill(dead, NEGATIVE).view(shape))


def hf_rank_sids(
    model: PreTrainedModel,
    trie: SidTrie,
    sid_of_sequence: list[str],
    examples: Sequence[Example],
    num_beams: int,
    end_token_id: int,
    length_penalty: float = 0.0,
) -> tuple[list[list[str]], list[list[float]]]:
    """What `ranking.rank_sids` returns, for one batch of examples, by `hf_beam_search`."""
    prompts = [example.prompt_ids for example in examples]
    found = hf_beam_search(model, trie, prompts, num_beams, end_token_id, length_penalty)
    ranked = [[sid_of_sequence[number] for number in numbers if number >= 0] for numbers in found.sequence.tolist()]
    return ranked, [values[: len(best)] for best, values in zip(ranked, found.score.tolist())]
