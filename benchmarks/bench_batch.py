"""Recommendations for a file of generated users: users a second, and the memory of a process.

A file of users is generated from a model folder's own items, popular ones more often, and recommend.py is run on it as
a user would run it, with several processes where --processes says so. The lists are then read again: every user must
have one, in the order of the file, of K different items that are not in the history. The last line is JSON with
`users_per_s` over the whole run, loading included, `rows_per_s` of the output, and `peak_mb`, the largest resident
memory of any process.

    python -m benchmarks.bench_batch --model output/quickstart/rl/final_checkpoint --users 100000
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import Flags, flag, parse_flags, run_command
from minionerec.common.settings import SeedFlags


@dataclass
class BatchBenchFlags(SeedFlags, Flags):
    """Benchmark."""

    model: str = flag(help="the model folder")
    users: int = flag(100_000, "users of the file")
    longest_history: int = flag(10, "items of a history, at most")
    K: int = flag(20, "length of the lists")
    num_beams: int = flag(50, "beams of the search")
    processes: int = flag(1, "processes that share the users, launched by torchrun")
    kind: str = flag("csv", "format of both files", choices=("csv", "jsonl", "parquet"))
    work_dir: str | None = flag(
        None,
        "a folder to put the files below; they are removed at the end",
        default_text="the temporary folder of the system",
    )


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(BatchBenchFlags)

import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from minionerec.common.files import InputError, read_json
from minionerec.common.model_folder import ModelCatalogue, read_model_catalogue
from minionerec.common.processes import say

ROOT = Path(__file__).parent.parent
GROUP = 10_000  # users of a group of rows, in Parquet


def draw_histories(known: ModelCatalogue, flags: BatchBenchFlags) -> Iterator[list[int]]:
    """The history of every user: different items, popular ones more often."""
    generator, items = random.Random(flags.seed), known.catalogue.item_ids
    weights = list(accumulate(known.catalogue.counts.get(item, 0) + 1 for item in items))
    most = min(flags.longest_history, len(items))
    for _ in range(flags.users):
        drawn = generator.choices(items, cum_weights=weights, k=generator.randint(1, most))
        yield list(dict.fromkeys(drawn))


def write_user_file(path: Path, histories: Iterator[list[int]]) -> None:
    """The file of users, as a stream, in the format of its name."""
    rows = ((f"U{number}", history) for number, history in enumerate(histories))
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema([("user_id", pyarrow.string()), ("history", pyarrow.list_(pyarrow.int64()))])
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            while group := [row for _, row in zip(range(GROUP), rows, strict=False)]:
                users, lists = zip(*group, strict=True)
                writer.write_table(pyarrow.table([list(users), list(lists)], schema=schema))
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["user_id", "history"])
            writer.writerows(rows)
        else:
            file.writelines(json.dumps({"user_id": user, "history": history}) + "\n" for user, history in rows)


def read_lists(path: Path) -> Iterator[tuple[str, list[int]]]:
    """(user, items of the list) of every user of recommend.py's output, in its order."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for line in file:
                user = json.loads(line)
                yield user["user_id"], [item["item_id"] for item in user["recommendations"]]
        return
    user, items = None, []
    for name, item in _read_rows(path):
        if name != user and user is not None:
            yield user, items
            items = []
        user = name
        items.append(item)
    if user is not None:
        yield user, items


def _read_rows(path: Path) -> Iterator[tuple[str, int]]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                yield row["user_id"], int(row["item_id"])
        return
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["user_id", "item_id"]):
            yield from ((row["user_id"], row["item_id"]) for row in batch.to_pylist())


def check_lists(path: Path, histories: Iterator[list[int]], k: int) -> int:
    """Rows of the output, once every user is found to have a whole list.

    Raises:
        InputError: a user without a list, out of order, or with an item twice or of the history.
    """
    rows, lists = 0, read_lists(path)
    for number, history in enumerate(histories):
        user, items = next(lists, (None, []))
        if user != f"U{number}" or len(set(items)) != k or len(items) != k or set(items) & set(history):
            raise InputError(f"{path}: expected {k} new items for U{number}, found {len(items)} for {user}")
        rows += len(items)
    if next(lists, None) is not None:
        raise InputError(f"{path}: more users than were asked for")
    return rows


def run_recommend(flags: BatchBenchFlags, users: Path, output: Path) -> float:
    """Run the command on the file of users; returns its seconds.

    Raises:
        InputError: it failed.
    """
    launcher = [] if flags.processes == 1 else ["-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={flags.processes}"] if launcher else []
    command = [sys.executable, *launcher, str(ROOT / "recommend.py"), "--model", flags.model]
    command += ["--input", str(users), "--output", str(output), "--K", str(flags.K), "--exclude_seen", "True"]
    command += ["--num_beams", str(flags.num_beams)]
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if subprocess.run(command, env=environment, check=False).returncode:
        raise InputError("recommend.py failed, see above")
    return time.perf_counter() - start


def bench(flags: BatchBenchFlags) -> dict[str, Any]:
    """Generate, recommend, check, and return the figures of the last line."""
    if flags.users < 1 or flags.processes < 1 or flags.longest_history < 1:
        raise InputError("--users, --processes, --longest_history: expected 1 or more")
    known = read_model_catalogue(flags.model)
    with tempfile.TemporaryDirectory(dir=flags.work_dir) as folder:
        users, output = Path(folder, f"users.{flags.kind}"), Path(folder, f"lists.{flags.kind}")
        write_user_file(users, draw_histories(known, flags))
        say(f"[bench_batch] {flags.users:,} users, {users.stat().st_size / 2**20:.1f} MB")
        seconds = run_recommend(flags, users, output)
        rows = check_lists(output, draw_histories(known, flags), flags.K)
        record = read_json(f"{output}.stage.json")
        size = output.stat().st_size
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    report = {
        "users": flags.users,
        "processes": flags.processes,
        "kind": flags.kind,
        "seconds": round(seconds, 1),
        "users_per_s": round(flags.users / seconds, 2),
        "rows_per_s": round(rows / seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 2**20),
        "main_peak_mb": record["peak_memory_mb"],
        "output_mb": round(size / 2**20, 1),
    }
    say(json.dumps(report))
    return report


if __name__ == "__main__":
    run_command(bench, FLAGS)
