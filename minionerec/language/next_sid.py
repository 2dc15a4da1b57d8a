"""Histories of SIDs and the SID that comes next: the real one, or that of an item like those of the history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress

import numpy as np
import pyarrow as pa

from minionerec.common.files import InputError
from minionerec.common.records import Catalogue, Row
from minionerec.common.row_table import get_history_sids
from minionerec.language.encoded_rows import ENCODED_SCHEMA
from minionerec.language.examples import Example, Groups, RowDataset, TokenRow
from minionerec.language.prompts import Encoder
from minionerec.language.timeline_cuts import TimelineCuts

TARGET_DRAWS = 2  # targets a row and epoch

# Histories as lists of numbers of the catalogue's items -> (numbers of items, most similar first, [H, k]; probabilities
# [H, k], all 0 where no item is like the history). It may be called in another process.
SimilarFinder = Callable[[Sequence[Sequence[int]]], tuple[np.ndarray, np.ndarray]]


class SidSFTDataset(RowDataset):
    """History SIDs -> next SID.

    Args:
        rows, encoder: see `RowDataset`.
        cut_histories: in every epoch, cut each user's timeline at other random positions into pieces of the longest
            history, and let a target see its own piece only. Histories are then shorter on average, but the targets of
            a piece share one prefix, and a prefix tree computes it once: for users with long timelines an epoch costs a
            small part of what sliding windows cost. Users whose timeline fits one history are not touched.
        seed: of the random positions.
    """

    def __init__(self, rows: Sequence[Row], encoder: Encoder, cut_histories: bool = False, seed: int = 42):
        self.cut_histories, self.seed = cut_histories, seed
        if cut_histories:
            self._prepare_parts(encoder, rows[0].history_sids if len(rows) else ())
        super().__init__(rows, encoder)
        if cut_histories:
            self._cuts = TimelineCuts(self.rows, self.shown_items, seed)

    def _prepare_parts(self, encoder: Encoder, history: Sequence[str]) -> None:
        """Token ids of the parts of a prompt, so that an epoch's cuts need no tokenizer.

        Where parts tokenise otherwise alone, as with SentencePiece, every cut prompt goes to the tokenizer whole.

        Args:
            encoder: tokenizer and templates.
            history: SIDs that the parts are tried with.
        """
        self._by_parts = False
        head, _, tail = encoder.prompts.template(self.task)["prompt"].partition("{history}")
        if "{history}" in tail:
            raise InputError("--cut_histories: the next_sid prompt must show {history} once")
        self._texts = (head.format(), tail.format())
        texts = [*self._texts, encoder.prompts.separator]
        encoded = encoder.tokenizer(texts, add_special_tokens=False).input_ids
        self._head, self._tail, self._separator = [*encoder.start, *encoded[0]], encoded[1], encoded[2]
        self._parts: dict[str, list[int]] = {}
        whole = encoder.prompts.prompt(self.task, [*history, *history])
        self._by_parts = self._join_parts([*history, *history], encoder) == encoder.prompt_ids([whole])[0]

    def encode(self, rows: Sequence[Row], numbers: Sequence[int]) -> dict[str, list]:
        """See `RowDataset.encode`.

        Raises:
            InputError: the parts of a prompt do not add up to what the tokenizer makes of the whole.
        """
        columns = super().encode(rows, numbers)
        if self.cut_histories and self._by_parts:
            kept = [reason is None for reason in columns["reason"]]
            for row, count, ids in compress(zip(rows, columns["shown"], columns["prompt_ids"], strict=True), kept):
                if self._join_parts(row.history_sids[-count:], self.encoder) != ids:
                    prompt = self.encoder.prompts.prompt(self.task, row.history_sids[-count:])
                    raise InputError(
                        f"--cut_histories: the parts of the prompt {prompt[:60]!r} tokenise otherwise alone"
                    )
        return columns

    def _cut_prompt(self, history: Sequence[str]) -> list[int]:
        """Token ids of the prompt that shows a history."""
        if self._by_parts:
            return self._join_parts(history, self.encoder)
        return self.encoder.prompt_ids([self.encoder.prompts.prompt(self.task, history)])[0]

    def _join_parts(self, history: Sequence[str], encoder: Encoder) -> list[int]:
        new = [sid for sid in history if sid not in self._parts]
        if new:
            encoded = encoder.tokenizer(new, add_special_tokens=False).input_ids
            self._parts.update(zip(new, encoded, strict=True))
        ids = list(self._head)
        for number, sid in enumerate(history):
            if number:
                ids += self._separator
            ids += self._parts[sid]
        return ids + self._tail

    def set_epoch(self, epoch: int) -> None:
        """Choose the cuts of this epoch; a function of the seed and the epoch alone."""
        if self.cut_histories:
            self._cuts.set_epoch(epoch)

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        if not self.cut_histories or self._cuts.pieces[index] < 0:
            return example
        history = self.rows[index].history_sids[-int(self._cuts.shown[index]) :]
        text = self._texts[0] + self.encoder.prompts.separator.join(history) + self._texts[1]
        return replace(example, prompt=text, group=f"{example.user_id}/{self._cuts.pieces[index]}")

    def read_tokens(self, places: Sequence[int]) -> list[TokenRow]:
        tokens = super().read_tokens(places)
        if not self.cut_histories:
            return tokens
        for number, place in enumerate(places):
            shown = int(self._cuts.shown[place])
            if shown < self.shown_items[place]:
                tokens[number] = (self._cut_prompt(get_history_sids(self.rows, place)[-shown:]), *tokens[number][1:])
        return tokens

    def list_groups(self) -> list[Groups]:
        (groups,) = super().list_groups()
        return [replace(groups, pieces=self._cuts.pieces)] if self.cut_histories else [groups]


class SimilarSidDataset(SidSFTDataset):
    """History SIDs -> SID of an item whose text is like those of the history; two draws a row, anew in every epoch.

    What a content-based recommender knows, said in SIDs: also of items that nobody in the train split has taken. A row
    whose history shares no word with another item has no example.

    Args:
        catalogue: the items.
        find_similar: the items most like each history, see there.
        rows, encoder, cut_histories, seed: see `SidSFTDataset`.
    """

    task = "similar_sid"
    # The likest items, as numbers in the catalogue, and sums of their probabilities from the first on.
    schema = pa.schema([*ENCODED_SCHEMA, ("similar", pa.list_(pa.int32())), ("cumulative", pa.list_(pa.float64()))])

    def __init__(
        self,
        rows: Sequence[Row],
        encoder: Encoder,
        catalogue: Catalogue,
        find_similar: SimilarFinder,
        cut_histories: bool = False,
        seed: int = 42,
    ):
        self._catalogue = catalogue
        self._column = {item: number for number, item in enumerate(catalogue.item_ids)}
        self._find_similar = find_similar
        self._targets = [encoder.prompts.target(self.task, sid) for sid in catalogue.sids]
        self._target_ids_of = encoder.target_ids(self.task, self._targets)
        super().__init__(rows, encoder, cut_histories, seed)
        self.set_epoch(0)

    def encode(self, rows: Sequence[Row], numbers: Sequence[int]) -> dict[str, list]:
        """See `RowDataset.encode`; rows without similar items are left out."""
        columns = super().encode(rows, numbers)
        histories = [[self._column[item] for item in row.history_ids] for row in rows]
        similar, probabilities = self._find_similar(histories)
        for number in np.flatnonzero(~probabilities.any(axis=1)):
            columns["reason"][number] = "like no other item"
        return {**columns, "similar": list(similar), "cumulative": list(probabilities.cumsum(axis=1))}

    def set_epoch(self, epoch: int) -> None:
        """Choose cuts and targets of this epoch; a function of the seed and the epoch alone."""
        super().set_epoch(epoch)
        generator = np.random.default_rng([self.seed, epoch])
        self._drawn = np.empty((TARGET_DRAWS, len(self.rows)), np.int32)  # items, as numbers in the catalogue
        for drawn in self._drawn:
            first = start = 0
            for batch in self._chunks.batches:
                low, high = np.searchsorted(self._numbers, (first, first + len(batch)))
                kept = self._numbers[low:high] - first
                similar, cumulative = (
                    batch.column(name).flatten().to_numpy().reshape(len(batch), -1)[kept]
                    for name in ("similar", "cumulative")
                )
                draws = generator.random((len(kept), 1)) * cumulative[:, -1:]
                columns = (draws >= cumulative).sum(axis=1)
                drawn[start : start + len(kept)] = similar[np.arange(len(kept)), columns]
                first, start = first + len(batch), start + len(kept)

    def __len__(self) -> int:
        return TARGET_DRAWS * len(self.rows)

    def __getitem__(self, index: int) -> Example:
        draw, place = divmod(range(len(self))[index], len(self.rows))
        item = int(self._drawn[draw, place])
        return replace(
            super().__getitem__(place),
            target=self._targets[item],
            target_ids=self._target_ids_of[item],
            sid=self._catalogue.sids[item],
            item_id=self._catalogue.item_ids[item],
        )

    def read_tokens(self, places: Sequence[int]) -> list[TokenRow]:
        draws, rows = np.divmod(np.asarray(places, dtype=np.int64), len(self.rows))
        prompts = [prompt for prompt, *_ in super().read_tokens(rows)]
        items = self._drawn[draws, rows].tolist()
        return [(prompt, self._target_ids_of[item], None) for prompt, item in zip(prompts, items, strict=True)]

    def count_prompt_tokens(self) -> np.ndarray:
        return np.tile(super().count_prompt_tokens(), TARGET_DRAWS)

    def list_sids(self) -> set[str]:
        return {self._catalogue.sids[item] for item in np.unique(self._drawn).tolist()}

    def list_groups(self) -> list[Groups]:
        (groups,) = super().list_groups()
        pieces = None if groups.pieces is None else np.tile(groups.pieces, TARGET_DRAWS)
        return [Groups(groups.names, np.tile(groups.codes, TARGET_DRAWS), pieces)]
