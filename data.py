"""Datasets for SFT, RL and evaluation: a task is a source of rows, items or preferences plus one template."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.utils.data import Dataset

from fileio import InputError
from prompts import TASK_FIELDS, Encoder
from records import Catalogue, Row


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
        fitted = fit(task, [source.given for source in chosen], [cutoff_len - len(ids) for ids in target_ids], encoder)
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


def fit(
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


# ------------------------------------------------------------------------------------------------------------------ SFT
class SidSFTDataset(RowDataset):
    """History SIDs -> next SID.

    Args:
        cut_histories: in every epoch, cut each user's timeline at another random place into pieces of the longest history
            and let a target see its own piece only. Histories are then shorter on average, but the targets of a piece
            share one prefix, and a prefix tree computes it once: for users with long timelines an epoch costs a small
            part of what sliding windows cost. Users whose timeline fits one history are not touched.
        seed: of the random places.
    """

    def __init__(
        self, rows: Sequence[Row], encoder: Encoder, cutoff_len: int = 512, cut_histories: bool = False, seed: int = 42
    ):
        super().__init__(rows, encoder, cutoff_len)
        self.cut_histories, self.seed, self._whole = cut_histories, seed, self.examples
        if cut_histories:
            self._prepare_parts()
            self.set_epoch(0)

    def _prepare_parts(self) -> None:
        """Token ids of the parts of a prompt, so that an epoch's cuts are lists put together, not texts tokenised again.

        Raises:
            InputError: the parts do not add up to what the tokenizer makes of a whole prompt.
        """
        head, _, tail = self.encoder.prompts.template(self.task)["prompt"].partition("{history}")
        if "{history}" in tail:
            raise InputError("--cut_histories: the next_sid prompt must show {history} once")
        self._texts = (head.format(), tail.format())
        sids = sorted({sid for row in self.rows for sid in row.history_sids})
        separator = self.encoder.prompts.separator
        encoded = self.encoder.tokenizer([*self._texts, separator, *sids], add_special_tokens=False).input_ids
        self._head, self._tail, self._separator = [*self.encoder.start, *encoded[0]], encoded[1], encoded[2]
        self._parts = dict(zip(sids, encoded[3:]))
        for row, example, count in zip(self.rows, self._whole, self.fitting):
            if self._prompt_ids(row.history_sids[-count:]) != example.prompt_ids:
                raise InputError(
                    f"--cut_histories: the parts of the prompt {example.prompt[:60]!r} tokenise otherwise alone"
                )

    def _prompt_ids(self, history: Sequence[str]) -> list[int]:
        ids = list(self._head)
        for place, sid in enumerate(history):
            if place:
                ids += self._separator
            ids += self._parts[sid]
        return ids + self._tail

    def set_epoch(self, epoch: int) -> None:
        """Choose the cuts of this epoch; a function of the seed and the epoch alone."""
        if not self.cut_histories:
            return
        generator = random.Random(f"{self.seed}-{epoch}")
        longest = max(len(row.history_sids) for row in self.rows)
        rows_of_user = Counter(row.user_id for row in self.rows)
        phase: dict[str, int] = {}
        position: Counter[str] = Counter()
        self.examples = []
        for row, whole, fitting in zip(self.rows, self._whole, self.fitting):
            user = row.user_id
            if rows_of_user[user] <= longest:
                self.examples.append(whole)
                continue
            if user not in phase:
                phase[user] = generator.randrange(longest)
            piece, place = divmod(position[user] + phase[user], longest)
            position[user] += 1
            history = row.history_sids[-min(place + 1, fitting) :]
            text = self._texts[0] + self.encoder.prompts.separator.join(history) + self._texts[1]
            self.examples.append(
                replace(whole, prompt=text, prompt_ids=self._prompt_ids(history), group=f"{user}/{piece}")
            )


class FusionSeqRecDataset(RowDataset):
    """History SIDs -> next title or, if descriptions (by item id) are given, -> next description."""

    def __init__(
        self,
        rows: Sequence[Row],
        encoder: Encoder,
        cutoff_len: int = 512,
        descriptions: dict[int, str] | None = None,
    ):
        self.task, self.descriptions = "next_title" if descriptions is None else "next_description", descriptions
        super().__init__(rows, encoder, cutoff_len)

    def _answer(self, row: Row) -> str:
        if self.descriptions is None:
            return row.title
        return self.encoder.prompts.shorten(self.descriptions.get(row.item_id, ""))


class TitleHistory2SidSFTDataset(RowDataset):
    """History titles -> next SID."""

    task = "title_history2sid"

    def _given(self, row: Row) -> Sequence[str]:
        return row.history_titles


class SFTData(TitleHistory2SidSFTDataset):
    """History titles -> next title."""

    task = "title_history2title"

    def _answer(self, row: Row) -> str:
        return row.title


class UserPreference2sidSFTDataset(RowDataset):
    """User preference text (by user id) -> next SID.

    A row is left out where the text names its target: the SID, or a title of three words or more. A shorter title may
    stand there by coincidence.
    """

    task = "preference2sid"

    def __init__(self, rows: Sequence[Row], encoder: Encoder, preferences: dict[str, str], cutoff_len: int = 512):
        self.preferences = preferences
        super().__init__(rows, encoder, cutoff_len)

    def _given(self, row: Row) -> Sequence[str]:
        return [self.preferences.get(row.user_id, "")]

    def _source(self, row: Row) -> Source | str:
        text, title = self._given(row)[0].casefold(), " ".join(row.title.casefold().split())
        named = row.sid.casefold() in text or (title.count(" ") >= 2 and title in text)
        return "naming the target" if named else super()._source(row)


class PreferenceSFTDataset(RowDataset):
    """History SIDs -> user preference text (by user id): one example a user, of the last row of each."""

    task = "history2preference"

    def __init__(self, rows: Sequence[Row], encoder: Encoder, preferences: dict[str, str], cutoff_len: int = 512):
        self.preferences = preferences
        self._last = {row.user_id: row for row in rows}
        super().__init__(rows, encoder, cutoff_len)

    def _answer(self, row: Row) -> str:
        return self.preferences.get(row.user_id, "")

    def _source(self, row: Row) -> Source | str | None:
        return super()._source(row) if row is self._last[row.user_id] else None


class SidItemFeatDataset(PromptDataset):
    """Alignment of language and SIDs, item by item: `tasks` of title2sid, sid2title, description2sid, sid2description.

    An item whose title, description or SID, as the prompt shows it, is another item's too is left out of the tasks that
    show it: the answer would be ambiguous. So is an item that is too long. Descriptions (by item id) are shortened first.
    """

    tasks: Sequence[str] = ("title2sid", "sid2title")

    def __init__(
        self,
        catalogue: Catalogue,
        encoder: Encoder,
        cutoff_len: int = 512,
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
            given, answer = (texts[field] for field in TASK_FIELDS[task])
            times = Counter(given)
            sources = [
                Source([shown], said, f"{task}/{item}", "", sid, item)
                if times[shown] == 1 or not shown.strip()
                else f"sharing its {TASK_FIELDS[task][0]}"
                for shown, said, sid, item in zip(given, answer, catalogue.sids, catalogue.item_ids)
            ]
            self._add(task, sources, encoder, cutoff_len, strict=False)


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
