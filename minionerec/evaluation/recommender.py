"""A model and its catalogue, ready to recommend to one user, and how a user's history is found."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from minionerec.common.files import InputError, parse_list
from minionerec.common.processes import process_state
from minionerec.common.records import Catalogue, Row
from minionerec.evaluation.settings import RecommendFlags
from minionerec.evaluation.setup import load_searched_model
from minionerec.language.catalogue_trie import CatalogueTrie, build_catalogue_trie
from minionerec.language.examples import shorten_prompts
from minionerec.language.prompts import Encoder, load_checkpoint_prompts
from minionerec.search.beam_search import beam_search
from minionerec.search.scorer import Engine

NEAREST_TITLES = 5  # that an error names


@dataclass(frozen=True)
class History:
    """The items of a history, oldest first: parallel lists of SIDs and titles."""

    sids: list[str]
    titles: list[str]


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
    return History([catalogue.sids[number] for number in numbers], [catalogue.titles[number] for number in numbers])


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
    return History([*last.history_sids, last.sid], [*last.history_titles, last.title])


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
    """

    model: PreTrainedModel | Engine
    encoder: Encoder
    catalogue: Catalogue
    catalogue_trie: CatalogueTrie
    num_beams: int
    max_history: int

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
        best = self.rank(prompt_ids, set(history.sids) if exclude_seen else ())[:top]
        width = max((len(sid) for sid, _ in best), default=3)
        lines = [f"after: {' | '.join(history.titles[-count:])}"]
        lines.append(f"{'rank':>4} {'log-prob':>9} {'prob':>9}  {'SID':<{width}}  title")
        for rank, (sid, score) in enumerate(best, 1):
            first, *others = [self._title_of[item] for item in self.catalogue.items_of_sid[sid]]
            start = f"{rank:>4} {score:>9.4f} {math.exp(score):>9.3%}  {sid:<{width}}  "
            lines += [start + first, *(" " * len(start) + title for title in others)]
        return "\n".join(lines)


def load_recommender(flags: RecommendFlags, catalogue: Catalogue) -> Recommender:
    """The model of --base_model on its device or in vLLM, with the catalogue in its tokens."""
    model, tokenizer = load_searched_model(flags)
    prompts = load_checkpoint_prompts(flags.base_model, flags.prompts, flags.category)
    encoder = Encoder(tokenizer, prompts, flags.cutoff_len)
    encoder.check_boundary("next_sid", prompts.target("next_sid", catalogue.sids[0]))
    device = process_state().device
    catalogue_trie = build_catalogue_trie(catalogue, encoder, device)
    return Recommender(model, encoder, catalogue, catalogue_trie, flags.num_beams, flags.max_history)
