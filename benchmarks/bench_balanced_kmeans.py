"""Balanced k-means: this project's against min-cost flow (k-means-constrained), and alone on many points.

Both get the same points and the same start centres in this process. The sizes are checked before anything is
reported, and both inertias are measured in the same way, about the means of the found clusters. k-means-constrained
lets its flow minimise the sum of distances, not of their squares, so an inertia below its own is no surprise.

The last line is JSON with `speed` = flow seconds / ours and `inertia` = ours / flow (medians), and for the large sizes
the seconds, the peak memory of the process before and after, and `growth`: the power of n by which the time rises from
one size to the next. On cores that other work shares, one thread is faster than several that wait for each other.

    python -m benchmarks.bench_balanced_kmeans --sizes 4000,16000 --large_sizes 100000,300000,1000000
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import time

import torch
from k_means_constrained import KMeansConstrained
from tqdm import tqdm

from minionerec.common.cli import run
from minionerec.common.files import InputError
from minionerec.common.processes import is_main_process, say
from rq.kmeans.balanced import balanced_kmeans, cluster_means


def mixture(n: int, dim: int, generator: torch.Generator, apart: float) -> torch.Tensor:
    """Gaussians of different weights (the largest about 100 times the smallest) and widths, centres `apart` from 0."""
    count = 64
    weights = 10 ** (2 * torch.rand(count, generator=generator))
    centres = apart * torch.randn(count, dim, generator=generator)
    widths = 0.5 + torch.rand(count, 1, generator=generator)
    x = torch.randn(n, dim, generator=generator)
    # In parts, so that making the points does not set the peak memory.
    for rows in x.split(10_000):
        group = torch.multinomial(weights, len(rows), replacement=True, generator=generator)
        rows.mul_(widths[group]).add_(centres[group])
    return x


KINDS = {
    "mixture": lambda n, dim, generator: mixture(n, dim, generator, 0.5),
    # Groups with empty space between them: balance then has to carry points across it.
    "apart": lambda n, dim, generator: mixture(n, dim, generator, 1.5),
    "uniform": lambda n, dim, generator: torch.rand(n, dim, generator=generator),
}


def inertia(x: torch.Tensor, labels: torch.Tensor, clusters: int) -> float:
    """Sum of squared distances to the means of the clusters."""
    centres, _ = cluster_means(x, labels, clusters, x.mean(0))
    parts = zip(x.split(100_000), labels.split(100_000))
    return sum((rows - centres[owner]).double().square().sum().item() for rows, owner in parts)


def peak_memory_mb() -> int:
    """Largest resident memory of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def ours(x: torch.Tensor, start: torch.Tensor, seed: int) -> torch.Tensor:
    return balanced_kmeans(x, len(start), seed=seed, start=start)[1]


def flow(x: torch.Tensor, start: torch.Tensor, seed: int) -> torch.Tensor:
    n, clusters = len(x), len(start)
    model = KMeansConstrained(
        clusters,
        size_min=n // clusters,
        size_max=-(-n // clusters),
        init=start.double().numpy(),
        n_init=1,
        random_state=seed,
    )
    return torch.from_numpy(model.fit(x.double().numpy()).labels_).long()


def checked_sizes(labels: torch.Tensor, clusters: int, name: str) -> list[int]:
    """[least, most] members; no figure is worth reporting unless both are n / K rounded."""
    sizes = torch.bincount(labels, minlength=clusters)
    low, high = int(sizes.min()), int(sizes.max())
    if low < len(labels) // clusters or high > -(-len(labels) // clusters):
        raise InputError(f"{name}: cluster sizes {low} to {high} of {len(labels)} points: no figure is reported")
    return [low, high]


def bench(
    sizes: list[int] | None = None,
    large_sizes: list[int] | None = None,
    kinds: list[str] | None = None,
    clusters: int = 256,
    dim: int = 64,
    repeats: int = 3,
    seed: int = 0,
) -> None:
    """Run ours on the large sizes once, then both ways on the other sizes, `repeats` times each with new points.

    Args:
        sizes: points to compare on, default 4000,16000.
        large_sizes: points for ours alone, default 100000,300000,1000000; run first and in rising order, since peak
            memory only rises.
        kinds: of mixture, uniform (the default) and apart.
        clusters, dim: clusters, and coordinates of a point.
    """
    sizes = [4_000, 16_000] if sizes is None else sizes
    large_sizes = [100_000, 300_000, 1_000_000] if large_sizes is None else sorted(large_sizes)
    kinds = ["mixture", "uniform"] if kinds is None else kinds
    if not set(kinds) <= set(KINDS):
        raise InputError(f"--kinds {','.join(kinds)}: expected some of {', '.join(KINDS)}")
    if repeats < 1 or clusters < 1 or min([*sizes, *large_sizes], default=clusters) < clusters:
        raise InputError("--repeats must be at least 1, and every size at least --clusters")

    def problem(kind: str, n: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        x = KINDS[kind](n, dim, generator)
        return x, x[torch.randperm(n, generator=generator)[:clusters]]

    ours(*problem("uniform", 2 * clusters, seed), seed)  # warm up
    large = []
    for n in large_sizes:
        for kind in kinds:
            x, start = problem(kind, n, seed)
            memory = peak_memory_mb()
            begin = time.perf_counter()
            labels = ours(x, start, seed)
            seconds = time.perf_counter() - begin
            before = next((row for row in reversed(large) if row["kind"] == kind), None)
            large.append(
                {
                    "kind": kind,
                    "n": n,
                    "sizes": checked_sizes(labels, clusters, f"ours on {kind}"),
                    "seconds": round(seconds, 1),
                    "data_mb": round(x.numel() * x.element_size() / 2**20),
                    "memory_before_mb": memory,
                    "peak_memory_mb": peak_memory_mb(),
                    "growth": before and round(math.log(seconds / before["seconds"]) / math.log(n / before["n"]), 2),
                }
            )
            say(json.dumps(large[-1]))
    compared = []
    for n in sizes:
        for kind in kinds:
            seconds: dict[str, list[float]] = {"ours": [], "flow": []}
            ratios, found = [], []
            for repeat in tqdm(range(repeats), desc=f"{kind} {n}", disable=not is_main_process()):
                x, start = problem(kind, n, seed + repeat)
                scores = {}
                for name, way in (("ours", ours), ("flow", flow)):
                    begin = time.perf_counter()
                    labels = way(x, start, seed)
                    seconds[name].append(time.perf_counter() - begin)
                    found += checked_sizes(labels, clusters, f"{name} on {kind}")
                    scores[name] = inertia(x, labels, clusters)
                ratios.append(scores["ours"] / scores["flow"])
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            compared.append(
                {
                    "kind": kind,
                    "n": n,
                    "sizes": [min(found), max(found)],
                    "inertia": round(statistics.median(ratios), 5),
                    "worst_inertia": round(max(ratios), 5),
                    "ours_s": round(medians["ours"], 3),
                    "flow_s": round(medians["flow"], 3),
                    "speed": round(medians["flow"] / medians["ours"], 1),
                }
            )
            say(json.dumps(compared[-1]))
    print(
        json.dumps(
            {
                "benchmark": "balanced_kmeans",
                "clusters": clusters,
                "dim": dim,
                "threads": torch.get_num_threads(),
                "repeats": repeats,
                "compared": compared,
                "large": large,
            }
        )
    )


if __name__ == "__main__":
    run(bench)
