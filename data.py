"""Datasets for SFT, RL and evaluation: a task is a source of rows, items or preferences plus one template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from minionerec.common.files import InputError
from minionerec.common.records import Catalogue, Row
from minionerec.common.row_table import number_users
from minionerec.common.texts import join_item_texts
from minionerec.common.tfidf import compute_tfidf
from minionerec.common.weights import parse_weighted_names
from minionerec.language.examples import PromptDataset, RowDataset, Source
from minionerec.language.mixture import TaskMixture
from minionerec.language.next_sid import SidSFTDataset, SimilarSidDataset
from minionerec.language.prompts import TASK_FIELDS, Encoder, PromptSet, register_templates
from minionerec.language.soft_targets import TaughtHistoryDataset, WalkDataset, add_last_rows
from minionerec.recommenders.content import find_similar_items
from minionerec.recommenders.registry import BaselineInputs
from minionerec.recommenders.teachers import Teacher, draw_walks


# ------------------------------------------------------------------------------------------------------------------ SFT
class FusionSeqRecDataset(RowDataset):
    """History SIDs -> next title or, if descriptions (by item id) are given, -> next description."""

    def __init__(
        self,
        rows: Sequence[Row],
        encoder: Encoder,
        descriptions: dict[int, str] | None = None,
    ):
        self.task, self.descriptions = "next_title" if descriptions is None else "next_description", descriptions
        super().__init__(rows, encoder)

    def get_target_text(self, row: Row) -> str:
        if self.descriptions is None:
            return row.title
        return self.encoder.prompts.shorten(self.descriptions.get(row.item_id, ""))


class TitleHistory2SidSFTDataset(RowDataset):
    """History titles -> next SID."""

    task = "title_history2sid"

    def get_prompt_texts(self, row: Row) -> Sequence[str]:
        return row.history_titles


class SFTData(TitleHistory2SidSFTDataset):
    """History titles -> next title."""

    task = "title_history2title"

    def get_target_text(self, row: Row) -> str:
        return row.title


class UserPreference2sidSFTDataset(RowDataset):
    """User preference text (by user id) -> next SID.

    A row is left out where the text names its target: the SID, or a title of three words or more. A shorter title may
    stand there by coincidence.
    """

    task = "preference2sid"

    def __init__(self, rows: Sequence[Row], encoder: Encoder, preferences: dict[str, str]):
        self.preferences = preferences
        super().__init__(rows, encoder)

    def get_prompt_texts(self, row: Row) -> Sequence[str]:
        return [self.preferences.get(row.user_id, "")]

    def _source(self, row: Row) -> Source | str:
        text, title = self.get_prompt_texts(row)[0].casefold(), " ".join(row.title.casefold().split())
        named = row.sid.casefold() in text or (title.count(" ") >= 2 and title in text)
        return "naming the target" if named else super()._source(row)


class PreferenceSFTDataset(RowDataset):
    """History SIDs -> user preference text (by user id): one example a user, of the last row of each."""

    task = "history2preference"

    def __init__(self, rows: Sequence[Row], encoder: Encoder, preferences: dict[str, str]):
        self.preferences = preferences
        users = number_users(rows)[1]
        self._is_last = np.zeros(len(rows), bool)
        self._is_last[len(rows) - 1 - np.unique(users[::-1], return_index=True)[1]] = True
        super().__init__(rows, encoder)

    def get_target_text(self, row: Row) -> str:
        return self.preferences.get(row.user_id, "")

    def encode(self, rows: Sequence[Row], numbers: Sequence[int]) -> dict[str, list]:
        last = [row for row, number in zip(rows, numbers, strict=True) if self._is_last[number]]
        found = super().encode(last, numbers)
        empty = {"reason": "", "shown": 0, "prompt_ids": [], "target_ids": []}
        columns = {name: iter(values) for name, values in found.items()}
        return {
            name: [next(values) if self._is_last[number] else empty[name] for number in numbers]
            for name, values in columns.items()
        }


class SidItemFeatDataset(PromptDataset):
    """Alignment of language and SIDs, item by item: `tasks` of title2sid, sid2title, description2sid, sid2description.

    An item whose title, description or SID, as the prompt shows it, is another item's too is left out of the tasks that
    show it: the answer would be ambiguous. So is an item that is too long. Descriptions are shortened first.
    """

    tasks: Sequence[str] = ("title2sid", "sid2title")

    def __init__(
        self,
        catalogue: Catalogue,
        encoder: Encoder,
        tasks: Sequence[str] | None = None,
        descriptions: dict[int, str] | None = None,
    ):
        super().__init__()
        texts = {
            "sid": catalogue.sids,
            "title": catalogue.titles,
            "description": [encoder.prompts.shorten((descriptions or {}).get(item, "")) for item in catalogue.item_ids],
        }
        for task in tasks or self.tasks:
            prompt_texts, target_texts = (texts[field] for field in TASK_FIELDS[task])
            times = Counter(prompt_texts)
            sources = [
                Source([shown], target, f"{task}/{item}", "", sid, item)
                if times[shown] == 1 or not shown.strip()
                else f"sharing its {TASK_FIELDS[task][0]}"
                for shown, target, sid, item in zip(
                    prompt_texts, target_texts, catalogue.sids, catalogue.item_ids, strict=True
                )
            ]
            self._add(task, sources, encoder)


# ------------------------------------------------------------------------------------------------------- RL, evaluation
class SidDataset(RowDataset):
    """RL: history SIDs -> next SID. The target travels in the example; nothing is looked up by text."""


class D3Dataset(SFTData):
    """RL: history titles -> next title."""


class RLSeqTitle2SidDataset(TitleHistory2SidSFTDataset):
    """RL: history titles -> next SID."""


class RLSidhis2TitleDataset(FusionSeqRecDataset):
    """RL: history SIDs -> next title."""


class RLTitle2SidDataset(SidItemFeatDataset):
    """RL: title -> SID, or with tasks=("description2sid",) description -> SID."""

    tasks = ("title2sid",)


class RLSid2TitleDataset(SidItemFeatDataset):
    """RL: SID -> title."""

    tasks = ("sid2title",)


class EvalSidDataset(RowDataset):
    """Evaluation: history SIDs -> next SID, in the order of the file."""


class EvalD3Dataset(SFTData):
    """Evaluation: history titles -> next title, in the order of the file."""


# ---------------------------------------------------------------------------------------------------------------- tasks
DEFAULT_TASKS = ("next_sid", "title_history2sid", "title2sid", "sid2title")


@dataclass(frozen=True)
class TaskInputs:
    """What the tasks of a run are made from. Descriptions go by item id, preferences by user id.

    Attributes:
        teacher_name, walks, teach_end: of the tasks that a teacher teaches, see `TaughtDataset`.
        walk_teacher_name: of `walk_teacher`; None is that of `teacher`.
        cf_path: the model folder of a network in it.
    """

    rows: Sequence[Row]
    catalogue: Catalogue
    descriptions: dict[int, str] | None = None
    preferences: dict[str, str] | None = None
    cut_histories: bool = False
    seed: int = 42
    teacher_name: str = "transitions+content"
    walk_teacher_name: str | None = None
    cf_path: str | None = None
    walks: int = 3
    teach_end: bool = True

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher of train rows, built from them when it is first needed."""
        return self._build_teacher(self.teacher_name)

    @cached_property
    def walk_teacher(self) -> Teacher:
        """The teacher of histories that are no train rows; it may hold a network that was trained on those."""
        if self.walk_teacher_name in (None, self.teacher_name):
            return self.teacher
        return self._build_teacher(self.walk_teacher_name)

    def _build_teacher(self, name: str) -> Teacher:
        counted = self.catalogue.with_counts(self.rows)
        return Teacher(name, BaselineInputs(self.rows, counted, files={"cf_path": self.cf_path}))


DatasetBuilder = Callable[[TaskInputs, Encoder], PromptDataset]


@dataclass(frozen=True)
class Task:
    """How a task's dataset is built, the flag of the file it needs beside rows and catalogue, and its templates.

    Attributes:
        template: the task whose templates it uses; "" where it has its own.
        in_memory: it cannot read rows that are kept as files.
    """

    build: DatasetBuilder
    file_flag: str = ""
    template: str = ""
    in_memory: bool = False


def _build_from_rows(kind: type[RowDataset]) -> DatasetBuilder:
    return lambda inputs, encoder: kind(inputs.rows, encoder)


def _build_from_items(kind: type[SidItemFeatDataset], task: str) -> DatasetBuilder:
    return lambda inputs, encoder: kind(inputs.catalogue, encoder, (task,), inputs.descriptions)


def _build_from_preferences(kind: type[UserPreference2sidSFTDataset | PreferenceSFTDataset]) -> DatasetBuilder:
    return lambda inputs, encoder: kind(inputs.rows, encoder, inputs.preferences)


def _build_next_sid(inputs: TaskInputs, encoder: Encoder) -> SidSFTDataset:
    return SidSFTDataset(inputs.rows, encoder, inputs.cut_histories, inputs.seed)


def _build_next_description(inputs: TaskInputs, encoder: Encoder) -> FusionSeqRecDataset:
    return FusionSeqRecDataset(inputs.rows, encoder, inputs.descriptions)


def _build_similar(inputs: TaskInputs, encoder: Encoder) -> SimilarSidDataset:
    catalogue = inputs.catalogue
    descriptions = [(inputs.descriptions or {}).get(item, "") for item in catalogue.item_ids]
    find_similar = partial(find_similar_items, compute_tfidf(join_item_texts(catalogue.titles, descriptions)))
    return SimilarSidDataset(inputs.rows, encoder, catalogue, find_similar, inputs.cut_histories, inputs.seed)


def _build_taught_histories(inputs: TaskInputs, encoder: Encoder) -> TaughtHistoryDataset:
    longest = max(len(row.history_ids) for row in inputs.rows)
    seen = SidSFTDataset(inputs.rows, encoder, inputs.cut_histories, inputs.seed)
    last = RowDataset(add_last_rows(inputs.rows, longest), encoder)
    parts = (
        inputs.teacher.teach_rows(seen.rows),
        inputs.walk_teacher.teach_histories([row.history_ids for row in last.rows]),
    )
    items, probabilities = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("items", "probabilities")
    )
    how = {"catalogue": inputs.catalogue, "encoder": encoder, "seed": inputs.seed, "teach_end": inputs.teach_end}
    return TaughtHistoryDataset([seen, last], items, probabilities, **how)


def _build_walks(inputs: TaskInputs, encoder: Encoder) -> WalkDataset:
    steps = inputs.walk_teacher.teach_histories([[item] for item in inputs.catalogue.item_ids])

    def draw(generator: np.random.Generator) -> list[list[int]]:
        return [walk for _ in range(inputs.walks) for walk in draw_walks(steps, generator)]

    number_of = {item: number for number, item in enumerate(inputs.catalogue.item_ids)}

    def teach(histories: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        # What follows single items is known already, and they are the beginning of every walk.
        is_single = np.array([len(history) == 1 for history in histories])
        known = steps.select([number_of[history[0]] for history in histories if len(history) == 1])
        others = inputs.walk_teacher.teach_histories([history for history in histories if len(history) > 1])
        items, probabilities = (
            np.empty((len(histories), part.shape[1]), part.dtype) for part in (steps.items, steps.probabilities)
        )
        items[is_single], probabilities[is_single] = known.items, known.probabilities
        items[~is_single], probabilities[~is_single] = others.items, others.probabilities
        return items, probabilities

    how = {"catalogue": inputs.catalogue, "encoder": encoder, "seed": inputs.seed, "teach_end": inputs.teach_end}
    return WalkDataset(draw, teach, **how)


TASKS: dict[str, Task] = {
    "next_sid": Task(_build_next_sid),
    "similar_sid": Task(_build_similar, "item_meta_path"),
    "next_title": Task(_build_from_rows(FusionSeqRecDataset)),
    "next_description": Task(_build_next_description, "item_meta_path"),
    "title_history2sid": Task(_build_from_rows(TitleHistory2SidSFTDataset)),
    "title_history2title": Task(_build_from_rows(SFTData)),
    "title2sid": Task(_build_from_items(SidItemFeatDataset, "title2sid")),
    "sid2title": Task(_build_from_items(SidItemFeatDataset, "sid2title")),
    "description2sid": Task(_build_from_items(SidItemFeatDataset, "description2sid"), "item_meta_path"),
    "sid2description": Task(_build_from_items(SidItemFeatDataset, "sid2description"), "item_meta_path"),
    "history2preference": Task(_build_from_preferences(PreferenceSFTDataset), "preference_file"),
    "preference2sid": Task(_build_from_preferences(UserPreference2sidSFTDataset), "preference_file"),
    "teacher_sid": Task(_build_taught_histories, template="next_sid", in_memory=True),
    "walk_sid": Task(_build_walks, template="next_sid"),
}

# Rollouts are items of the catalogue: the tasks whose target is a SID.
RL_TASKS: dict[str, Task] = {
    "next_sid": Task(_build_from_rows(SidDataset)),
    "title_history2sid": Task(_build_from_rows(RLSeqTitle2SidDataset)),
    "title2sid": Task(_build_from_items(RLTitle2SidDataset, "title2sid")),
    "description2sid": Task(_build_from_items(RLTitle2SidDataset, "description2sid"), "item_meta_path"),
    "preference2sid": Task(_build_from_preferences(UserPreference2sidSFTDataset), "preference_file"),
}


def register_task(
    name: str,
    prompt_field: str,
    target_field: str,
    templates: dict[str, str],
    build: DatasetBuilder,
    file_flag: str = "",
) -> None:
    """Add a task, which --tasks then knows in SFT and, where its target is a SID, in RL.

    Args:
        name: of the task.
        prompt_field, target_field: what its prompt shows and its target says: history, sid, title, description or
            preference.
        templates: {"prompt": ..., "target": ...}, which prompt sets without templates of this task use.
        build: makes its dataset from the inputs of a run.
        file_flag: the flag of the file that it needs, item_meta_path or preference_file.

    Raises:
        InputError: a name that is taken, or templates that do not fit the fields.
    """
    if name in TASKS:
        raise InputError(f"task {name!r} is registered already")
    register_templates(name, (prompt_field, target_field), templates)
    TASKS[name] = Task(build, file_flag)
    if target_field == "sid":
        RL_TASKS[name] = TASKS[name]


def choose_tasks(
    tasks: Sequence[str] | None, prompts: PromptSet, known: dict[str, Task] = TASKS, **files: str | None
) -> dict[str, float]:
    """{task: weight} of --tasks: names, each with a weight after a colon if it is not 1.

    Without --tasks: those of DEFAULT_TASKS that are known here and in the prompt set.

    Args:
        tasks: the entries of --tasks.
        prompts: the prompt set, which must have templates of every task.
        known: TASKS or RL_TASKS.
        files: by flag, the files a task may need; each that is given must have a task that needs it.

    Raises:
        InputError: a task that is unknown, named twice, has no template or lacks its file, a weight that is no positive
            number, a file without its task, or no task.
    """
    entries = tasks or [task for task in DEFAULT_TASKS if task in known and task in prompts.templates]
    if not entries:
        raise InputError(f"--tasks: name the tasks; this prompt set has {', '.join(prompts.templates)}")
    weights = parse_weighted_names("tasks", entries, known)
    for task in weights:
        prompts.template(known[task].template or task)
        needed = known[task].file_flag
        if needed in files and not files[needed]:
            raise InputError(f"--tasks: {task} needs --{needed}")
    for name, file in files.items():
        users = [task for task in known if known[task].file_flag == name]
        if file and not any(task in weights for task in users):
            raise InputError(f"--{name}: no chosen task needs it; --tasks may name {', '.join(users)}")
    return weights


def build_mixture(
    weights: dict[str, float], inputs: TaskInputs, encoder: Encoder, known: dict[str, Task] = TASKS
) -> TaskMixture:
    """The datasets of the tasks of `weights`, built as TASKS or RL_TASKS say."""
    inputs = replace(inputs, teach_end=inputs.teach_end and "next_sid" not in weights)
    return TaskMixture(weights, [known[task].build(inputs, encoder) for task in weights], inputs.seed)
