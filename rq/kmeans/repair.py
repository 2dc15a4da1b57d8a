"""Cluster sizes made exact by moving points along cheapest chains of clusters, which keeps an assignment optimal."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from rq.kmeans.costs import Costs, draw_sample, iterate_blocks

WATCH = 128  # members of a cluster, at least, that are looked at when points change clusters


def find_cheapest_ways(lengths: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distance [K] from the nearest of `starts`, the cluster before each on that way [K], -1 at a start).

    Bellman and Ford's rounds over lengths [K, K] >= 0, from the clusters that the last round changed.
    """
    distance = np.full(len(lengths), np.inf)
    before = np.full(len(lengths), -1)
    distance[starts] = 0.0
    changed = starts
    while len(changed):
        through = distance[changed, None] + lengths[changed]
        nearest = through.argmin(0)
        offer = through[nearest, np.arange(len(lengths))]
        better = np.flatnonzero(offer < distance)
        distance[better] = offer[better]
        before[better] = changed[nearest[better]]
        changed = better
    return distance, before


class Clusters:
    """The members of every cluster, and what the cheapest of them pays for moving to any other.

    edge [K, K] (float64, host): least cost at b minus cost at a over the watched members of a; infinite at a = b.
    least_loss [K]: members not watched lose at least this much under the present prices, wherever they go. Only those
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
        self.least_loss = np.full(count, np.inf)

    def choose_watched(self, cluster: int, prices: np.ndarray, least: int, need: float) -> None:
        """Choose anew whom to watch: all members that lose at most `need` under `prices`, and at least `least`."""
        rows = self.members[cluster]
        self.least_loss[cluster] = np.inf
        if len(rows) > least:
            shift = torch.as_tensor(prices, device=rows.device)
            loss = torch.empty(len(rows), dtype=self.x.dtype, device=rows.device)
            for part in iterate_blocks(len(rows), len(prices)):
                table = self.costs(self.x[rows[part]], shift)
                stay = table[:, cluster].clone()
                table[:, cluster] = float("inf")
                loss[part] = table.amin(1) - stay
            loss, order = loss.sort(stable=True)
            least = max(least, int((loss <= need).sum()))
            if least < len(rows):
                self.least_loss[cluster] = max(0.0, loss[least].item())
            rows = rows[order[:least]]
        self.watched[cluster] = rows
        self.update_edges(cluster)

    def update_edges(self, cluster: int) -> None:
        """Bring the edges of a cluster up to date with its watched members."""
        self.edge[cluster] = np.inf
        for part in iterate_blocks(len(self.watched[cluster]), len(self.free)):
            table = self.costs(self.x[self.watched[cluster][part]], self.free)
            least = (table - table[:, cluster : cluster + 1]).amin(0)
            self.edge[cluster] = np.minimum(self.edge[cluster], least.double().cpu().numpy())
        self.edge[cluster, cluster] = np.inf

    def find_leavers(self, start: int, end: int, most: int, slack: float, later: bool) -> torch.Tensor:
        """Up to `most` watched members of `start`, cheapest first, that pay its edge to `end`, give or take `slack`.

        later: the cheapest may have gone since the last look, so that perhaps nobody pays so little.
        """
        rows = self.watched[start]
        if not len(rows):
            return rows
        pays, order = self.costs.compare(self.x[rows], start, end).topk(min(most, len(rows)), largest=False)
        limit = self.edge[start, end] if later else max(self.edge[start, end], pays[0].item())
        return rows[order[: int((pays <= limit + slack).sum())]]

    def move(self, rows: torch.Tensor, start: int, end: int) -> None:
        """Carry points from one cluster to another."""
        self.labels[rows] = end
        for lists in (self.members, self.watched):
            lists[start] = lists[start][self.labels[lists[start]] == start]
            lists[end] = torch.cat([lists[end], rows])


def repair_sizes(
    x: torch.Tensor, costs: Costs, labels: torch.Tensor, prices: np.ndarray, wanted: np.ndarray, extra: np.ndarray
) -> tuple[torch.Tensor, np.ndarray]:
    """Labels and prices with the sizes exactly as wanted, of least total cost for those sizes.

    Successive shortest paths (Ahuja, Magnanti and Orlin 1993, ch. 9) on the graph of clusters: going from a to b costs
    what the cheapest member of a pays for moving to b. Prices keep all lengths >= 0 and thereby prove that no cheaper
    assignment is left. Each search serves all chains that share no edge; coinciding points move together.

    Args:
        x: the points [n, d].
        costs: of the centres.
        labels: [n], every point's nearest centre under `prices`.
        prices: [K].
        wanted: sizes [K].
        extra: [K] (bool), the clusters whose wanted size holds one point more than the others'; this right may pass to
            another cluster at no cost.
    """
    clusters = Clusters(x, costs, labels)
    extra, prices = extra.copy(), prices.copy()
    surplus = clusters.sizes - wanted
    slack = 16 * torch.finfo(x.dtype).eps * costs(draw_sample(x, 4096), clusters.free).abs().max().item()
    if (surplus > 0).any():
        for cluster in range(len(prices)):
            clusters.choose_watched(cluster, prices, WATCH + 2 * max(0, surplus[cluster]), 0.0)
    while (surplus > 0).any():
        rise = prices[None, :] - prices[:, None]
        lengths = clusters.edge + rise
        by_right = ~extra[:, None] & extra[None, :] & (rise < lengths)
        # Below 0 by rounding only.
        lengths = np.where(by_right, rise, lengths).clip(0.0)
        distance, before = find_cheapest_ways(lengths, np.flatnonzero(surplus > 0))
        short = np.flatnonzero(surplus < 0)
        short = short[np.argsort(distance[short], kind="stable")]
        # Prices follow only as far as the nearer half of the ends, which are served now.
        reach = distance[short[(len(short) - 1) // 2]]
        need = np.zeros(len(prices))
        need[distance < reach] = reach - distance[distance < reach]
        hidden = np.flatnonzero(clusters.least_loss < need)
        for cluster in hidden:
            # More than needed now, so as not to be back soon.
            clusters.choose_watched(cluster, prices, WATCH, 4 * need[cluster])
        if len(hidden):
            continue
        prices += need
        clusters.least_loss -= need
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
                    moves[a, b] = clusters.find_leavers(a, b, amount, slack, a in touched)
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
            clusters.update_edges(cluster)
    return clusters.labels, prices
