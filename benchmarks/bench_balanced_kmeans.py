"""Balanced k-means: this project's against min-cost flow (k-means-constrained), and alone on many points.

Both get the same points and the same start centres in this process. The sizes are checked before anything is
reported, and both inertias are measured in the same way, about the means of the clusters. k-means-constrained
lets its flow minimise the sum of distances, not of their squares, so an inertia below its own is no surprise.

The last line is JSON with `compared`, one entry per kind and size, with `speed` = flow seconds / ours, `inertia` =
ours / flow (medians), and `share_of_bound`: the seconds that the matrix products of ours would take at the fastest
speed of a product in this process, over the CPU seconds of a thread that it took; `large`, for the large sizes, with
the seconds, the peak memory of the process before and after, and `growth`, the power of n by which the time rises from
one size to the next; and `ratio`, the median of the speeds. On cores that other work shares, one thread is faster than
several that wait for each other.

    python -m benchmarks.bench_balanced_kmeans --sizes 4000,16000 --large_sizes 100000,300000,1000000
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag, parse_flags, run_command


@dataclass
class BalancedKMeansBenchFlags:
    """Benchmark."""

    sizes: list[int] = flag([4_000, 16_000], "points to compare both ways on")
    large_sizes: list[int] = flag(
        [100_000, 300_000, 1_000_000],
        "points for this project's alone; run first and in rising order, since peak memory only rises",
    )
    kinds: list[str] = flag(["mixture", "uniform"], "of points", choices=("mixture", "uniform", "apart"))
    clusters: int = flag(256, "clusters")
    dim: int = flag(64, "coordinates of a point")
    repeats: int = flag(3, "problems per kind and size that both ways solve")
    seed: int = flag(0, "seed of the points")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(BalancedKMeansBenchFlags)

import json
import math
import statistics
import time
from typing import Any

import torch
from k_means_constrained import KMeansConstrained
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.arithmetic import measure_peak_gflops
from benchmarks.memory import read_peak_memory_mb
from minionerec.common.files import InputError
from minionerec.common.processes import is_main_process, say
from rq.kmeans.balanced import balanced_kmeans, compute_means


def draw_mixture(n: int, dim: int, generator: torch.Generator, apart: float) -> torch.Tensor:
    """Points [n, dim] of Gaussians of different weights (the largest about 100 times the smallest) and widths.

    Args:
        n, dim: points, and coordinates of a point.
        generator: of all draws.
        apart: standard deviation of the centres.
    """
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
    "mixture": lambda n, dim, generator: draw_mixture(n, dim, generator, 0.5),
    # Groups with empty space between them: balance then has to carry points across it.
    "apart": lambda n, dim, generator: draw_mixture(n, dim, generator, 1.5),
    "uniform": lambda n, dim, generator: torch.rand(n, dim, generator=generator),
}


def compute_inertia(x: torch.Tensor, labels: torch.Tensor, clusters: int) -> float:
    """Sum of squared distances to the means of the clusters."""
    centres, _ = compute_means(x, labels, clusters, x.mean(0))
    parts = zip(x.split(100_000), labels.split(100_000), strict=True)
    return sum((rows - centres[cluster]).double().square().sum().item() for rows, cluster in parts)


def cluster_with_prices(x: torch.Tensor, start: torch.Tensor, seed: int) -> torch.Tensor:
    """Labels [n] by this project's balanced k-means."""
    return balanced_kmeans(x, len(start), seed=seed, start=start)[1]


def cluster_with_flow(x: torch.Tensor, start: torch.Tensor, seed: int) -> torch.Tensor:
    """Labels [n] by k-means-constrained."""
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


def check_sizes(labels: torch.Tensor, clusters: int, name: str) -> list[int]:
    """[least, most] members.

    Raises:
        InputError: they are not n / K rounded down and up; no figure is worth reporting then.
    """
    sizes = torch.bincount(labels, minlength=clusters)
    low, high = int(sizes.min()), int(sizes.max())
    if low < len(labels) // clusters or high > -(-len(labels) // clusters):
        raise InputError(f"{name}: cluster sizes {low} to {high} of {len(labels)} points: no figure is reported")
    return [low, high]


def make_problem(kind: str, n: int, seed: int, flags: BalancedKMeansBenchFlags) -> tuple[torch.Tensor, torch.Tensor]:
    """(points [n, dim], start centres [clusters, dim])."""
    generator = torch.Generator().manual_seed(seed)
    x = KINDS[kind](n, flags.dim, generator)
    return x, x[torch.randperm(n, generator=generator)[: flags.clusters]]


def measure_large(kind: str, n: int, flags: BalancedKMeansBenchFlags, earlier: list[dict]) -> dict[str, Any]:
    """Seconds and memory of this project's k-means on n points; `earlier` holds the figures of the smaller sizes."""
    x, start = make_problem(kind, n, flags.seed, flags)
    memory = read_peak_memory_mb()
    begin = time.perf_counter()
    labels = cluster_with_prices(x, start, flags.seed)
    seconds = time.perf_counter() - begin
    before = next((row for row in reversed(earlier) if row["kind"] == kind), None)
    return {
        "kind": kind,
        "n": n,
        "sizes": check_sizes(labels, flags.clusters, f"ours on {kind}"),
        "seconds": round(seconds, 1),
        "data_mb": round(x.numel() * x.element_size() / 2**20),
        "memory_before_mb": memory,
        "peak_memory_mb": read_peak_memory_mb(),
        "growth": before and round(math.log(seconds / before["seconds"]) / math.log(n / before["n"]), 2),
    }


def count_flops_of_prices(x: torch.Tensor, start: torch.Tensor, seed: int) -> int:
    """Operations of the matrix products of `cluster_with_prices`, counted in a run of its own."""
    with FlopCounterMode(display=False) as counter:
        cluster_with_prices(x, start, seed)
    return counter.get_total_flops()


def compare_balanced(kind: str, n: int, flags: BalancedKMeansBenchFlags, peak_flops: float) -> dict[str, Any]:
    """Seconds and inertia of both ways on the same problems of n points.

    Args:
        kind, n: of the points.
        flags: of the command.
        peak_flops: operations a second of the fastest matrix product here.
    """
    ways = {"ours": cluster_with_prices, "flow": cluster_with_flow}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    shares = []
    inertia_ratios, sizes = [], []
    for repeat in tqdm(range(flags.repeats), desc=f"{kind} {n}", disable=not is_main_process()):
        x, start = make_problem(kind, n, flags.seed + repeat, flags)
        inertias = {}
        for name, cluster in ways.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            labels = cluster(x, start, flags.seed)
            seconds[name].append(time.perf_counter() - begin)
            cpu_seconds = (time.process_time() - begin_cpu) / torch.get_num_threads()
            if name == "ours":
                shares.append(count_flops_of_prices(x, start, flags.seed) / peak_flops / cpu_seconds)
            sizes += check_sizes(labels, flags.clusters, f"{name} on {kind}")
            inertias[name] = compute_inertia(x, labels, flags.clusters)
        inertia_ratios.append(inertias["ours"] / inertias["flow"])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "kind": kind,
        "n": n,
        "sizes": [min(sizes), max(sizes)],
        "inertia": round(statistics.median(inertia_ratios), 5),
        "worst_inertia": round(max(inertia_ratios), 5),
        "ours_s": round(medians["ours"], 3),
        "flow_s": round(medians["flow"], 3),
        "share_of_bound": float(f"{statistics.median(shares):.3g}"),
        "speed": round(medians["flow"] / medians["ours"], 1),
    }


def bench(flags: BalancedKMeansBenchFlags) -> None:
    """Run ours on the large sizes once, then both ways on the other sizes, `repeats` times each with new points.

    Raises:
        InputError: a flag out of range, or wrong cluster sizes.
    """
    if (
        flags.repeats < 1
        or flags.clusters < 1
        or min([*flags.sizes, *flags.large_sizes], default=flags.clusters) < flags.clusters
    ):
        raise InputError("--repeats must be at least 1, and every size at least --clusters")
    cluster_with_prices(*make_problem("uniform", 2 * flags.clusters, flags.seed, flags), flags.seed)  # warm up
    large: list[dict[str, Any]] = []
    for n in sorted(flags.large_sizes):
        for kind in flags.kinds:
            large.append(measure_large(kind, n, flags, large))
            say(json.dumps(large[-1]))
    peak_flops = measure_peak_gflops() * 1e9
    compared = []
    for n in flags.sizes:
        for kind in flags.kinds:
            compared.append(compare_balanced(kind, n, flags, peak_flops))
            say(json.dumps(compared[-1]))
    report = {
        "benchmark": "balanced_kmeans",
        "clusters": flags.clusters,
        "dim": flags.dim,
        "threads": torch.get_num_threads(),
        "repeats": flags.repeats,
        "peak_gflops": round(peak_flops / 1e9, 1),
        "ratio": statistics.median(row["speed"] for row in compared) if compared else None,
        "compared": compared,
        "large": large,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    run_command(bench, FLAGS)
