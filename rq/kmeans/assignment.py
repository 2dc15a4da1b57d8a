"""Points to centres under fixed cluster sizes at the least sum of squared distances, for millions of points.

This is a transport problem. Its dual has one price per centre: at the best prices every point simply takes the centre
of least distance^2 + price, as in a plain Lloyd round, and the sizes come out right but for a few ties. Prices are a
vector of K numbers, so a sample of the points gives them nearly; all points only refine them. What is left over moves
along cheapest chains of clusters, which keeps the assignment optimal for its prices.

Costs are |centre|^2 - 2 point.centre, both seen from one origin: the squared distance without the part that is the same
for every centre. Prices are float64, costs have the type of the points.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

BLOCK = 1_000_000  # entries of a [rows, K] block: 4 MB of float32, which a cache holds


SAMPLE = 65_536  # points, at least, that prices are first found on


SAMPLE_PER_CLUSTER = 64


WATCH = 128  # members of a cluster, at least, that are looked at when points change clusters


class Costs:
    """rows [b, d], prices [K] -> [b, K]: distance^2 to each centre + its price - distance^2 to `origin` [d]."""

    def __init__(self, centres: torch.Tensor, origin: torch.Tensor):
        moved = centres - origin
        self.origin, self.weight, self.bias = origin, moved.T.contiguous(), moved.square().sum(1)

    def __call__(self, rows: torch.Tensor, prices: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias + prices.to(rows.dtype), rows - self.origin, self.weight, alpha=-2)

    def between(self, rows: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """[b] cost at `end` minus cost at `start`."""
        across = self.weight[:, end] - self.weight[:, start]
        return (rows - self.origin) @ across * -2 + (self.bias[end] - self.bias[start])


def iterate_blocks(n: int, columns: int) -> Iterator[slice]:
    """Slices of 0..n, each with at most BLOCK entries of that many columns."""
    step = max(1, BLOCK // columns)
    return (slice(begin, min(begin + step, n)) for begin in range(0, n, step))


def draw_sample(x: torch.Tensor, count: int) -> torch.Tensor:
    """About `count` rows of x, or fewer where it has fewer, evenly spaced."""
    return x[:: max(1, len(x) // count)]


def find_nearest(x: torch.Tensor, costs: Costs, prices: torch.Tensor) -> torch.Tensor:
    """The centre of least cost + price of every point [n]."""
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for rows in iterate_blocks(len(x), max(len(prices), x.shape[1])):
        labels[rows] = costs(x[rows], prices).min(1).indices
    return labels


def make_even_sizes(n: int, prices: torch.Tensor) -> torch.Tensor:
    """Sizes [K] (int64) that differ by one at most; the dearest clusters, in the densest places, get one more."""
    sizes = torch.full_like(prices, n // len(prices), dtype=torch.int64)
    sizes[prices.argsort(descending=True, stable=True)[: n % len(prices)]] += 1
    return sizes


def _size_gap(x: torch.Tensor, costs: Costs, prices: torch.Tensor) -> float:
    """By how much a point's second centre costs more than its first, on average over some points."""
    two = costs(draw_sample(x, 4096), prices).topk(2, dim=1, largest=False).values
    return (two[:, 1] - two[:, 0]).double().mean().item()


def _soft_sizes(
    x: torch.Tensor, costs: Costs, prices: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sizes [K], curvature [K, K]), float64, when every point is shared out by softmax(-(cost + price) / epsilon).

    curvature: minus the derivative of the sizes by the prices, a graph Laplacian that couples neighbouring clusters.
    """
    sizes = torch.zeros_like(prices)
    shared = prices.new_zeros(len(prices), len(prices))
    for rows in iterate_blocks(len(x), max(len(prices), x.shape[1])):
        share = costs(x[rows], prices)
        # Without the floor, shares and their products would be subnormal numbers, which are many times slower.
        share = share.sub_(share.amin(1, keepdim=True)).div_(-epsilon).clamp_min_(-25.0).exp_()
        share.div_(share.sum(1, keepdim=True))
        sizes += share.sum(0)
        shared += share.T @ share
    return sizes, (torch.diag(sizes) - shared) / epsilon


def _newton_step(curvature: torch.Tensor, surplus: torch.Tensor) -> torch.Tensor:
    """The change of prices [K] that takes away `surplus` [K] to first order, mean 0.

    A little of the diagonal is added: adding one number to all prices changes no assignment, and clusters without a
    point between them are not coupled.
    """
    ridge = 1e-3 * curvature.diagonal().mean().clamp_min(1e-30)
    change = torch.linalg.solve(curvature + ridge * torch.eye(len(surplus)).to(curvature), surplus)
    return change - change.mean()


def anneal_prices(x: torch.Tensor, costs: Costs, wanted: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """Prices [K] under which the sizes are nearly in proportion to `wanted` [K] (float64).

    Newton steps on the entropy-smoothed dual of the transport problem (Cuturi 2013; Kitagawa, Merigot and Thibert
    2019), whose smoothing epsilon is cooled to a tenth of the usual gap between a point's two best centres. From
    `given` prices, those of a similar problem, it is heated only until they are not far off.
    """
    start = torch.zeros_like(wanted) if given is None else given
    if len(wanted) == 1:
        return start
    spread = costs(draw_sample(x, 1024), torch.zeros_like(wanted)).double().std(1).mean().item()
    # Points or centres that coincide leave nothing to tell apart.
    if not spread > 1e-6 * costs.bias.abs().max().item():
        return start
    coarse = draw_sample(x, max(4096, 16 * len(wanted)))
    hottest, last = spread / 3, max(0.1 * _size_gap(x, costs, start), 1e-3 * spread)
    prices, heating = start, given is not None
    epsilon = last if heating else max(hottest, last)
    # Sizes of whole points differ from the smoothed ones by chance anyway; in large clusters a few points may be off.
    each = len(x) / len(wanted)
    enough = min(0.4 / each**0.5, 6.4 / each)
    while True:
        # At the beginning of all, a part of the points says enough.
        part = x if epsilon <= 3 * last or given is not None else coarse
        share = wanted * (len(part) / wanted.sum())
        reach, before = 4.0, float("inf")
        for _ in range(12):
            sizes, curvature = _soft_sizes(part, costs, prices, epsilon)
            surplus = sizes - share
            off = surplus.abs().sum().item() / len(part)
            change = _newton_step(curvature, surplus)
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
            last = max(0.1 * _size_gap(x, costs, prices), 1e-3 * spread)
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
        epsilon = 0.2 * _size_gap(sample, costs, prices)
        if off == 0 or off > 0.67 * least or not epsilon > 0:
            return best, min(off, least)
        least = off
        _, curvature = _soft_sizes(sample, costs, prices, epsilon)
        change = _newton_step(curvature * (len(x) / len(sample)), surplus)
        prices = prices + change.clamp(-4 * epsilon, 4 * epsilon)


def _cheapest_ways(lengths: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distance [K] from the nearest of `starts`, the cluster before each on that way [K], -1 at a start).

    Bellman and Ford's rounds over lengths [K, K] >= 0, from the clusters that the last round changed.
    """
    distance = np.full(len(lengths), np.inf)
    before = np.full(len(lengths), -1)
    distance[starts] = 0.0
    changed = starts
    while len(changed):
        through = distance[changed, None] + lengths[changed]
        place = through.argmin(0)
        offer = through[place, np.arange(len(lengths))]
        better = np.flatnonzero(offer < distance)
        distance[better] = offer[better]
        before[better] = changed[place[better]]
        changed = better
    return distance, before


class _Clusters:
    """The members of every cluster, and what the cheapest of them pays for moving to any other.

    edge [K, K] (float64, host): least cost at b minus cost at a over the watched members of a; infinite at a = b.
    floor [K]: members not watched lose at least this much under the present prices, wherever they go. Only those
    nearest to leaving are watched, which is what makes a look at a cluster cheap.
    """

    def __init__(self, x: torch.Tensor, costs: Costs, labels: torch.Tensor):
        self.x, self.costs, self.labels = x, costs, labels.clone()
        count = len(costs.bias)
        self.free = torch.zeros(count, dtype=torch.float64, device=x.device)
        self.sizes = torch.bincount(labels, minlength=count).cpu().numpy()
        self.members = list(labels.argsort(stable=True).split(self.sizes.tolist()))
        self.watched = list(self.members)
        self.edge = np.full((count, count), np.inf)
        self.floor = np.full(count, np.inf)

    def open(self, cluster: int, prices: np.ndarray, least: int, need: float) -> None:
        """Choose anew whom to watch: all members that lose at most `need` under `prices`, and at least `least`."""
        rows = self.members[cluster]
        self.floor[cluster] = np.inf
        if len(rows) > least:
            shift = torch.as_tensor(prices, device=rows.device)
            loss = torch.empty(len(rows), dtype=self.x.dtype, device=rows.device)
            for part in iterate_blocks(len(rows), len(prices)):
                table = self.costs(self.x[rows[part]], shift)
                own = table[:, cluster].clone()
                table[:, cluster] = float("inf")
                loss[part] = table.amin(1) - own
            loss, order = loss.sort(stable=True)
            least = max(least, int((loss <= need).sum()))
            if least < len(rows):
                self.floor[cluster] = max(0.0, loss[least].item())
            rows = rows[order[:least]]
        self.watched[cluster] = rows
        self.look(cluster)

    def look(self, cluster: int) -> None:
        """Bring the edges of a cluster up to date with its watched members."""
        self.edge[cluster] = np.inf
        for part in iterate_blocks(len(self.watched[cluster]), len(self.free)):
            table = self.costs(self.x[self.watched[cluster][part]], self.free)
            least = (table - table[:, cluster : cluster + 1]).amin(0)
            self.edge[cluster] = np.minimum(self.edge[cluster], least.double().cpu().numpy())
        self.edge[cluster, cluster] = np.inf

    def leavers(self, start: int, end: int, most: int, slack: float, later: bool) -> torch.Tensor:
        """Up to `most` watched members of `start`, cheapest first, that pay its edge to `end`, give or take `slack`.

        later: the cheapest may have gone since the last look, so that perhaps nobody pays so little.
        """
        rows = self.watched[start]
        if not len(rows):
            return rows
        pays, order = self.costs.between(self.x[rows], start, end).topk(min(most, len(rows)), largest=False)
        limit = self.edge[start, end] if later else max(self.edge[start, end], pays[0].item())
        return rows[order[: int((pays <= limit + slack).sum())]]

    def move(self, rows: torch.Tensor, start: int, end: int) -> None:
        self.labels[rows] = end
        for lists in (self.members, self.watched):
            lists[start] = lists[start][self.labels[lists[start]] == start]
            lists[end] = torch.cat([lists[end], rows])


def _repair_sizes(
    x: torch.Tensor, costs: Costs, labels: torch.Tensor, prices: np.ndarray, wanted: np.ndarray, extra: np.ndarray
) -> tuple[torch.Tensor, np.ndarray]:
    """(labels, prices) with the sizes exactly as wanted, of least total cost for those sizes.

    labels [n]: every point's nearest centre under prices [K]. wanted [K]: sizes. extra [K] (bool): the clusters whose
    wanted size holds one point more than the others'; this right may pass to another cluster at no cost.

    Successive shortest paths (Ahuja, Magnanti and Orlin 1993, ch. 9) on the graph of clusters: going from a to b costs
    what the cheapest member of a pays for moving to b. Prices keep all lengths >= 0 and thereby prove that no cheaper
    assignment is left. Each search serves all chains that share no edge; coinciding points move together.
    """
    clusters = _Clusters(x, costs, labels)
    extra, prices = extra.copy(), prices.copy()
    surplus = clusters.sizes - wanted
    slack = 16 * torch.finfo(x.dtype).eps * costs(draw_sample(x, 4096), clusters.free).abs().max().item()
    if (surplus > 0).any():
        for cluster in range(len(prices)):
            clusters.open(cluster, prices, WATCH + 2 * max(0, surplus[cluster]), 0.0)
    while (surplus > 0).any():
        rise = prices[None, :] - prices[:, None]
        lengths = clusters.edge + rise
        by_right = ~extra[:, None] & extra[None, :] & (rise < lengths)
        # Below 0 by rounding only.
        lengths = np.where(by_right, rise, lengths).clip(0.0)
        distance, before = _cheapest_ways(lengths, np.flatnonzero(surplus > 0))
        short = np.flatnonzero(surplus < 0)
        short = short[np.argsort(distance[short], kind="stable")]
        # Prices follow only as far as the nearer half of the ends, which are served now.
        reach = distance[short[(len(short) - 1) // 2]]
        need = np.zeros(len(prices))
        need[distance < reach] = reach - distance[distance < reach]
        hidden = np.flatnonzero(clusters.floor < need)
        for cluster in hidden:
            # More than needed now, so as not to be back soon.
            clusters.open(cluster, prices, WATCH, 4 * need[cluster])
        if len(hidden):
            continue
        prices += need
        clusters.floor -= need
        used: set[tuple[int, int]] = set()
        touched: set[int] = set()
        for end in short[distance[short] <= reach]:
            way = [int(end)]
            while before[way[-1]] >= 0:
                way.append(int(before[way[-1]]))
            way.reverse()
            start, steps = way[0], list(pairwise(way))
            amount = int(min(surplus[start], -surplus[end]))
            rights = [step for step in steps if by_right[step]]
            if amount < 1 or not used.isdisjoint(steps) or any(extra[a] or not extra[b] for a, b in rights):
                continue
            amount = 1 if rights else amount
            moves = {}
            for a, b in steps:
                if not by_right[a, b]:
                    moves[a, b] = clusters.leavers(a, b, amount, slack, a in touched)
                    amount = len(moves[a, b])
                    if not amount:
                        break
            if not amount:
                continue
            for (a, b), rows in moves.items():
                clusters.move(rows[:amount], a, b)
                touched |= {a, b}
            for a, b in rights:
                extra[a], extra[b] = True, False
            surplus[start] -= amount
            surplus[end] += amount
            used |= set(steps)
        for cluster in touched:
            clusters.look(cluster)
    return clusters.labels, prices


def choose_price_sample(x: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """x itself, or enough random rows of it, in their order, to find prices for `count` clusters."""
    most = max(SAMPLE, SAMPLE_PER_CLUSTER * count)
    if len(x) <= most:
        return x
    return x[torch.randperm(len(x), generator=generator)[:most].sort().values.to(x.device)]


def check_points(x: torch.Tensor, count: int) -> torch.Tensor:
    """x as float32 or float64; ValueError for what cannot be clustered into `count` clusters."""
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"points must be [n, d] with d >= 1, got {list(x.shape)}")
    if not 1 <= count <= len(x):
        raise ValueError(f"{count} clusters for {len(x)} points: expected 1 to {len(x)}")
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if not all(torch.isfinite(x[rows]).all() for rows in iterate_blocks(len(x), x.shape[1])):
        raise ValueError("a coordinate of the points is not finite")
    return x


def check_centres(centres: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """centres [K, d] with the type and device of x [n, d]; ValueError for other shapes or values not finite."""
    if centres.ndim != 2 or centres.shape[1] != x.shape[1]:
        raise ValueError(f"centres must be [K, {x.shape[1]}], got {list(centres.shape)}")
    centres = centres.to(x)
    if not torch.isfinite(centres).all():
        raise ValueError("a coordinate of the centres is not finite")
    return centres


def assign_points(
    x: torch.Tensor, sample: torch.Tensor, costs: Costs, wanted: torch.Tensor | None, given: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`balanced_assign` of checked points: sample [m, d] of x, wanted sizes [K] >= 1, given prices [K], float64."""
    count = len(costs.bias)
    goal = torch.full((count,), len(x) / count, dtype=torch.float64, device=x.device) if wanted is None else wanted
    if sample is x:
        prices = anneal_prices(x, costs, goal, given)
    else:
        prices = anneal_prices(sample, costs, goal, None) if given is None else given
        prices, off = _refine_prices(x, sample, costs, goal, prices)
        # A few points per cluster are quicker to move one by one.
        if off * len(x) > 8 * count:
            prices, _ = _refine_prices(x, sample, costs, goal, anneal_prices(x, costs, goal, prices))
    labels = find_nearest(x, costs, prices)
    sizes = make_even_sizes(len(x), prices) if wanted is None else wanted.long()
    extra = sizes > len(x) // count if wanted is None else torch.zeros(count, dtype=torch.bool)
    labels, found = _repair_sizes(x, costs, labels, *(part.cpu().numpy() for part in (prices, sizes, extra)))
    return labels, torch.as_tensor(found - found.mean(), device=x.device)


@torch.no_grad()
def balanced_assign(
    x: torch.Tensor, centres: torch.Tensor, sizes: torch.Tensor | None = None, prices: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assign points to centres under fixed sizes, at the least sum of squared distances (up to rounding).

    x [n, d], centres [K, d]. sizes [K]: whole numbers that sum to n; without it every cluster has n // K or n // K + 1
    points, and the larger ones are where that is cheapest. prices [K]: those of a similar problem, as a start.
    Returns the labels [n] (int64) and prices [K] (dtype of x): every point's centre is that of least squared distance +
    price, ties aside. A centre of size 0 has an infinite price.
    Raises ValueError for K < 1, K > n, shapes that do not fit, values that are not finite, or wrong sizes.
    """
    x = check_points(x, len(centres))
    centres = check_centres(centres, x)
    for name, given in (("sizes", sizes), ("prices", prices)):
        if given is not None and given.shape != (len(centres),):
            raise ValueError(f"{name} must be [{len(centres)}], one per centre, got {list(given.shape)}")
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
    labels, found = assign_points(x, sample, Costs(centres[used], centres.mean(0)), sizes, prices)
    full = x.new_full((len(centres),), float("inf"))
    full[used] = found.to(x.dtype)
    return used[labels], full
