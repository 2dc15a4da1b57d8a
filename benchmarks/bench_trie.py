"""The trie at catalogue scale: build time, memory, and the cost of a search step, for catalogues of growing size.

A step is what a beam search asks of the trie and of its candidates, the model left out: the children of every beam, their
logits, the best 2 B of them, and the best B of those. Before anything is reported, the sequences of a sample of walks are
looked up in the input, and a step's candidates are compared with a Python dictionary of prefixes. The last line is JSON.

    python -m benchmarks.bench_trie --items 10000,1000000,10000000
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from minionerec.common.cli import run
from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.search.beam_search import stable_topk
from minionerec.search.trie import SidTrie, SubTries

END = 0


def random_catalogue(items: int, levels: int, codes: int, rng: np.random.Generator) -> np.ndarray:
    """[items, levels + 1] distinct sequences, level j drawing from its own `codes` tokens; END closes each."""
    numbers = np.unique(rng.integers(codes**levels, size=items + items // 8 + 16))
    while len(numbers) < items:
        numbers = np.unique(np.concatenate((numbers, rng.integers(codes**levels, size=items))))
    numbers = rng.permutation(numbers)[:items]
    matrix = np.full((items, levels + 1), END, dtype=np.int64)
    for level in range(levels):
        matrix[:, level] = 1 + level * codes + numbers // codes ** (levels - 1 - level) % codes
    return matrix


def check(trie: SidTrie, matrix: np.ndarray, rng: np.random.Generator) -> None:
    """Walks along 200 sequences and 200 that are none, and the children of prefixes, against the input."""
    rows = matrix[rng.integers(len(matrix), size=200)]
    strange = rows.copy()
    strange[:, -2] = rng.permutation(strange[:, -2])
    first = np.isin(matrix[:, 0], rows[:3, 0])
    known = defaultdict(set)
    for row in matrix[first].tolist():
        for place, token in enumerate(row):
            known[tuple(row[:place])].add(token)
    for row in rows[:3].tolist():
        node = torch.zeros(1, dtype=torch.long)
        for level, token in enumerate(row):
            child, legal = trie.children(node, trie.fanout[level])
            if level and set(trie.tokens(child[legal], level + 1).tolist()) != known[tuple(row[:level])]:
                raise InputError(f"the children of {row[:level]} are not those of the catalogue: no figure is reported")
            node = trie.advance(node, torch.tensor([token]), level)
    legal = set(map(bytes, np.ascontiguousarray(matrix)))
    for row in np.concatenate((rows, strange)):
        node = torch.zeros(1, dtype=torch.long)
        for level, token in enumerate(row.tolist()):
            node = trie.advance(node, torch.tensor([token]), level)
        if (node.item() >= 0) != (bytes(np.ascontiguousarray(row)) in legal):
            raise InputError(f"the trie and the catalogue disagree on {row.tolist()}: no figure is reported")


def step_times(trie: SidTrie, users: int, num_beams: int, repeats: int, sub_tries: SubTries | None) -> list[float]:
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


def bench(
    items: list[int] | None = None,
    levels: int = 4,
    codes: int = 256,
    num_beams: int = 50,
    users: int = 32,
    repeats: int = 9,
    seed: int = 0,
) -> None:
    """Build a trie of each size and time a search's steps in it.

    Args:
        items: catalogue sizes (10000,1000000,10000000). levels, codes: tokens per SID and codes per level.
        num_beams, users: of a step. repeats: timed searches, of which medians are taken.
    """
    sizes = items or [10_000, 1_000_000, 10_000_000]
    if codes**levels < 2 * max(sizes):
        raise InputError(f"--items {max(sizes)}: {codes} codes on {levels} levels have no room for it")
    say(f"{'items':>12}{'build s':>9}{'bytes/item':>12}{'save s':>8}{'load s':>8}{'add s':>8}  us a step")
    results = []
    for size in sizes:
        rng = np.random.default_rng(seed)
        matrix = random_catalogue(size, levels, codes, rng)
        start = time.perf_counter()
        trie = SidTrie(matrix)
        built = time.perf_counter() - start
        check(trie, matrix, rng)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "items.trie"
            start = time.perf_counter()
            trie.save(path)
            saved = time.perf_counter()
            if not torch.equal(SidTrie.load(path).code, trie.code):
                raise InputError("the trie read back is another one: no figure is reported")
            loaded = time.perf_counter()
        new = random_catalogue(min(1000, size), levels, codes, rng).tolist()
        added = time.perf_counter()
        if trie.add(new).row_sequence.shape[0] != size + len(new):
            raise InputError("items were lost when 1,000 were added: no figure is reported")
        added = time.perf_counter() - added
        seen = [rng.integers(trie.num_sequences, size=10).tolist() for _ in range(users)]
        result = {
            "items": size,
            "build_s": round(built, 3),
            "bytes_per_item": round(trie.num_bytes / size, 1),
            "save_s": round(saved - start, 3),
            "load_s": round(loaded - saved, 3),
            "add_1000_s": round(added, 3),
            "step_us": step_times(trie, users, num_beams, repeats, None),
            "step_us_without_10_seen": step_times(trie, users, num_beams, repeats, SubTries(trie, seen, None)),
        }
        results.append(result)
        say(
            f"{size:>12,}{result['build_s']:>9.2f}{result['bytes_per_item']:>12.1f}{result['save_s']:>8.2f}"
            f"{result['load_s']:>8.2f}{result['add_1000_s']:>8.2f}  {result['step_us']}"
        )
    totals = [sum(result["step_us"]) for result in results]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        json.dumps(
            {
                "benchmark": "trie",
                "levels": levels,
                "codes": codes,
                "num_beams": num_beams,
                "users": users,
                "threads": torch.get_num_threads(),
                "peak_memory_mb": round(peak),
                "sizes": results,
                "step_ratio": round(totals[-1] / totals[0], 2),
            }
        )
    )


if __name__ == "__main__":
    run(bench)
