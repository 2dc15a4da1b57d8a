"""The trie at catalogue scale: build time, memory, and the cost of a search step, for catalogues of growing size.

A step is what a beam search asks of the trie and of its candidates, the model left out: the children of every beam,
their logits, the best 2 B of them, and the best B of those. Before anything is reported, the sequences of a sample of
walks are looked up in the input, and a step's candidates are compared with a Python dictionary of prefixes. The last
line is JSON with `ratio` = `step_ratio` = time of a search's steps in the largest catalogue / in the smallest.

    python -m benchmarks.bench_trie --items 10000,1000000,10000000
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag, parse_flags, run_command


@dataclass
class TrieBenchFlags:
    """Benchmark."""

    items: list[int] = flag([10_000, 1_000_000, 10_000_000], "catalogue sizes")
    levels: int = flag(4, "tokens of a SID")
    codes: int = flag(256, "tokens of each level")
    num_beams: int = flag(50, "beams of a step")
    users: int = flag(32, "prompts of a step")
    repeats: int = flag(9, "timed searches, of which medians are taken")
    seed: int = flag(0, "seed of the catalogue")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(TrieBenchFlags)

import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.problems import read_peak_memory_mb
from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.search.beam_search import stable_topk
from minionerec.search.sub_tries import SubTries
from minionerec.search.trie import SidTrie

END = 0


def draw_catalogue(items: int, levels: int, codes: int, rng: np.random.Generator) -> np.ndarray:
    """[items, levels + 1] distinct sequences, level j drawing from its own `codes` tokens; END closes each."""
    numbers = np.unique(rng.integers(codes**levels, size=items + items // 8 + 16))
    while len(numbers) < items:
        numbers = np.unique(np.concatenate((numbers, rng.integers(codes**levels, size=items))))
    numbers = rng.permutation(numbers)[:items]
    matrix = np.full((items, levels + 1), END, dtype=np.int64)
    for level in range(levels):
        matrix[:, level] = 1 + level * codes + numbers // codes ** (levels - 1 - level) % codes
    return matrix


def check_walks(trie: SidTrie, matrix: np.ndarray, rng: np.random.Generator) -> None:
    """Compare walks along 200 sequences and 200 that are none, and the children of prefixes, with the input.

    Raises:
        InputError: they differ.
    """
    rows = matrix[rng.integers(len(matrix), size=200)]
    strange = rows.copy()
    strange[:, -2] = rng.permutation(strange[:, -2])
    first = np.isin(matrix[:, 0], rows[:3, 0])
    children = defaultdict(set)
    for row in matrix[first].tolist():
        for level, token in enumerate(row):
            children[tuple(row[:level])].add(token)
    for row in rows[:3].tolist():
        node = torch.zeros(1, dtype=torch.long)
        for level, token in enumerate(row):
            child, legal = trie.children(node, trie.fanout[level])
            if level and set(trie.tokens(child[legal], level + 1).tolist()) != children[tuple(row[:level])]:
                raise InputError(f"the children of {row[:level]} are not those of the catalogue: no figure is reported")
            node = trie.advance(node, torch.tensor([token]), level)
    legal = set(map(bytes, np.ascontiguousarray(matrix)))
    for row in np.concatenate((rows, strange)):
        node = torch.zeros(1, dtype=torch.long)
        for level, token in enumerate(row.tolist()):
            node = trie.advance(node, torch.tensor([token]), level)
        if (node.item() >= 0) != (bytes(np.ascontiguousarray(row)) in legal):
            raise InputError(f"the trie and the catalogue disagree on {row.tolist()}: no figure is reported")


def time_steps(trie: SidTrie, users: int, num_beams: int, repeats: int, sub_tries: SubTries | None) -> list[float]:
    """Median microseconds of every step of a search whose beams choose by random logits."""
    seconds = defaultdict(list)
    for repeat in range(repeats + 1):  # the first warms up
        generator = torch.Generator().manual_seed(repeat)
        nodes, score = torch.zeros(users, 1, dtype=torch.long), torch.zeros(users, 1)
        for step in range(trie.depth):
            logits = torch.randn(users, nodes.shape[1], trie.max_token + 1, generator=generator)
            start = time.perf_counter()
            child, legal = trie.children(nodes, trie.fanout[step])
            if sub_tries:
                legal &= sub_tries.alive(child, step + 1)
            gain = logits.gather(-1, trie.tokens(child, step + 1))
            total = (score.unsqueeze(-1) + gain).masked_fill(~legal, float("-inf")).flatten(1)
            score, index = stable_topk(total, min(2 * num_beams, total.shape[1]))
            score, nodes = score[:, :num_beams], child.flatten(1).gather(1, index)[:, :num_beams]
            if repeat:
                seconds[step].append(time.perf_counter() - start)
    return [round(statistics.median(values) * 1e6, 1) for values in seconds.values()]


def measure_size(items: int, flags: TrieBenchFlags) -> dict[str, Any]:
    """Build, save, load and extend a trie of so many items, and time a search's steps in it."""
    rng = np.random.default_rng(flags.seed)
    matrix = draw_catalogue(items, flags.levels, flags.codes, rng)
    start = time.perf_counter()
    trie = SidTrie(matrix)
    built = time.perf_counter() - start
    check_walks(trie, matrix, rng)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "items.trie"
        start = time.perf_counter()
        trie.save(path)
        saved = time.perf_counter()
        if not torch.equal(SidTrie.load(path).code, trie.code):
            raise InputError("the trie read back is another one: no figure is reported")
        loaded = time.perf_counter()
    new = draw_catalogue(min(1000, items), flags.levels, flags.codes, rng).tolist()
    added = time.perf_counter()
    if trie.add(new).row_sequence.shape[0] != items + len(new):
        raise InputError("items were lost when 1,000 were added: no figure is reported")
    added = time.perf_counter() - added
    seen = [rng.integers(trie.num_sequences, size=10).tolist() for _ in range(flags.users)]
    searches = (flags.users, flags.num_beams, flags.repeats)
    return {
        "items": items,
        "build_s": round(built, 3),
        "bytes_per_item": round(trie.num_bytes / items, 1),
        "save_s": round(saved - start, 3),
        "load_s": round(loaded - saved, 3),
        "add_1000_s": round(added, 3),
        "step_us": time_steps(trie, *searches, None),
        "step_us_without_10_seen": time_steps(trie, *searches, SubTries(trie, seen, None)),
    }


def bench(flags: TrieBenchFlags) -> None:
    """Build a trie of each size and time a search's steps in it.

    Raises:
        InputError: more items than codes can tell apart, or a trie that is wrong.
    """
    if flags.codes**flags.levels < 2 * max(flags.items):
        raise InputError(f"--items {max(flags.items)}: too many for {flags.codes} codes on {flags.levels} levels")
    say(f"{'items':>12}{'build s':>9}{'bytes/item':>12}{'save s':>8}{'load s':>8}{'add s':>8}  us a step")
    results = []
    for items in flags.items:
        result = measure_size(items, flags)
        results.append(result)
        say(
            f"{items:>12,}{result['build_s']:>9.2f}{result['bytes_per_item']:>12.1f}{result['save_s']:>8.2f}"
            f"{result['load_s']:>8.2f}{result['add_1000_s']:>8.2f}  {result['step_us']}"
        )
    totals = [sum(result["step_us"]) for result in results]
    ratio = round(totals[-1] / totals[0], 2)
    report = {
        "benchmark": "trie",
        "levels": flags.levels,
        "codes": flags.codes,
        "num_beams": flags.num_beams,
        "users": flags.users,
        "threads": torch.get_num_threads(),
        "peak_memory_mb": read_peak_memory_mb(),
        "sizes": results,
        "step_ratio": ratio,
        "ratio": ratio,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(bench, FLAGS)
