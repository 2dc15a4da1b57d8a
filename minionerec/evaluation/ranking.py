"""Whole lists of SIDs for many rows: what evaluation and the validation of SFT and RL share."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.utils import gather_object
from transformers import PreTrainedModel

from minionerec.common.processes import is_main_process, process_state
from minionerec.common.progress import ProgressBar
from minionerec.evaluation.metrics import find_rank, hit_ratio, ndcg
from minionerec.language.catalogue_trie import CatalogueTrie
from minionerec.language.examples import Example
from minionerec.search.beam_search import beam_search
from minionerec.search.kept_head import KeptHead
from minionerec.search.scorer import Engine


def rank_sids(
    model: PreTrainedModel | Engine,
    catalogue_trie: CatalogueTrie,
    examples: Sequence[Example],
    num_beams: int,
    batch_size: int,
    *,
    length_penalty: float = 0.0,
    progress: bool = True,
    renormalize: bool = False,
    excluded: Sequence[Sequence[int]] | None = None,
    included: Sequence[Sequence[int] | None] | None = None,
    kept: KeptHead | None = None,
) -> tuple[list[list[str]], list[list[float]]]:
    """The best SIDs of every example; batches hold prompts of similar length.

    Args:
        model: decoder-only HF model, or an engine that runs one.
        catalogue_trie: the catalogue, on the model's device.
        examples: whose prompts are ranked for.
        num_beams: beams of the search, and the length of the lists.
        batch_size: prompts of a forward pass.
        length_penalty: as in `beam_search`, like renormalize.
        progress: show a bar.
        renormalize: score with probabilities over the legal tokens.
        excluded: per example, the sequence numbers that may not be found.
        included: per example, the only ones that may, or None for all.
        kept: what prompts ranked before began with; None: kept from batch to batch of this call.

    Returns:
        (rankings, scores) in the order of `examples`: SIDs, best first, and their scores.
    """
    kept = kept or KeptHead()
    order = sorted(range(len(examples)), key=lambda number: len(examples[number].prompt_ids))
    rankings: list[list[str]] = [[] for _ in examples]
    scores: list[list[float]] = [[] for _ in examples]
    bar = ProgressBar(
        total=len(examples),
        desc="validation",
        unit="row",
        disable=not (progress and is_main_process()),
        mininterval=2.0,
    )
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        result = beam_search(
            model,
            catalogue_trie.trie,
            [examples[number].prompt_ids for number in numbers],
            num_beams,
            length_penalty=length_penalty,
            renormalize=renormalize,
            excluded=excluded and [excluded[number] for number in numbers],
            included=included and [included[number] for number in numbers],
            kept=kept,
        )
        rows = zip(numbers, result.sequence.tolist(), result.score.tolist(), strict=True)
        for number, sequences, values in rows:
            rankings[number] = [catalogue_trie.sids[sequence] for sequence in sequences if sequence >= 0]
            scores[number] = values[: len(rankings[number])]
        bar.update(len(numbers))
    bar.close()
    return rankings, scores


def measure_validation(
    model: PreTrainedModel,
    catalogue_trie: CatalogueTrie,
    examples: Sequence[Example],
    num_beams: int,
    batch_size: int,
) -> dict[str, float]:
    """{"HR@10", "NDCG@10", "sum"} at SID level of a search with num_beams (at least 10, or the figures are too low).

    Called on every process with all examples; each ranks its share, and all return the same figures.
    """
    state = process_state()
    share = [examples[number] for number in range(state.process_index, len(examples), state.num_processes)]
    rankings, _ = rank_sids(model, catalogue_trie, share, num_beams, batch_size, progress=False)
    ranks = [find_rank(example.sid, ranked) for example, ranked in zip(share, rankings, strict=True)]
    # Sums, so that the processes' shares add up to the same figures whatever their number; on the CPU, as not every
    # device has float64.
    sums = [(hit_ratio(ranks, 10) * len(ranks), ndcg(ranks, 10) * len(ranks)) if ranks else (0.0, 0.0)]
    total = [sum(values) for values in zip(*gather_object(sums), strict=True)]
    hits, gain = round(total[0]) / len(examples), total[1] / len(examples)
    return {"HR@10": hits, "NDCG@10": gain, "sum": hits + gain}
