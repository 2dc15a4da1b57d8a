"""The tasks of a run: which there are, what files they need, how they are chosen, weighted and mixed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from data import (
    Example,
    FusionSeqRecDataset,
    PreferenceSFTDataset,
    PromptDataset,
    RLSeqTitle2SidDataset,
    RLTitle2SidDataset,
    RowDataset,
    SFTData,
    SidDataset,
    SidItemFeatDataset,
    SidSFTDataset,
    TitleHistory2SidSFTDataset,
    UserPreference2sidSFTDataset,
)
from fileio import InputError, open_text, read_json, read_lines
from prompts import Encoder, PromptSet
from records import Catalogue, Row
from similar_items import SimilarSidDataset, texts_of

DEFAULT_TASKS = ("next_sid", "title_history2sid", "title2sid", "sid2title")


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


# ---------------------------------------------------------------------------------------------------------------- tasks
@dataclass(frozen=True)
class Inputs:
    """What the tasks of a run are made from. Descriptions go by item id, preferences by user id."""

    rows: Sequence[Row]
    catalogue: Catalogue
    descriptions: dict[int, str] | None = None
    preferences: dict[str, str] | None = None
    cut_histories: bool = False
    seed: int = 42


Maker = Callable[[Inputs, Encoder, int], PromptDataset]


def _of_rows(kind: type[RowDataset]) -> Maker:
    return lambda inputs, encoder, cutoff_len: kind(inputs.rows, encoder, cutoff_len)


def _of_items(kind: type[SidItemFeatDataset], task: str) -> Maker:
    return lambda inputs, encoder, cutoff_len: kind(inputs.catalogue, encoder, cutoff_len, (task,), inputs.descriptions)


def _of_preferences(kind: type[UserPreference2sidSFTDataset | PreferenceSFTDataset]) -> Maker:
    return lambda inputs, encoder, cutoff_len: kind(inputs.rows, encoder, inputs.preferences, cutoff_len)


def _similar(inputs: Inputs, encoder: Encoder, cutoff_len: int) -> SimilarSidDataset:
    catalogue = inputs.catalogue
    descriptions = [(inputs.descriptions or {}).get(item, "") for item in catalogue.item_ids]
    texts = texts_of(catalogue.titles, descriptions)
    return SimilarSidDataset(inputs.rows, encoder, catalogue, texts, cutoff_len, inputs.cut_histories, inputs.seed)


# Task: how its dataset is made, and the flag of the file it needs beside rows and catalogue.
TASKS: dict[str, tuple[Maker, str]] = {
    "next_sid": (lambda inputs, *rest: SidSFTDataset(inputs.rows, *rest, inputs.cut_histories, inputs.seed), ""),
    "similar_sid": (_similar, "item_meta_path"),
    "next_title": (_of_rows(FusionSeqRecDataset), ""),
    "next_description": (
        lambda inputs, *rest: FusionSeqRecDataset(inputs.rows, *rest, inputs.descriptions),
        "item_meta_path",
    ),
    "title_history2sid": (_of_rows(TitleHistory2SidSFTDataset), ""),
    "title_history2title": (_of_rows(SFTData), ""),
    "title2sid": (_of_items(SidItemFeatDataset, "title2sid"), ""),
    "sid2title": (_of_items(SidItemFeatDataset, "sid2title"), ""),
    "description2sid": (_of_items(SidItemFeatDataset, "description2sid"), "item_meta_path"),
    "sid2description": (_of_items(SidItemFeatDataset, "sid2description"), "item_meta_path"),
    "history2preference": (_of_preferences(PreferenceSFTDataset), "preference_file"),
    "preference2sid": (_of_preferences(UserPreference2sidSFTDataset), "preference_file"),
}
# Rollouts are items of the catalogue: the tasks whose answer is a SID.
RL_TASKS: dict[str, tuple[Maker, str]] = {
    "next_sid": (_of_rows(SidDataset), ""),
    "title_history2sid": (_of_rows(RLSeqTitle2SidDataset), ""),
    "title2sid": (_of_items(RLTitle2SidDataset, "title2sid"), ""),
    "description2sid": (_of_items(RLTitle2SidDataset, "description2sid"), "item_meta_path"),
    "preference2sid": (_of_preferences(UserPreference2sidSFTDataset), "preference_file"),
}


def choose_tasks(
    tasks: Sequence[str] | None, prompts: PromptSet, known: Collection[str] = TASKS, **files: str | None
) -> dict[str, float]:
    """{task: weight} of --tasks: names, each with a weight after a colon if it is not 1.

    Without --tasks: those of DEFAULT_TASKS that are known here and in the prompt set; a new template changes no default.

    Args:
        files: by flag, the files a task may need; each that is given must have a task that needs it.

    Raises:
        InputError: a task that is unknown, named twice, has no template or lacks its file, a weight that is no positive
            number, a file without its task, or no task.
    """
    default = [task for task in DEFAULT_TASKS if task in known and task in prompts.templates]
    weights: dict[str, float] = {}
    for entry in tasks or default:
        task, colon, weight = entry.partition(":")
        if task not in known:
            raise InputError(f"--tasks: unknown task {task!r}; known: {', '.join(known)}")
        prompts.template(task)
        if task in weights:
            raise InputError(f"--tasks: {task} stands there twice; write {task}:2 to take its rows twice")
        try:
            weights[task] = float(weight) if colon else 1.0
        except ValueError:
            weights[task] = 0.0
        if not 0 < weights[task] < float("inf"):
            raise InputError(
                f"--tasks {entry}: expected TASK or TASK:WEIGHT with a positive number, such as {task}:0.5"
            )
        needed = TASKS[task][1]
        if needed in files and not files[needed]:
            raise InputError(f"--tasks: {task} needs --{needed}")
    if not weights:
        raise InputError(f"--tasks: name the tasks; this prompt set has {', '.join(prompts.templates)}")
    for flag, file in files.items():
        users = [task for task in known if TASKS[task][1] == flag]
        if file and not any(task in weights for task in users):
            raise InputError(f"--{flag}: no chosen task needs it; --tasks may name {', '.join(users)}")
    return weights


class Mixture(Dataset):
    """The datasets of several tasks as one, each with a weight: 0.5 takes a fresh random half of its examples in every
    epoch, 2 takes all of them twice. Every epoch has the same number of examples, at least one of every task.

    Raises:
        InputError: a task without any example.
    """

    def __init__(self, tasks: dict[str, float], datasets: Sequence[PromptDataset], seed: int):
        self.tasks, self.datasets, self.seed = tasks, list(datasets), seed
        for task, dataset in zip(tasks, self.datasets):
            if not len(dataset):
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in dataset.left_out.items())
                raise InputError(f"--tasks: {task} has no example (left out: {reasons})")
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the examples of this epoch; a function of the seed and the epoch alone."""
        self.places: list[tuple[Dataset, int]] = []
        for (task, weight), dataset in zip(self.tasks.items(), self.datasets):
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
            rows = len(dataset)
            copies, rest = divmod(max(1, round(weight * rows)), rows)
            drawn = random.Random(f"{self.seed}-{task}-{epoch}").sample(range(rows), rest)
            self.places += [(dataset, place) for place in sorted([*range(rows)] * copies + drawn)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        dataset, place = self.places[index]
        return dataset[place]

    def report(self) -> list[str]:
        """One line a task: its weight, its examples, and what was left out."""
        return [
            f"{task} x {weight:g}: {len(dataset):,} examples"
            + "".join(f", {count:,} left out {reason}" for reason, count in sorted(dataset.left_out.items()))
            for (task, weight), dataset in zip(self.tasks.items(), self.datasets)
        ]


def make_mixture(
    weights: dict[str, float],
    inputs: Inputs,
    encoder: Encoder,
    cutoff_len: int,
    makers: dict[str, tuple[Maker, str]] = TASKS,
) -> Mixture:
    """The datasets of the tasks of `weights`, made by TASKS or RL_TASKS."""
    return Mixture(weights, [makers[task][0](inputs, encoder, cutoff_len) for task in weights], inputs.seed)
