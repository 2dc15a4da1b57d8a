"""Points to centres under fixed cluster sizes at the least sum of squared distances, for millions of points.

This is a transport problem. Its dual has one price per centre: at the best prices every point simply takes the centre
of least distance^2 + price, as in a plain Lloyd round, and the sizes come out right but for a few ties. Prices are a
vector of K numbers, so a sample of the points gives them nearly; all points only refine them. What is left over moves
along cheapest chains of clusters, which keeps the assignment optimal for its prices.
"""

from __future__ import annotations

import torch

from rq.kmeans.costs import Costs, draw_sample, find_nearest, iterate_blocks, make_even_sizes
from rq.kmeans.repair import repair_sizes

SAMPLE = 65_536  # points, at least, that prices are first found on
SAMPLE_PER_CLUSTER = 64


def _measure_gap(x: torch.Tensor, costs: Costs, prices: torch.Tensor) -> float:
    """By how much a point's second centre costs more than its first, on average over some points."""
    two = costs(draw_sample(x, 4096), prices).topk(2, dim=1, largest=False).values
    return (two[:, 1] - two[:, 0]).double().mean().item()


def _compute_soft_sizes(
    x: torch.Tensor, costs: Costs, prices: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sizes [K], curvature [K, K]), float64, when every point is shared out by softmax(-(cost + price) / epsilon).

    curvature: minus the derivative of the sizes by the prices, a graph Laplacian that couples neighbouring clusters.
    """
    sizes = torch.zeros_like(prices)
    shared = prices.new_zeros(len(prices), len(prices))
    for rows in iterate_blocks(len(x), max(len(prices), x.shape[1])):
        share = costs(x[rows], prices)
        # Without this lower bound, shares and their products would be subnormal numbers, which are many times slower.
        share = share.sub_(share.amin(1, keepdim=True)).div_(-epsilon).clamp_min_(-25.0).exp_()
        share.div_(share.sum(1, keepdim=True))
        sizes += share.sum(0)
        shared += share.T @ share
    return sizes, (torch.diag(sizes) - shared) / epsilon


def _take_newton_step(curvature: torch.Tensor, surplus: torch.Tensor) -> torch.Tensor:
    """The change of prices [K] that takes away `surplus` [K] to first order, mean 0.

    A little of the diagonal is added: adding one number to all prices changes no assignment, and clusters without a
    point between them are not coupled.
    """
    ridge = 1e-3 * curvature.diagonal().mean().clamp_min(1e-30)
    change = torch.linalg.solve(curvature + ridge * torch.eye(len(surplus)).to(curvature), surplus)
    return change - change.mean()


def anneal_prices(x: torch.Tensor, costs: Costs, wanted: torch.Tensor, initial: torch.Tensor | None) -> torch.Tensor:
    """Prices [K] under which the sizes are nearly in proportion to `wanted` [K] (float64).

    Newton steps on the entropy-smoothed dual of the transport problem (Cuturi 2013; Kitagawa, Merigot and Thibert
    2019), whose smoothing epsilon is cooled to a tenth of the usual gap between a point's two best centres. From
    initial prices, those of a similar problem, it is heated only until they are not far off.

    Args:
        x: the points [n, d].
        costs: of the centres.
        wanted: sizes [K], float64, or numbers in proportion to them.
        initial: prices [K] to start from.
    """
    start = torch.zeros_like(wanted) if initial is None else initial
    if len(wanted) == 1:
        return start
    spread = costs(draw_sample(x, 1024), torch.zeros_like(wanted)).double().std(1).mean().item()
    # Points or centres that coincide leave nothing to tell apart.
    if not spread > 1e-6 * costs.bias.abs().max().item():
        return start
    coarse = draw_sample(x, max(4096, 16 * len(wanted)))
    hottest, last = spread / 3, max(0.1 * _measure_gap(x, costs, start), 1e-3 * spread)
    prices, heating = start, initial is not None
    epsilon = last if heating else max(hottest, last)
    # Sizes of whole points differ from the smoothed ones by chance anyway; in large clusters a few points may be off.
    each = len(x) / len(wanted)
    enough = min(0.4 / each**0.5, 6.4 / each)
    while True:
        # At the beginning of all, a part of the points says enough.
        part = x if epsilon <= 3 * last or initial is not None else coarse
        share = wanted * (len(part) / wanted.sum())
        reach, before = 4.0, float("inf")
        for _ in range(12):
            sizes, curvature = _compute_soft_sizes(part, costs, prices, epsilon)
            surplus = sizes - share
            off = surplus.abs().sum().item() / len(part)
            change = _take_newton_step(curvature, surplus)
            # Groups of points far from each other: their prices are a long way from right, in steps of a few epsilon.
            far = off > 0.3 or off > enough and change.abs().max().item() > 48 * epsilon
            heating = heating and far and epsilon < hottest
            if heating:
                break
            # A Newton step holds within a few epsilon; one that made it worse says that this was too far.
            reach = reach / 2 if off > before else reach
            prices = prices + change.clamp(-reach * epsilon, reach * epsilon)
            if off < (0.02 if epsilon > last else enough):
                break
            before = off
        if heating:
            epsilon *= 3
        elif epsilon <= last:
            return prices
        else:
            last = max(0.1 * _measure_gap(x, costs, prices), 1e-3 * spread)
            epsilon = max(epsilon / 3, last)


def _refine_prices(
    x: torch.Tensor, sample: torch.Tensor, costs: Costs, wanted: torch.Tensor, prices: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """(prices, sum over clusters of |size - wanted| per point): `prices` found on a sample, made right for all of x.

    Newton steps again, with the sizes counted on x and the curvature estimated on the sample, for as long as each takes
    a third off what is wrong.
    """
    best, least = prices, float("inf")
    while True:
        surplus = torch.bincount(find_nearest(x, costs, prices), minlength=len(prices)) - wanted
        off = surplus.abs().sum().item() / len(x)
        if off < least:
            best = prices
        epsilon = 0.2 * _measure_gap(sample, costs, prices)
        if off == 0 or off > 0.67 * least or not epsilon > 0:
            return best, min(off, least)
        least = off
        _, curvature = _compute_soft_sizes(sample, costs, prices, epsilon)
        change = _take_newton_step(curvature * (len(x) / len(sample)), surplus)
        prices = prices + change.clamp(-4 * epsilon, 4 * epsilon)


def choose_price_sample(x: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """x itself, or enough random rows of it, in their order, to find prices for `count` clusters."""
    most = max(SAMPLE, SAMPLE_PER_CLUSTER * count)
    if len(x) <= most:
        return x
    return x[torch.randperm(len(x), generator=generator)[:most].sort().values.to(x.device)]


def check_points(x: torch.Tensor, count: int) -> torch.Tensor:
    """x as float32 or float64.

    Raises:
        ValueError: x cannot be clustered into `count` clusters.
    """
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"points must be [n, d] with d >= 1, got {list(x.shape)}")
    if not 1 <= count <= len(x):
        raise ValueError(f"{count} clusters for {len(x)} points: expected 1 to {len(x)}")
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if not all(torch.isfinite(x[rows]).all() for rows in iterate_blocks(len(x), x.shape[1])):
        raise ValueError("a coordinate of the points is not finite")
    return x


def check_centres(centres: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """centres [K, d] with the type and device of x [n, d].

    Raises:
        ValueError: other shapes, or values that are not finite.
    """
    if centres.ndim != 2 or centres.shape[1] != x.shape[1]:
        raise ValueError(f"centres must be [K, {x.shape[1]}], got {list(centres.shape)}")
    centres = centres.to(x)
    if not torch.isfinite(centres).all():
        raise ValueError("a coordinate of the centres is not finite")
    return centres


def assign_points(
    x: torch.Tensor, sample: torch.Tensor, costs: Costs, wanted: torch.Tensor | None, initial: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`balanced_assign` of checked points.

    Args:
        x: the points [n, d].
        sample: rows [m, d] of x that prices are first found on.
        costs: of the centres.
        wanted: sizes [K] of 1 or more, float64; None for even ones.
        initial: prices [K] to start from, float64.
    """
    count = len(costs.bias)
    goal = torch.full((count,), len(x) / count, dtype=torch.float64, device=x.device) if wanted is None else wanted
    if sample is x:
        prices = anneal_prices(x, costs, goal, initial)
    else:
        prices = anneal_prices(sample, costs, goal, None) if initial is None else initial
        prices, off = _refine_prices(x, sample, costs, goal, prices)
        # A few points per cluster are quicker to move one by one.
        if off * len(x) > 8 * count:
            prices, _ = _refine_prices(x, sample, costs, goal, anneal_prices(x, costs, goal, prices))
    labels = find_nearest(x, costs, prices)
    sizes = make_even_sizes(len(x), prices) if wanted is None else wanted.long()
    extra = sizes > len(x) // count if wanted is None else torch.zeros(count, dtype=torch.bool)
    labels, final = repair_sizes(x, costs, labels, *(part.cpu().numpy() for part in (prices, sizes, extra)))
    return labels, torch.as_tensor(final - final.mean(), device=x.device)


@torch.no_grad()
def balanced_assign(
    x: torch.Tensor, centres: torch.Tensor, sizes: torch.Tensor | None = None, prices: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assign points to centres under fixed sizes, at the least sum of squared distances (up to rounding).

    Args:
        x: the points [n, d].
        centres: [K, d].
        sizes: [K], whole numbers that sum to n; without it every cluster has n // K or n // K + 1 points, and the
            larger ones are where that is cheapest.
        prices: [K], those of a similar problem, as a start.

    Returns:
        The labels [n] (int64) and prices [K] (dtype of x): every point's centre is that of least squared distance +
        price, ties aside. A centre of size 0 has an infinite price.

    Raises:
        ValueError: K < 1, K > n, shapes that do not fit, values that are not finite, or wrong sizes.
    """
    x = check_points(x, len(centres))
    centres = check_centres(centres, x)
    for name, vector in (("sizes", sizes), ("prices", prices)):
        if vector is not None and vector.shape != (len(centres),):
            raise ValueError(f"{name} must be [{len(centres)}], one per centre, got {list(vector.shape)}")
    used = torch.arange(len(centres), device=x.device)
    if sizes is not None:
        sizes = sizes.to(x.device, torch.float64)
        if (sizes < 0).any() or (sizes != sizes.round()).any() or sizes.sum() != len(x):
            raise ValueError(f"sizes must be whole numbers >= 0 that sum to {len(x)}, the number of points")
        used = sizes.nonzero()[:, 0]
        sizes = sizes[used]
    if prices is not None:
        # A price that is not finite belongs to a centre that had size 0.
        prices = prices.to(x.device, torch.float64)[used].nan_to_num(0.0, 0.0, 0.0)
    sample = choose_price_sample(x, len(used), torch.Generator().manual_seed(0))
    labels, final = assign_points(x, sample, Costs(centres[used], centres.mean(0)), sizes, prices)
    full = x.new_full((len(centres),), float("inf"))
    full[used] = final.to(x.dtype)
    return used[labels], full
