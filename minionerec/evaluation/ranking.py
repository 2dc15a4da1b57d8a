"""Whole lists of SIDs for many rows: what evaluation and the validation of SFT and RL share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm import tqdm
from transformers import PreTrainedModel

from minionerec.common.processes import is_main_process
from minionerec.evaluation.metrics import find_rank, hit_ratio, ndcg
from minionerec.language.examples import Example
from minionerec.search.beam_search import beam_search
from minionerec.search.trie import SidTrie


def rank_sids(
    model: PreTrainedModel,
    trie: SidTrie,
    sid_of_sequence: list[str],
    examples: list[Example],
    num_beams: int,
    batch_size: int,
    length_penalty: float = 0.0,
    progress: bool = True,
    renormalize: bool = False,
    excluded: Sequence[Sequence[int]] | None = None,
    included: Sequence[Sequence[int] | None] | None = None,
) -> tuple[list[list[str]], list[list[float]]]:
    """(the best SIDs of every example, best first; their scores), in the order of `examples`.

    Batches hold prompts of similar length. Scores are those of `beam_search.Ranked`; renormalize, excluded and included
    (sequence numbers per example) are as in `beam_search`.
    """
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].prompt_ids))
    ranked: list[list[str]] = [[] for _ in examples]
    scores: list[list[float]] = [[] for _ in examples]
    bar = tqdm(total=len(examples), unit="row", disable=not (progress and is_main_process()), mininterval=2.0)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        found = beam_search(
            model,
            trie,
            [examples[place].prompt_ids for place in places],
            num_beams,
            length_penalty,
            renormalize,
            excluded and [excluded[place] for place in places],
            included and [included[place] for place in places],
        )
        for place, sequences, values in zip(places, found.sequence.tolist(), found.score.tolist()):
            ranked[place] = [sid_of_sequence[number] for number in sequences if number >= 0]
            scores[place] = values[: len(ranked[place])]
        bar.update(len(places))
    bar.close()
    return ranked, scores


def measure_validation(
    model: PreTrainedModel,
    trie: SidTrie,
    sid_of_sequence: list[str],
    examples: Sequence[Example],
    num_beams: int,
    batch_size: int,
) -> dict[str, float]:
    """{"HR@10", "NDCG@10"} at SID level of a search with num_beams (at least 10, or the figures are too low).

    Called on every process with all examples; each ranks its share, and all return the same figures.
    """
    state = PartialState()
    own = list(examples[state.process_index :: state.num_processes])
    ranked, _ = rank_sids(model, trie, sid_of_sequence, own, num_beams, batch_size, progress=False)
    ranks = [find_rank(example.sid, best) for example, best in zip(own, ranked)]
    # Sums, so that the processes' shares add up to the same figures whatever their number.
    sums = [hit_ratio(ranks, 10) * len(ranks), ndcg(ranks, 10) * len(ranks)] if ranks else [0.0, 0.0]
    total = reduce(torch.tensor(sums, dtype=torch.float64, device=model.device), "sum").tolist()
    return {"HR@10": round(total[0]) / len(examples), "NDCG@10": total[1] / len(examples)}
