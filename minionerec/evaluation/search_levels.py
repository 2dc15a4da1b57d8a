"""The search seen level by level: the prefixes of SIDs that its beams stood on, and which of them went on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minionerec.common.records import SID_TOKEN
from minionerec.evaluation.histories import History
from minionerec.evaluation.recommender import Recommender
from minionerec.search.beam_search import beam_search
from minionerec.search.trie import SidTrie


@dataclass(frozen=True)
class PrefixBeam:
    """One beam after a level.

    Attributes:
        prefix: the SID tokens so far, as one text.
        probability: that the model writes this prefix after the history.
        survives: whether a beam of the next level stands below it; at the last level, whether it is in the list.
    """

    prefix: str
    probability: float
    survives: bool


def trace_levels(
    recommender: Recommender,
    history: History,
    k: int,
    exclude_seen: bool,
    categories: Sequence[str] | None = None,
    num_beams: int | None = None,
) -> list[list[PrefixBeam]]:
    """The beams of `Recommender.rank_histories` after every level of the SIDs, most likely first.

    Every level is a search of its own over the prefixes of that length, whose last step has the beams of the whole
    search. A shorter SID stands at deeper levels with the probability that it ends.

    Raises:
        InputError: as `Recommender.recommend`.
    """
    (best,) = recommender.rank_histories([history], k, exclude_seen, categories, num_beams)
    ((_, prompt),) = recommender.build_prompts([history.sids])
    sids = recommender.list_allowed(history, exclude_seen, categories)
    sequences = recommender.encoder.sid_ids(sids)
    convert, end = recommender.encoder.tokenizer.convert_ids_to_tokens, set(recommender.encoder.end)
    longest = max(map(len, sequences)) - len(recommender.encoder.end)
    levels: list[list[tuple[str, float]]] = []
    for depth in range(1, longest + 1):
        prefixes = sorted({tuple(tokens[:depth]) for tokens in sequences})
        trie = SidTrie(prefixes, recommender.catalogue_trie.trie.device)
        result = beam_search(recommender.model, trie, [prompt], num_beams or recommender.num_beams)
        # A shorter SID is followed by its end, which its name leaves out; some end tokens look like those of a SID.
        texts = ["".join(convert([token for token in tokens if token not in end])) for tokens in trie.sequences()]
        names = ["".join(SID_TOKEN.findall(text)) for text in texts]
        pairs = zip(result.sequence[0].tolist(), result.score[0].tolist(), strict=True)
        levels.append([(names[number], math.exp(score)) for number, score in pairs if number >= 0])
    listed = {item.sid for item in best}
    below = [[prefix for prefix, _ in level] for level in levels[1:]] + [sorted(listed)]
    return [
        [
            PrefixBeam(prefix, value, any(name.startswith(prefix) for name in (*deeper, *listed)))
            for prefix, value in level
        ]
        for level, deeper in zip(levels, below, strict=True)
    ]
