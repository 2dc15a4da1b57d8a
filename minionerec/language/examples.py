"""Examples: a prompt, its target and what they carry along, and the datasets that hold them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.utils.data import Dataset

from minionerec.common.files import InputError
from minionerec.common.records import Row
from minionerec.language.prompts import TASK_FIELDS, Encoder


@dataclass(frozen=True)
class Example:
    """What a model sees and must say. `group` is what packing keeps together; `sid` and `item_id` are the target's.

    history_ids: the items the row's user has had, oldest first; empty where a task has no user.
    """

    prompt: str
    prompt_ids: list[int]
    target_ids: list[int]
    group: str
    user_id: str
    sid: str
    item_id: int
    target: str = ""
    history_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Source:
    """What one example is made of: the texts its prompt shows (a history's items, oldest first, or one text), the text
    its target says, and what the example carries along."""

    given: Sequence[str]
    answer: str
    group: str
    user_id: str
    sid: str
    item_id: int
    history_ids: tuple[int, ...] = ()


class PromptDataset(Dataset):
    """Examples made of sources and templates.

    Blank texts are not shown: a history's items without one are skipped, and a source that has no text to show or none
    to say is left out. An example longer than cutoff_len tokens loses its oldest history, never its instruction or target.

    Attributes:
        examples: list[Example]. left_out: how many sources gave no example, by reason.
    """

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self.left_out: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def _add(
        self, task: str, sources: Sequence[Source | str | None], encoder: Encoder, cutoff_len: int, strict: bool
    ) -> list[tuple[int, int]]:
        """Append a task's examples. A source may be a text instead, the reason why there is none, or None: not asked for.

        Returns:
            (place in `sources`, texts of its history that fit) of every example.

        Raises:
            InputError: an example that is too long even with a history of one item, if `strict`; else it is left out.
        """
        kept: dict[int, Source] = {}
        for place, source in enumerate(sources):
            if source is None:
                continue
            reason = source
            if isinstance(source, Source):
                given = [text for text in source.given if text.strip()]
                source = replace(source, given=given, answer=source.answer.strip())
                empty = [name for name, has in zip(TASK_FIELDS[task], (given, source.answer)) if not has]
                reason = f"without {empty[0]}" if empty else ""
            if reason:
                self.left_out[reason] += 1
            else:
                kept[place] = source
        places, chosen = list(kept), list(kept.values())
        targets = [encoder.prompts.target(task, source.answer) for source in chosen]
        for target in targets[:1]:
            encoder.check_boundary(task, target)
        target_ids = encoder.target_ids(targets)
        fitted = shorten_prompts(
            task, [source.given for source in chosen], [cutoff_len - len(ids) for ids in target_ids], encoder
        )
        found = []
        for place, source, target, ids, (count, prompt, prompt_ids) in zip(places, chosen, targets, target_ids, fitted):
            if len(prompt_ids) + len(ids) > cutoff_len:
                if strict:
                    needed = len(prompt_ids) + len(ids)
                    raise InputError(f"--cutoff_len {cutoff_len}: row {place + 1} needs {needed} tokens for {task}")
                self.left_out["longer than cutoff_len"] += 1
                continue
            found.append((place, count))
            origin = (source.group, source.user_id, source.sid, source.item_id)
            self.examples.append(Example(prompt, prompt_ids, ids, *origin, target, source.history_ids))
        return found


def shorten_prompts(
    task: str, given: Sequence[Sequence[str]], room: Sequence[int], encoder: Encoder
) -> list[tuple[int, str, list[int]]]:
    """(number of texts, prompt, token ids) of the longest prompt of each that has at most `room` tokens.

    The newest texts stay; one always stays, whatever the room. Prompts that are too long are tried again at half the
    remaining choice, all in one batch, so that a history of n texts takes log2(n) batches.
    """
    best = [len(texts) for texts in given]
    prompts = [encoder.prompts.prompt(task, texts) for texts in given]
    ids = encoder.prompt_ids(prompts)
    spans = {place: (1, best[place] - 1) for place in range(len(given)) if len(ids[place]) > room[place]}
    while spans := {place: span for place, span in spans.items() if span[0] <= span[1]}:
        middle = {place: (low + high) // 2 for place, (low, high) in spans.items()}
        shorter = [encoder.prompts.prompt(task, given[place][-count:]) for place, count in middle.items()]
        for (place, count), prompt, found in zip(middle.items(), shorter, encoder.prompt_ids(shorter)):
            low, high = spans[place]
            fits = len(found) <= room[place]
            spans[place] = (count + 1, high) if fits else (low, count - 1)
            if fits or count == 1:
                best[place], prompts[place], ids[place] = count, prompt, found
    return list(zip(best, prompts, ids))


class RowDataset(PromptDataset):
    """Examples of one task over the rows of a split; `rows` keeps those that have one, in the same order.

    Args:
        rows: the split.
        encoder: tokenizer and templates.
        cutoff_len: longest prompt + target in tokens; the oldest history is dropped until an example fits.

    Raises:
        InputError: an example that is too long even with a history of one item.
    """

    task = "next_sid"

    def __init__(self, rows: Sequence[Row], encoder: Encoder, cutoff_len: int = 512):
        super().__init__()
        self.encoder, self.cutoff_len = encoder, cutoff_len
        found = self._add(self.task, [self._source(row) for row in rows], encoder, cutoff_len, strict=True)
        self.rows = [rows[place] for place, _ in found]
        self.fitting = [count for _, count in found]  # items of each history that cutoff_len leaves

    def _given(self, row: Row) -> Sequence[str]:
        return row.history_sids

    def _answer(self, row: Row) -> str:
        return row.sid

    def _source(self, row: Row) -> Source | str | None:
        origin = (row.user_id, row.user_id, row.sid, row.item_id, row.history_ids)
        return Source(self._given(row), self._answer(row), *origin)


class TaskMixture(Dataset):
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
