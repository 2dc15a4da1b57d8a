"""Readers of per-item and per-user files: item.json, preference texts, lists of item ids."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from minionerec.common.files import InputError, parse_item_id, read_json, read_lines, replace_surrogates
from minionerec.common.records import Catalogue
from minionerec.common.texts import clean_text


def read_item_ids(path: str, item_ids: Container[int]) -> list[int]:
    """The item ids of a file, one a line.

    Raises:
        InputError: a line that is no item of `item_ids`, or no line.
    """
    chosen = []
    for number, line in read_lines(path, "only_items"):
        if not line.strip():
            continue
        try:
            item = parse_item_id(line.strip())
        except ValueError:
            item = -1
        if item not in item_ids:
            raise InputError(f"{path}, line {number}: expected the id of an item of the info file, got {line[:40]!r}")
        chosen.append(item)
    if not chosen:
        raise InputError(f"{path}: no item id")
    return chosen


def read_catalogue(path: str, index: dict[int, tuple[str, ...]], index_path: str) -> tuple[Catalogue, dict[int, str]]:
    """(catalogue, {item id: description}) of an index and the item.json `path`, which must cover it.

    Raises:
        InputError: an item of the index that the item.json lacks.
    """
    items = read_items(path, index, index_path)
    titles = [record["title"] for record in items.values()]
    descriptions = {item: record.get("description", "") for item, record in items.items()}
    return Catalogue(["".join(index[item]) for item in items], titles, list(items)), descriptions


def _read_item_object(path: str | Path, flag: str | None) -> dict[int, dict[str, str]]:
    """{item id: its texts} of an item.json, checked; lists of texts, as Amazon writes descriptions, become one text.

    Raises:
        InputError: no object of items with whole numbers as ids and a text "title" each, or an item that stands there
            twice.
    """
    shape = '{"0": {"title": ...}, ...}'
    content = read_json(path, flag, pairs=True)
    if not isinstance(content, tuple) or not content:
        found = "a list" if isinstance(content, list) else "nothing" if content == () else str(content)[:40]
        raise InputError(f"{path}: expected an object of items, {shape}, got {found}")
    items: dict[int, dict[str, str]] = {}
    for key, record in content:
        try:
            item = parse_item_id(key)
        except ValueError:
            raise InputError(
                f"{path}: item {key!r}: items are named by their numbers 0, 1, ..., as in the index; NAME.item2id of "
                "data_process says which number an original id has"
            ) from None
        if item in items:
            raise InputError(f"{path}: item {item} stands there twice")
        if not isinstance(record, tuple) or not isinstance(dict(record).get("title"), str):
            got = f", got {str(record)[:40]!r}" if isinstance(record, str) else ""
            raise InputError(f'{path}, item {item}: expected an object with a text "title"{got}')
        items[item] = {str(name): _join_text(value) for name, value in record}
    return items


def _join_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return clean_text([part for part in value if not isinstance(part, tuple)] if isinstance(value, list) else value)


def read_items(
    path: str | Path, item_ids: Iterable[int], source: str, flag: str = "item_meta_path"
) -> dict[int, dict[str, str]]:
    """{item id: {"title", "description", ...}} of an item.json, in the order of the ids.

    Args:
        path: the item.json.
        item_ids: the items that must stand there, as the file `source` names them.

    Raises:
        InputError: what `_read_item_object` finds, or an item that is missing.
    """
    content = _read_item_object(path, flag)
    missing = next((item for item in sorted(item_ids) if item not in content), None)
    if missing is not None:
        raise InputError(f"{path}: item {missing} of {source} is missing")
    return {item: content[item] for item in sorted(item_ids)}


def read_preferences(path: str | Path, flag: str = "preference_file") -> dict[str, str]:
    """{user id: text} of a preference file: one JSON object of that form, or, in a file named .jsonl, one object
    {"user_id": ..., "preference": ...} a line. Runs of white space become one blank.

    The texts must be written from the train split alone: nobody can see afterwards what a text was made from.

    Raises:
        InputError: anything else than texts, a user who stands there twice, or no user.
    """
    pairs: list[tuple[str, Any, Any]] = []  # where it stands, user, text
    if str(path).endswith(".jsonl"):
        for number, line in read_lines(path, flag):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                record = replace_surrogates(json.loads(line))
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or set(record) != {"user_id", "preference"}:
                raise InputError(f'{where}: expected {{"user_id": "...", "preference": "..."}}, got {line[:60]!r}')
            pairs.append((where, record["user_id"], record["preference"]))
    else:
        # Pairs, because a dictionary would hide a user who stands there twice.
        content = read_json(path, flag, pairs=True, hint="; a file of JSON lines is named .jsonl")
        if not isinstance(content, tuple):
            raise InputError(f'{path}: expected one object such as {{"user id": "text"}}')
        pairs = [(f"{path}, user {user!r}", user, text) for user, text in content]
    preferences: dict[str, str] = {}
    for where, user, text in pairs:
        if not isinstance(user, str) or not isinstance(text, str):
            raise InputError(f"{where}: the user id and the preference must be texts in quotes")
        if user in preferences:
            raise InputError(f"{where}: user {user!r} stands there already")
        preferences[user] = " ".join(text.split())
    if not preferences:
        raise InputError(f"{path}: no user")
    return preferences


def read_descriptions(path: str | Path, item_ids: Iterable[int], source: str) -> dict[int, str]:
    """{item id: description} of an item.json, see `read_items`."""
    return {item: record.get("description", "") for item, record in read_items(path, item_ids, source).items()}


def read_item_records(path: str | Path, flag: str | None = None) -> dict[str, dict[str, str]]:
    """`{ds}.item.json`, checked: ids are the texts 0..N-1 and every item is an object with a `title`."""
    items = _read_item_object(path, flag)
    stray = next((item for item in sorted(items) if item >= len(items)), None)
    if stray is not None:
        raise InputError(f"{path}: item ids must be 0..{len(items) - 1}, found '{stray}'")
    return {str(item): items[item] for item in range(len(items))}
