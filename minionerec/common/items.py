"""Readers of per-item and per-user files: item.json, preference texts, lists of item ids."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from minionerec.common.files import InputError, open_text, read_json, read_lines
from minionerec.common.records import (
    Catalogue,
)


def read_item_ids(path: str, item_ids: Container[int]) -> list[int]:
    """The item ids of a file, one a line.

    Raises:
        InputError: a line that is no item of `item_ids`, or no line.
    """
    chosen = []
    for number, line in read_lines(path, "only_items"):
        if not line.strip():
            continue
        if not line.strip().isdecimal() or int(line) not in item_ids:
            raise InputError(f"{path}, line {number}: expected the id of an item of the info file, got {line[:40]!r}")
        chosen.append(int(line))
    if not chosen:
        raise InputError(f"{path}: no item id")
    return chosen


def read_catalogue(path: str, index: dict[int, tuple[str, ...]], index_path: str) -> tuple[Catalogue, dict[int, str]]:
    """(catalogue, {item id: description}) of an index and the item.json `path`, which must cover it.

    Raises:
        InputError: an item of the index that the item.json lacks.
    """
    items = read_items(path, index, index_path)
    titles = [str(items[item].get("title") or "") for item in items]
    descriptions = {item: str(record.get("description") or "") for item, record in items.items()}
    return Catalogue(["".join(index[item]) for item in items], titles, list(items)), descriptions


def read_items(path: str | Path, item_ids: Iterable[int], source: str, flag: str = "item_meta_path") -> dict[int, dict]:
    """{item id: {"title", "description", ...}} of an item.json, in the order of the ids.

    Args:
        path: the item.json.
        item_ids: the items that must stand there, as the file `source` names them.

    Raises:
        InputError: no object of objects, or an item that is missing.
    """
    content = read_json(path, flag)
    if not isinstance(content, dict):
        raise InputError(f'{path}: expected an object of items, {{"0": {{"title": ...}}, ...}}')
    items = {}
    for item in sorted(item_ids):
        if not isinstance(content.get(str(item)), dict):
            raise InputError(f"{path}: item {item} of {source} is missing")
        items[item] = content[str(item)]
    return items


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
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or set(record) != {"user_id", "preference"}:
                raise InputError(f'{where}: expected {{"user_id": "...", "preference": "..."}}, got {line[:60]!r}')
            pairs.append((where, record["user_id"], record["preference"]))
    else:
        with open_text(path, flag) as file:
            try:
                # Pairs, because a dictionary would hide a user who stands there twice.
                content = json.load(file, object_pairs_hook=lambda pairs: pairs)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}, line {error.lineno}: not valid JSON ({error.msg}); a file of JSON lines is named .jsonl"
                ) from None
        if not isinstance(content, list) or not all(isinstance(pair, tuple) for pair in content):
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
    return {item: str(record.get("description") or "") for item, record in read_items(path, item_ids, source).items()}


def read_item_records(path: str | Path, flag: str | None = None) -> dict[str, dict[str, str]]:
    """`{ds}.item.json`, checked: ids are the texts 0..N-1 and every item is an object with a `title`."""
    items = read_json(path, flag)
    if not isinstance(items, dict) or not items:
        raise InputError(f'{path}: expected an object of items, {{"0": {{"title": ...}}, ...}}')
    if set(items) != {str(i) for i in range(len(items))}:
        stray = sorted(set(items) - {str(i) for i in range(len(items))})[:1]
        raise InputError(f"{path}: item ids must be 0..{len(items) - 1}, found {stray[0]!r}")
    for item_id, item in items.items():
        if not isinstance(item, dict) or not isinstance(item.get("title"), str):
            raise InputError(f'{path}, item {item_id}: expected an object with a text "title"')
    return {str(i): items[str(i)] for i in range(len(items))}
