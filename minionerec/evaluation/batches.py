"""Recommendations for a file of users of any size: in chunks that several processes share and a kill leaves whole."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from minionerec.common.files import InputError, atomic_write, read_json, write_json
from minionerec.common.processes import process_state, say
from minionerec.evaluation.histories import History
from minionerec.evaluation.recommender import Recommender
from minionerec.evaluation.user_files import User, read_users, write_lists

CHUNK = 2048  # users between two files of finished work
SHOWN_SECONDS = 30  # between two lines of progress


def recommend_to_users(
    recommender: Recommender,
    users: Sequence[User],
    k: int,
    exclude_seen: bool,
    categories: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """What `write_lists` writes of some users; those that cannot be read have a "problem" instead of a list."""
    results: list[dict[str, Any]] = []
    histories: list[History] = []
    asked: list[dict[str, Any]] = []
    for user in users:
        result: dict[str, Any] = {"user_id": user.user_id, "row": user.row}
        results.append(result)
        try:
            if user.problem:
                raise InputError(user.problem)
            histories.append(recommender.finder.find_history(user.history, has_ids=user.has_ids))
            asked.append(result)
        except InputError as error:
            result["problem"] = str(error)
    lists = recommender.rank_histories(histories, k, exclude_seen, categories)
    for result, items in zip(asked, lists, strict=True):
        result["recommendations"] = [item.to_json() for item in items[:k]]
    return results


def recommend_in_chunks(
    recommender: Recommender,
    path: str,
    column: str | None,
    user_column: str | None,
    folder: Path,
    k: int,
    exclude_seen: bool,
    categories: Sequence[str] | None,
) -> int:
    """Work off a file of users; called on every process, each of which does its share of the chunks.

    A finished chunk is a file of `folder`; one that is there is not done again.

    Args:
        recommender: the model and its catalogue.
        path: of the file of users. column, user_column: of their histories and names, see `read_users`.
        folder: on a disk that all processes share.
        k, exclude_seen, categories: see `Recommender.recommend`.

    Returns:
        How many chunks the file has.
    """
    state = process_state()
    folder.mkdir(parents=True, exist_ok=True)
    began = shown = time.monotonic()
    chunks = done = 0
    stream = read_users(path, column, user_column)
    while users := list(islice(stream, CHUNK)):
        number, chunks = chunks, chunks + 1
        finished = folder / f"part-{number:06}.json"
        if number % state.num_processes != state.process_index or finished.exists():
            continue
        write_json(finished, recommend_to_users(recommender, users, k, exclude_seen, categories), indent=None)
        done += len(users)
        if time.monotonic() - shown > SHOWN_SECONDS:
            shown = time.monotonic()
            say(f"[recommend] {number * CHUNK + len(users):,} users, {done / (shown - began):,.0f} users/s here")
    state.wait_for_everyone()
    return chunks


def read_chunks(folder: Path, chunks: int) -> Iterator[dict[str, Any]]:
    """The results of all users, in the order of their file."""
    for number in range(chunks):
        yield from read_json(folder / f"part-{number:06}.json")


def write_recommendations(output: Path, folder: Path, chunks: int) -> tuple[int, int]:
    """The finished chunks as one file, and the users without a list as OUTPUT.skipped.jsonl, with their reasons.

    Returns:
        (users with a list, users without).
    """
    skipped = 0
    with atomic_write(name_skipped(output)) as temporary, temporary.open("w", encoding="utf-8") as file:

        def select_lists() -> Iterator[dict[str, Any]]:
            nonlocal skipped
            for result in read_chunks(folder, chunks):
                if "problem" in result:
                    skipped += 1
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
                else:
                    yield {"user_id": result["user_id"], "recommendations": result["recommendations"]}

        count = write_lists(str(output), select_lists())
    return count, skipped


def name_skipped(output: Path) -> Path:
    """The file of the users without a list."""
    return output.with_name(f"{output.name}.skipped.jsonl")
