"""Rows, index and catalogue: reading the files that the SID side hands to the language-model side."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from minionerec.common.files import WHOLE_NUMBER, InputError, parse_item_id, parse_list, read_json, read_lines
from minionerec.common.row_files import is_csv, iterate_records

SID_TOKEN = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True)
class Row:
    """One next-item sample: a user's history, oldest first, and the item that came next."""

    user_id: str
    history_titles: tuple[str, ...]
    history_ids: tuple[int, ...]
    history_sids: tuple[str, ...]
    title: str
    item_id: int
    sid: str


def parse_list_cell(text: str, where: str) -> list:
    # JSON is several times faster than a literal parser; without double quotes and escapes the two differ in their
    # quotes only. The rest take the careful way.
    if '"' not in text and "\\" not in text and text.count("'") % 2 == 0:
        try:
            value = json.loads(text.replace("'", '"'))
            if isinstance(value, list):
                return value
        except (ValueError, RecursionError):
            pass
    return parse_list(text, where)


def parse_row(record: dict[str, Any], where: str) -> Row:
    """The row of a record of `iterate_records`.

    Raises:
        InputError: a broken list, an item id that is no number, history columns of different lengths, an empty history,
            or a text that is none; each with `where`.
    """
    titles, ids, sids = (
        parse_list_cell(value, f"{where}, column {name}") if isinstance(value := record[name], str) else value
        for name in ("history_item_title", "history_item_id", "history_item_sid")
    )
    if not (isinstance(titles, list) and isinstance(ids, list) and isinstance(sids, list)):
        raise InputError(f"{where}: expected the history columns to be lists")
    if not len(titles) == len(ids) == len(sids):
        raise InputError(
            f"{where}: histories of different length: {len(titles)} titles, {len(ids)} ids, {len(sids)} SIDs"
        )
    if not sids:
        raise InputError(f"{where}: the history is empty")
    try:
        item_ids = [parse_item_id(value) for value in (*ids, record["item_id"])]
    except ValueError as error:
        raise InputError(f"{where}: item ids must be whole numbers, {error}") from None
    return Row(
        str(record["user_id"]),
        tuple(map(str, titles)),
        tuple(item_ids[:-1]),
        tuple(map(str, sids)),
        str(record["item_title"]),
        item_ids[-1],
        str(record["item_sid"]),
    )


def iterate_rows(path: str | Path, flag: str | None = None) -> Iterator[Row]:
    """The rows of a split (docs/file_formats.md), one after the other: CSV, .jsonl or .parquet.

    Raises:
        InputError: what `iterate_records` and `parse_row` find, with file and line, or a file without rows.
    """
    empty = True
    for where, record in iterate_records(path, flag):
        empty = False
        yield parse_row(record, where)
    if empty:
        raise InputError(f"{path}: no rows" + (" below the header line" if is_csv(path) else ""))


def read_rows(path: str | Path, flag: str | None = None) -> list[Row]:
    """All rows of a split in memory, see `iterate_rows`; `open_rows` is the way that holds any number of rows."""
    return list(iterate_rows(path, flag))


def read_index(path: str | Path, flag: str | None = None) -> dict[int, tuple[str, ...]]:
    """{item id: SID tokens} of an index.json.

    Raises:
        InputError: not an object of lists of `<...>` tokens.
    """
    content = read_json(path, flag, pairs=True)
    index: dict[int, tuple[str, ...]] = {}
    if not isinstance(content, tuple) or not content:
        raise InputError(f'{path}: expected an object such as {{"0": ["<a_1>", "<b_2>"]}}')
    for key, tokens in content:
        if (
            not isinstance(tokens, list)
            or not tokens
            or not all(isinstance(t, str) and SID_TOKEN.fullmatch(t) for t in tokens)
        ):
            raise InputError(
                f'{path}, item {key}: expected a list of tokens such as ["<a_1>", "<b_2>"], got {str(tokens)[:60]}'
            )
        try:
            item = parse_item_id(key)
        except ValueError:
            raise InputError(f"{path}: item id {key!r} is not a whole number") from None
        if item in index:
            raise InputError(f"{path}: item {item} stands there twice")
        index[item] = tuple(tokens)
    return index


@dataclass(frozen=True)
class Catalogue:
    """The closed list of items: parallel lists of SIDs, titles and item ids.

    Attributes:
        counts: {item id: times it is a target of a train row}, where that is known; items without an entry have none.
            It orders the items that share a SID, and breaks ties.
    """

    sids: list[str]
    titles: list[str]
    item_ids: list[int]
    counts: dict[int, int] = field(default_factory=dict)

    @cached_property
    def sid_of(self) -> dict[int, str]:
        """{item id: SID}."""
        return dict(zip(self.item_ids, self.sids, strict=True))

    @cached_property
    def items_of_sid(self) -> dict[str, list[int]]:
        """{SID: its items}, most popular first and then by id: how a list of SIDs is read as a list of items."""
        groups: dict[str, list[int]] = defaultdict(list)
        for item in sorted(self.item_ids, key=lambda item: (-self.counts.get(item, 0), item)):
            groups[self.sid_of[item]].append(item)
        return dict(groups)

    def with_counts(self, train_rows: Iterable[Row]) -> Catalogue:
        """The same catalogue with the popularity of its items in the train rows."""
        return replace(self, counts=Counter(row.item_id for row in train_rows))


def check_rows(
    rows: Iterable[Row],
    catalogue: Catalogue,
    path: str | Path,
    source: str | Path,
    *,
    history: bool = True,
    first: int = 1,
) -> None:
    """Every item of the rows must be in the catalogue, with the same SID.

    Args:
        rows: of the split `path`.
        catalogue: read from the file `source`.
        history: check the items of the histories too, not only the targets.
        first: number of the first of the rows in its split.

    Raises:
        InputError: at the first item that is not.
    """
    sid_of = catalogue.sid_of
    for number, row in enumerate(rows, first):
        items = (*row.history_ids, row.item_id) if history else (row.item_id,)
        sids = (*row.history_sids, row.sid) if history else (row.sid,)
        for item, sid in zip(items, sids, strict=True):
            if item not in sid_of:
                raise InputError(f"{path}, row {number}: item {item} is not in {source}")
            if sid_of[item] != sid:
                raise InputError(f"{path}, row {number}: item {item} has SID {sid}, but {source} says {sid_of[item]}")


def check_index_against_info(
    index: dict[int, tuple[str, ...]], catalogue: Catalogue, path: str | Path, source: str | Path
) -> None:
    """Every item of the catalogue must stand in the index, with the same SID.

    Args:
        index: {item id: SID tokens}, read from `path`.
        catalogue: read from the file `source`.

    Raises:
        InputError: at the first item that does not.
    """
    for item, sid in catalogue.sid_of.items():
        if "".join(index.get(item, ())) != sid:
            raise InputError(
                f"{path}: item {item} has SID {''.join(index.get(item, ())) or 'none'}, {source} says {sid}"
            )


def read_info(path: str | Path, shared_sids: bool = False, flag: str = "info_file") -> Catalogue:
    """The items of an info file, one `sid<TAB>title<TAB>item_id` a line.

    Args:
        shared_sids: accept items that share a SID; a model cannot tell them apart, and metrics say how ties fall.

    Raises:
        InputError: a malformed line, an item listed twice, an empty file, or a SID listed twice unless `shared_sids`.
    """
    sids, titles, item_ids = [], [], []
    line_of_sid: dict[str, int] = {}
    line_of_item: dict[int, int] = {}
    for number, line in read_lines(path, flag):
        if not line.strip():
            continue
        fields = line.split("\t")
        if (
            len(fields) != 3
            or "".join(SID_TOKEN.findall(fields[0])) != fields[0]
            or not fields[0]
            or not WHOLE_NUMBER.fullmatch(fields[2])
        ):
            raise InputError(f"{path}, line {number}: expected sid<TAB>title<TAB>item_id, got {line[:60]!r}")
        sid, title, item = fields[0], fields[1], int(fields[2])
        if item in line_of_item:
            raise InputError(f"{path}, line {number}: item {item} stands on line {line_of_item[item]} already")
        if sid in line_of_sid and not shared_sids:
            raise InputError(
                f"{path}, line {number}: SID {sid} belongs to the item of line {line_of_sid[sid]} already; make SIDs "
                "unique (rq.generate_indices --collisions nearest_free) or accept ties with --shared_sids True"
            )
        line_of_item[item] = line_of_sid[sid] = number
        sids.append(sid), titles.append(title), item_ids.append(item)
    if not sids:
        raise InputError(f"{path}: no items")
    return Catalogue(sids, titles, item_ids)
