"""What a person writes for an item of a history: its title, its SID or an id, and the item that is meant."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minionerec.common.files import InputError, parse_list
from minionerec.common.records import Catalogue, Row

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


def move_article(title: str) -> str:
    """A normalised title with the article in front that lists of films put behind: "alien, the" is "the alien"."""
    return re.sub(r"^(.+), (the|a|an)\b", r"\2 \1", title)


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


class ItemFinder:
    """Finds the items of a catalogue that people name.

    Args:
        catalogue: the items.
        original_ids: {item id: its id in the raw log}, where that is known.
    """

    def __init__(self, catalogue: Catalogue, original_ids: Mapping[int, str] | None = None):
        self.catalogue, self._original_ids = catalogue, original_ids or {}
        self._titles = [normalise_title(text) for text in catalogue.titles]
        self._moved = [move_article(title) for title in self._titles]
        self._of_sid: dict[str, list[int]] = defaultdict(list)
        self._of_title: dict[str, list[int]] = defaultdict(list)
        for number, (sid, title) in enumerate(zip(catalogue.sids, self._titles, strict=True)):
            self._of_sid[sid].append(number)
            self._of_title[title].append(number)
            if self._moved[number] != title:
                self._of_title[self._moved[number]].append(number)
        self._of_item = {item: number for number, item in enumerate(catalogue.item_ids)}
        self._of_original = {
            text: self._of_item[item] for item, text in self._original_ids.items() if item in self._of_item
        }
        self._known: dict[str, int] = {}

    def find(self, name: str | int) -> int:
        """Number in the catalogue of the item that `name` means.

        A number is an item id. A text is a SID, else an id of the raw log, else a title in any case, also with the
        article in front where the catalogue has it behind ("Alien, The"), else an item id in
        digits (where no ids of a raw log are known, which may be digits too), else a part of one item's title. Items
        that share a SID are the same to a model: of several that fit, with one SID, the first is taken.

        Raises:
            InputError: no such item, or several; the line names up to NEAREST_TITLES of them.
        """
        if isinstance(name, int):
            if name not in self._of_item:
                raise InputError(f"no item has the id {name}")
            return self._of_item[name]
        if name not in self._known:
            self._known[name] = self._search(name)
        return self._known[name]

    def find_history(self, names: Sequence[str | int], *, has_ids: bool = False) -> History:
        """The items that `names` mean, oldest first, see `find`.

        Args:
            names: of the items.
            has_ids: numbers, and texts of digits, are ids of the raw log, or item ids where it has none.

        Raises:
            InputError: a name of no item, or of several.
        """
        numbers = [self.find(self._read_id(name) if has_ids else name) for name in names]
        catalogue = self.catalogue
        columns = (catalogue.sids, catalogue.titles, catalogue.item_ids)
        return History(*([column[number] for number in numbers] for column in columns))

    def _read_id(self, name: str | int) -> str | int:
        text = str(name).strip()
        if self._of_original:
            if isinstance(name, int) and text not in self._of_original:
                raise InputError(f"no item has the id {name}")
            return text
        return int(text) if text.isdecimal() else name

    def _search(self, name: str) -> int:
        wanted, sids = normalise_title(name), self.catalogue.sids
        if name.strip() in self._of_original:
            return self._of_original[name.strip()]
        numbers = self._of_sid.get(name.strip()) or self._of_title.get(wanted) or []
        if not numbers and not self._of_original and wanted.isdecimal() and int(wanted) in self._of_item:
            numbers = [self._of_item[int(wanted)]]
        pairs = enumerate(zip(self._titles, self._moved, strict=True))
        numbers = numbers or [number for number, (title, moved) in pairs if wanted in title or wanted in moved]
        if len({sids[number] for number in numbers}) == 1:
            return numbers[0]
        message = f"{len(numbers)} items have {name!r} in their title; write one title in full, or its SID"
        if not numbers:
            words = set(wanted.split())
            shared = [len(words & set(text.split())) for text in self._titles]
            numbers = [number for number, count in enumerate(shared) if count]
            numbers.sort(key=lambda number: -shared[number])
            message = f"no item has {name!r} in its title" + ("; nearest" if numbers else "")
        nearest = "; ".join(
            f"{textwrap.shorten(self.catalogue.titles[number], 60, placeholder=' ...')!r} {sids[number]}"
            for number in numbers[:NEAREST_TITLES]
        )
        raise InputError(message + (f": {nearest}" if nearest else ""))


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
