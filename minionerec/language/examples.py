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
from minionerec.search.prefix_tree import SoftLabels


@dataclass(frozen=True)
class Example:
    """What a model sees and must say.

    Attributes:
        prompt, target: the texts. prompt_ids, target_ids: their token ids, the end token included.
        group: what packing keeps together, such as the rows of one user.
        user_id, sid, item_id: of the row and its target item.
        history_ids: the items the row's user has had, oldest first; empty where a task has no user.
        labels: what a teacher says along the target, instead of the target's own tokens.
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
    labels: SoftLabels | None = None


@dataclass(frozen=True)
class Source:
    """What one example is made of.

    Attributes:
        prompt_texts: what its prompt shows: a history's items, oldest first, or one text.
        target_text: what its target says.
        group, user_id, sid, item_id, history_ids: what the example carries along, see `Example`.
    """

    prompt_texts: Sequence[str]
    target_text: str
    group: str
    user_id: str
    sid: str
    item_id: int
    history_ids: tuple[int, ...] = ()


class PromptDataset(Dataset):
    """Examples made of sources and templates.

    Blank texts are not shown: a history's items without one are skipped, and a source that has no text to show or none
    to say is left out. An example longer than the encoder's cutoff_len loses its oldest history, never its instruction
    or its target.

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
        self, task: str, sources: Sequence[Source | str | None], encoder: Encoder, strict: bool
    ) -> list[tuple[int, int]]:
        """Append a task's examples.

        Args:
            task: whose templates are used.
            sources: one per example; a text instead is the reason why there is none, None was not asked for.
            encoder: tokenizer, templates and longest example.
            strict: stop at an example that is too long even with a history of one item; else it is left out.

        Returns:
            (index in `sources`, items of its history that are shown) of every example.

        Raises:
            InputError: an example that is too long, if `strict`.
        """
        complete = self._complete_sources(task, sources)
        indices, chosen = list(complete), list(complete.values())
        targets = [encoder.prompts.target(task, source.target_text) for source in chosen]
        for target in targets[:1]:
            encoder.check_boundary(task, target)
        target_ids = encoder.target_ids(targets)
        budgets = [encoder.cutoff_len - len(ids) for ids in target_ids]
        prompts = shorten_prompts(task, [source.prompt_texts for source in chosen], budgets, encoder)
        added = []
        for index, source, target, ids, (count, prompt, prompt_ids) in zip(
            indices, chosen, targets, target_ids, prompts, strict=True
        ):
            length = len(prompt_ids) + len(ids)
            if length > encoder.cutoff_len:
                if strict:
                    raise InputError(
                        f"--cutoff_len {encoder.cutoff_len}: row {index + 1} needs {length} tokens for {task}"
                    )
                self.left_out["longer than cutoff_len"] += 1
                continue
            added.append((index, count))
            origin = (source.group, source.user_id, source.sid, source.item_id)
            self.examples.append(Example(prompt, prompt_ids, ids, *origin, target, source.history_ids))
        return added

    def _complete_sources(self, task: str, sources: Sequence[Source | str | None]) -> dict[int, Source]:
        """{index: source} of those with something to show and to say; the others are counted in `left_out`."""
        complete: dict[int, Source] = {}
        for index, source in enumerate(sources):
            if source is None:
                continue
            reason = source
            if isinstance(source, Source):
                texts = [text for text in source.prompt_texts if text.strip()]
                source = replace(source, prompt_texts=texts, target_text=source.target_text.strip())
                fields = zip(TASK_FIELDS[task], (texts, source.target_text), strict=True)
                empty = [name for name, content in fields if not content]
                reason = f"without {empty[0]}" if empty else ""
            if reason:
                self.left_out[reason] += 1
            else:
                complete[index] = source
        return complete


def shorten_prompts(
    task: str, histories: Sequence[Sequence[str]], budgets: Sequence[int], encoder: Encoder
) -> list[tuple[int, str, list[int]]]:
    """The longest prompt of each history that stays within its budget.

    The newest texts stay; one always stays, whatever the budget. Prompts that are too long are tried again at half the
    remaining choice, all in one batch, so that a history of n texts takes log2(n) batches.

    Args:
        task: whose template is used.
        histories: the texts that each prompt shows, oldest first.
        budgets: tokens that each prompt may have.
        encoder: tokenizer and templates.

    Returns:
        (number of texts shown, prompt, token ids) of each.
    """
    counts = [len(texts) for texts in histories]
    prompts = [encoder.prompts.prompt(task, texts) for texts in histories]
    ids = encoder.prompt_ids(prompts)
    # Bisection: the counts that are still to be tried, of every prompt that is too long.
    spans = {row: (1, counts[row] - 1) for row in range(len(histories)) if len(ids[row]) > budgets[row]}
    while spans := {row: span for row, span in spans.items() if span[0] <= span[1]}:
        middles = {row: (low + high) // 2 for row, (low, high) in spans.items()}
        shorter = [encoder.prompts.prompt(task, histories[row][-count:]) for row, count in middles.items()]
        for (row, count), prompt, tokens in zip(middles.items(), shorter, encoder.prompt_ids(shorter), strict=True):
            low, high = spans[row]
            fits = len(tokens) <= budgets[row]
            spans[row] = (count + 1, high) if fits else (low, count - 1)
            if fits or count == 1:
                counts[row], prompts[row], ids[row] = count, prompt, tokens
    return list(zip(counts, prompts, ids, strict=True))


class RowDataset(PromptDataset):
    """Examples of one task over the rows of a split.

    Args:
        rows: the split.
        encoder: tokenizer, templates and the longest example; the oldest history is dropped until it fits.

    Attributes:
        rows: those that have an example, in the same order.
        shown_items: how many items of each of their histories the prompt shows.

    Raises:
        InputError: an example that is too long even with a history of one item.
    """

    task = "next_sid"

    def __init__(self, rows: Sequence[Row], encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        added = self._add(self.task, [self._source(row) for row in rows], encoder, strict=True)
        self.rows = [rows[index] for index, _ in added]
        self.shown_items = [count for _, count in added]

    def get_prompt_texts(self, row: Row) -> Sequence[str]:
        """What the prompt of a row shows: the items of its history, oldest first, or one text."""
        return row.history_sids

    def get_target_text(self, row: Row) -> str:
        """What the target of a row says."""
        return row.sid

    def _source(self, row: Row) -> Source | str | None:
        origin = (row.user_id, row.user_id, row.sid, row.item_id, row.history_ids)
        return Source(self.get_prompt_texts(row), self.get_target_text(row), *origin)


class TaskMixture(Dataset):
    """The datasets of several tasks as one, each with a weight.

    A weight of 0.5 takes a fresh random half of a task's examples in every epoch, 2 takes all of them twice. Every
    epoch has the same number of examples, at least one of every task.

    Args:
        weights: {task: weight}. datasets: of the tasks, in the same order. seed: of the random halves.

    Raises:
        InputError: a task without any example.
    """

    def __init__(self, weights: dict[str, float], datasets: Sequence[PromptDataset], seed: int):
        self.weights, self.datasets, self.seed = weights, list(datasets), seed
        for task, dataset in zip(weights, self.datasets, strict=True):
            if not len(dataset):
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in dataset.left_out.items())
                raise InputError(f"--tasks: {task} has no example (left out: {reasons})")
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the examples of this epoch; a function of the seed and the epoch alone."""
        self._chosen: list[tuple[Dataset, int]] = []
        for (task, weight), dataset in zip(self.weights.items(), self.datasets, strict=True):
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
            rows = len(dataset)
            copies, rest = divmod(max(1, round(weight * rows)), rows)
            drawn = random.Random(f"{self.seed}-{task}-{epoch}").sample(range(rows), rest)
            self._chosen += [(dataset, index) for index in sorted([*range(rows)] * copies + drawn)]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Example:
        dataset, number = self._chosen[index]
        return dataset[number]

    def report(self) -> list[str]:
        """One line a task: its weight, its examples, and what was left out."""
        return [
            f"{task} x {weight:g}: {len(dataset):,} examples"
            + "".join(f", {count:,} left out {reason}" for reason, count in sorted(dataset.left_out.items()))
            for (task, weight), dataset in zip(self.weights.items(), self.datasets, strict=True)
        ]
