"""Examples: a prompt, its target and what they carry along, and the datasets that hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset

from minionerec.common.files import InputError
from minionerec.common.records import Row
from minionerec.common.row_table import Chunks, list_target_sids, number_users, select_rows
from minionerec.language.encoded_rows import ENCODED_SCHEMA, IdColumn, describe_code, encode_rows
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


# (prompt_ids, target_ids, labels) of an example.
TokenRow = tuple[list[int], list[int], SoftLabels | None]


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


@dataclass(frozen=True)
class Encoded:
    """A source in token ids.

    Attributes:
        shown: how many of the texts the prompt shows. prompt, target: the texts; prompt_ids, target_ids: their tokens.
    """

    source: Source
    shown: int
    prompt: str
    prompt_ids: list[int]
    target: str
    target_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of the example."""
        return len(self.prompt_ids) + len(self.target_ids)


@dataclass(frozen=True)
class Groups:
    """Which examples packing keeps together: those with the same name and the same piece.

    Attributes:
        names: distinct ones. codes: [examples], the number of each one's name. pieces: [examples], or None.
    """

    names: pa.Array
    codes: np.ndarray
    pieces: np.ndarray | None = None


def number_groups(parts: Sequence[Groups]) -> np.ndarray:
    """The groups of all examples of the parts, numbered in order of first appearance: int64 [examples]."""
    codes = [part.codes.astype(np.int64) for part in parts]
    if any(part.names is not parts[0].names for part in parts):
        names = pa.concat_arrays([part.names for part in parts]).dictionary_encode().indices.to_numpy()
        starts = np.cumsum([0, *(len(part.names) for part in parts)])
        codes = [names[numbers + start].astype(np.int64) for numbers, start in zip(codes, starts[:-1], strict=True)]
    pieces = [np.full(len(part.codes), -1) if part.pieces is None else part.pieces for part in parts]
    keys, piece = np.concatenate(codes), np.concatenate(pieces) + 1
    keys *= int(piece.max(initial=0)) + 1
    keys += piece
    _, first, numbers = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[numbers]


class PromptDataset(Dataset):
    """Examples made of sources and templates.

    Blank texts are not shown: a history's items without one are skipped, and a source that has no text to show or none
    to say is left out. An example longer than the encoder's cutoff_len loses its oldest history, never its instruction
    or its target.

    Attributes:
        left_out: how many sources gave no example, by reason.
    """

    def __init__(self) -> None:
        self._examples: list[Example] = []
        self.left_out: Counter[str] = Counter()

    @property
    def examples(self) -> list[Example]:
        """All examples of this epoch in a list."""
        return [self[index] for index in range(len(self))]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def read_tokens(self, places: Sequence[int]) -> list[TokenRow]:
        """(prompt_ids, target_ids, labels) of some examples, which is less work than the examples."""
        return [(example.prompt_ids, example.target_ids, example.labels) for example in map(self.__getitem__, places)]

    def count_prompt_tokens(self) -> np.ndarray:
        """Tokens of every prompt, or of the longer one that its row would have in another epoch."""
        return np.array([len(self[index].prompt_ids) for index in range(len(self))], dtype=np.int64)

    def list_sids(self) -> set[str]:
        """The SIDs of all targets."""
        return {self[index].sid for index in range(len(self))}

    def list_groups(self) -> list[Groups]:
        """What packing keeps together, in the order of the examples."""
        encoded = pa.array([self[index].group for index in range(len(self))], pa.string()).dictionary_encode()
        return [Groups(encoded.dictionary, encoded.indices.to_numpy())]

    def _add(self, task: str, sources: Sequence[Source | str | None], encoder: Encoder) -> None:
        """Append a task's examples; those that are too long even with a history of one item are left out.

        Args:
            task: whose templates are used.
            sources: one per example; a text instead is the reason why there is none, None was not asked for.
            encoder: tokenizer, templates and longest example.
        """
        for encoded in encode_sources(task, sources, encoder):
            if isinstance(encoded, Encoded) and encoded.length > encoder.cutoff_len:
                encoded = "longer than cutoff_len"
            if isinstance(encoded, str):
                self.left_out[encoded] += bool(encoded)
            else:
                self._examples.append(build_example(encoded))
        self.left_out = +self.left_out


class ExampleList(PromptDataset):
    """Examples that are there already."""

    def __init__(self, examples: Sequence[Example]):
        super().__init__()
        self._examples = list(examples)


def build_example(encoded: Encoded) -> Example:
    """The example of an encoded source."""
    source = encoded.source
    origin = (source.group, source.user_id, source.sid, source.item_id)
    return Example(encoded.prompt, encoded.prompt_ids, encoded.target_ids, *origin, encoded.target, source.history_ids)


def complete_source(task: str, source: Source | str | None) -> Source | str:
    """The source without blank texts, or why there is none; "" where none was asked for."""
    if not isinstance(source, Source):
        return source or ""
    texts = [text for text in source.prompt_texts if text.strip()]
    source = replace(source, prompt_texts=texts, target_text=source.target_text.strip())
    fields = zip(TASK_FIELDS[task], (texts, source.target_text), strict=True)
    empty = [name for name, content in fields if not content]
    return f"without {empty[0]}" if empty else source


def encode_sources(task: str, sources: Sequence[Source | str | None], encoder: Encoder) -> list[Encoded | str]:
    """The sources in token ids; for one without an example, why, as `complete_source` says it.

    Args:
        task: whose templates are used.
        sources: one per example; a text instead is the reason why there is none, None was not asked for.
        encoder: tokenizer, templates and longest example. What is too long even with a history of one item is longer.
    """
    results: list[Encoded | str] = [complete_source(task, source) for source in sources]
    chosen = {index: source for index, source in enumerate(results) if isinstance(source, Source)}
    targets = [encoder.prompts.target(task, source.target_text) for source in chosen.values()]
    for target in targets[:1]:
        encoder.check_boundary(task, target)
    target_ids = encoder.target_ids(task, targets)
    budgets = [encoder.cutoff_len - len(ids) for ids in target_ids]
    prompts = shorten_prompts(task, [source.prompt_texts for source in chosen.values()], budgets, encoder)
    for (index, source), target, ids, prompt in zip(chosen.items(), targets, target_ids, prompts, strict=True):
        results[index] = Encoded(source, *prompt, target, ids)
    return results


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

    What is held of a row is its token ids, in an Arrow table that may lie on disk; the rest of an example is made when
    it is asked for.

    Args:
        rows: the split.
        encoder: tokenizer, templates and the longest example; the oldest history is dropped until it fits.

    Attributes:
        rows: those that have an example, in the same order.
        shown_items: how many items of each of their histories the prompt shows, [rows].

    Raises:
        InputError: an example that is too long even with a history of one item.
    """

    task = "next_sid"
    schema = ENCODED_SCHEMA

    def __init__(self, rows: Sequence[Row], encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        table = encode_rows(rows, self.encode, self.schema, self.task, self._decided_by())
        self._chunks = Chunks(table)
        self._prompt_ids, self._target_ids = (IdColumn(self._chunks, name) for name in ("prompt_ids", "target_ids"))
        for reason in table["reason"].value_counts().to_pylist():
            if reason["values"]:
                self.left_out[reason["values"]] = reason["counts"]
        self._numbers = np.flatnonzero(table["reason"].is_null().to_numpy())  # of the rows that have an example
        self._check_lengths()
        self.rows = select_rows(rows, self._numbers)
        self.shown_items = table["shown"].to_numpy()[self._numbers]

    def _decided_by(self) -> tuple:
        """What decides the token ids beside the rows."""
        encoder = self.encoder
        own = {name: value for name, value in vars(self).items() if name not in ("encoder", "_examples", "left_out")}
        return (describe_code(type(self), PromptDataset), encoder.describe(), self.task, own)

    def _check_lengths(self) -> None:
        lengths = (self._prompt_ids.lengths() + self._target_ids.lengths())[self._numbers]
        too_long = np.flatnonzero(lengths > self.encoder.cutoff_len)
        if len(too_long):
            row, length = self._numbers[too_long[0]] + 1, lengths[too_long[0]]
            raise InputError(f"--cutoff_len {self.encoder.cutoff_len}: row {row} needs {length} tokens for {self.task}")

    def get_prompt_texts(self, row: Row) -> Sequence[str]:
        """What the prompt of a row shows: the items of its history, oldest first, or one text."""
        return row.history_sids

    def get_target_text(self, row: Row) -> str:
        """What the target of a row says."""
        return row.sid

    def _source(self, row: Row) -> Source | str | None:
        origin = (row.user_id, row.user_id, row.sid, row.item_id, row.history_ids)
        return Source(self.get_prompt_texts(row), self.get_target_text(row), *origin)

    def encode(self, rows: Sequence[Row], numbers: Sequence[int]) -> dict[str, list]:
        """The columns of `schema` for some rows; may run in another process, before this one has the rows.

        Args:
            rows: a batch of the split.
            numbers: of these rows in the split.
        """
        encoded = encode_sources(self.task, [self._source(row) for row in rows], self.encoder)
        return {
            "reason": [entry if isinstance(entry, str) else None for entry in encoded],
            "shown": [0 if isinstance(entry, str) else entry.shown for entry in encoded],
            "prompt_ids": [[] if isinstance(entry, str) else entry.prompt_ids for entry in encoded],
            "target_ids": [[] if isinstance(entry, str) else entry.target_ids for entry in encoded],
        }

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Example:
        place = range(len(self))[index]
        ((prompt_ids, target_ids, _),) = self.read_tokens([place])
        source = complete_source(self.task, self._source(self.rows[place]))
        prompts, shown = self.encoder.prompts, int(self.shown_items[place])
        prompt, target = prompts.prompt(self.task, source.prompt_texts[-shown:]), source.target_text
        return build_example(Encoded(source, shown, prompt, prompt_ids, prompts.target(self.task, target), target_ids))

    def read_tokens(self, places: Sequence[int]) -> list[TokenRow]:
        return [(self._prompt_ids[number], self._target_ids[number], None) for number in self._numbers[places]]

    def iterate_prompts(self) -> Iterator[str]:
        """The prompts of the rows in order, as texts; less work than the examples."""
        for row, shown in zip(self.rows, self.shown_items.tolist(), strict=True):
            source = complete_source(self.task, self._source(row))
            yield self.encoder.prompts.prompt(self.task, source.prompt_texts[-shown:])

    def count_prompt_tokens(self) -> np.ndarray:
        return self._prompt_ids.lengths()[self._numbers]

    def list_sids(self) -> set[str]:
        return list_target_sids(self.rows)

    def list_groups(self) -> list[Groups]:
        return [Groups(*number_users(self.rows))]
