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


def read_item_ids(path: str, known: Container[int]) -> list[int]:
    """The item ids of a file, one a line.

    Raises:
        InputError: a line that is no item of `known`, or no line.
    """
    found = []
    for number, line in read_lines(path, "only_items"):
        if not line.strip():
            continue
        if not line.strip().isdecimal() or int(line) not in known:
            raise InputError(f"{path}, line {number}: expected the id of an item of the info file, got {line[:40]!r}")
        found.append(int(line))
    if not found:
        raise InputError(f"{path}: no item id")
    return found


def read_catalogue(path: str, index: dict[int, tuple[str, ...]], index_path: str) -> tuple[Catalogue, list[str]]:
    """(catalogue, descriptions) of an item.json, which must cover the index.

    Raises:
        InputError: an item that one of the two files lacks.
    """
    items = read_json(path, "item_meta_path")
    missing = sorted(set(index) - {int(key) for key in items})
    if missing:
        raise InputError(f"{path}: item {missing[0]} of {index_path} is missing")
    order = sorted(index)
    titles = [str(items[str(item)].get("title") or "") for item in order]
    descriptions = [str(items[str(item)].get("description") or "") for item in order]
    return Catalogue(["".join(index[item]) for item in order], titles, order), descriptions


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
                content = json.load(
                    file, object_pairs_hook=lambda found: found
                )  # pairs: a dict would hide a user twice
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


def read_descriptions(path: str | Path, item_ids: Iterable[int], flag: str = "item_meta_path") -> dict[int, str]:
    """{item id: description} of an item.json.

    Raises:
        InputError: an item of `item_ids` that is missing there.
    """
    items = read_json(path, flag)
    descriptions = {}
    for item in item_ids:
        if not isinstance(items, dict) or not isinstance(items.get(str(item)), dict):
            raise InputError(f"{path}: item {item} is missing")
        descriptions[item] = str(items[str(item)].get("description") or "")
    return descriptions


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
