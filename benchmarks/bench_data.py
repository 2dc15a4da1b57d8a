"""Reading an Amazon dump: this project's streaming reader against the plain way, load all JSON and loop.

A dump of the 2018 form is generated, each way reads it in a process of its own, and their six output files are
compared byte by byte before anything is reported. Seconds include the imports a way needs; memory is the peak of its
process. The last line is JSON with `ratio` and `time_ratio`, both plain seconds / streaming seconds, and `memory_ratio`
= plain peak / streaming peak.

    python -m benchmarks.bench_data --reviews 5000000
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag, parse_flags, run_command


@dataclass
class DataBenchFlags:
    """Benchmark."""

    reviews: int = flag(5_000_000, "lines of the dump; 5,000,000 need 4 GB of disk, and the plain way 13 GB of memory")
    seed: int = flag(0, "seed of the dump")
    work_dir: str | None = flag(
        None,
        "a folder to put the dump below; it is removed at the end",
        default_text="the temporary folder of the system",
    )


if __name__ == "__main__":
    FLAGS = parse_flags(DataBenchFlags)

import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from benchmarks.memory import read_peak_memory_mb
from minionerec.common.files import InputError, read_json
from minionerec.common.processes import say

WORDS = "great works as described battery the cable fits my old one and it broke after two weeks but price is “fair” \\"
WINDOW = {"st_year": 2014, "st_month": 10, "ed_year": 2018, "ed_month": 7}
START, END = 1_412_121_600, 1_530_403_200  # the same in seconds UTC
FILES = ("item.json", "train.inter", "valid.inter", "test.inter", "user2id", "item2id")


def generate_dump(folder: Path, reviews: int, seed: int) -> None:
    """Write meta.json and reviews.json, with skewed popularity and activity.

    10 % of the reviews are outside the window, 1 % stand there twice, a few are malformed.

    A user has 6 reviews on average and an item 50; review texts are 50 to 1,500 characters long, most about 300.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    words = WORDS.split()

    def make_text(length: int) -> str:
        return json.dumps(" ".join(random.choice(words, max(1, int(length) // 6))))

    n_users, n_items = max(1, reviews // 6), max(1, reviews // 50)
    texts = [make_text(length) for length in np.clip(random.lognormal(5.7, 0.8, 4000), 50, 1500)]
    with (folder / "meta.json").open("w", encoding="utf-8") as file:
        for item in range(n_items):
            # Every 100th title is a piece of a web page.
            title = f'"<span id=title{item}"' if item % 100 == 7 else f'"Cable &amp; Plug No. {item}"'
            about = f'"title": {title}, "brand": "Brand {item % 500}", "category": ["Electronics", "Part {item % 40}"]'
            others = f'"price": "$9.99", "rank": "{item} in Electronics", "also_buy": ["B000000001", "B000000002"]'
            file.write(f'{{"asin": "B{item:09}", {about}, "description": [{texts[item % len(texts)]}], {others}}}\n')
    with (folder / "reviews.json").open("w", encoding="utf-8") as file:
        for begin in range(0, reviews, 100_000):
            n = min(100_000, reviews - begin)
            users = (n_users * random.random(n) ** 2.5).astype(int).tolist()
            items = (n_items * random.random(n) ** 3).astype(int).tolist()
            inside = random.random(n) < 0.9
            times = np.where(inside, random.integers(START, END, n), random.integers(START - 10**8, START, n)).tolist()
            stars = random.integers(1, 6, n).tolist()
            body = random.integers(0, len(texts), n).tolist()
            fate = random.random(n)
            for i in range(n):
                line = (
                    f'{{"overall": {stars[i]}.0, "verified": true, "reviewTime": "07 1, 2016", '
                    f'"reviewerID": "A{users[i]:013}", "asin": "B{items[i]:09}", "style": {{"Color:": " Black"}}, '
                    f'"reviewerName": "Customer {users[i]}", "reviewText": {texts[body[i]]}, '
                    f'"summary": "Five Stars", "unixReviewTime": {times[i]}}}\n'
                )
                if fate[i] < 1e-5:
                    line = line[:40] + "\n"
                elif fate[i] < 0.01:
                    line += line
                file.write(line)


def read_streaming(folder: Path) -> None:
    """This project's way."""
    from data_process.amazon18_data_process import process_amazon
    from data_process.settings import AmazonFlags

    process_amazon(
        AmazonFlags(
            dataset="toy",
            metadata_file=str(folder / "meta.json"),
            reviews_file=str(folder / "reviews.json"),
            output_path=str(folder / "streaming"),
            max_bad_lines=10**9,
            **WINDOW,
        )
    )


def load_records(path: Path) -> list[dict]:
    """All records of a file; malformed lines are left out."""
    records = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def read_plain(folder: Path) -> None:
    """The plain way: every record in memory, then loops over lists and dictionaries. Same rules, same files."""
    from data_process.amazon_files import clean_title
    from minionerec.common.texts import clean_text

    items: dict[str, dict] = {}
    for record in load_records(folder / "meta.json"):
        title = clean_title(record.get("title"), 20)
        if title and record["asin"] not in items:
            items[record["asin"]] = {
                "title": title,
                "description": clean_text(record["description"]),
                "brand": clean_text(record["brand"]),
                "categories": ", ".join(record["category"]),
            }
    reviews = load_records(folder / "reviews.json")
    kept, seen = [], set()
    for review in reviews:
        row = review["reviewerID"], review["asin"], review["unixReviewTime"]
        if START <= row[2] < END and row[1] in items and row not in seen:
            seen.add(row)
            kept.append(row)
    while True:
        by_user = Counter(row[0] for row in kept)
        by_item = Counter(row[1] for row in kept)
        left = [row for row in kept if by_user[row[0]] >= 5 and by_item[row[1]] >= 5]
        if len(left) == len(kept):
            break
        kept = left
    kept.sort(key=lambda row: row[2])
    user_ids: dict[str, int] = {}
    item_ids: dict[str, int] = {}
    histories: dict[int, list[int]] = {}
    samples = []
    for user, item, _ in kept:
        user_id = user_ids.setdefault(user, len(user_ids))
        item_id = item_ids.setdefault(item, len(item_ids))
        history = histories.setdefault(user_id, [])
        if history:
            samples.append((user_id, history[-10:], item_id))
        history.append(item_id)
    out = folder / "plain"
    out.mkdir()
    cuts = [0, len(samples) * 8 // 10, len(samples) * 9 // 10, len(samples)]
    for name, (begin, end) in zip(("train", "valid", "test"), pairwise(cuts), strict=True):
        with (out / f"toy.{name}.inter").open("w", encoding="utf-8") as file:
            file.write("user_id:token\titem_id_list:token_seq\titem_id:token\n")
            for user_id, history, item_id in samples[begin:end]:
                file.write(f"{user_id}\t{' '.join(map(str, history))}\t{item_id}\n")
    for kind, ids in (("user", user_ids), ("item", item_ids)):
        with (out / f"toy.{kind}2id").open("w", encoding="utf-8") as file:
            file.write(f"original_{kind}\t{kind}_id\n")
            for name, number in ids.items():
                file.write(f"{name}\t{number}\n")
    with (out / "toy.item.json").open("w", encoding="utf-8") as file:
        json.dump({str(number): items[name] for name, number in item_ids.items()}, file, ensure_ascii=False, indent=2)
        file.write("\n")


def measure_way(way: Callable[[Path], None], folder: Path, queue: SimpleQueue) -> None:
    """Run one way and put (seconds, seconds of CPU time, peak memory in MB) of this process into the queue."""
    start, start_cpu = time.perf_counter(), time.process_time()
    way(folder)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    queue.put((seconds, cpu, read_peak_memory_mb()))


def run_in_child(function: Callable, *arguments: Any) -> None:
    """Run in a fresh process, so that this one stays small: a child's peak begins at its parent's.

    Raises:
        InputError: the process ended with an error.
    """
    child = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        raise InputError(f"{function.__name__} stopped with exit status {child.exitcode}, perhaps for want of memory")


def run_both(folder: Path) -> dict[str, tuple[float, float, float]]:
    """{way: (seconds, seconds of CPU time, peak memory in MB)}.

    Raises:
        InputError: a way that failed, or ways whose files differ.
    """
    figures = {}
    for name, way in (("streaming", read_streaming), ("plain", read_plain)):
        queue = multiprocessing.get_context("spawn").SimpleQueue()
        run_in_child(measure_way, way, folder, queue)
        figures[name] = queue.get()
    for file in FILES:
        if (folder / "streaming" / f"toy.{file}").read_bytes() != (folder / "plain" / f"toy.{file}").read_bytes():
            raise InputError(f"the two ways disagree in toy.{file}: no figure is reported")
    return figures


def bench(flags: DataBenchFlags) -> None:
    """Generate the dump, run both ways, compare their files and report.

    Raises:
        InputError: a flag out of range, a way that failed, or ways whose files differ.
    """
    if flags.reviews < 1000:
        raise InputError(f"--reviews {flags.reviews}: expected 1000 or more")
    if flags.work_dir:
        Path(flags.work_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=flags.work_dir) as name:
        folder = Path(name)
        run_in_child(generate_dump, folder, flags.reviews, flags.seed)
        size = sum((folder / file).stat().st_size for file in ("meta.json", "reviews.json")) / 2**20
        say(f"generated {flags.reviews} reviews, {size:.0f} MB")
        figures = run_both(folder)
        counts = read_json(folder / "streaming" / "toy.data_process.stage.json")["results"]
    lines = counts["metadata_lines"] + counts["raw_reviews"]
    say(f"{'way':<12}{'seconds':>10}{'CPU s':>10}{'lines/s':>12}{'peak MB':>10}")
    for way, (seconds, cpu, peak) in figures.items():
        say(f"{way:<12}{seconds:>10.1f}{cpu:>10.1f}{lines / seconds:>12.0f}{peak:>10.0f}")
    (ours, ours_cpu, ours_peak), (theirs, theirs_cpu, theirs_peak) = figures["streaming"], figures["plain"]
    report = {
        "benchmark": "data",
        "reviews": flags.reviews,
        "dump_mb": round(size),
        "lines": lines,
        "interactions": counts["interactions"],
        "agree": True,
        "streaming_s": round(ours, 1),
        "plain_s": round(theirs, 1),
        "streaming_cpu_s": round(ours_cpu, 1),
        "plain_cpu_s": round(theirs_cpu, 1),
        "streaming_lines_per_s": round(lines / ours),
        "plain_lines_per_s": round(lines / theirs),
        "streaming_peak_mb": round(ours_peak),
        "plain_peak_mb": round(theirs_peak),
        "ratio": round(theirs / ours, 2),
        "time_ratio": round(theirs / ours, 2),
        "memory_ratio": round(theirs_peak / ours_peak, 2),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(bench, FLAGS)
