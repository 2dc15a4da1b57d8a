"""A model and its catalogue, ready to recommend: from Python, to recommend.py and to the demo alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from minionerec.common.files import InputError
from minionerec.common.model_folder import ModelCatalogue, read_model_catalogue
from minionerec.common.processes import process_state
from minionerec.common.records import SID_TOKEN, Catalogue
from minionerec.evaluation.fusion import CandidateScorer
from minionerec.evaluation.fusion_weights import fuse_scores, list_terms
from minionerec.evaluation.histories import History, ItemFinder, normalise_title
from minionerec.evaluation.predict import VLLM_BATCH
from minionerec.evaluation.recommended_fusion import FusedBaselines, build_fused, check_recommended_fusion
from minionerec.evaluation.settings import RecommendFlags
from minionerec.evaluation.setup import load_searched_model
from minionerec.language.catalogue_trie import CatalogueTrie, build_catalogue_trie, check_token_rows
from minionerec.language.examples import shorten_prompts
from minionerec.language.model_checks import limit_length
from minionerec.language.prompts import Encoder, load_checkpoint_prompts
from minionerec.search.beam_search import beam_search
from minionerec.search.scorer import Engine
from minionerec.search.tree_scorer import choose_batch_size


@dataclass(frozen=True)
class Recommendation:
    """One item of a list.

    Attributes:
        item_id: of the catalogue.
        title, sid: its texts.
        score: what the list is ordered by: the log-probability, in nats, that the model writes the SID and its end
            after the history; with baselines, the weighted sum of probabilities.
        probability: of the SID by the model.
        reason: what carried the item, such as `bought after X (62 %), like Y (30 %)`; "" without baselines.
        original_id: what the raw log calls the item; "" where the model's catalogue does not know.
    """

    item_id: int
    title: str
    sid: str
    score: float
    probability: float
    reason: str = ""
    original_id: str = ""

    def to_json(self) -> dict[str, int | float | str]:
        """What files and the demo's API say of the item; numbers are rounded to 6 digits."""
        numbers = {"score": round(self.score, 6), "probability": round(self.probability, 6)}
        content = {"item_id": self.item_id, "sid": self.sid, "title": self.title, **numbers, "reason": self.reason}
        return content | ({"original_id": self.original_id} if self.original_id else {})


class Recommender:
    """A model and its catalogue, ready to answer.

    Args:
        model: on its device, in evaluation mode; or the engine that runs it.
        encoder: its tokens, and the longest prompt with its target.
        known: the items with their popularity, texts and categories, where these are known.
        catalogue_trie: the catalogue in the model's tokens.
        num_beams: beams of the search.
        max_history: newest items of a history that the model and the baselines are shown; 0 is all.
        fused: the baselines beside the model, if any.
        words_of: {prefix of a SID: its most telling words}, if they are known.
    """

    def __init__(
        self,
        model: PreTrainedModel | Engine,
        encoder: Encoder,
        known: ModelCatalogue,
        catalogue_trie: CatalogueTrie,
        num_beams: int,
        max_history: int,
        *,
        fused: FusedBaselines | None = None,
        words_of: dict[str, list[str]] | None = None,
    ):
        self.model, self.encoder, self.known, self.catalogue_trie = model, encoder, known, catalogue_trie
        self.num_beams, self.max_history, self.fused, self.words_of = num_beams, max_history, fused, words_of or {}
        self.finder = ItemFinder(known.catalogue, known.original_ids)
        self._original_ids = known.original_ids
        self._title_of = dict(zip(self.catalogue.item_ids, self.catalogue.titles, strict=True))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        num_beams: int = 50,
        max_history: int | None = None,
        dtype: str | None = None,
        engine: str = "tree",
        fuse: str | None = None,
        fuse_weight: Sequence[float] | None = None,
    ) -> Recommender:
        """The recommender of a model folder that sft.py or rl.py wrote, which carries all it needs.

        Args:
            folder: such as output/rl/final_checkpoint.
            num_beams: beams of the search; the longest list.
            max_history: newest items that the model is shown, 0 for all; None is the longest history of its training.
            dtype: precision of the weights, see `recommend.py --help`.
            engine: tree, or vllm.
            fuse: baselines beside the model that the folder's tables hold: transitions, content, or a sum.
            fuse_weight: of each of them, as `recommend.py --fuse_weight`.

        Raises:
            InputError: no such folder, or one without its catalogue.
        """
        known = read_model_catalogue(folder)
        flags = RecommendFlags(
            base_model=str(folder),
            num_beams=num_beams,
            max_history=known.max_history if max_history is None else max_history,
            cutoff_len=known.cutoff_len,
            dtype=dtype,
            engine=engine,
            fuse=fuse,
            fuse_weight=None if fuse_weight is None else list(fuse_weight),
        )
        check_recommended_fusion(flags, has_transitions=True)
        return load_recommender(flags, known, build_fused(flags, known))

    @property
    def catalogue(self) -> Catalogue:
        """The items, with their popularity where it is known."""
        return self.known.catalogue

    def recommend(
        self,
        histories: Sequence[Sequence[str | int]],
        k: int = 10,
        exclude_seen: bool = True,
        categories: Sequence[str] | None = None,
        num_beams: int | None = None,
        fuse_weight: Sequence[float] | None = None,
    ) -> list[list[Recommendation]]:
        """The k best items after every history.

        Args:
            histories: of each user the items, oldest first: item ids, titles or SIDs, see `ItemFinder.find`.
            k: length of the lists; they are shorter where fewer items are left. At most num_beams.
            exclude_seen: leave out the items of the history.
            categories: recommend only items of one of these, by a part of their category text in any case.
            num_beams: of the search; default those of the recommender.
            fuse_weight: of the model and of every baseline; default those of the recommender.

        Raises:
            InputError: an empty history, a name of no item or of several, a category of no item, or a k out of range.
        """
        found = [self.finder.find_history(history) for history in histories]
        lists = self.rank_histories(found, k, exclude_seen, categories, num_beams, fuse_weight)
        return [items[:k] for items in lists]

    def rank_histories(
        self,
        histories: Sequence[History],
        k: int,
        exclude_seen: bool,
        categories: Sequence[str] | None = None,
        num_beams: int | None = None,
        fuse_weight: Sequence[float] | None = None,
    ) -> list[list[Recommendation]]:
        """The items of the k best SIDs after every history, or the k best items with baselines; see `recommend`."""
        num_beams = num_beams or self.num_beams
        if not 1 <= k <= num_beams:
            raise InputError(f"k {k}: must be at least 1 and cannot exceed num_beams {num_beams}")
        included = self.select_categories(categories) if categories else None
        prompts = [prompt_ids for _, prompt_ids in self.build_prompts([history.sids for history in histories])]
        excluded = [self._number_seen(history) if exclude_seen else [] for history in histories]
        lists: list[list[Recommendation]] = [[] for _ in histories]
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        size = self._choose_batch_size(len(prompts[order[0]]), num_beams) if order else 1
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            result = beam_search(
                self.model,
                self.catalogue_trie.trie,
                [prompts[row] for row in rows],
                num_beams,
                excluded=[excluded[row] for row in rows],
                included=[included] * len(rows) if included else None,
            )
            pairs = zip(result.sequence.tolist(), result.score.tolist(), strict=True)
            beams = [self._name_beams(numbers, scores) for numbers, scores in pairs]
            if self.fused is None:
                found = [self._list_items(beam[:k]) for beam in beams]
            else:
                allowed = [self._allow(excluded[row], included) for row in rows]
                batch = [histories[row] for row in rows]
                found = self._fuse(batch, [prompts[row] for row in rows], beams, allowed, k, fuse_weight)
            for row, items in zip(rows, found, strict=True):
                lists[row] = items
        return lists

    def build_prompts(self, histories: Sequence[Sequence[str]]) -> list[tuple[int, list[int]]]:
        """(how many of the newest items fit, token ids of the prompt that shows them) of every history of SIDs.

        Raises:
            InputError: a SID that the model does not know, or an empty history.
        """
        if not all(histories):
            raise InputError("the history is empty")
        # The catalogue's own SIDs are known to be known.
        self.encoder.sid_ids([sid for sids in histories for sid in sids if sid not in self.catalogue_trie.number_of])
        newest = [sids[-self.max_history :] for sids in histories]  # all of them where max_history is 0
        budget = self.encoder.cutoff_len - self.catalogue_trie.trie.depth
        shortened = shorten_prompts("next_sid", newest, [budget] * len(newest), self.encoder)
        return [(count, prompt_ids) for count, _, prompt_ids in shortened]

    def select_categories(self, categories: Sequence[str]) -> list[int]:
        """The sequence numbers, in the trie, of the items of some categories.

        Raises:
            InputError: a category that no item has, or a model folder that knows no categories.
        """
        if not self.known.categories:
            raise InputError("categories: the model's catalogue knows none")
        texts = {item: normalise_title(text) for item, text in self.known.categories.items()}
        chosen: set[int] = set()
        for category in categories:
            wanted = normalise_title(category)
            items = [item for item, text in texts.items() if wanted and wanted in text]
            if not items:
                raise InputError(f"categories: no item is of {category!r}")
            chosen.update(self.catalogue_trie.number_of[self.catalogue.sid_of[item]] for item in items)
        return sorted(chosen)

    def list_allowed(self, history: History, exclude_seen: bool, categories: Sequence[str] | None = None) -> list[str]:
        """The SIDs that a search for this history may find, see `recommend`."""
        seen = set(self._number_seen(history)) if exclude_seen else set()
        numbers = self.select_categories(categories) if categories else range(len(self.catalogue_trie.sids))
        return [self.catalogue_trie.sids[number] for number in numbers if number not in seen]

    def answer(self, history: History, top: int, exclude_seen: bool, categories: Sequence[str] | None = None) -> str:
        """The best `top` as a text table, below the titles the model was shown. Items that share a SID share a rank."""
        ((count, _),) = self.build_prompts([history.sids])
        (items,) = self.rank_histories([history], top, exclude_seen, categories)
        width = max((len(item.sid) for item in items), default=3)
        lines = [f"after: {' | '.join(history.titles[-count:])}"]
        lines.append(f"{'rank':>4} {'score' if self.fused else 'log-prob':>9} {'prob':>9}  {'SID':<{width}}  title")
        rank, before, start = 0, None, ""
        for item in items:
            if item.sid == before and not self.fused:
                lines.append(" " * len(start) + item.title)
                continue
            rank, before = rank + 1, item.sid
            start = f"{rank:>4} {item.score:>9.4f} {item.probability:>9.3%}  {item.sid:<{width}}  "
            lines.append(start + item.title)
            lines += [f"{'':>4} {text}" for text in (item.reason, self._put_in_words(item.sid)) if text]
        return "\n".join(lines)

    def _put_in_words(self, sid: str) -> str:
        """What the prefixes of a SID stand for, where that is known."""
        tokens = SID_TOKEN.findall(sid)
        prefixes = ["".join(tokens[:length]) for length in range(1, len(tokens) + 1)]
        return "; ".join(f"{p}: {', '.join(self.words_of[p])}" for p in prefixes if self.words_of.get(p))

    def _number_seen(self, history: History) -> list[int]:
        number_of = self.catalogue_trie.number_of
        return sorted({number_of[sid] for sid in history.sids if sid in number_of})

    def _allow(self, excluded: Sequence[int], included: Sequence[int] | None) -> Callable[[int], bool]:
        """Whether an item may be recommended, by the sequence numbers that a search may not, or may only, find."""
        number_of, sid_of = self.catalogue_trie.number_of, self.catalogue.sid_of
        without, only = set(excluded), None if included is None else set(included)

        def is_allowed(item: int) -> bool:
            number = number_of[sid_of[item]]
            return number not in without and (only is None or number in only)

        return is_allowed

    def _name_beams(self, numbers: Sequence[int], scores: Sequence[float]) -> list[tuple[str, float]]:
        """[(SID, log-probability)] of a search, best first; numbers below 0 are none."""
        pairs = zip(numbers, scores, strict=True)
        return [(self.catalogue_trie.sids[number], score) for number, score in pairs if number >= 0]

    def _list_items(self, beams: Sequence[tuple[str, float]]) -> list[Recommendation]:
        """The items of some SIDs, those that share a SID by popularity."""
        return [
            Recommendation(
                item, self._title_of[item], sid, score, math.exp(score), original_id=self._original_ids.get(item, "")
            )
            for sid, score in beams
            for item in self.catalogue.items_of_sid[sid]
        ]

    def _fuse(
        self,
        histories: Sequence[History],
        prompts: Sequence[Sequence[int]],
        beams: Sequence[Sequence[tuple[str, float]]],
        allowed: Sequence[Callable[[int], bool]],
        k: int,
        weights: Sequence[float] | None,
    ) -> list[list[Recommendation]]:
        """The k best items of each history by model and baselines, with reasons."""
        weights = self.fused.weights if weights is None else weights
        newest = [history.item_ids[-self.max_history :] for history in histories]
        sids = [[sid for sid, _ in beam] for beam in beams]
        scores = [[score for _, score in beam] for beam in beams]
        likelihoods = self.fused.predict(newest, allowed)
        scorer = CandidateScorer(self.model, self.encoder, self.catalogue, likelihoods, max(map(len, sids)))
        lists = []
        for shown, result in zip(newest, scorer(range(len(newest)), prompts, sids, scores), strict=True):
            terms = list_terms(result, self.catalogue)
            ranked = fuse_scores(terms, weights, self.catalogue)[:k]
            reasons = self.fused.explainer.explain(shown, terms, [item for item, _ in ranked], weights)
            lists.append(
                [
                    Recommendation(
                        item,
                        self._title_of[item],
                        self.catalogue.sid_of[item],
                        score,
                        terms[0][item],
                        reason,
                        self._original_ids.get(item, ""),
                    )
                    for (item, score), reason in zip(ranked, reasons, strict=True)
                ]
            )
        return lists

    def _choose_batch_size(self, longest_prompt: int, num_beams: int) -> int:
        if isinstance(self.model, Engine):
            return VLLM_BATCH
        return choose_batch_size(self.model, self.catalogue_trie.trie, longest_prompt, num_beams)


def load_recommender(
    flags: RecommendFlags,
    known: ModelCatalogue,
    fused: FusedBaselines | None = None,
    words_of: dict[str, list[str]] | None = None,
) -> Recommender:
    """The model of --base_model on its device or in vLLM, with the catalogue in its tokens."""
    model, tokenizer = load_searched_model(flags)
    prompts = load_checkpoint_prompts(flags.base_model, flags.prompts, flags.category)
    encoder = Encoder(tokenizer, prompts, limit_length(flags.cutoff_len, model, quiet=True))
    encoder.check_boundary("next_sid", prompts.target("next_sid", known.catalogue.sids[0]))
    catalogue_trie = build_catalogue_trie(known.catalogue, encoder, process_state().device)
    check_token_rows(catalogue_trie, model, flags.base_model, "base_model")
    shape = (flags.num_beams, flags.max_history)
    return Recommender(model, encoder, known, catalogue_trie, *shape, fused=fused, words_of=words_of)
