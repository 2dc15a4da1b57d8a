"""SFT on a train split of any size: rows mapped from disk against rows and examples as Python objects.

A split is generated, and every way prepares it and trains a small model on it for some steps, in a process of its own.
`rows_per_s` is over all of the preparation: reading, checking, tokenising and planning the first epoch. `first_step_s`
is the time from the start of the process to the end of the first optimizer step, imports included, and
`first_step_again_s` the same once the files are there. Memory is the largest resident memory of the training process
and of the largest worker, and `private_mb` what of it is not a mapped file at the end. The plain way runs at the sizes
of --plain_rows only. The last line is JSON with `ratio` = `memory_ratio`, plain peak / streamed peak at the largest of
these sizes; the losses of both ways are compared before it is printed.

    python -m benchmarks.bench_stream --rows 5000000
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minionerec.common.cli import flag, parse_flags, run_command


@dataclass
class StreamBenchFlags:
    """Benchmark."""

    rows: int = flag(5_000_000, "rows of the train split; 5,000,000 need 7 GB of disk")
    plain_rows: list[int] = flag([100_000, 300_000], "sizes at which the plain way runs too, at most --rows")
    items: int = flag(20_000, "items of the catalogue")
    steps: int = flag(200, "optimizer steps of 64 rows")
    workers: int | None = flag(None, "processes that tokenise", default_text="the CPU cores, at most 8")
    base_model: str = flag("config/tiny_qwen3.json", "a config, which gets random weights")
    seed: int = flag(0, "seed of everything random")
    work_dir: str | None = flag(
        None,
        "a folder to put the data below; it is removed at the end",
        default_text="the temporary folder of the system",
    )


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(StreamBenchFlags)

import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from benchmarks.bench_data import run_in_child
from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.common.row_files import CSV_COLUMNS

BATCH_ROWS = 64
VALID_ROWS = 200
LONGEST_HISTORY = 10
ROWS_OF_USER = (1, 22)  # the fewest and the most: histories have 5.6 items on average


@dataclass
class StreamFigures:
    """What a process measured; memory in MB."""

    prepare_s: float = 0.0
    first_step_s: float = 0.0
    steps_s: float = 0.0
    peak_mb: float = 0.0
    worker_peak_mb: float = 0.0
    private_mb: float = 0.0
    losses: list[float] = field(default_factory=list)


def generate_samples(rows: int, items: int, seed: int) -> Iterator[str]:
    """Lines of a CSV split: users with timelines of random items, those with low numbers more often."""
    rng = random.Random(seed)
    sids = [make_sid(item) for item in range(items)]
    written = user = 0
    while written < rows:
        timeline = [int(items * rng.random() ** 3) for _ in range(rng.randint(*ROWS_OF_USER) + 1)]
        for end in range(1, min(len(timeline), rows - written + 1)):
            history, target = timeline[max(0, end - LONGEST_HISTORY) : end], timeline[end]
            titles = [f"Item number {item}" for item in history]
            texts = f'"{titles}","Item number {target}","{history}",{target},"{[sids[item] for item in history]}"'
            yield f"U{user},{texts},{sids[target]}\n"
            written += 1
        user += 1


def make_sid(item: int) -> str:
    """A SID of three tokens."""
    return f"<a_{item % 32}><b_{item // 32 % 32}><c_{item // 1024}>"


def generate_split(folder: Path, rows: int, items: int, seed: int) -> None:
    """Write the train and validation splits, the items and their SIDs."""
    folder.mkdir()
    for name, count in (("train.csv", rows), ("valid.csv", VALID_ROWS)):
        with (folder / name).open("w", encoding="utf-8") as file:
            file.write(",".join(CSV_COLUMNS) + "\n")
            file.writelines(generate_samples(count, items, seed))
    index = {item: [f"{token}>" for token in make_sid(item).split(">")[:-1]] for item in range(items)}
    (folder / "index.json").write_text(json.dumps(index))
    meta = {item: {"title": f"Item number {item}", "description": ""} for item in range(items)}
    (folder / "item.json").write_text(json.dumps(meta))


def measure_reader(way: str, folder: Path, flags: StreamBenchFlags, queue: SimpleQueue) -> None:
    """Prepare the split of a folder one way, train, and put `StreamFigures` of this process into the queue."""
    start = time.perf_counter()
    from transformers import TrainerCallback, TrainingArguments

    from minionerec.language.prompts import load_prompts
    from minionerec.training.settings import SFTFlags
    from minionerec.training.setup import build_arguments
    from minionerec.training.sft_setup import build_sft_model
    from minionerec.training.sft_trainer import TreeTrainer

    figures = StreamFigures()

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                figures.first_step_s = time.perf_counter() - start

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                figures.losses.append(logs["loss"])

    sft_flags = SFTFlags(
        base_model=flags.base_model,
        train_from_scratch=True,
        train_file=str(folder / "train.csv"),
        eval_file=str(folder / "valid.csv"),
        sid_index_path=str(folder / "index.json"),
        item_meta_path=str(folder / "item.json"),
        output_dir=str(folder / way),
        batch_size=BATCH_ROWS,
        micro_batch_size=BATCH_ROWS,
        cut_histories=True,
        sid_init="noise",
        streaming="False" if way == "plain" else "True",
        workers=flags.workers,
        seed=flags.seed,
    )
    prepare = prepare_plain if way == "plain" else prepare_streamed
    begin = time.perf_counter()
    data, make_batches = prepare(sft_flags)
    reading = time.perf_counter() - begin
    built = build_sft_model(sft_flags, data, load_prompts("compact"))
    planning = time.perf_counter()
    batches = make_batches(built.encoder)
    figures.prepare_s = reading + time.perf_counter() - planning
    arguments = build_arguments(
        TrainingArguments,
        sft_flags,
        flags.steps,
        [],
        per_device_train_batch_size=1,
        max_steps=flags.steps,
        save_strategy="no",
        logging_steps=max(1, flags.steps // 10),
    )
    training = time.perf_counter()
    TreeTrainer(model=built.model, train_dataset=batches, args=arguments, callbacks=[Clock()]).train()
    figures.steps_s = time.perf_counter() - training
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    for name, who in (("peak_mb", resource.RUSAGE_SELF), ("worker_peak_mb", resource.RUSAGE_CHILDREN)):
        setattr(figures, name, resource.getrusage(who).ru_maxrss * unit / 2**20)
    figures.private_mb = read_private_mb()
    queue.put(figures)


def read_private_mb() -> float:
    """MB of resident memory of this process that no file stands behind; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def prepare_streamed(flags):
    """The project's way: (inputs of the run, function from an encoder to its batches)."""
    from data import TaskInputs, build_mixture
    from minionerec.training.sft_setup import batch_training, read_sft_data

    data = read_sft_data(flags)
    inputs = TaskInputs(data.train_rows, data.catalogue, cut_histories=True, seed=flags.seed)
    return data, lambda encoder: batch_training(flags, build_mixture({"next_sid": 1.0}, inputs, encoder), encoder)


def prepare_plain(flags):
    """Lists of rows and examples: (inputs of the run, function from an encoder to its batches)."""
    from benchmarks.plain_reader import PlainSidDataset, PlainTreeBatches
    from minionerec.common.items import read_catalogue
    from minionerec.common.records import check_rows, read_index, read_rows
    from minionerec.training.sft_setup import SFTInputs

    index = read_index(flags.sid_index_path)
    catalogue, descriptions = read_catalogue(flags.item_meta_path, index, flags.sid_index_path)
    rows, valid = read_rows(flags.train_file), read_rows(flags.eval_file)
    for split, path in ((rows, flags.train_file), (valid, flags.eval_file)):
        check_rows(split, catalogue, path, flags.sid_index_path)

    def make_batches(encoder):
        dataset = PlainSidDataset(rows, encoder, True, flags.seed)
        return PlainTreeBatches([dataset], BATCH_ROWS, 1, encoder.pad_token_id, flags.seed)

    return SFTInputs(index, catalogue, descriptions, None, rows, valid), make_batches


def run_way(way: str, folder: Path, flags: StreamBenchFlags) -> StreamFigures:
    """The figures of one way in a process of its own.

    Raises:
        InputError: it failed.
    """
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    run_in_child(measure_reader, way, folder, flags, queue)
    return queue.get()


def measure_rows(rows: int, flags: StreamBenchFlags, work: Path) -> dict:
    """The figures of all ways at one size.

    Raises:
        InputError: a way that failed, or ways whose losses differ.
    """
    folder = work / f"{rows}"
    run_in_child(generate_split, folder, rows, flags.items, flags.seed)
    first, again = run_way("streamed", folder, flags), run_way("streamed", folder, flags)
    files = [path for path in (folder / "streamed" / "data_cache").rglob("*.arrow")]
    report = {
        "rows": rows,
        "csv_mb": round((folder / "train.csv").stat().st_size / 2**20),
        "cache_mb": round(sum(path.stat().st_size for path in files) / 2**20),
        "rows_per_s": round(rows / first.prepare_s),
        "first_step_s": round(first.first_step_s, 1),
        "first_step_again_s": round(again.first_step_s, 1),
        "steps_s": round(first.steps_s, 1),
        "peak_mb": round(max(first.peak_mb, again.peak_mb)),
        "worker_peak_mb": round(first.worker_peak_mb),
        "private_mb": round(again.private_mb),
    }
    if rows in flags.plain_rows:
        plain = run_way("plain", folder, flags)
        for other in (first, again):
            if other.losses != plain.losses:
                raise InputError(f"the two ways disagree at {rows} rows: no figure is reported")
        report |= {
            "plain_rows_per_s": round(rows / plain.prepare_s),
            "plain_first_step_s": round(plain.first_step_s, 1),
            "plain_peak_mb": round(plain.peak_mb),
            "plain_private_mb": round(plain.private_mb),
            "memory_ratio": round(plain.peak_mb / report["peak_mb"], 2),
        }
    return report


def bench(flags: StreamBenchFlags) -> None:
    """Generate the splits, measure and report.

    Raises:
        InputError: a flag out of range, a way that failed, or ways that disagree.
    """
    if flags.rows < BATCH_ROWS or not flags.plain_rows or max(flags.plain_rows) > flags.rows:
        raise InputError(f"--rows {flags.rows}: expected {BATCH_ROWS} or more, and no size of --plain_rows above it")
    if flags.items > 32 * 32 * 32:
        raise InputError(f"--items {flags.items}: expected {32**3} or fewer")
    if flags.work_dir:
        Path(flags.work_dir).mkdir(parents=True, exist_ok=True)
    sizes = []
    with tempfile.TemporaryDirectory(dir=flags.work_dir) as name:
        for rows in sorted({*flags.plain_rows, flags.rows}):
            sizes.append(measure_rows(rows, flags, Path(name)))
            say(" ".join(f"{key}={value}" for key, value in sizes[-1].items()))
    compared = [size for size in sizes if "memory_ratio" in size]
    report = {
        "benchmark": "stream",
        "steps": flags.steps,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "agree": True,
        "ratio": compared[-1]["memory_ratio"],
        "memory_ratio": compared[-1]["memory_ratio"],
        "sizes": sizes,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(bench, FLAGS)
