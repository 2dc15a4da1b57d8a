"""What a model recommends to one user: the best items of the catalogue with their scores, once or in a dialogue.

python recommend.py --base_model output/sft/final_checkpoint --info_file ... --history_file ... --user_id U12
python recommend.py --base_model output/sft/final_checkpoint --info_file ... --titles "first title; second title"
python recommend.py --base_model output/sft/final_checkpoint --info_file ... --interactive True
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from minionerec.common.cli import run
from minionerec.common.files import InputError, parse_list
from minionerec.common.processes import process_state, say
from minionerec.common.records import Catalogue, Row, count_popularity, group_items_by_sid, read_info, read_rows
from minionerec.language.catalogue_trie import build_catalogue_trie
from minionerec.language.examples import shorten_prompts
from minionerec.language.models import load_model
from minionerec.language.prompts import Encoder, load_checkpoint_prompts
from minionerec.search.beam_search import beam_search
from minionerec.search.trie import SidTrie

CANDIDATES = 5


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
    """Place in the catalogue of the item with this title, or of an item with this SID.

    A title may be written in any case. An exact one wins; else it may be a part of one item's title. Items that share a
    SID are the same to a model: of several that fit, with one SID, the first is taken.

    Raises:
        InputError: no such item, or several; the line names up to CANDIDATES of them.
    """
    wanted = normalise_title(title)
    titles = [normalise_title(own) for own in catalogue.titles]
    places = [place for place, sid in enumerate(catalogue.sids) if sid == title.strip()]
    places = places or [place for place, own in enumerate(titles) if own == wanted]
    places = places or [place for place, own in enumerate(titles) if wanted in own]
    if len({catalogue.sids[place] for place in places}) == 1:
        return places[0]
    said = f"{len(places)} items have {title!r} in their title; write one title in full, or its SID"
    if not places:
        words = set(wanted.split())
        shared = [len(words & set(own.split())) for own in titles]
        places = sorted((place for place, count in enumerate(shared) if count), key=lambda place: -shared[place])
        said = f"no item has {title!r} in its title" + ("; nearest" if places else "")
    shown = "; ".join(
        f"{textwrap.shorten(catalogue.titles[place], 60, placeholder=' ...')!r} {catalogue.sids[place]}"
        for place in places[:CANDIDATES]
    )
    raise InputError(said + (f": {shown}" if shown else ""))


def find_latest_history(rows: Sequence[Row], user_id: str, path: str) -> tuple[list[str], list[str]]:
    """(SIDs, titles), oldest first, of all that is known of a user: the history of the last row, and its target.

    Raises:
        InputError: the user has no row.
    """
    own = [row for row in rows if row.user_id == user_id]
    if not own:
        raise InputError(
            f"--user_id {user_id}: {path} has no row of this user; the first one there is {rows[0].user_id}"
        )
    return [*own[-1].history_sids, own[-1].sid], [*own[-1].history_titles, own[-1].title]


@dataclass
class Recommender:
    """A model and its catalogue, ready to answer.

    Attributes:
        titles: {SID: the titles of its items, in the order to show them}.
        max_history, cutoff_len: items of a history, and tokens of a prompt with its target, that the model is shown.
    """

    model: PreTrainedModel
    encoder: Encoder
    trie: SidTrie
    sid_of_sequence: list[str]
    titles: dict[str, list[str]]
    num_beams: int
    max_history: int
    cutoff_len: int

    def prompt(self, history: Sequence[str]) -> tuple[int, list[int]]:
        """(how many of the newest items of a history of SIDs fit, token ids of the prompt that shows them).

        Raises:
            InputError: a SID that the model does not know.
        """
        self.encoder.sid_ids(history)
        newest = history[-self.max_history :]  # all of them where max_history is 0
        ((count, _, prompt_ids),) = shorten_prompts(
            "next_sid", [newest], [self.cutoff_len - self.trie.depth], self.encoder
        )
        return count, prompt_ids

    def rank(self, prompt_ids: list[int], without: Collection[str]) -> list[tuple[str, float]]:
        """[(SID, log-probability of the SID after the prompt)], best first, of the SIDs that are not in `without`."""
        excluded = [number for number, sid in enumerate(self.sid_of_sequence) if sid in without]
        found = beam_search(self.model, self.trie, [prompt_ids], self.num_beams, excluded=[excluded])
        return [
            (self.sid_of_sequence[number], score)
            for number, score in zip(found.sequence[0].tolist(), found.score[0].tolist())
            if number >= 0
        ]

    def answer(self, history: Sequence[str], names: Sequence[str], top: int, exclude_seen: bool) -> str:
        """The best `top` as a text table, below the titles the model was shown. Items that share a SID share a rank.

        history, names: SIDs and titles, oldest first.
        """
        count, prompt_ids = self.prompt(history)
        best = self.rank(prompt_ids, set(history) if exclude_seen else ())[:top]
        width = max((len(sid) for sid, _ in best), default=3)
        lines = [f"after: {' | '.join(names[-count:])}"]
        lines.append(f"{'rank':>4} {'log-prob':>9} {'prob':>9}  {'SID':<{width}}  title")
        for rank, (sid, score) in enumerate(best, 1):
            first, *others = self.titles[sid]
            start = f"{rank:>4} {score:>9.4f} {math.exp(score):>9.3%}  {sid:<{width}}  "
            lines += [start + first, *(" " * len(start) + title for title in others)]
        return "\n".join(lines)


def recommend(
    base_model: str,
    info_file: str,
    history_file: str | None = None,
    user_id: str | None = None,
    titles: str | None = None,
    interactive: bool = False,
    top: int = 10,
    num_beams: int = 50,
    max_history: int = 10,
    exclude_seen: bool = False,
    train_file: str | None = None,
    shared_sids: bool = False,
    cutoff_len: int = 512,
    prompts: str | None = None,
    category: str | None = None,
) -> None:
    """Print the items that a model recommends next.

    The score of an item is the log-probability that the model writes its SID and the end token, over the whole
    vocabulary, as in the predictions of evaluate.py.

    Args:
        base_model: checkpoint of sft.py or rl.py. info_file: the catalogue.
        history_file, user_id: a CSV split and a user of it. The history is all that the file knows of the user: that of
            the user's last row, and that row's target.
        titles: the history, oldest first: "first; second" or a JSON list. In any case; a part of a title will do where
            no other has it. A SID may stand for a title.
        interactive: read such lines from the standard input until an empty one.
        top: recommendations to print, at most num_beams. num_beams: beams of the search.
        max_history: newest items of a history that the model is shown, as many as in its training data; 0: all.
        exclude_seen: leave out the items of the history.
        train_file: CSV of the train split; of items that share a SID, the more frequent target is then shown first, else
            the lower id. shared_sids: accept items that share a SID in the info file.
        prompts: another prompt set than the checkpoint's own. category: any text, for prompts that show {category}.
    """
    if (user_id is not None) + (titles is not None) + interactive != 1:
        raise InputError("expected one of --user_id with --history_file, --titles, --interactive True")
    if (user_id is None) != (history_file is None):
        raise InputError("--user_id and --history_file go together")
    if not 1 <= top <= num_beams:
        raise InputError(f"--top {top}: must be at least 1 and cannot exceed --num_beams {num_beams}")
    if max_history < 0:
        raise InputError(f"--max_history {max_history}: must be 0 (all) or more")
    catalogue = read_info(info_file, shared_sids)
    counts = count_popularity(row.item_id for row in read_rows(train_file, "train_file")) if train_file else {}
    title_of = dict(zip(catalogue.item_ids, catalogue.titles))
    items = group_items_by_sid(catalogue.sids, catalogue.item_ids, counts)

    def from_titles(text: str) -> tuple[list[str], list[str]]:
        places = [find_item(title, catalogue) for title in split_titles(text)]
        return [catalogue.sids[place] for place in places], [catalogue.titles[place] for place in places]

    # What can be wrong is found before a model is loaded.
    if user_id is not None:
        history = find_latest_history(read_rows(history_file, "history_file"), user_id, history_file)
    elif titles is not None:
        history = from_titles(titles)
    model, tokenizer = load_model(base_model, "base_model")
    encoder = Encoder(tokenizer, load_checkpoint_prompts(base_model, prompts, category))
    encoder.check_boundary("next_sid", encoder.prompts.target("next_sid", catalogue.sids[0]))
    device = process_state().device
    model.to(device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    trie, sid_of_sequence = build_catalogue_trie(catalogue, encoder, device)
    shown_titles = {sid: [title_of[item] for item in own] for sid, own in items.items()}
    recommender = Recommender(model, encoder, trie, sid_of_sequence, shown_titles, num_beams, max_history, cutoff_len)

    if not interactive:
        say(recommender.answer(*history, top, exclude_seen))
        return
    say('titles, oldest first: "first; second"; an empty line ends')
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not text:
            return
        try:
            say(recommender.answer(*from_titles(text), top, exclude_seen))
        except InputError as error:
            say(f"error: {error}")


if __name__ == "__main__":
    run(recommend)
