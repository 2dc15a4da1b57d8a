"""k-means whose clusters all have n // K or n // K + 1 points, for millions of points.

Lloyd's rounds with the assignment of `rq.kmeans.assignment`: first on a sample with nearly cheapest assignments,
then with exact ones, then on all points. Prices carry over from round to round, which is what makes a round cheap.
"""

from __future__ import annotations

import torch

from minionerec.common.progress import ProgressBar
from rq.kmeans.assignment import (
    anneal_prices,
    assign_points,
    check_centres,
    check_points,
    choose_price_sample,
)
from rq.kmeans.costs import Costs, find_nearest, iterate_blocks, make_even_sizes


def _draw_centres(x: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): `count` rows of x, drawn by squared distance to those drawn before."""
    draws = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    far = torch.full((len(x),), float("inf"), dtype=torch.float64, device=x.device)
    mass = torch.ones_like(far)
    chosen: list[int] = []
    for draw in draws:
        heap = mass.cumsum(0)
        chosen.append(int(torch.searchsorted(heap, heap[-1] * draw, right=True).clamp(max=len(x) - 1)))
        torch.minimum(far, (x - x[chosen[-1]]).square().sum(1).double(), out=far)
        # Once every point lies on a centre, any will do.
        mass = far if far.max() > 0 else torch.ones_like(far)
    return x[chosen]


def _rank_in_group(group: torch.Tensor) -> torch.Tensor:
    """How many earlier entries have the same number, for every entry of `group` [m]."""
    order = group.argsort(stable=True)
    ordered = group[order]
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - torch.searchsorted(ordered, ordered)
    return rank


def _level_sizes(
    x: torch.Tensor, costs: Costs, labels: torch.Tensor, prices: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """`labels` [n] with the sizes `wanted` [K], by least regret: fast, but not of least cost.

    Members of too large clusters bid for the nearest of the too small ones; those who lose least by it go.
    """
    labels = labels.clone()
    while True:
        surplus = torch.bincount(labels, minlength=len(wanted)) - wanted
        if not (surplus > 0).any():
            return labels
        small = (surplus < 0).nonzero()[:, 0]
        rows = (surplus[labels] > 0).nonzero()[:, 0]
        loss, target = torch.empty(len(rows), dtype=x.dtype, device=x.device), torch.empty_like(rows)
        for part in iterate_blocks(len(rows), len(wanted)):
            table = costs(x[rows[part]], prices)
            least, target[part] = table[:, small].min(1)
            loss[part] = least - table.gather(1, labels[rows[part], None])[:, 0]
        order = loss.argsort(stable=True)
        rows, target = rows[order], small[target[order]]
        leaves = _rank_in_group(labels[rows]) < surplus[labels[rows]]
        rows, target = rows[leaves], target[leaves]
        enters = _rank_in_group(target) < -surplus[target]
        labels[rows[enters]] = target[enters]


def _measure_spread(x: torch.Tensor, origin: torch.Tensor) -> float:
    """Sum of the squared distances of x [n, d] to `origin` [d]."""
    return sum((x[rows] - origin).double().square().sum().item() for rows in iterate_blocks(len(x), x.shape[1]))


def compute_means(
    x: torch.Tensor, labels: torch.Tensor, count: int, origin: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """(mean of every cluster [count, d]; sum over points of |mean - origin|^2, by which they lie nearer to it)."""
    sums = torch.zeros(count, x.shape[1], dtype=torch.float64, device=x.device)
    for rows in iterate_blocks(len(x), x.shape[1]):
        sums.index_add_(0, labels[rows], (x[rows] - origin).double())
    sizes = torch.bincount(labels, minlength=count)[:, None]
    means = sums / sizes
    return (means + origin).to(x.dtype), (sizes * means.square()).sum().item()


def _run_rough_rounds(
    x: torch.Tensor, centres: torch.Tensor, origin: torch.Tensor, iterations: int, tolerance: float, bar: ProgressBar
) -> tuple[torch.Tensor, torch.Tensor]:
    """(centres, prices) after Lloyd rounds over x whose assignments have the right sizes, but not quite the least cost.

    The sizes have to be right: centres that follow clusters of wrong sizes drive the prices up and down without end.
    """
    wanted = torch.full((len(centres),), len(x) / len(centres), dtype=torch.float64, device=x.device)
    spread, before, prices = _measure_spread(x, origin), float("inf"), None
    for _ in range(iterations):
        costs = Costs(centres, origin)
        prices = anneal_prices(x, costs, wanted, prices)
        labels = _level_sizes(x, costs, find_nearest(x, costs, prices), prices, make_even_sizes(len(x), prices))
        centres, gain = compute_means(x, labels, len(centres), origin)
        inertia = spread - gain
        bar.update()
        bar.set_postfix(points=len(x), inertia=f"{inertia:.6g}")
        if before - inertia <= tolerance * inertia:
            break
        before = inertia
    return centres, prices


@torch.no_grad()
def balanced_kmeans(
    x: torch.Tensor,
    n_clusters: int,
    iterations: int = 100,
    seed: int = 0,
    start: torch.Tensor | None = None,
    tolerance: float = 1e-4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means with n // K or n // K + 1 points in every cluster.

    The same seed gives the same result on a CPU. Memory: x, and a few numbers per point.

    Args:
        x: the points [n, d].
        n_clusters: K.
        iterations: Lloyd rounds at most in each of the stages: rough and exact ones on a sample, exact ones on all
            points.
        seed: of the sample and of the first centres.
        start: the first centres [K, d]; k-means++ on the sample without it.
        tolerance: a stage ends when its inertia falls by no more than this share of itself.

    Returns:
        The centres [K, d], which are the means of their clusters, in x's type (float32 for half types), and the labels
        [n] (int64), of least inertia for the centres of the round before.

    Raises:
        ValueError: K < 1, K > n, iterations < 1, shapes that do not fit, or values that are not finite.
    """
    x = check_points(x, n_clusters)
    if iterations < 1:
        raise ValueError(f"iterations {iterations}: expected 1 or more")
    generator = torch.Generator().manual_seed(seed)
    sample = choose_price_sample(x, n_clusters, generator)
    if start is None:
        centres = _draw_centres(sample, n_clusters, generator)
    elif len(start) != n_clusters:
        raise ValueError(f"start must be [{n_clusters}, {x.shape[1]}], got {list(start.shape)}")
    else:
        centres = check_centres(start, x)
    origin = sample.double().mean(0).to(x.dtype)
    bar = ProgressBar(desc="balanced k-means", unit=" rounds")
    centres, prices = _run_rough_rounds(sample, centres, origin, iterations, tolerance, bar)
    for points in (x,) if sample is x else (sample, x):
        spread, best, labels = _measure_spread(points, origin), float("inf"), None
        for _ in range(iterations):
            assigned, prices = assign_points(points, sample, Costs(centres, origin), None, prices)
            means, gain = compute_means(points, assigned, n_clusters, origin)
            inertia, before = max(0.0, spread - gain), best
            bar.update()
            bar.set_postfix(points=len(points), inertia=f"{inertia:.6g}")
            if inertia < best or labels is None:
                best, centres, labels = inertia, means, assigned
            if before - inertia <= tolerance * inertia:
                break
    bar.close()
    return centres, labels
