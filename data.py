"""Prompts and datasets for SFT, RL and evaluation: a task is a source of rows plus one template."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Sequence

import yaml
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from fileio import InputError, open_text
from records import SID_TOKEN, Catalogue, Row

PROMPTS_FILE = "prompts.yaml"  # the prompt set a checkpoint carries


@dataclass(frozen=True)
class PromptSet:
    """Templates by task (`{"prompt": ..., "target": ...}`) and the text between the items of a history."""

    templates: dict[str, dict[str, str]]
    separator: str

    def render(self, task: str, **fields: str) -> tuple[str, str]:
        """(prompt, target) texts of a task."""
        template = self.template(task)
        return template["prompt"].format(**fields), template["target"].format(**fields)

    def template(self, task: str) -> dict[str, str]:
        if task not in self.templates:
            raise InputError(f"this prompt set has no task {task!r}; it has {', '.join(self.templates)}")
        return self.templates[task]

    def to_yaml(self) -> str:
        return yaml.safe_dump(
            {"checkpoint": {"separator": self.separator, **self.templates}}, allow_unicode=True, sort_keys=False
        )


def load_prompts(name_or_file: str | Path) -> PromptSet:
    """A prompt set: `compact` or `worded` (config/prompts.yaml), a YAML file with one set, or FILE:SET.

    Raises:
        InputError: no such set or file, or a task that lacks its prompt or target, has an unknown field, or has its target in
            its prompt.
    """
    text, _, name = str(name_or_file).rpartition(":")
    path, name = (text, name) if text else (str(name_or_file), "")
    if path in ("compact", "worded"):
        path, name = str(Path(__file__).parent / "config" / PROMPTS_FILE), path
    try:
        with open_text(path, "prompts") as file:
            content = yaml.safe_load(file)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or (not name and len(content) != 1) or (name and name not in content):
        raise InputError(
            f"{path}: expected {f'the prompt set {name!r}' if name else 'exactly one prompt set, or FILE:SET'}"
        )
    chosen = content[name] if name else next(iter(content.values()))
    if not isinstance(chosen, dict):
        raise InputError(f"{path}: expected the prompt set to be tasks with their templates, got {str(chosen)[:60]!r}")
    chosen = dict(chosen)
    separator = chosen.pop("separator", "")
    for task, template in chosen.items():
        if not isinstance(template, dict) or set(template) != {"prompt", "target"}:
            raise InputError(f"{path}, task {task}: expected the keys prompt and target")
        in_prompt, in_target = (set(re.findall(r"{(\w*)}", str(template[part]))) for part in ("prompt", "target"))
        unknown = (in_prompt | in_target) - {"history", "sid", "title"}
        if unknown:
            raise InputError(
                f"{path}, task {task}: unknown field {{{unknown.pop()}}}; known: {{history}}, {{sid}}, {{title}}"
            )
        shared = in_prompt & in_target
        if shared:
            raise InputError(f"{path}, task {task}: the prompt contains its own target {{{shared.pop()}}}")
    return PromptSet(chosen, separator)


def checkpoint_prompts(checkpoint: str | Path, override: str | None = None) -> PromptSet:
    """The prompts a checkpoint was trained with, the `override` where one is named, else the worded set."""
    own = Path(checkpoint) / PROMPTS_FILE
    return load_prompts(override or (own if own.is_file() else "worded"))


class Encoder:
    """Turns texts into token ids the same way everywhere: [the tokenizer's own start tokens] prompt | target, end token.

    Raises:
        InputError: the tokenizer has no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: PromptSet):
        if tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token")
        self.tokenizer, self.prompts = tokenizer, prompts
        self.end = [tokenizer.eos_token_id]
        start = tokenizer("").input_ids
        self.start = start[:-1] if start and start[-1] == tokenizer.eos_token_id else start
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False).input_ids if len(texts) else []

    def prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*self.start, *ids] for ids in self._encode(texts)]

    def target_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*ids, *self.end] for ids in self._encode(texts)]

    def sid_ids(self, sids: Sequence[str]) -> list[list[int]]:
        """Token ids of SIDs with the end token: what the trie holds.

        Raises:
            InputError: a SID whose tokens are not single tokens of this tokenizer.
        """
        vocabulary = self.tokenizer.get_vocab()
        for sid in sids:
            unknown = [token for token in SID_TOKEN.findall(sid) if token not in vocabulary]
            if unknown:
                raise InputError(
                    f"the model's tokenizer ({self.tokenizer.name_or_path}) does not know the SID token {unknown[0]}; "
                    "was the model trained with this index?"
                )
        return [[*(vocabulary[token] for token in SID_TOKEN.findall(sid)), *self.end] for sid in sids]

    def check_boundary(self, task: str, target: str) -> None:
        """A target must tokenise the same alone and after its prompt, or training and search would see other tokens.

        Raises:
            InputError: it does not.
        """
        fields = re.findall(r"{(\w+)}", self.prompts.template(task)["prompt"])
        prompt = self.prompts.template(task)["prompt"].format(**{field: target for field in fields})
        alone = self._encode([prompt])[0] + self._encode([target])[0]
        if self._encode([prompt + target])[0] != alone:
            raise InputError(
                f"prompt task {task}: {target!r} tokenises differently after the prompt than alone; end the prompt otherwise"
            )


@dataclass(frozen=True)
class Example:
    """What a model sees and must say. `group` is what packing keeps together; `sid` and `item_id` are the target's."""

    prompt: str
    prompt_ids: list[int]
    target_ids: list[int]
    group: str
    user_id: str
    sid: str
    item_id: int


class PromptDataset(Dataset):
    """Examples of one task over the rows of a split.

    Args:
        rows: the split.
        encoder: tokenizer and templates.
        cutoff_len: longest prompt + target in tokens; the oldest history is dropped until an example fits.

    Raises:
        InputError: an example that is too long even with a history of one item.
    """

    task = "next_sid"

    def __init__(self, rows: Sequence[Row], encoder: Encoder, cutoff_len: int = 512):
        self.rows, self.encoder, self.cutoff_len = list(rows), encoder, cutoff_len
        encoder.check_boundary(self.task, rows[0].sid)
        self.examples = self._encode_rows(self.rows, [row.user_id for row in self.rows])

    def _history(self, row: Row) -> Sequence[str]:
        return row.history_sids

    def _encode_rows(self, rows: Sequence[Row], groups: Sequence[str]) -> list[Example]:
        separator = self.encoder.prompts.separator
        self.fitting = [len(row.history_sids) for row in rows]  # items of each history that cutoff_len leaves
        texts = [
            self.encoder.prompts.render(
                self.task, history=separator.join(self._history(row)), sid=row.sid, title=row.title
            )
            for row in rows
        ]
        prompt_ids = self.encoder.prompt_ids([prompt for prompt, _ in texts])
        target_ids = self.encoder.target_ids([target for _, target in texts])
        examples = []
        for number, row in enumerate(rows):
            shorter, count = row, len(row.history_sids)
            prompt, ids = texts[number][0], prompt_ids[number]
            while len(ids) + len(target_ids[number]) > self.cutoff_len:
                count -= 1
                if count < 1:
                    raise InputError(
                        f"--cutoff_len {self.cutoff_len}: row {number + 1} needs {len(ids) + len(target_ids[number])} tokens"
                    )
                shorter = row.last(count)
                history = separator.join(self._history(shorter))
                prompt, _ = self.encoder.prompts.render(self.task, history=history, sid=row.sid, title=row.title)
                ids = self.encoder.prompt_ids([prompt])[0]
            self.fitting[number] = count
            examples.append(Example(prompt, ids, target_ids[number], groups[number], row.user_id, row.sid, row.item_id))
        return examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class SidSFTDataset(PromptDataset):
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
        head, history, tail = self.encoder.prompts.template(self.task)["prompt"].partition("{history}")
        try:
            self._texts = (head.format(), tail.format())
        except (KeyError, IndexError):
            raise InputError("--cut_histories: the next_sid prompt must have {history} as its only field") from None
        sids = sorted({sid for row in self.rows for sid in row.history_sids})
        separator = self.encoder.prompts.separator
        encoded = self.encoder.tokenizer([*self._texts, separator, *sids], add_special_tokens=False).input_ids
        self._head, self._tail, self._separator = [*self.encoder.start, *encoded[0]], encoded[1], encoded[2]
        self._parts = dict(zip(sids, encoded[3:]))
        for row, example, count in zip(self.rows, self._whole, self.fitting):
            if not history or self._prompt_ids(row.history_sids[-count:]) != example.prompt_ids:
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


class TitleHistory2SidSFTDataset(PromptDataset):
    """History titles -> next SID."""

    task = "title_history2sid"

    def _history(self, row: Row) -> Sequence[str]:
        return row.history_titles


class SidItemFeatDataset(Dataset):
    """Alignment of language and SIDs: title -> SID and SID -> title of every item that has a title.

    An item whose title another item has too is left out of title -> SID: the answer would be ambiguous.
    """

    tasks = ("title2sid", "sid2title")

    def __init__(self, catalogue: Catalogue, encoder: Encoder, cutoff_len: int = 512, tasks: Sequence[str] = tasks):
        with_title = Counter(catalogue.titles)
        self.examples: list[Example] = []
        for task in tasks:
            items = [
                (sid, title, item)
                for sid, title, item in zip(catalogue.sids, catalogue.titles, catalogue.item_ids)
                if title.strip() and (task != "title2sid" or with_title[title] == 1)
            ]
            texts = [encoder.prompts.render(task, sid=sid, title=title) for sid, title, _ in items]
            prompts = encoder.prompt_ids([prompt for prompt, _ in texts])
            targets = encoder.target_ids([target for _, target in texts])
            self.examples += [
                Example(texts[i][0], prompts[i], targets[i], f"{task}/{item}", "", sid, item)
                for i, (sid, _, item) in enumerate(items)
                if len(prompts[i]) + len(targets[i]) <= cutoff_len
            ]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class SidDataset(PromptDataset):
    """RL: history SIDs -> next SID. The target travels in the example; nothing is looked up by text."""


class RLSeqTitle2SidDataset(TitleHistory2SidSFTDataset):
    """RL: history titles -> next SID."""


class RLTitle2SidDataset(SidItemFeatDataset):
    """RL: title -> SID."""

    tasks = ("title2sid",)

    def __init__(self, catalogue: Catalogue, encoder: Encoder, cutoff_len: int = 512):
        super().__init__(catalogue, encoder, cutoff_len, self.tasks)


class EvalSidDataset(PromptDataset):
    """Evaluation: history SIDs -> next SID, in the order of the file."""
