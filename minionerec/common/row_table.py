"""Rows of a split as an Arrow table, which may be larger than memory: on disk it is mapped, not loaded."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from minionerec.common.files import InputError, is_running, require_file
from minionerec.common.processes import is_first_of_machine
from minionerec.common.progress import ProgressBar
from minionerec.common.records import Catalogue, Row, check_rows, iterate_rows
from minionerec.common.settings import StreamFlags
from minionerec.common.sharing import broadcast_value

SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "history_titles": pa.list_(pa.string()),
        "history_ids": pa.list_(pa.int64()),
        "history_sids": pa.list_(pa.string()),
        "title": pa.string(),
        "item_id": pa.int64(),
        "sid": pa.string(),
    }
)
BATCH_ROWS = 10_000  # of a record batch on disk
ROWS_AT_ONCE = 1000  # as Python objects
STREAM_FROM = 64 * 2**20  # bytes of a file from which --streaming auto keeps its rows on disk
FORMAT = "1"  # of the files in a cache: another number, and older ones are not read
POLL_SECONDS = 0.2
MOST_WORKERS = 8  # unless --workers says so: each holds what the tasks are made from


# --------------------------------------------------------------------------------------------------------- cache folder
def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Make a folder, on one process of every machine, while the others wait for it.

    It is built under another name and renamed when it is complete, so that a folder of this name is always whole. The
    others look for the name, however long it takes; if the builder fails, the launcher ends them.

    Args:
        folder: its name says what is in it.
        build: writes the files into a folder.
    """
    if not is_first_of_machine():
        while not folder.exists():
            time.sleep(POLL_SECONDS)
        return
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The machine stands in the name, since processes of several machines may have the same number.
    ours = f"{folder.name}.tmp-{socket.gethostname()}-"
    for left in folder.parent.glob(f"{ours}*"):  # of builds that were killed
        process = left.name.removeprefix(ours)
        if not (process.isdecimal() and is_running(int(process))):
            shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f"{ours}{os.getpid()}")
    temporary.mkdir()
    try:
        build(temporary)
        with suppress(OSError):  # another machine was faster
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_arrow_files(folder: Path) -> pa.Table:
    """The Arrow files of a folder in the order of their names, mapped into memory."""
    from datasets import Dataset

    return pa.concat_tables([Dataset.from_file(str(path)).data.table for path in sorted(folder.glob("*.arrow"))])


class Chunks:
    """The record batches of a table, and in which of them a row stands."""

    def __init__(self, table: pa.Table):
        self.batches = [batch for batch in table.to_batches() if len(batch)]
        self.starts = np.cumsum([0, *map(len, self.batches)])

    def locate(self, number: int) -> tuple[int, int]:
        """(record batch, row in it)."""
        chunk = int(np.searchsorted(self.starts, number, side="right")) - 1
        return chunk, number - int(self.starts[chunk])


# ----------------------------------------------------------------------------------------------------------------- rows
def _convert_to_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    columns = [column.to_pylist() for column in batch.columns]
    for user, titles, ids, sids, title, item, sid in zip(*columns, strict=True):
        yield Row(user, tuple(titles), tuple(ids), tuple(sids), title, item, sid)


def iterate_record_batches(rows: Iterator[Row], path: str | Path) -> Iterator[pa.RecordBatch]:
    """The rows as record batches of SCHEMA.

    Raises:
        InputError: a text that Arrow cannot hold, or an item id beyond 64 bits.
    """
    buffer: list[Row] = []
    number = 0

    def convert() -> pa.RecordBatch:
        fields = ("user_id", "history_titles", "history_ids", "history_sids", "title", "item_id", "sid")
        columns = [[getattr(row, name) for row in buffer] for name in fields]
        try:
            arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        except (UnicodeError, OverflowError, pa.ArrowException) as error:
            where = f"{path}, rows {number - len(buffer) + 1} to {number}"
            raise InputError(f"{where}: a value that is no valid text or number ({error})") from None
        return pa.record_batch(arrays, schema=SCHEMA)

    for row in rows:
        buffer.append(row)
        number += 1
        if len(buffer) == BATCH_ROWS:
            yield convert()
            buffer.clear()
    if buffer:
        yield convert()


class RowTable(Sequence[Row]):
    """Rows of a split in an Arrow table; a `Row` is made when it is asked for.

    Args:
        table: of SCHEMA, in memory or mapped.
        numbers: which of its rows, in ascending order; None is all.
        file: the Arrow file that `table` is mapped from, which passes over all rows read instead: mapped pages would
            count as memory of the process.
        cache: where what is made of the rows is kept; None keeps it in memory.
        fingerprint: of the content of the split.
    """

    def __init__(
        self,
        table: pa.Table,
        numbers: np.ndarray | None = None,
        *,
        file: Path | None = None,
        cache: RowCache | None = None,
        fingerprint: str = "",
    ):
        self.table, self.numbers, self.file = table, numbers, file
        self.cache, self.fingerprint = cache, fingerprint
        self._chunks = Chunks(table)
        self._whole = self

    def __len__(self) -> int:
        return self.table.num_rows if self.numbers is None else len(self.numbers)

    def _number(self, index: int) -> int:
        index = range(len(self))[index]
        return index if self.numbers is None else int(self.numbers[index])

    def __getitem__(self, index: int | slice) -> Row | RowTable:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        chunk, place = self._chunks.locate(self._number(index))
        return next(_convert_to_rows(self._chunks.batches[chunk].slice(place, 1)))

    def get_history_sids(self, index: int) -> list[str]:
        """The SIDs of one history, oldest first; less work than the whole row."""
        chunk, place = self._chunks.locate(self._number(index))
        return self._chunks.batches[chunk].column("history_sids")[place].as_py()

    def __iter__(self) -> Iterator[Row]:
        for batch in self.iterate_batches():
            for start in range(0, len(batch), ROWS_AT_ONCE):
                yield from _convert_to_rows(batch.slice(start, ROWS_AT_ONCE))

    def iterate_batches(self) -> Iterator[pa.RecordBatch]:
        """The rows as record batches, in order."""
        start = 0
        for batch in self._read_batches():
            if self.numbers is not None:
                low, high = np.searchsorted(self.numbers, (start, start + len(batch)))
                start += len(batch)
                batch = batch.take(pa.array(self.numbers[low:high] - (start - len(batch))))
            if len(batch):
                yield batch

    def _read_batches(self) -> Iterator[pa.RecordBatch]:
        if self.file is None:
            yield from self._chunks.batches
            return
        with pa.OSFile(str(self.file)) as source, pa.ipc.open_stream(source) as stream:
            yield from stream

    def select(self, numbers: Sequence[int] | np.ndarray) -> RowTable:
        """Some of the rows, by their numbers here, in ascending order."""
        numbers = np.asarray(numbers, dtype=np.int64)
        if self.numbers is not None:
            numbers = self.numbers[numbers]
        part = RowTable(self.table, numbers, file=self.file, cache=self.cache, fingerprint=self.fingerprint)
        part._whole, part._chunks = self._whole, self._chunks
        return part

    @cached_property
    def _users(self) -> tuple[pa.Array, np.ndarray]:
        if self._whole is not self:
            names, codes = self._whole._users
            return names, codes[self.numbers]
        # Encoded batch by batch: a column alone would keep the whole batch in memory.
        batches = [batch.column("user_id").dictionary_encode() for batch in self._read_batches()]
        encoded = pa.chunked_array(batches).unify_dictionaries()
        codes = [chunk.indices.to_numpy() for chunk in encoded.chunks]
        return encoded.chunk(0).dictionary, np.concatenate(codes).astype(np.int32)

    def number_users(self) -> tuple[pa.Array, np.ndarray]:
        """(the users of the whole split in order of first appearance, the number among them of each row's [rows])."""
        return self._users


def number_users(rows: Sequence[Row]) -> tuple[pa.Array, np.ndarray]:
    """`RowTable.number_users`, of rows in a list too."""
    if isinstance(rows, RowTable):
        return rows.number_users()
    encoded = pa.array([row.user_id for row in rows], pa.string()).dictionary_encode()
    return encoded.dictionary, encoded.indices.to_numpy().astype(np.int32)


def get_history_sids(rows: Sequence[Row], index: int) -> Sequence[str]:
    """The SIDs of one history, oldest first."""
    return rows.get_history_sids(index) if isinstance(rows, RowTable) else rows[index].history_sids


def list_target_sids(rows: Sequence[Row]) -> set[str]:
    """The SIDs of the targets of the rows."""
    if isinstance(rows, RowTable):
        return set().union(*(batch.column("sid").unique().to_pylist() for batch in rows.iterate_batches()))
    return {row.sid for row in rows}


def count_history_items(rows: Sequence[Row]) -> np.ndarray:
    """Items of every history, [rows]."""
    if isinstance(rows, RowTable):
        lengths = [batch.column("history_sids").value_lengths().to_numpy() for batch in rows.iterate_batches()]
        return np.concatenate([np.zeros(0, np.int32), *lengths])
    return np.array([len(row.history_sids) for row in rows], dtype=np.int32)


def select_rows(rows: Sequence[Row], numbers: np.ndarray) -> Sequence[Row]:
    """Some of the rows, by their numbers in ascending order."""
    if len(numbers) == len(rows):
        return rows
    return rows.select(numbers) if isinstance(rows, RowTable) else [rows[number] for number in numbers]


def draw_rows(rows: Sequence[Row], count: int, generator: random.Random) -> Sequence[Row]:
    """`count` random rows in their order; all of them where count is negative or there are no more."""
    if not 0 <= count < len(rows):
        return rows
    return select_rows(rows, np.sort(np.array(generator.sample(range(len(rows)), count), dtype=np.int64)))


# ------------------------------------------------------------------------------------------------------ opening, checks
@dataclass(frozen=True)
class RowCache:
    """Where and how the rows of a run are kept.

    Attributes:
        folder: for the Arrow files, beside the run's output.
        streaming: "True" keeps rows on disk, "False" in memory, "auto" on disk from STREAM_FROM bytes on.
        workers: processes that tokenise rows that are kept on disk.
    """

    folder: Path
    streaming: str
    workers: int

    def open_rows(self, path: str | Path, flag: str) -> RowTable:
        """The rows of a split: CSV, .jsonl or .parquet.

        A split that is kept on disk is converted once; the copy is known by the content of the file, so that a later
        run and the other processes of this one only map it.

        Raises:
            InputError: as `iterate_rows`.
        """
        path = require_file(path, flag)
        if not self._keeps_on_disk(path):
            batches = iterate_record_batches(iterate_rows(path, flag), path)
            return RowTable(pa.Table.from_batches(batches, SCHEMA))
        fingerprint = broadcast_value(hash_file(path))
        folder = self.folder / f"{flag}-{fingerprint}"

        def build(temporary: Path) -> None:
            with pa.OSFile(str(temporary / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
                with ProgressBar(desc=f"read {path.name}", unit="row", mininterval=2) as bar:
                    for batch in iterate_record_batches(iterate_rows(path, flag), path):
                        writer.write_batch(batch)
                        bar.update(len(batch))

        build_once(folder, build)
        return RowTable(
            open_arrow_files(folder), file=folder / "rows.arrow", cache=self, fingerprint=f"{flag}-{fingerprint}"
        )

    def _keeps_on_disk(self, path: Path) -> bool:
        if self.streaming != "auto":
            return self.streaming == "True"
        factor = 8 if path.suffix == ".parquet" else 1  # it is compressed, about so much
        return path.stat().st_size * factor >= STREAM_FROM


def open_row_cache(flags: StreamFlags, output: Path) -> RowCache:
    """How a run with these flags keeps its rows; on disk they lie below the folder of its output.

    Raises:
        InputError: no worker.
    """
    if flags.workers is not None and flags.workers < 1:
        raise InputError(f"--workers {flags.workers}: must be at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    streaming = "False" if getattr(flags, "dry_run", False) else flags.streaming  # a dry run writes nothing
    return RowCache(output / "data_cache", streaming, flags.workers or min(cores, MOST_WORKERS))


def hash_file(path: Path) -> str:
    """20 hexadecimal digits that tell the content of a split, and how it is read."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=10))
    digest.update(f"{path.suffix if path.suffix in ('.jsonl', '.parquet') else '.csv'} {FORMAT}".encode())
    return digest.hexdigest()


def check_table(rows: RowTable, catalogue: Catalogue, path: str | Path, source: str | Path, *, history: bool) -> None:
    """`check_rows` of any number of rows: every pair of item and SID is looked up once a record batch."""
    first = 1
    for batch in rows.iterate_batches():
        pairs = [(batch.column("item_id"), batch.column("sid"))]
        if history:
            pairs.append((batch.column("history_ids").flatten(), batch.column("history_sids").flatten()))
        if not all(_agree(items, sids, catalogue.sid_of) for items, sids in pairs):
            check_rows(_convert_to_rows(batch), catalogue, path, source, history=history, first=first)
        first += len(batch)


def _agree(items: pa.Array, sids: pa.Array, sid_of: dict[int, str]) -> bool:
    """Whether every item has its SID beside it."""
    encoded = sids.dictionary_encode()
    names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    numbers, places = np.unique(items.to_numpy(), return_inverse=True)
    distinct = np.unique(places.astype(np.int64) * len(names) + codes)
    return all(
        sid_of.get(item) == names[code]
        for item, code in zip(numbers[distinct // len(names)].tolist(), (distinct % len(names)).tolist(), strict=True)
    )
