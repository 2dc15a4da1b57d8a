"""Rows, prompts and datasets for SFT, RL and evaluation: a task is a source of rows plus one template."""
from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterable, Sequence

import yaml
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from fileio import InputError, open_text, parse_list, read_json, read_lines

CSV_COLUMNS = (
    "user_id", "history_item_title", "item_title", "history_item_id", "item_id", "history_item_sid", "item_sid"
)
PROMPTS_FILE = "prompts.yaml"  # the prompt set a checkpoint carries
SID_TOKEN = re.compile(r"<[^<>\s]+>")


# ---------------------------------------------------------------------------------------------------------------- files
@dataclass(frozen=True)
class Row:
    """One next-item sample: a user's history, oldest first, and the item that came next."""

    user_id: str
    history_titles: tuple[str, ...]
    history_ids: tuple[int, ...]
    history_sids: tuple[str, ...]
    title: str
    item_id: int
    sid: str

    def last(self, count: int) -> "Row":
        """The same row with only the newest `count` items of its history."""
        if count >= len(self.history_sids):
            return self
        return replace(
            self,
            history_titles=self.history_titles[-count:],
            history_ids=self.history_ids[-count:],
            history_sids=self.history_sids[-count:],
        )


def _list_cell(text: str, where: str) -> list:
    # JSON is several times faster than a literal parser; without double quotes and escapes the two differ in their quotes
    # only. The rest take the careful way.
    if '"' not in text and "\\" not in text and text.count("'") % 2 == 0:
        try:
            value = json.loads(text.replace("'", '"'))
            if isinstance(value, list):
                return value
        except (ValueError, RecursionError):
            pass
    return parse_list(text, where)


def read_rows(path: str | Path, flag: str | None = None) -> list[Row]:
    """The rows of a CSV split (DESIGN file contract: CSV_COLUMNS, list columns as Python or JSON list literals).

    Raises:
        InputError: a missing column, a broken list literal, an item id that is no number, history columns of different
            lengths, an empty history or a file without rows; each with file and line.
    """
    rows: list[Row] = []
    with open_text(path, flag) as file:
        reader = csv.DictReader(file)
        missing = [name for name in CSV_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"{path}, line 1: missing column {', '.join(missing)}; found {', '.join(reader.fieldnames or ())}")
        for record in reader:
            where = f"{path}, line {reader.line_num}"
            if None in record.values() or None in record:
                raise InputError(f"{where}: expected {len(reader.fieldnames)} fields")
            titles, ids, sids = (
                _list_cell(record[name], f"{where}, column {name}")
                for name in ("history_item_title", "history_item_id", "history_item_sid")
            )
            if not len(titles) == len(ids) == len(sids):
                raise InputError(f"{where}: histories of different length: {len(titles)} titles, {len(ids)} ids, {len(sids)} SIDs")
            if not sids:
                raise InputError(f"{where}: the history is empty")
            try:
                item_ids = [int(str(value)) for value in (*ids, record["item_id"])]  # int(2.7) would be 2
            except ValueError:
                raise InputError(f"{where}: item ids must be whole numbers") from None
            rows.append(
                Row(
                    record["user_id"], tuple(map(str, titles)), tuple(item_ids[:-1]), tuple(map(str, sids)),
                    record["item_title"], item_ids[-1], record["item_sid"],
                )
            )
    if not rows:
        raise InputError(f"{path}: no rows below the header line")
    return rows


def read_index(path: str | Path, flag: str | None = None) -> dict[int, tuple[str, ...]]:
    """{item id: SID tokens} of an index.json.

    Raises:
        InputError: not an object of lists of `<...>` tokens.
    """
    content = read_json(path, flag)
    index = {}
    if not isinstance(content, dict) or not content:
        raise InputError(f'{path}: expected an object such as {{"0": ["<a_1>", "<b_2>"]}}')
    for key, tokens in content.items():
        if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) and SID_TOKEN.fullmatch(t) for t in tokens):
            raise InputError(f'{path}, item {key}: expected a list of tokens such as ["<a_1>", "<b_2>"], got {str(tokens)[:60]}')
        try:
            index[int(key)] = tuple(tokens)
        except ValueError:
            raise InputError(f"{path}: item id {key!r} is not a whole number") from None
    return index


def check_rows_against_index(rows: Iterable[Row], index: dict[int, tuple[str, ...]], path: str | Path, index_path: str | Path) -> None:
    """Every item of `rows` must stand in the index, with the same SID.

    Raises:
        InputError: at the first item that does not.
    """
    sids = {item: "".join(tokens) for item, tokens in index.items()}
    for number, row in enumerate(rows, 1):
        for item, sid in zip((*row.history_ids, row.item_id), (*row.history_sids, row.sid)):
            if item not in sids:
                raise InputError(f"{index_path}: item {item} is missing ({path}, row {number} uses it)")
            if sids[item] != sid:
                raise InputError(f"{path}, row {number}: item {item} has SID {sid}, but {index_path} says {sids[item]}")


@dataclass(frozen=True)
class Catalogue:
    """The closed list of items: parallel lists of SIDs, titles and item ids."""

    sids: list[str]
    titles: list[str]
    item_ids: list[int]


def read_info(path: str | Path, shared_sids: bool = False, flag: str = "info_file") -> Catalogue:
    """The items of an info file, one `sid<TAB>title<TAB>item_id` a line.

    Args:
        shared_sids: accept items that share a SID (they cannot be told apart by a model; metrics then say how ties fall).

    Raises:
        InputError: a malformed line, an item listed twice, an empty file, or a SID listed twice unless `shared_sids`.
    """
    sids, titles, item_ids = [], [], []
    line_of_sid: dict[str, int] = {}
    line_of_item: dict[int, int] = {}
    for number, line in read_lines(path, flag):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != 3 or "".join(SID_TOKEN.findall(fields[0])) != fields[0] or not fields[0] or not fields[2].isdecimal():
            raise InputError(f"{path}, line {number}: expected sid<TAB>title<TAB>item_id, got {line[:60]!r}")
        sid, title, item = fields[0], fields[1], int(fields[2])
        if item in line_of_item:
            raise InputError(f"{path}, line {number}: item {item} stands on line {line_of_item[item]} already")
        if sid in line_of_sid and not shared_sids:
            raise InputError(
                f"{path}, line {number}: SID {sid} belongs to the item of line {line_of_sid[sid]} already; make SIDs unique "
                "(rq.generate_indices --dedup True) or accept ties with --shared_sids True"
            )
        line_of_item[item] = line_of_sid[sid] = number
        sids.append(sid), titles.append(title), item_ids.append(item)
    if not sids:
        raise InputError(f"{path}: no items")
    return Catalogue(sids, titles, item_ids)


# -------------------------------------------------------------------------------------------------------------- prompts
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
        return yaml.safe_dump({"checkpoint": {"separator": self.separator, **self.templates}}, allow_unicode=True, sort_keys=False)


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
        raise InputError(f"{path}: expected {f'the prompt set {name!r}' if name else 'exactly one prompt set, or FILE:SET'}")
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
            raise InputError(f"{path}, task {task}: unknown field {{{unknown.pop()}}}; known: {{history}}, {{sid}}, {{title}}")
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
            raise InputError(f"prompt task {task}: {target!r} tokenises differently after the prompt than alone; end the prompt otherwise")


# ------------------------------------------------------------------------------------------------------------- datasets
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
            self.encoder.prompts.render(self.task, history=separator.join(self._history(row)), sid=row.sid, title=row.title)
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
                    raise InputError(f"--cutoff_len {self.cutoff_len}: row {number + 1} needs {len(ids) + len(target_ids[number])} tokens")
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
                raise InputError(f"--cut_histories: the parts of the prompt {example.prompt[:60]!r} tokenise otherwise alone")

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
