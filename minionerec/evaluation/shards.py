"""Rows worked off in batches by any number of processes, so that a kill costs the batches under way only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minionerec.common.files import InputError
from minionerec.common.processes import process_state


def read_finished(path: Path, offset: int = 0) -> tuple[dict[int, Any], int]:
    """({row number: its result} of the whole lines after byte `offset`, the byte after them).

    A line without its end was torn by a kill, or is being written, and is left alone.

    Raises:
        InputError: a line that `work_in_shards` did not write.
    """
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    results: dict[int, Any] = {}
    for line in whole.splitlines():
        try:
            batch = json.loads(line)
            results.update(zip(batch["rows"], batch["results"], strict=True))
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path}: not the finished batches of an earlier run; remove the folder {path.parent} to begin anew"
            ) from None
    return results, offset + len(whole)


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
        os.truncate(path, read_finished(path)[1])


def work_in_shards(
    work: Callable[[list[int]], Sequence[Any]],
    lengths: Sequence[int],
    batch_size: int,
    folder: Path,
    after_batch: Callable[[], None],
) -> list[Any] | None:
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
    results: dict[int, Any] = {}
    offsets: dict[Path, int] = {}

    def collect() -> int:
        before = len(results)
        for path in sorted(folder.glob("rank*.jsonl")):
            new_results, offsets[path] = read_finished(path, offsets.get(path, 0))
            results.update(new_results)
        return len(results) - before

    finished = collect()
    state.wait_for_everyone()  # nobody writes before everybody has read, or the shares would not fit together
    order = sorted((row for row in range(len(lengths)) if row not in results), key=lambda row: -lengths[row])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    folder.mkdir(parents=True, exist_ok=True)
    main = state.is_main_process
    with (
        (folder / f"rank{state.process_index}.jsonl").open("a", encoding="utf-8") as file,
        tqdm(total=len(lengths), initial=finished, unit="row", disable=not main, mininterval=2.0) as bar,
    ):
        for rows in batches[state.process_index :: state.num_processes]:
            batch = {"rows": rows, "results": list(work(rows))}
            file.write(json.dumps(batch, ensure_ascii=False) + "\n")
            file.flush()
            if main:
                bar.update(collect())
                after_batch()
        file.close()
        state.wait_for_everyone()
        if not main:
            return None
        bar.update(collect())
    missing = len(lengths) - len(results)
    if missing:
        raise InputError(
            f"{folder}: {missing} rows of other processes are not there; all processes must share this disk"
        )
    return [results[row] for row in range(len(lengths))]
