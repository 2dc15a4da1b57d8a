"""The checks of `data_process.validate` on the files about items: each goes on after what is wrong and reports it.

A check takes the `Report` that collects problems and what earlier files say of the `Items`, to which it may add.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from minionerec.common.embeddings import open_array
from minionerec.common.file_kinds import name_other_kind
from minionerec.common.files import HALF_PAIR, WHOLE_NUMBER, InputError, open_text, replace_surrogates
from minionerec.common.processes import say
from minionerec.common.progress import ProgressBar
from minionerec.common.records import SID_TOKEN

EMBEDDING_ROWS = 65_536  # checked at a time


class Report:
    """What is wrong, by kind and file, and what was checked. The first `limit` problems of a kind and file are kept."""

    def __init__(self, limit: int):
        self.limit = limit
        self.texts: dict[tuple[str, str, Path], list[str]] = defaultdict(list)
        self.counts: Counter[tuple[str, str, Path]] = Counter()
        self.checked: list[tuple[Path, int, str]] = []

    def error(self, kind: str, path: Path, where: str, text: str) -> None:
        """Add an error."""
        self.add("error", kind, path, where, text)

    def warning(self, kind: str, path: Path, where: str, text: str) -> None:
        """Add a warning."""
        self.add("warning", kind, path, where, text)

    def add(self, level: str, kind: str, path: Path, where: str, text: str) -> None:
        """Count a problem and keep its text.

        Args:
            level: error or warning.
            kind: what problems of one kind and file are counted under.
            path: the file.
            where: such as 'line 3' or 'item 17', or empty for the file as a whole.
            text: what is wrong.
        """
        key = (level, kind, path)
        self.counts[key] += 1
        if self.counts[key] <= self.limit:
            text = " ".join(text.splitlines())
            self.texts[key].append(f"{level}: {path}, {where}: {text}" if where else f"{level}: {path}: {text}")

    def count(self, level: str) -> int:
        """How many errors or warnings there are."""
        return sum(count for key, count in self.counts.items() if key[0] == level)

    def show(self, folder: Path) -> None:
        """Print the errors, the warnings and a table of the files."""
        for level in ("error", "warning"):
            for key, texts in self.texts.items():
                if key[0] == level:
                    hidden = self.counts[key] - len(texts)
                    say("\n".join(texts + [f"{level}: {key[2]}: and {hidden} more: {key[1]}"] * (hidden > 0)))
        names = [str(path.relative_to(folder)) for path, _, _ in self.checked]
        for name, (_, rows, note) in zip(names, self.checked, strict=True):
            say(f"  {name:<{max(map(len, names))}} {rows:>9} {note}".rstrip())
        counts = [(self.count(level), level) for level in ("error", "warning")]
        say(f"{folder}: " + ", ".join(f"{count} {level}{'s' * (count != 1)}" for count, level in counts))


@dataclass
class Items:
    """The items by id, as the first file says that has them: their ids, titles (white space made single), SIDs as text.

    `*_file` is that file, or None where no file has spoken yet.
    """

    ids: Collection[int] = ()
    ids_file: Path | None = None
    titles: dict[int, str] = field(default_factory=dict)
    titles_file: Path | None = None
    sids: dict[int, str] = field(default_factory=dict)
    sids_file: Path | None = None

    def add_ids(self, ids: dict[int, object], path: Path) -> None:
        """Take the ids of a file, unless an earlier one has named them."""
        if self.ids_file is None and ids:
            self.ids, self.ids_file = ids.keys(), path

    def wrong_title(self, item: int, title: str) -> str | None:
        """What is wrong with `title`; an item without a title so far gets it."""
        expected = self.titles.setdefault(item, " ".join(title.split()))
        if expected == title or expected == " ".join(title.split()):
            return None
        return f"item {item} has the title {title!r}, but {self.titles_file or 'an earlier line'} says {expected!r}"

    def wrong_sid(self, item: int, sid: str) -> str | None:
        """What is wrong with `sid`; an item without a SID so far gets it."""
        expected = self.sids.setdefault(item, sid)
        if expected == sid:
            return None
        return f"item {item} has SID {sid}, but {self.sids_file or 'an earlier line'} says {expected}"


def iterate_lines(report: Report, path: Path) -> Iterator[str]:
    """The lines of a text file as they are; bytes that are not UTF-8 end it and are reported, as is what is no text."""
    try:
        with open_text(path) as file:
            yield from ProgressBar(file, desc=path.name, unit=" lines", leave=False, delay=2, mininterval=1)
    except InputError as error:
        with path.open("rb") as file:
            wrong = (number for number, raw in enumerate(file, 1) if raw.decode("utf-8", "replace").encode() != raw)
            line = 0 if name_other_kind(path) else next(wrong, 0)
        what = "not UTF-8 text; the file was not read to its end" if line else str(error).removeprefix(f"{path}: ")
        report.error("not text", path, f"line {line}" if line else "", what)


def iterate_fields(report: Report, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, tab-separated fields) of a text file."""
    for number, line in enumerate(iterate_lines(report, path), 1):
        yield number, line.rstrip("\r\n").split("\t")


def parse_json(report: Report, path: Path, pairs_hook: Callable[[list], object] | None = None) -> object:
    """What a JSON file holds, None when that is not JSON."""
    text = "".join(iterate_lines(report, path))
    if ("error", "not text", path) in report.counts:
        return None
    try:
        value = json.loads(text, object_pairs_hook=pairs_hook)
    except json.JSONDecodeError as error:
        report.error("not JSON", path, f"line {error.lineno}", f"not valid JSON ({error.msg})")
        return None
    except (RecursionError, ValueError) as error:
        report.error("not JSON", path, "", f"not usable JSON ({type(error).__name__})")
        return None
    if not HALF_PAIR.search(text):
        return value
    plain = replace_surrogates(value)
    if plain != value:
        text = 'a text is cut in the middle of a character (half of a surrogate pair), which is read as "?"'
        report.warning("cut character", path, "", text)
    return plain


def parse_item_object(report: Report, path: Path) -> dict[int, object]:
    """{item id: value} of a JSON object; what is no item id, or stands there twice, is reported."""
    pairs: list[tuple[str, object]] = []

    def keep(read: list[tuple[str, object]]) -> dict[str, object]:
        # The outermost object comes last.
        pairs[:] = read
        return dict(read)

    content = parse_json(report, path, keep)
    if content is None:
        return {}
    if not isinstance(content, dict) or not content:
        report.error("no items", path, "line 1", 'expected an object of items, {"0": ..., "1": ...}')
        return {}
    for key, count in Counter(key for key, _ in pairs).items() if len(pairs) > len(content) else ():
        if count > 1:
            report.error("item twice", path, f"item {key}", f"stands there {count} times")
    for key in content:
        if not WHOLE_NUMBER.fullmatch(key):
            report.error("item id", path, f"item {key}", "expected an item id, a whole number from 0")
    return {int(key): value for key, value in content.items() if WHOLE_NUMBER.fullmatch(key)}


def check_item_file(report: Report, path: Path, items: Items) -> None:
    """Ids from 0 without a gap, and a title for every item."""
    content = parse_item_object(report, path)
    # An id far from the others is wrong itself; it does not make all ids below it missing.
    far = sorted(item for item in content if item >= 2 * len(content))
    for item in far:
        report.error(
            "item id", path, f"item {item}", f"ids run from 0 without a gap, and there are {len(content)} items"
        )
    highest = max(content.keys() - set(far), default=-1)
    for item in sorted(set(range(highest)) - content.keys()):
        report.error("item missing", path, f"item {item}", "is missing; ids run from 0 without a gap")
    titles = {}
    for item, value in content.items():
        if not isinstance(value, dict) or not isinstance(value.get("title"), str):
            report.error("no title", path, f"item {item}", 'expected an object with a text "title"')
            continue
        titles[item] = " ".join(value["title"].split())
        if not titles[item]:
            report.warning("empty title", path, f"item {item}", "the title is empty")
    items.add_ids(content, path)
    if items.titles_file is None and titles:
        items.titles, items.titles_file = titles, path
    report.checked.append((path, len(content), "items"))


def check_index(report: Report, path: Path, items: Items) -> None:
    """A SID for every item, none of which begins another, and no token on two levels."""
    content = parse_item_object(report, path)
    index: dict[int, tuple[str, ...]] = {}
    level_of: dict[str, tuple[int, int]] = {}
    for item, tokens in content.items():
        if (
            not isinstance(tokens, list)
            or not tokens
            or not all(isinstance(token, str) and SID_TOKEN.fullmatch(token) for token in tokens)
        ):
            text = f'expected a list of tokens such as ["<a_1>", "<b_2>"], got {str(tokens)[:60]}'
            report.error("no SID", path, f"item {item}", text)
            continue
        index[item] = tuple(tokens)
        for level, token in enumerate(tokens, 1):
            first, other = level_of.setdefault(token, (level, item))
            if first != level:
                text = f"token {token} is on level {level}, but on level {first} for item {other}"
                report.warning("token on two levels", path, f"item {item}", text)
    if content and items.ids_file:
        for item in items.ids:
            if item not in content:
                report.error("item missing", path, f"item {item}", f"has no SID, but stands in {items.ids_file}")
        for item in content:
            if item not in items.ids:
                report.error("unknown item", path, f"item {item}", f"is not in {items.ids_file}")
    owners: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for item, tokens in index.items():
        owners[tokens].append(item)
    shared = [sharing for sharing in owners.values() if len(sharing) > 1]
    if shared:
        examples = "; ".join(f"{' and '.join(map(str, ids))} {''.join(index[ids[0]])}" for ids in shared[:3])
        text = f"{sum(map(len, shared))} items share their SID with another, such as {examples}"
        report.warning("shared SIDs", path, f"item {shared[0][0]}", text)
    # In sorted order the SIDs that begin with a SID stand right behind it.
    ordered = sorted(owners)
    for short, long in pairwise(ordered):
        if long[: len(short)] == short:
            text = f"its SID {''.join(short)} is the beginning of {''.join(long)}, item {owners[long][0]}"
            report.error("SID that begins another", path, f"item {owners[short][0]}", text)
    items.add_ids(content, path)
    if items.sids_file is None and index:
        items.sids, items.sids_file = {item: "".join(tokens) for item, tokens in index.items()}, path
    for item, tokens in index.items():
        wrong = items.wrong_sid(item, "".join(tokens))
        if wrong:
            report.error("SID", path, f"item {item}", wrong)
    lengths = sorted({len(tokens) for tokens in index.values()})
    note = f"{len(owners)} distinct SIDs, {sum(map(len, shared))} items share one, tokens {'/'.join(map(str, lengths))}"
    report.checked.append((path, len(content), note))


def check_info(report: Report, path: Path, items: Items) -> None:
    """A line for every item, with the title and the SID that other files give it."""
    line_of: dict[int, int] = {}
    for number, fields in iterate_fields(report, path):
        line = f"line {number}"
        if not "".join(fields).strip():
            continue
        sid_ok = len(fields) == 3 and fields[0] and "".join(SID_TOKEN.findall(fields[0])) == fields[0]
        if not sid_ok or not WHOLE_NUMBER.fullmatch(fields[2]):
            got = " ".join(fields)[:60]
            report.error("malformed line", path, line, f"expected sid<TAB>title<TAB>item_id, got {got!r}")
            continue
        item = int(fields[2])
        if item in line_of:
            report.error("item twice", path, line, f"item {item} stands on line {line_of[item]} already")
            continue
        line_of[item] = number
        if items.ids_file and item not in items.ids:
            report.error("unknown item", path, line, f"item {item} is not in {items.ids_file}")
            continue
        check_texts(report, path, line, items, [item], [fields[1]], [fields[0]])
    for item in items.ids:
        if item not in line_of and line_of:
            report.error("item missing", path, "", f"item {item} of {items.ids_file} has no line")
    if not line_of:
        report.error("no items", path, "", "no items")
    items.add_ids(line_of, path)
    if line_of:
        # What was remembered line by line came from this file, where no other had spoken before.
        items.titles_file, items.sids_file = items.titles_file or path, items.sids_file or path
    report.checked.append((path, len(line_of), "items"))


def check_texts(
    report: Report, path: Path, line: str, items: Items, ids: list[int], titles: list[str], sids: list[str]
) -> None:
    """The titles and SIDs of one line against those of other files; the first wrong one of each is reported."""
    if [items.sids.get(item) for item in ids] != sids:
        wrong = next(filter(None, map(items.wrong_sid, ids, sids)), None)
        if wrong:
            report.error("SID", path, line, wrong)
    if [items.titles.get(item) for item in ids] != titles:
        wrong = next(filter(None, map(items.wrong_title, ids, titles)), None)
        if wrong:
            report.error("title", path, line, wrong)


def check_names(report: Report, path: Path, kind: str, items: Items | None) -> set[str]:
    """The mapped ids of a user2id or item2id file; with `items` they are the ids of all items."""
    originals: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for number, fields in iterate_fields(report, path):
        line = f"line {number}"
        if len(fields) != 2:
            text = f"expected the original and the mapped {kind} id separated by a tab, got {len(fields)} fields"
            report.error("malformed line", path, line, text)
        elif number == 1:
            if WHOLE_NUMBER.fullmatch(fields[1]):
                report.error("no header", path, line, f"expected a header line such as original_{kind} {kind}_id")
        elif not WHOLE_NUMBER.fullmatch(fields[1]):
            report.error("malformed line", path, line, f"expected a whole number from 0, got {fields[1][:60]!r}")
        else:
            for name, seen, what in ((fields[0], originals, "original id"), (fields[1], numbers, "mapped id")):
                if seen.setdefault(name, number) != number:
                    report.error("id twice", path, line, f"{what} {name!r} stands on line {seen[name]} already")
    if items and items.ids_file:
        expected = {str(item) for item in items.ids}
        for item in sorted(expected - numbers.keys(), key=int):
            report.error("item missing", path, "", f"item {item} of {items.ids_file} has no line")
        for item in numbers.keys() - expected:
            report.error("unknown item", path, f"line {numbers[item]}", f"item {item} is not in {items.ids_file}")
    report.checked.append((path, len(numbers), f"{kind}s"))
    return set(numbers)


def check_embeddings(report: Report, path: Path, items: Items) -> None:
    """Shape and values of an embedding file, and the item ids of its side file."""
    try:
        array = open_array(path, mapped=True)
    except InputError as error:
        report.error("not an array", path, "", str(error).removeprefix(f"{path}: "))
        return
    for start in range(0, len(array), EMBEDDING_ROWS):
        for row in np.flatnonzero(~np.isfinite(array[start : start + EMBEDDING_ROWS]).all(axis=1)) + start:
            report.error("not finite", path, f"row {row}", "a value is not finite")
    report.checked.append((path, len(array), f"rows of {array.shape[1]} {array.dtype} values"))
    side = path.with_suffix(".json")
    if not side.is_file():
        report.error("no side file", side, "", 'no such file; it names the item of each row: {"item_ids": ["0", ...]}')
        return
    described = parse_json(report, side)
    if described is None:
        return
    ids = described.get("item_ids") if isinstance(described, dict) else None
    if not isinstance(ids, list):
        report.error("no item ids", side, "", 'expected an object with a list "item_ids"')
        return
    if len(ids) != len(array):
        report.error("row count", side, "", f"{len(ids)} item ids for the {len(array)} rows of {path}")
    row_of: dict[str, int] = {}
    expected = {str(item) for item in items.ids}
    for row, item in enumerate(map(str, ids)):
        if row_of.setdefault(item, row) != row:
            report.error("item twice", side, f"row {row}", f"item {item} is row {row_of[item]} already")
        if items.ids_file and item not in expected:
            report.error("unknown item", side, f"row {row}", f"item {item} is not in {items.ids_file}")
    for item in sorted(expected - row_of.keys(), key=int):
        report.error("item missing", side, f"item {item}", f"has no row, but stands in {items.ids_file}")
