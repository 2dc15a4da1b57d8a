"""The rows of a split ranked by a language model, in batches that several processes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.utils import gather_object
from transformers import PreTrainedModel

from minionerec.common.records import Row
from minionerec.evaluation.fusion import CandidateScorer
from minionerec.evaluation.ranking import rank_sids
from minionerec.evaluation.seen_items import find_excluded
from minionerec.evaluation.settings import EvaluateFlags
from minionerec.evaluation.shards import RowResults, work_in_shards
from minionerec.language.catalogue_trie import CatalogueTrie
from minionerec.language.examples import Example, PromptDataset
from minionerec.language.prompts import Encoder
from minionerec.search.kept_head import KeptHead
from minionerec.search.scorer import Engine
from minionerec.search.tree_scorer import choose_batch_size

VLLM_BATCH = 64  # prompts; vLLM itself decides how many of them it computes together
Rankings = tuple[list[list[str]], list[list[float]]]  # the SIDs of every example, best first; their scores


class SplitRanker:
    """A model with its catalogue, ready to rank splits.

    Args:
        model: on its device, in evaluation mode; or the engine that runs it.
        encoder: tokenizer and templates of the model.
        catalogue_trie: the catalogue.
        flags: num_beams, K, batch_size, length_penalty, renormalize, exclude_seen and engine.
        included: sequence numbers of the only SIDs that may be found; None for all.
        rank_by_generate: the search of --engine hf, called as (model, catalogue_trie, examples, num_beams,
            end_token_id, length_penalty).
    """

    def __init__(
        self,
        model: PreTrainedModel | Engine,
        encoder: Encoder,
        catalogue_trie: CatalogueTrie,
        flags: EvaluateFlags,
        *,
        included: list[int] | None,
        rank_by_generate: Callable[..., Rankings],
    ):
        self.model, self.encoder, self.catalogue_trie, self.flags = model, encoder, catalogue_trie, flags
        self.included, self.rank_by_generate = included, rank_by_generate
        self.kept = KeptHead()  # a ranker's weights do not change

    def rank(
        self,
        rows: Sequence[Row],
        examples: PromptDataset,
        folder: Path,
        after_batch: Callable[[], None],
        scorer: CandidateScorer | None = None,
    ) -> RowResults | None:
        """Rank the catalogue for every row.

        Args:
            rows: of the split.
            examples: those of the rows, in the same order.
            folder: where finished batches are kept, see `work_in_shards`.
            after_batch: called on the main process after each of its batches.
            scorer: what else is to be found out about every row, if anything.

        Returns:
            Per row, `predict` [SID, ...] and `score` [float, ...] of the K best, and what the scorer adds; None on
            other processes than the main one.
        """
        length = self.flags.K

        def rank_batch(numbers: list[int]) -> list[dict]:
            batch = [examples[number] for number in numbers]
            rankings, scores = self._search(batch, [rows[number] for number in numbers])
            results = [
                {"predict": ranked[:length], "score": [round(value, 6) for value in values[:length]]}
                for ranked, values in zip(rankings, scores, strict=True)
            ]
            if scorer is None:
                return results
            additions = scorer(numbers, [example.prompt_ids for example in batch], rankings, scores)
            return [{**result, **addition} for result, addition in zip(results, additions, strict=True)]

        lengths = examples.count_prompt_tokens()
        # The scorer's candidates take as much memory as further beams.
        width = self.flags.num_beams + (length if scorer else 0)
        return work_in_shards(rank_batch, lengths, self._choose_size(int(lengths.max()), width), folder, after_batch)

    def _choose_size(self, longest_prompt: int, width: int) -> int:
        """Prompts of a batch.

        All processes must cut the same batches, whatever memory each of them has.
        """
        flags = self.flags
        if flags.batch_size is not None:
            return flags.batch_size
        if flags.engine == "vllm":
            return VLLM_BATCH
        size = min(gather_object([choose_batch_size(self.model, self.catalogue_trie.trie, longest_prompt, width)]))
        # A beam is a row of its own in `generate`.
        return max(1, size // flags.num_beams) if flags.engine == "hf" else size

    def _search(self, examples: Sequence[Example], rows: Sequence[Row]) -> Rankings:
        """The lists of one batch, num_beams long."""
        flags, number_of = self.flags, self.catalogue_trie.number_of
        if flags.engine == "hf":
            end_token_id = self.encoder.end[-1]
            return self.rank_by_generate(
                self.model, self.catalogue_trie, examples, flags.num_beams, end_token_id, flags.length_penalty
            )
        excluded = None
        if flags.exclude_seen:
            seen = [find_excluded(row.history_sids, flags.repeat_newest) for row in rows]
            excluded = [[number_of[sid] for sid in sids if sid in number_of] for sids in seen]
        return rank_sids(
            self.model,
            self.catalogue_trie,
            examples,
            flags.num_beams,
            len(examples),
            length_penalty=flags.length_penalty,
            progress=False,
            renormalize=flags.renormalize,
            excluded=excluded,
            included=[self.included] * len(examples) if self.included else None,
            kept=self.kept,
        )
