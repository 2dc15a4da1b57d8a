"""Rows worked off in batches by any number of processes, so that a kill costs the batches under way only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minionerec.common.files import InputError
from minionerec.common.processes import process_state
from minionerec.common.progress import ProgressBar

RESULTS = b', "results": ['  # of a line, between the numbers of its rows and their results
SHORTER = "--sample (a part of the rows), --num_beams"


class Batch(NamedTuple):
    """A finished batch in a file.

    Attributes:
        rows: numbers of its rows. starts: first byte of the result of each. sizes: bytes of each. end: the byte after
            the batch.
    """

    rows: list[int]
    starts: list[int]
    sizes: list[int]
    end: int


def format_batch(rows: Sequence[int], results: Iterable[Any]) -> bytes:
    """A finished batch as a line of JSON: {"rows": [...], "bytes": [length of every result], "results": [...]}."""
    texts = [json.dumps(result, ensure_ascii=False).encode() for result in results]
    head = json.dumps({"rows": list(rows), "bytes": list(map(len, texts))}).encode()
    return head[:-1] + RESULTS + b", ".join(texts) + b"]}\n"


def find_batches(path: Path, offset: int = 0) -> Iterator[Batch]:
    """The batches of the whole lines after byte `offset`.

    A line without its end was torn by a kill, or is being written, and is left alone.

    Raises:
        InputError: a line that `format_batch` did not write.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            head, _, results = line.partition(RESULTS)
            try:
                batch = json.loads(head + b"}")
                rows, sizes = batch["rows"], batch["bytes"]
                # Two bytes stand between any two results, and three after the last one.
                ends = list(accumulate(size + 2 for size in sizes))
                if len(rows) != len(sizes) or len(results) != ends[-1] + 1:
                    raise ValueError
            except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                raise _refuse(path) from None
            first = offset + len(head) + len(RESULTS)
            starts = [first + end - size - 2 for end, size in zip(ends, sizes, strict=True)]
            offset += len(line)
            yield Batch(rows, starts, sizes, offset)


def _refuse(path: Path) -> InputError:
    return InputError(
        f"{path}: not the finished batches of an earlier run; remove the folder {path.parent} to begin anew"
    )


def prepare_folder(folder: Path, resuming: bool) -> None:
    """Make the partial files of an earlier run ready to be continued, or remove them.

    Called by one process, before any of them reads the files.

    Args:
        folder: that of `work_in_shards`; it need not exist.
        resuming: whether they belong to this run.

    Raises:
        InputError: files that `work_in_shards` did not write.
    """
    if folder.exists() and not resuming:
        shutil.rmtree(folder)
    for path in folder.glob("rank*.jsonl"):
        end = 0
        for batch in find_batches(path):
            end = batch.end
        os.truncate(path, end)


class RowResults:
    """The results of all rows of a split, in row order; they stay in the files until they are read.

    Args:
        folder: with the rank*.jsonl files.
        rows: how many there are.
    """

    def __init__(self, folder: Path, rows: int):
        self.folder = folder
        self._paths: list[Path] = []
        self._ends: list[int] = []  # what was read of each file
        # Of every row: the file, the first byte and the bytes of its result.
        self._file, self._start, self._size = np.full(rows, -1, np.int32), *np.zeros((2, rows), np.int64)

    def collect(self) -> int:
        """Look for batches that are new in the files; how many rows became finished by them."""
        before = len(self.missing)
        for path in sorted(self.folder.glob("rank*.jsonl")):
            if path not in self._paths:
                self._paths.append(path)
                self._ends.append(0)
            number = self._paths.index(path)
            for batch in find_batches(path, self._ends[number]):
                try:
                    self._start[batch.rows], self._size[batch.rows] = batch.starts, batch.sizes
                except (IndexError, ValueError, TypeError):
                    raise _refuse(path) from None
                self._file[batch.rows] = number
                self._ends[number] = batch.end
        return before - len(self.missing)

    @property
    def missing(self) -> np.ndarray:
        """The numbers of the rows without a result, in ascending order."""
        return np.flatnonzero(self._file < 0)

    def __len__(self) -> int:
        return len(self._file)

    def __iter__(self) -> Iterator[Any]:
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in self._paths]
            for row in range(len(self)):
                file = files[self._file[row]]
                file.seek(int(self._start[row]))
                yield json.loads(file.read(int(self._size[row])))


def work_in_shards(
    work: Callable[[list[int]], Sequence[Any]],
    lengths: Sequence[int],
    batch_size: int,
    folder: Path,
    after_batch: Callable[[], None],
) -> RowResults | None:
    """The result of every row, in row order, on the main process; None on the others.

    Batches hold rows of similar length, longest first, so that what does not fit into memory fails at once. They are
    cut before they are dealt out, so neither the number of processes nor a kill changes what is computed together. Each
    process appends a line per finished batch to `folder`/rank{N}.jsonl; rows found there are not done again, whichever
    process did them. A process that fails ends the run of all: its launcher stops the others, or the barrier does.

    Args:
        work: gives the results (JSON values) of a batch of row numbers, in its order.
        lengths: of every row, such as the tokens of its prompt.
        batch_size: rows of a batch.
        folder: on a disk that all processes share, made ready by `prepare_folder`.
        after_batch: called on the main process after each of its batches.

    Raises:
        InputError: a broken partial file, or one process does not see the files of another.
    """
    state = process_state()
    results = RowResults(folder, len(lengths))
    finished = results.collect()
    state.wait_for_everyone()  # nobody writes before everybody has read, or the shares would not fit together
    missing = results.missing
    order = missing[np.argsort(-np.asarray(lengths)[missing], kind="stable")]
    batches = range(0, len(order), batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    main = state.is_main_process
    with (
        (folder / f"rank{state.process_index}.jsonl").open("ab") as file,
        ProgressBar(
            total=len(lengths), initial=finished, desc="search", unit="rows", mininterval=2.0, shorter=SHORTER
        ) as bar,
    ):
        for start in batches[state.process_index :: state.num_processes]:
            rows = order[start : start + batch_size].tolist()
            file.write(format_batch(rows, work(rows)))
            file.flush()
            if main:
                bar.update(results.collect())
                after_batch()
        file.close()
        state.wait_for_everyone()
        if not main:
            return None
        bar.update(results.collect())
    if len(results.missing):
        raise InputError(
            f"{folder}: {len(results.missing)} rows of other processes are not there; all processes must share this "
            "disk"
        )
    return results
