"""The textbook search, slow and obvious on purpose: HF `generate` and a Python dictionary of prefixes.

It shares neither trie nor decoding with what it is compared to, so that benchmarks and tests have an independent twin.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, PreTrainedModel

from LogitProcessor import generate_beams

Ranking = list[tuple[tuple[int, ...], float]]  # (token ids up to the end token, score), best first
DEAD_SCORE = -1e6  # `generate` gives beams that hold no legal sequence far lower scores


class PrefixDictionary(LogitsProcessor):
    """Looks every beam's generated tokens up in a dictionary from each prefix to its allowed next tokens.

    Args:
        sequences: the legal sequences, end token included.
        prompt_length: columns of `input_ids` that are prompt (padding included).
    """

    def __init__(self, sequences: Sequence[Sequence[int]], prompt_length: int):
        self.prompt_length = prompt_length
        self.allowed: dict[tuple[int, ...], set[int]] = {}
        for sequence in sequences:
            for length, token in enumerate(sequence):
                self.allowed.setdefault(tuple(sequence[:length]), set()).add(token)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        masked = torch.full_like(scores, float("-inf"))
        for row, ids in enumerate(input_ids.tolist()):
            allowed = sorted(self.allowed.get(tuple(ids[self.prompt_length :]), ()))
            masked[row, allowed] = scores[row, allowed]
        return masked


def search_textbook(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    num_beams: int,
    end_token_id: int,
    *,
    length_penalty: float = 0.0,
    processors: Sequence[LogitsProcessor] | None = None,
) -> list[Ranking]:
    """The best sequences after each prompt.

    Args:
        model: any causal LM.
        sequences: the legal sequences, each closed by the end token.
        prompts: token-id lists of any lengths.
        num_beams: at most so many are found; at least 2.
        end_token_id: the last token of every sequence.
        length_penalty: as in HF.
        processors: used instead of the dictionary of prefixes.

    Returns:
        A ranking per prompt; beams that hold no legal sequence are left out.
    """
    tokens, scores = generate_beams(
        model,
        prompts,
        num_beams,
        processors or [PrefixDictionary(sequences, max(map(len, prompts)))],
        max_new_tokens=max(map(len, sequences)),
        end_token_id=end_token_id,
        length_penalty=length_penalty,
    )
    return [
        [
            (tuple(ids[: ids.index(end_token_id) + 1]), score)
            for ids, score in zip(*pair, strict=True)
            if score > DEAD_SCORE
        ]
        for pair in zip(tokens.tolist(), scores.tolist(), strict=True)
    ]
