"""The planner against real runs: planned and measured peak memory of sft.py and rl.py, each in its own process.

Models are random, data is made up. Every process first runs the same command with a model of 30,000 weights, so that
all libraries are loaded; what is resident then is its base. Measured is how far the resident memory then rises above
the base, sampled every 2 ms by a thread; planned is the peak of the plan. glibc is told to return freed blocks of
256 KiB or more at once: left to itself it keeps some of them, and the resident memory is more than what the run holds.
The last line is JSON: `ratio` = the largest of planned / measured and its inverse over all runs.

    python -m benchmarks.bench_plan                          all runs
    python -m benchmarks.bench_plan --runs sft-30m-lora      one run
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import Flags, flag, parse_flags, run_command

RUNS = {
    f"{stage}-{size}-{trains}": (stage, size, trains)
    for stage in ("sft", "rl")
    for size in ("30m", "120m")
    for trains in ("full", "lora")
}
RUNS["sft-120m-checkpointing"] = ("sft", "120m", "checkpointing")


@dataclass
class PlanBenchFlags(Flags):
    """Benchmark."""

    runs: list[str] = flag(list(RUNS), "which runs", choices=tuple(RUNS))
    rows: int = flag(32, "train rows, on each of two tasks")
    returns_memory: bool = flag(True, "let glibc return freed blocks at once; False leaves it to itself")
    seed: int = flag(0, "seed of data and weights")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(PlanBenchFlags)

import csv
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import rl
import sft
from benchmarks.problems import WORDS, list_sid_tokens
from minionerec.common.files import InputError, write_json
from minionerec.common.processes import say
from minionerec.common.records import SID_TOKEN, Catalogue
from minionerec.common.row_files import CSV_COLUMNS
from minionerec.language.models import train_tokenizer
from minionerec.language.sid_tokens import add_sid_tokens
from minionerec.training.settings import RLFlags, SFTFlags

SHAPES: dict[str, dict[str, int]] = {
    "tiny": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
    "30m": dict(hidden_size=384, intermediate_size=1152, num_hidden_layers=8, num_attention_heads=6),
    "120m": dict(hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12),
}
VOCABULARY = {"tiny": 1000, "30m": 32_000, "120m": 32_000}
ITEMS, HISTORY = 400, 10
SAMPLED_EVERY = 0.002  # seconds


def write_data(folder: Path, rows: int, rng: random.Random) -> tuple[dict[str, str], Catalogue]:
    """({flag: path} of a made-up data set, its catalogue)."""
    titles = [" ".join(rng.choices(WORDS, k=rng.randint(6, 16))) + f" {item}" for item in range(ITEMS)]
    sids = [f"<a_{item % 50}><b_{item // 50}><c_{item % 7}>" for item in range(ITEMS)]
    paths = {
        "train_file": folder / "train.csv",
        "eval_file": folder / "valid.csv",
        "sid_index_path": folder / "x.index.json",
        "item_meta_path": folder / "x.item.json",
        "info_file": folder / "info.txt",
    }
    for name, count in (("train_file", rows), ("eval_file", 16)):
        with paths[name].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(CSV_COLUMNS)
            for row in range(count):
                *history, target = rng.sample(range(ITEMS), rng.randint(4, HISTORY + 1))
                shown = [[texts[item] for item in history] for texts in (titles, sids)]
                writer.writerow([f"U{row // 2}", shown[0], titles[target], history, target, shown[1], sids[target]])
    write_json(paths["sid_index_path"], {str(item): SID_TOKEN.findall(sid) for item, sid in enumerate(sids)})
    write_json(paths["item_meta_path"], {str(item): {"title": title} for item, title in enumerate(titles)})
    lines = [f"{sid}\t{title}\t{item}\n" for item, (sid, title) in enumerate(zip(sids, titles, strict=True))]
    paths["info_file"].write_text("".join(lines), encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}, Catalogue(sids, titles, list(range(ITEMS)))


def write_model(folder: Path, size: str, catalogue: Catalogue, seed: int) -> str:
    """A random Qwen3 of one of SHAPES that knows the SID tokens; returns its folder."""
    tokenizer = train_tokenizer(catalogue.titles, 1000)
    vocabulary = VOCABULARY[size]
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(seed)
    heads = max(1, SHAPES[size]["num_attention_heads"] // 3)
    config = Qwen3Config(
        vocab_size=vocabulary,
        num_key_value_heads=heads,
        head_dim=64 if size != "tiny" else 16,
        tie_word_embeddings=True,
        **SHAPES[size],
        **ids,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    add_sid_tokens(model, tokenizer, list_sid_tokens(catalogue), seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build_run_flags(run: str, model: str, paths: dict[str, str], output: Path) -> SFTFlags | RLFlags:
    """The flags of a run: two optimizer steps or a few, of two micro-batches each."""
    stage, _, trains = RUNS[run]
    common: dict[str, Any] = {
        "train_file": paths["train_file"],
        "eval_file": paths["eval_file"],
        "item_meta_path": paths["item_meta_path"] if stage == "sft" else None,
        "sid_index_path": paths["sid_index_path"],
        "output_dir": str(output),
        "tasks": ["next_sid", "title_history2sid"],
        "lora": trains == "lora",
        "gradient_checkpointing": trains == "checkpointing",
    }
    if stage == "sft":
        return SFTFlags(base_model=model, batch_size=32, micro_batch_size=16, num_epochs=1, **common)
    return RLFlags(
        model_path=model,
        info_file=paths["info_file"],
        train_batch_size=64,
        gradient_accumulation_steps=2,
        max_steps=2,
        test_during_training=False,
        **common,
    )


@contextmanager
def watch_memory() -> Iterator[list[int]]:
    """Yields a list whose only entry is the largest resident memory of this process inside, in bytes."""
    process, peak, stop = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(SAMPLED_EVERY)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def measure_run(run: str, rows: int, seed: int) -> dict[str, Any]:
    """Plan one run, do it, and compare."""
    stage, size, _ = RUNS[run]
    command = sft.sft if stage == "sft" else rl.rl
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths, catalogue = write_data(folder, rows, random.Random(seed))
        tiny = write_model(folder / "tiny", "tiny", catalogue, seed)
        command(build_run_flags(run, tiny, paths, folder / "warm"))
        model = write_model(folder / "model", size, catalogue, seed)
        flags = build_run_flags(run, model, paths, folder / "output")
        plan = sft.plan_sft(*sft.resolve_sft_flags(flags)) if stage == "sft" else rl.plan_rl(rl.resolve_rl_flags(flags))
        gc.collect()
        base = psutil.Process().memory_info().rss
        started = time.perf_counter()
        with watch_memory() as peak:
            command(flags)
    measured, planned = peak[0] - base, plan.peak[1]
    return {
        "run": run,
        "parameters": plan.shape.parameters,
        "trainable": plan.shape.trainable,
        "phase": plan.peak[0],
        "planned_mb": round(planned / 2**20),
        "measured_mb": round(measured / 2**20),
        "base_mb": round(base / 2**20),
        "planned_over_measured": round(planned / measured, 3),
        "planned_s": round(plan.seconds or 0, 1),
        "measured_s": round(time.perf_counter() - started, 1),
    }


def print_run(run: str, rows: str, seed: str) -> None:
    """`measure_run` as a program: its last line is JSON."""
    print(json.dumps(measure_run(run, int(rows), int(seed))))


def bench(flags: PlanBenchFlags) -> None:
    """Plan and measure the runs.

    Raises:
        InputError: a run that failed.
    """
    results = []
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": str(2**18)} if flags.returns_memory else {})}
    heading = f"{'run':<24}{'phase':<28}{'planned MiB':>12}{'measured MiB':>14}"
    say(f"{heading}{'ratio':>8}{'planned s':>11}{'measured s':>12}")
    for run in flags.runs:
        program = "import sys; from benchmarks.bench_plan import print_run; print_run(*sys.argv[1:])"
        command = [sys.executable, "-c", program, run, str(flags.rows), str(flags.seed)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise InputError(f"{run}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        result = json.loads(done.stdout.strip().splitlines()[-1])
        results.append(result)
        say(
            f"{run:<24}{result['phase']:<28}{result['planned_mb']:>12,}{result['measured_mb']:>14,}"
            f"{result['planned_over_measured']:>8.2f}{result['planned_s']:>11,}{result['measured_s']:>12,}"
        )
    ratios = [result["planned_over_measured"] for result in results]
    worst = max(max(ratio, 1 / ratio) for ratio in ratios)
    report = {"benchmark": "plan", "threads": torch.get_num_threads(), "ratio": round(worst, 3), "runs": results}
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(bench, FLAGS)
