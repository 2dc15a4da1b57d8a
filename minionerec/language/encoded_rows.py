"""Token ids of a split's examples as an Arrow table, made in batches and kept on disk where the rows are."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from minionerec.common.records import Row
from minionerec.common.row_table import (
    BATCH_ROWS,
    FORMAT,
    ROWS_AT_ONCE,
    Chunks,
    RowTable,
    build_once,
    open_arrow_files,
)
from minionerec.common.sharing import broadcast_value

# One line a row, those without an example included.
ENCODED_SCHEMA = pa.schema(
    {
        "reason": pa.string(),  # why there is no example; "" where none was asked for, null where there is one
        "shown": pa.int32(),  # items of the history that the prompt shows
        "prompt_ids": pa.list_(pa.int32()),
        "target_ids": pa.list_(pa.int32()),
    }
)

# {column: values} of a batch of rows, whose numbers in the split are given.
RowEncoder = Callable[[Sequence[Row], Sequence[int]], dict[str, list]]


class IdColumn:
    """A column of lists; element n is the n-th of them as a Python list."""

    def __init__(self, chunks: Chunks, name: str):
        self._chunks = chunks
        columns = [batch.column(name) for batch in chunks.batches]
        self._views = [(column.offsets.to_numpy(), column.values.to_numpy()) for column in columns]

    def __getitem__(self, number: int) -> list:
        chunk, place = self._chunks.locate(number)
        offsets, values = self._views[chunk]
        return values[offsets[place] : offsets[place + 1]].tolist()

    def lengths(self) -> np.ndarray:
        """Lengths of all lists."""
        return np.concatenate([np.zeros(0, np.int32), *(np.diff(offsets) for offsets, _ in self._views)])


def encode_rows(rows: Sequence[Row], encode: RowEncoder, schema: pa.Schema, name: str, decided_by: Any) -> pa.Table:
    """What `encode` makes of all rows, one line a row; mapped from the rows' cache where they have one.

    Args:
        rows: of a split.
        encode: called with batches of rows, in several processes at once where the rows are on disk.
        schema: of what it makes.
        name: of the table.
        decided_by: everything that decides the table beside the rows; equal values give equal tables.
    """
    if not isinstance(rows, RowTable) or rows.cache is None:
        batches = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            numbers = range(start, min(start + ROWS_AT_ONCE, len(rows)))
            columns = encode(list(rows[start : numbers.stop]), numbers)
            batches.append(pa.record_batch([pa.array(columns[n], schema.field(n).type) for n in schema.names], schema))
        return pa.Table.from_batches(batches, schema)

    from datasets.fingerprint import Hasher

    chosen = None if rows.numbers is None else hashlib.blake2b(rows.numbers.tobytes()).hexdigest()
    fingerprint = broadcast_value(Hasher.hash((rows.fingerprint, chosen, schema.names, FORMAT, decided_by)))
    folder = rows.cache.folder / f"{rows.fingerprint}.{name}-{fingerprint}"
    build_once(folder, lambda temporary: _map_rows(rows, encode, schema, f"tokenise {name}", temporary))
    return open_arrow_files(folder)


def _map_rows(rows: RowTable, encode: RowEncoder, schema: pa.Schema, title: str, folder: Path) -> None:
    from datasets import Dataset, Features

    dataset = Dataset.from_file(str(rows.file))
    if rows.numbers is not None:
        dataset = dataset.select(rows.numbers)
    dataset.map(
        _encode_columns,
        batched=True,
        batch_size=ROWS_AT_ONCE,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features.from_arrow_schema(schema),
        # Its own name for an unchanged table is a hash of the function, which takes long and decides nothing here.
        new_fingerprint="0" * 16,
        cache_file_name=str(folder / "rows.arrow"),
        writer_batch_size=BATCH_ROWS,
        # One process too is another one than this: the pages that it maps are then not memory of the run.
        num_proc=max(1, min(rows.cache.workers, len(rows) // ROWS_AT_ONCE)),
        fn_kwargs={"encode": encode},
        desc=title,
    )


def _encode_columns(columns: dict[str, list], numbers: Sequence[int], encode: RowEncoder) -> dict[str, list]:
    rows = [
        Row(user, tuple(titles), tuple(ids), tuple(sids), title, item, sid)
        for user, titles, ids, sids, title, item, sid in zip(*columns.values(), strict=True)
    ]
    return encode(rows, numbers)


def describe_code(kind: type, base: type) -> list[str]:
    """The source of a class and of those between it and `base`, which is part of what decides a table."""
    return [inspect.getsource(parent) for parent in kind.__mro__ if issubclass(parent, base)]
