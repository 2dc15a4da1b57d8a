"""A model and its catalogue, ready to recommend to one user, and how a user's history is found."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from minionerec.common.files import InputError, parse_list, read_json
from minionerec.common.processes import process_state
from minionerec.common.records import SID_TOKEN, Catalogue, Row
from minionerec.evaluation.fusion import (
    CandidateScorer,
    Explainer,
    check_fuse_names,
    name_terms,
    read_baseline_inputs,
    resolve_weights,
)
from minionerec.evaluation.fusion_weights import fuse_scores, list_terms
from minionerec.evaluation.settings import RecommendFlags
from minionerec.evaluation.setup import load_searched_model
from minionerec.language.catalogue_trie import CatalogueTrie, build_catalogue_trie
from minionerec.language.examples import shorten_prompts
from minionerec.language.prompts import Encoder, load_checkpoint_prompts
from minionerec.recommenders.registry import BuiltBaselines, Likelihoods
from minionerec.search.beam_search import beam_search
from minionerec.search.scorer import Engine

NEAREST_TITLES = 5  # that an error names


@dataclass(frozen=True)
class History:
    """The items of a history, oldest first: parallel lists of SIDs, titles and item ids."""

    sids: list[str]
    titles: list[str]
    item_ids: list[int]


def normalise_title(text: str) -> str:
    """`text` for comparing: without case, with single blanks."""
    return " ".join(text.casefold().split())


def split_titles(text: str) -> list[str]:
    """The titles of `first; second` or of a list literal such as ["first", "second"], without empty ones.

    Raises:
        InputError: a list literal that is not one, or no title at all.
    """
    text = text.strip()
    parts = parse_list(text, "titles") if text.startswith("[") and text.endswith("]") else text.split(";")
    titles = [str(part).strip() for part in parts if str(part).strip()]
    if not titles:
        raise InputError('no titles; expected "first title; second title" or ["first title", "second title"]')
    return titles


def find_item(title: str, catalogue: Catalogue) -> int:
    """Number in the catalogue of the item with this title, or of an item with this SID.

    A title may be written in any case. An exact one wins; else it may be a part of one item's title. Items that share a
    SID are the same to a model: of several that fit, with one SID, the first is taken.

    Raises:
        InputError: no such item, or several; the line names up to NEAREST_TITLES of them.
    """
    wanted = normalise_title(title)
    titles = [normalise_title(text) for text in catalogue.titles]
    numbers = [number for number, sid in enumerate(catalogue.sids) if sid == title.strip()]
    numbers = numbers or [number for number, text in enumerate(titles) if text == wanted]
    numbers = numbers or [number for number, text in enumerate(titles) if wanted in text]
    if len({catalogue.sids[number] for number in numbers}) == 1:
        return numbers[0]
    message = f"{len(numbers)} items have {title!r} in their title; write one title in full, or its SID"
    if not numbers:
        words = set(wanted.split())
        shared = [len(words & set(text.split())) for text in titles]
        numbers = sorted((number for number, count in enumerate(shared) if count), key=lambda number: -shared[number])
        message = f"no item has {title!r} in its title" + ("; nearest" if numbers else "")
    nearest = "; ".join(
        f"{textwrap.shorten(catalogue.titles[number], 60, placeholder=' ...')!r} {catalogue.sids[number]}"
        for number in numbers[:NEAREST_TITLES]
    )
    raise InputError(message + (f": {nearest}" if nearest else ""))


def find_history(titles: str, catalogue: Catalogue) -> History:
    """The items of --titles or of a line of the dialogue, see `split_titles` and `find_item`."""
    numbers = [find_item(title, catalogue) for title in split_titles(titles)]
    return History(*([values[number] for number in numbers] for values in _list_columns(catalogue)))


def _list_columns(catalogue: Catalogue) -> tuple[list, list, list]:
    return catalogue.sids, catalogue.titles, catalogue.item_ids


def find_latest_history(rows: Sequence[Row], user_id: str, path: str) -> History:
    """All that is known of a user: the history of the last row, and its target.

    Raises:
        InputError: the user has no row.
    """
    of_user = [row for row in rows if row.user_id == user_id]
    if not of_user:
        raise InputError(
            f"--user_id {user_id}: {path} has no row of this user; the first one there is {rows[0].user_id}"
        )
    last = of_user[-1]
    return History(
        [*last.history_sids, last.sid], [*last.history_titles, last.title], [*last.history_ids, last.item_id]
    )


@dataclass
class Recommender:
    """A model and its catalogue, ready to answer.

    Attributes:
        model: on its device, in evaluation mode; or the engine that runs it.
        encoder: its tokens, and the longest prompt with its target.
        catalogue: the items, with their popularity where it is known.
        catalogue_trie: the catalogue in the model's tokens.
        num_beams: beams of the search.
        max_history: newest items of a history that the model is shown; 0 is all.
        fused: the baselines beside the model, if any.
        words_of: {prefix of a SID: its most telling words}, if they are known.
    """

    model: PreTrainedModel | Engine
    encoder: Encoder
    catalogue: Catalogue
    catalogue_trie: CatalogueTrie
    num_beams: int
    max_history: int
    fused: FusedBaselines | None = None
    words_of: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._title_of = dict(zip(self.catalogue.item_ids, self.catalogue.titles, strict=True))

    def build_prompt(self, sids: Sequence[str]) -> tuple[int, list[int]]:
        """(how many of the newest items of a history of SIDs fit, token ids of the prompt that shows them).

        Raises:
            InputError: a SID that the model does not know.
        """
        self.encoder.sid_ids(sids)
        newest = sids[-self.max_history :]  # all of them where max_history is 0
        budget = self.encoder.cutoff_len - self.catalogue_trie.trie.depth
        ((count, _, prompt_ids),) = shorten_prompts("next_sid", [newest], [budget], self.encoder)
        return count, prompt_ids

    def rank(self, prompt_ids: list[int], seen: Collection[str]) -> list[tuple[str, float]]:
        """[(SID, log-probability of the SID after the prompt)], best first, of the SIDs that are not in `seen`."""
        sids = self.catalogue_trie.sids
        excluded = [number for number, sid in enumerate(sids) if sid in seen]
        result = beam_search(self.model, self.catalogue_trie.trie, [prompt_ids], self.num_beams, excluded=[excluded])
        pairs = zip(result.sequence[0].tolist(), result.score[0].tolist(), strict=True)
        return [(sids[number], score) for number, score in pairs if number >= 0]

    def answer(self, history: History, top: int, exclude_seen: bool) -> str:
        """The best `top` as a text table, below the titles the model was shown. Items that share a SID share a rank."""
        count, prompt_ids = self.build_prompt(history.sids)
        seen = set(history.sids) if exclude_seen else set()
        best = self.rank(prompt_ids, seen)
        lines = [f"after: {' | '.join(history.titles[-count:])}"]
        if self.fused:
            return "\n".join(lines + self._list_fused(history, prompt_ids, best, seen, top))
        width = max((len(sid) for sid, _ in best[:top]), default=3)
        lines.append(f"{'rank':>4} {'log-prob':>9} {'prob':>9}  {'SID':<{width}}  title")
        for rank, (sid, score) in enumerate(best[:top], 1):
            first, *others = [self._title_of[item] for item in self.catalogue.items_of_sid[sid]]
            start = f"{rank:>4} {score:>9.4f} {math.exp(score):>9.3%}  {sid:<{width}}  "
            lines += [start + first, *(" " * len(start) + title for title in others)]
            lines += self._list_reasons("", sid)
        return "\n".join(lines)

    def _list_fused(
        self, history: History, prompt_ids: list[int], best: list[tuple[str, float]], seen: set[str], top: int
    ) -> list[str]:
        """Lines of the fused list: rank, score, probability by the model, SID and title, and the reasons below."""
        newest = history.item_ids[-self.max_history :]
        sids, scores = [sid for sid, _ in best], [score for _, score in best]
        scorer = CandidateScorer(self.model, self.encoder, self.catalogue, self.fused.predict(newest), len(sids))
        (result,) = scorer([0], [prompt_ids], [sids], [scores])
        terms = [
            {item: p for item, p in term.items() if self.catalogue.sid_of[item] not in seen}
            for term in list_terms(result, self.catalogue)
        ]
        ranked = fuse_scores(terms, self.fused.weights, self.catalogue)[:top]
        items = [item for item, _ in ranked]
        reasons = self.fused.explainer.explain(newest, terms, items)
        width = max((len(self.catalogue.sid_of[item]) for item in items), default=3)
        lines = [f"{'rank':>4} {'score':>9} {'prob':>9}  {'SID':<{width}}  title"]
        for rank, ((item, score), reason) in enumerate(zip(ranked, reasons, strict=True), 1):
            sid = self.catalogue.sid_of[item]
            lines.append(f"{rank:>4} {score:>9.4f} {terms[0][item]:>9.3%}  {sid:<{width}}  {self._title_of[item]}")
            lines += self._list_reasons(reason, sid)
        return lines

    def _list_reasons(self, reason: str, sid: str) -> list[str]:
        """The lines below a recommendation: what carried it, and what its codes stand for."""
        tokens = SID_TOKEN.findall(sid)
        prefixes = ["".join(tokens[:length]) for length in range(1, len(tokens) + 1)]
        known = [f"{prefix}: {', '.join(self.words_of[prefix])}" for prefix in prefixes if self.words_of.get(prefix)]
        return [f"{'':>4} {text}" for text in (reason, "; ".join(known)) if text]


@dataclass
class FusedBaselines:
    """Baselines beside the model of a recommender.

    Attributes:
        likelihoods: of each, in the order of their weights.
        weights: of the model and the baselines.
        explainer: of the fused lists.
    """

    likelihoods: list[Likelihoods]
    weights: list[float]
    explainer: Explainer

    def predict(self, history: Sequence[int]) -> list[Callable[[Sequence[int]], list[dict[int, float]]]]:
        """What `CandidateScorer` asks for: the likelihoods of this one history, whatever row it asks about."""
        return [lambda numbers, predict=predict: predict([history] * len(numbers)) for predict in self.likelihoods]


def read_fused_metrics(flags: RecommendFlags) -> RecommendFlags:
    """The flags with the baselines and weights of --fused_metrics, where it is given.

    Raises:
        InputError: no file of a fusion.
    """
    if flags.fused_metrics is None:
        return flags
    if flags.fuse or flags.fuse_weight:
        raise InputError("--fused_metrics: names baselines and weights, so it goes without --fuse and --fuse_weight")
    content = read_json(flags.fused_metrics, "fused_metrics")
    weights = content.get("weights") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not isinstance(content.get("fuse"), str):
        raise InputError(f"--fused_metrics {flags.fused_metrics}: expected NAME.fused.metrics.json of evaluate.py")
    return replace(flags, fuse=content["fuse"], fuse_weight=list(weights.values()))


def check_recommended_fusion(flags: RecommendFlags) -> None:
    """The flags of the fusion must fit each other. Plugins are loaded before.

    Raises:
        InputError: the first that does not.
    """
    if flags.fuse is None:
        for name in ("fuse_weight", "cf_path", "item_meta_path"):
            if getattr(flags, name) is not None:
                raise InputError(f"--{name}: has an effect with --fuse or --fused_metrics only")
        return
    if flags.engine == "vllm":
        raise InputError("--engine vllm: has no --fuse, which scores items that the search did not find")
    if flags.fuse_weight is None:
        raise InputError("--fuse: needs --fuse_weight, or --fused_metrics instead of both")
    check_fuse_names(flags, flags.train_file, files=False)


def build_fused(flags: RecommendFlags, catalogue: Catalogue, train_rows: Sequence[Row]) -> FusedBaselines | None:
    """The baselines of --fuse; None without it."""
    if flags.fuse is None:
        return None
    built = BuiltBaselines(read_baseline_inputs(flags, flags.info_file, catalogue, train_rows))
    weights, names = resolve_weights(flags), name_terms(flags.fuse)
    return FusedBaselines([built.combine(name) for name in names[1:]], weights, Explainer(built, names, weights))


def read_prefix_words(path: str) -> dict[str, list[str]]:
    """{prefix of a SID: its most telling words} of a file of rq.explain.

    Raises:
        InputError: not such a file.
    """
    content = read_json(path, "explained_sids")
    prefixes = content.get("prefixes") if isinstance(content, dict) else None
    if not isinstance(prefixes, list) or not all(
        isinstance(p, dict) and {"prefix", "words"} <= p.keys() for p in prefixes
    ):
        raise InputError(f"--explained_sids {path}: expected NAME.index.explained.json of rq.explain")
    return {prefix["prefix"]: list(map(str, prefix["words"])) for prefix in prefixes}


def load_recommender(
    flags: RecommendFlags,
    catalogue: Catalogue,
    fused: FusedBaselines | None = None,
    words_of: dict[str, list[str]] | None = None,
) -> Recommender:
    """The model of --base_model on its device or in vLLM, with the catalogue in its tokens."""
    model, tokenizer = load_searched_model(flags)
    prompts = load_checkpoint_prompts(flags.base_model, flags.prompts, flags.category)
    encoder = Encoder(tokenizer, prompts, flags.cutoff_len)
    encoder.check_boundary("next_sid", prompts.target("next_sid", catalogue.sids[0]))
    device = process_state().device
    catalogue_trie = build_catalogue_trie(catalogue, encoder, device)
    shape = (flags.num_beams, flags.max_history)
    return Recommender(model, encoder, catalogue, catalogue_trie, *shape, fused=fused, words_of=words_of or {})
