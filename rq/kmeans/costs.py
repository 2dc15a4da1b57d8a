"""Costs of points at centres, in blocks that a cache holds.

A cost is |centre|^2 - 2 point.centre, both seen from one origin: the squared distance without the part that is the same
for every centre. A price per centre is added to it. Prices are float64, costs have the type of the points.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 1_000_000  # entries of a [rows, K] block: 4 MB of float32, which a cache holds


class Costs:
    """rows [b, d], prices [K] -> [b, K]: distance^2 to each centre + its price - distance^2 to `origin` [d]."""

    def __init__(self, centres: torch.Tensor, origin: torch.Tensor):
        moved = centres - origin
        self.origin, self.weight, self.bias = origin, moved.T.contiguous(), moved.square().sum(1)

    def __call__(self, rows: torch.Tensor, prices: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias + prices.to(rows.dtype), rows - self.origin, self.weight, alpha=-2)

    def compare(self, rows: torch.Tensor, start: int, end: int) -> torch.Tensor:
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
    """Sizes [K] (int64) that differ by one at most; the dearest clusters, where points are densest, get one more."""
    sizes = torch.full_like(prices, n // len(prices), dtype=torch.int64)
    sizes[prices.argsort(descending=True, stable=True)[: n % len(prices)]] += 1
    return sizes
