"""evaluate.py on a test split of any size: results that stay in files against lists of all of them.

A split and a random model are made, and every way evaluates in a process of its own. The search is replaced by
recommendations that a hash of the prompt decides, so that what is measured is the rest of the command: rows, tokens,
finished batches, predictions and metrics. "streamed" is evaluate.py; "plain" holds rows, examples, results and
predictions as Python objects and runs at the sizes of --plain_rows only. Memory is the largest resident memory of the
process, the model included. Both ways must write the same bytes and the same metrics. The last line is JSON with
`ratio` = `memory_ratio`, plain peak / streamed peak at the largest of these sizes.

    python -m benchmarks.bench_evaluation --rows 300000
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag, parse_flags, run_command


@dataclass
class EvaluationBenchFlags:
    """Benchmark."""

    rows: int = flag(300_000, "rows of the test split")
    plain_rows: list[int] = flag([30_000, 300_000], "sizes at which the plain way runs too, at most --rows")
    items: int = flag(20_000, "items of the catalogue")
    K: int = flag(50, "recommendations a row")
    base_model: str = flag("config/tiny_qwen3.json", "a config, which gets random weights")
    seed: int = flag(0, "seed of everything random")
    work_dir: str | None = flag(
        None,
        "a folder to put the data below; it is removed at the end",
        default_text="the temporary folder of the system",
    )


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(EvaluationBenchFlags)

import filecmp
import json
import multiprocessing
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from benchmarks.bench_data import run_in_child
from benchmarks.bench_stream import generate_split, make_sid
from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.evaluation.settings import EvaluateFlags

BATCH_ROWS = 256
STRIDE = 7919  # between the items of a list; a prime, so that they are distinct


def recommend_by_hash(prompts: Sequence[str], sids: Sequence[str], k: int) -> tuple[list[list[str]], list[list[float]]]:
    """What stands for the search: (k distinct SIDs, k scores) for every prompt, functions of its text."""
    starts = [zlib.crc32(prompt.encode()) for prompt in prompts]
    rankings = [[sids[(start + STRIDE * place) % len(sids)] for place in range(k)] for start in starts]
    return rankings, [[-(start % 1000 + 1) / 999 - place / 7 for place in range(k)] for start in starts]


def make_checkpoint(folder: Path, flags: EvaluationBenchFlags) -> None:
    """Write a random model with the SIDs of the split in `folder`, and its info file."""
    from minionerec.common.items import read_catalogue
    from minionerec.common.records import read_index
    from minionerec.language.prompts import load_prompts
    from minionerec.training.checkpoints import save_checkpoint_folder
    from minionerec.training.settings import SFTFlags
    from minionerec.training.sft_setup import SFTInputs, build_sft_model

    index = read_index(str(folder / "index.json"))
    catalogue, descriptions = read_catalogue(str(folder / "item.json"), index, "index.json")
    sft_flags = SFTFlags(
        base_model=flags.base_model,
        train_from_scratch=True,
        train_file="",
        eval_file="",
        sid_index_path="",
        item_meta_path="",
        output_dir="",
        sid_init="noise",
        seed=flags.seed,
    )
    prompts = load_prompts("compact")
    built = build_sft_model(sft_flags, SFTInputs(index, catalogue, descriptions, None, [], []), prompts)
    save_checkpoint_folder(built.model, built.encoder.tokenizer, prompts, folder / "model")
    lines = [f"{make_sid(item)}\tItem number {item}\t{item}\n" for item in range(flags.items)]
    (folder / "info.txt").write_text("".join(lines))


def build_evaluate_flags(way: str, folder: Path, flags: EvaluationBenchFlags) -> EvaluateFlags:
    """The flags of the evaluation, without a train split."""
    return EvaluateFlags(
        base_model=str(folder / "model"),
        info_file=str(folder / "info.txt"),
        test_data_path=str(folder / "train.csv"),
        result_json_data=str(folder / way / "test.json"),
        batch_size=BATCH_ROWS,
        num_beams=flags.K,
        K=flags.K,
        streaming="True",
    )


def evaluate_streamed(folder: Path, flags: EvaluationBenchFlags) -> None:
    """The project's way."""
    from evaluate import evaluate
    from minionerec.evaluation import predict

    sids = [make_sid(item) for item in range(flags.items)]

    def rank(model, catalogue_trie, examples, *_, **__):
        return recommend_by_hash([example.prompt for example in examples], sids, flags.K)

    predict.rank_sids = rank
    evaluate(build_evaluate_flags("streamed", folder, flags))


def evaluate_plain(folder: Path, flags: EvaluationBenchFlags) -> None:
    """Lists of rows, examples, results and predictions."""
    from data import EvalSidDataset
    from minionerec.common.files import write_json
    from minionerec.common.records import check_rows, read_info, read_rows
    from minionerec.evaluation.metrics import score_predictions
    from minionerec.evaluation.setup import load_searched_model
    from minionerec.language.prompts import Encoder, load_checkpoint_prompts

    asked = build_evaluate_flags("plain", folder, flags)
    catalogue, rows = read_info(asked.info_file), read_rows(asked.test_data_path)
    check_rows(rows, catalogue, asked.test_data_path, asked.info_file)
    _, tokenizer = load_searched_model(asked)
    examples = EvalSidDataset(rows, Encoder(tokenizer, load_checkpoint_prompts(asked.base_model))).examples
    results = {}
    sids = [make_sid(item) for item in range(flags.items)]
    order = sorted(range(len(rows)), key=lambda row: -len(examples[row].prompt_ids))
    with (folder / "finished.jsonl").open("w") as file:
        for start in range(0, len(rows), BATCH_ROWS):
            batch = order[start : start + BATCH_ROWS]
            found = recommend_by_hash([examples[row].prompt for row in batch], sids, flags.K)
            for row, ranked, scores in zip(batch, *found, strict=True):
                line = json.dumps({"predict": ranked, "score": [round(score, 6) for score in scores]})
                file.write(line + "\n")
                results[row] = json.loads(line)  # as from the files of several processes
    predictions = [
        {
            "user_id": row.user_id,
            "item_id": row.item_id,
            "input": examples[number].prompt,
            "output": row.sid,
            **results[number],
        }
        for number, row in enumerate(rows)
    ]
    metrics = score_predictions(predictions, catalogue, flags.K, [row.history_sids for row in rows])
    write_json(folder / "plain" / "test.json", predictions, indent=None)
    write_json(folder / "plain" / "test.metrics.json", metrics)


def measure_evaluation(way: str, folder: Path, flags: EvaluationBenchFlags, queue: SimpleQueue) -> None:
    """Evaluate one way and put (seconds, peak memory in MB) of this process into the queue."""
    start = time.perf_counter()
    (evaluate_plain if way == "plain" else evaluate_streamed)(folder, flags)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    queue.put((time.perf_counter() - start, peak))


def check_same_files(folder: Path) -> None:
    """Both ways must have written the same bytes.

    Raises:
        InputError: they did not.
    """
    for end in ("json", "metrics.json"):
        if not filecmp.cmp(*(folder / way / f"test.{end}" for way in ("streamed", "plain")), shallow=False):
            raise InputError(f"the two ways write another test.{end} in {folder}: no figure is reported")


def measure_split(rows: int, flags: EvaluationBenchFlags, work: Path) -> dict:
    """The figures of all ways at one size.

    Raises:
        InputError: a way that failed, or ways whose files differ.
    """
    folder = work / f"{rows}"
    run_in_child(generate_split, folder, rows, flags.items, flags.seed)
    run_in_child(make_checkpoint, folder, flags)
    report = {"rows": rows}
    for way in ("streamed", "plain") if rows in flags.plain_rows else ("streamed",):
        queue = multiprocessing.get_context("spawn").SimpleQueue()
        run_in_child(measure_evaluation, way, folder, flags, queue)
        seconds, peak = queue.get()
        name = "" if way == "streamed" else "plain_"
        report |= {f"{name}seconds": round(seconds, 1), f"{name}peak_mb": round(peak)}
    report["predictions_mb"] = round((folder / "streamed" / "test.json").stat().st_size / 2**20)
    if rows in flags.plain_rows:
        check_same_files(folder)
        report["memory_ratio"] = round(report["plain_peak_mb"] / report["peak_mb"], 2)
    return report


def bench(flags: EvaluationBenchFlags) -> None:
    """Generate the splits, measure and report.

    Raises:
        InputError: a flag out of range, a way that failed, or ways that disagree.
    """
    if not flags.plain_rows or min(flags.plain_rows) < 1 or max(flags.plain_rows) > flags.rows:
        raise InputError(f"--rows {flags.rows}: expected no size of --plain_rows above it, and at least one")
    if not flags.K <= flags.items <= 32**3 or flags.items % STRIDE == 0:
        raise InputError(f"--items {flags.items}: expected K to {32**3}, and no multiple of {STRIDE}")
    if flags.work_dir:
        Path(flags.work_dir).mkdir(parents=True, exist_ok=True)
    sizes = []
    with tempfile.TemporaryDirectory(dir=flags.work_dir) as name:
        for rows in sorted({*flags.plain_rows, flags.rows}):
            sizes.append(measure_split(rows, flags, Path(name)))
            say(" ".join(f"{key}={value}" for key, value in sizes[-1].items()))
    ratio = [size["memory_ratio"] for size in sizes if "memory_ratio" in size][-1]
    print(json.dumps({"benchmark": "evaluation", "agree": True, "ratio": ratio, "memory_ratio": ratio, "sizes": sizes}))


if __name__ == "__main__":
    run_command(bench, FLAGS)
