"""Balanced assignment against exact matching and min-cost flow, sizes as a property, and the edge cases of k-means."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from rq.kmeans import assignment, costs, repair
from rq.kmeans.assignment import balanced_assign
from rq.kmeans.balanced import _level_sizes, balanced_kmeans
from rq.kmeans.costs import Costs, find_nearest, make_even_sizes


@st.composite
def problems(draw):
    """(points [n, d], centres [K, d]): continuous or on a coarse grid (ties, duplicates), also all points the same."""
    n, d = draw(st.integers(1, 60)), draw(st.integers(1, 4))
    count = draw(st.integers(1, n))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["continuous", "grid", "apart", "same"]))
    if kind == "continuous":
        x, centres = random.normal(size=(n, d)), random.normal(size=(count, d))
    elif kind == "grid":
        x, centres = random.integers(3, size=(n, d)), random.integers(3, size=(count, d))
    elif kind == "apart":
        # Few groups, far from each other and of unequal sizes: prices have to carry points across empty space.
        groups = 50 * random.normal(size=(3, d))
        x = groups[random.choice(3, n, p=[0.7, 0.2, 0.1])] + random.normal(size=(n, d))
        centres = groups[random.integers(3, size=count)] + random.normal(size=(count, d))
    else:
        x, centres = np.ones((n, d)), random.integers(2, size=(count, d))
    return torch.tensor(x, dtype=torch.float64), torch.tensor(centres, dtype=torch.float64)


def cost(x, centres, labels):
    return (x.double() - centres.double()[labels]).square().sum().item()


def least_cost(x, centres, sizes=None):
    """The optimum by matching points to seats: a centre of size s has s seats, and n // K + 1 where sizes are free.

    With free sizes each centre's last seat is optional, which dummy points that may sit only there express.
    """
    distances = torch.cdist(x.double(), centres.double()).square().numpy()
    n, count = distances.shape
    if sizes is not None:
        table = np.repeat(distances, sizes, axis=1)
    else:
        must = np.repeat(distances, n // count, axis=1)
        table = np.concatenate([must, distances], axis=1)
        empty = count - n % count
        blocked = np.full((empty, must.shape[1]), 1e12)
        table = np.concatenate([table, np.concatenate([blocked, np.zeros((empty, count))], axis=1)])
    rows, columns = linear_sum_assignment(table)
    return table[rows, columns].sum()


def assert_near_equal_sizes(labels, n, count):
    sizes = torch.bincount(labels, minlength=count)
    assert labels.dtype == torch.int64 and len(labels) == n and len(sizes) == count
    assert sizes.min() >= n // count and sizes.max() <= n // count + 1


@settings(deadline=None, max_examples=150)
@given(problems(), st.sampled_from([torch.float32, torch.float64]))
def test_assignment_is_balanced_and_of_least_cost(problem, dtype):
    x, centres = (part.to(dtype) for part in problem)
    labels, prices = balanced_assign(x, centres)
    assert_near_equal_sizes(labels, len(x), len(centres))
    assert prices.shape == (len(centres),) and prices.dtype == dtype
    scale = 1 + (x.double() - centres.double().mean(0)).square().sum().item()
    rounding = (1e-4 if dtype == torch.float32 else 1e-9) * scale
    least = least_cost(x, centres)
    assert least - 1e-9 * scale <= cost(x, centres, labels) <= least + rounding
    # The prices prove it: nobody has a cheaper centre under them.
    total = torch.cdist(x.double(), centres.double()).square() + prices.double()
    assert (total.gather(1, labels[:, None])[:, 0] - total.amin(1)).max() <= rounding


@settings(deadline=None, max_examples=80)
@given(problems(), st.integers(0, 2**31))
def test_given_sizes_are_kept_at_least_cost(problem, seed):
    x, centres = problem
    random = np.random.default_rng(seed)
    sizes = np.bincount(random.choice(len(centres), len(x), p=random.dirichlet(np.ones(len(centres)))))
    sizes = np.pad(sizes, (0, len(centres) - len(sizes)))
    labels, prices = balanced_assign(x, centres, torch.tensor(sizes))
    assert torch.bincount(labels, minlength=len(centres)).tolist() == sizes.tolist()
    assert np.array_equal(np.isinf(prices.numpy()), sizes == 0)
    scale = 1 + (x - centres.mean(0)).square().sum().item()
    assert cost(x, centres, labels) == pytest.approx(least_cost(x, centres, sizes), abs=1e-9 * scale)
    again, _ = balanced_assign(x, centres, torch.tensor(sizes), prices)
    assert torch.bincount(again, minlength=len(centres)).tolist() == sizes.tolist()
    assert cost(x, centres, again) == pytest.approx(cost(x, centres, labels), abs=1e-9 * scale)


@settings(deadline=None, max_examples=60)
@given(problems(), st.integers(0, 100))
def test_kmeans_sizes_and_centres(problem, seed):
    x, centres = problem
    count = len(centres)
    new_centres, labels = balanced_kmeans(x, count, seed=seed)
    assert_near_equal_sizes(labels, len(x), count)
    means = torch.stack([x[labels == k].mean(0) for k in range(count)])
    assert torch.allclose(new_centres, means, atol=1e-9 * (1 + x.abs().max().item()))


@settings(deadline=None, max_examples=60)
@given(problems(), st.integers(0, 2**31))
def test_rough_assignment_has_the_right_sizes(problem, seed):
    x, centres = problem
    prices = torch.zeros(len(centres), dtype=torch.float64)
    wanted = make_even_sizes(len(x), prices)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(len(centres), size=len(x)))
    levelled = _level_sizes(x, Costs(centres, centres.mean(0)), labels, prices, wanted)
    assert torch.bincount(levelled, minlength=len(centres)).tolist() == wanted.tolist()
    # Nobody leaves but those too many.
    stayed = torch.bincount(labels[levelled == labels], minlength=len(centres))
    assert torch.equal(stayed, torch.minimum(torch.bincount(labels, minlength=len(centres)), wanted))


def gaussians(n, d, groups, seed):
    random = np.random.default_rng(seed)
    weights = random.dirichlet(np.ones(groups))
    centres = 3 * random.normal(size=(groups, d))
    return torch.tensor(centres[random.choice(groups, n, p=weights)] + random.normal(size=(n, d)), dtype=torch.float32)


def repaired_from_nothing(x, centres):
    """Cost after the repair alone: from the nearest centres, without prices, one watched member per cluster."""
    table, zero = Costs(centres, centres.mean(0)), torch.zeros(len(centres), dtype=torch.float64)
    sizes = make_even_sizes(len(x), zero)
    extra = (sizes > len(x) // len(centres)).numpy()
    with mock.patch.object(repair, "WATCH", 1), mock.patch.object(costs, "BLOCK", 20):
        labels = find_nearest(x, table, zero)
        labels, _ = repair.repair_sizes(x, table, labels, zero.numpy(), sizes.numpy(), extra)
    assert_near_equal_sizes(labels, len(x), len(centres))
    return cost(x, centres, labels)


@settings(deadline=None, max_examples=80)
@given(problems())
def test_repair_alone_reaches_the_optimum(problem):
    x, centres = problem
    scale = 1 + (x - centres.mean(0)).square().sum().item()
    assert repaired_from_nothing(x, centres) == pytest.approx(least_cost(x, centres), abs=1e-9 * scale)


@pytest.mark.parametrize("seed", range(6))
def test_repair_of_larger_clusters_reaches_the_optimum(seed):
    """Most members are not watched for most of the time."""
    x = gaussians(300, 2, 3, seed).double()
    centres = x[:6] / 4
    assert repaired_from_nothing(x, centres) == pytest.approx(least_cost(x, centres), rel=1e-9)


def test_sample_blocks_and_watched_members_change_nothing(monkeypatch):
    """Many points in miniature: prices from a sample, several blocks, few watched members per cluster."""
    x = gaussians(3000, 5, 6, seed=0)
    centres = x[torch.randperm(3000, generator=torch.Generator().manual_seed(1))[:12]]
    whole = cost(x, centres, balanced_assign(x, centres)[0])
    limits = ((assignment, "SAMPLE", 400), (assignment, "SAMPLE_PER_CLUSTER", 1), (costs, "BLOCK", 5000))
    for module, name, value in (*limits, (repair, "WATCH", 2)):
        monkeypatch.setattr(module, name, value)
    labels, prices = balanced_assign(x, centres)
    assert_near_equal_sizes(labels, 3000, 12)
    assert cost(x, centres, labels) == pytest.approx(whole, rel=1e-6)
    warm, _ = balanced_assign(x, centres, prices=prices)
    assert cost(x, centres, warm) == pytest.approx(whole, rel=1e-6)
    new_centres, labels = balanced_kmeans(x, 12)
    assert_near_equal_sizes(labels, 3000, 12)
    assert cost(x, new_centres, labels) < 0.9 * whole


@pytest.mark.parametrize("seed", [0, 1])
def test_inertia_against_min_cost_flow(seed):
    from k_means_constrained import KMeansConstrained

    n, count = 610, 16
    x = gaussians(n, 8, 5, seed)
    start = x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count]]
    flow = KMeansConstrained(
        count, size_min=n // count, size_max=-(-n // count), init=start.double().numpy(), n_init=1, random_state=0
    )
    flow.fit(x.double().numpy())
    labels = torch.tensor(flow.labels_).long()
    means = torch.stack([x[labels == k].mean(0) for k in range(count)])
    centres, ours = balanced_kmeans(x, count, start=start)
    assert_near_equal_sizes(ours, n, count)
    assert cost(x, centres, ours) <= 1.03 * cost(x, means, labels)
    # The package's flow minimises distances, not their squares, so under its own centres ours costs no more.
    flow_centres = torch.tensor(flow.cluster_centers_)
    flow_labels = torch.tensor(flow.predict(x.double().numpy(), size_min=n // count, size_max=-(-n // count))).long()
    same, _ = balanced_assign(x, flow_centres)
    assert 0.95 * cost(x, flow_centres, flow_labels) < cost(x, flow_centres, same) <= cost(x, flow_centres, flow_labels)


def test_start_centres_are_where_it_starts():
    """A balanced optimum as start is kept, cluster by cluster."""
    groups = torch.tensor([[0.0, 0], [100, 0], [0, 100], [100, 100]])
    x = groups.repeat(5, 1) + torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        centres, labels = balanced_kmeans(x, 4, start=groups[order])
        assert labels.tolist() == [order.index(i % 4) for i in range(20)]
        assert torch.allclose(centres, groups[order] + 0.5, atol=0.5)
    one, _ = balanced_kmeans(x, 4, iterations=1, start=groups)
    assert torch.allclose(one, torch.stack([x[k::4].mean(0) for k in range(4)]))


def test_same_seed_same_result_and_input_untouched():
    x = gaussians(500, 6, 4, seed=3)
    original = x.clone()
    first, second, other = (balanced_kmeans(x, 20, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0]) and torch.equal(x, original)


def test_more_rounds_lower_the_inertia():
    x = gaussians(800, 4, 7, seed=1)
    start = x[:16]
    inertias = [cost(x, *balanced_kmeans(x, 16, iterations=rounds, start=start)) for rounds in (1, 4, 100)]
    assert inertias[0] > inertias[1] >= inertias[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_types(dtype):
    x = gaussians(200, 3, 4, seed=2).to(dtype)
    centres, labels = balanced_kmeans(x, 7)
    assert centres.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert_near_equal_sizes(labels, 200, 7)


def test_far_from_zero_nothing_is_lost():
    x = gaussians(300, 3, 4, seed=2).double()
    near, far = (balanced_kmeans((x + shift).float(), 9, start=(x[:9] + shift).float()) for shift in (0.0, 4096.0))
    assert cost(x + 4096, far[0], far[1]) == pytest.approx(cost(x, near[0], near[1]), rel=0.02)


def test_edge_cases():
    random = torch.Generator().manual_seed(0)
    x = torch.rand(30, 3, generator=random)
    centres, labels = balanced_kmeans(x, 30)
    assert sorted(labels.tolist()) == list(range(30)) and torch.allclose(centres[labels], x)
    centres, labels = balanced_kmeans(x, 1)
    assert labels.tolist() == [0] * 30 and torch.allclose(centres[0], x.mean(0))
    centres, labels = balanced_kmeans(torch.full((31, 2), 7.0), 4)
    assert sorted(torch.bincount(labels).tolist()) == [7, 8, 8, 8] and torch.allclose(centres, torch.tensor(7.0))
    centres, labels = balanced_kmeans(torch.arange(12.0)[:, None], 3)
    assert [sorted(set(labels[i : i + 4].tolist())) for i in (0, 4, 8)] == [[k] for k in labels[::4].tolist()]
    assert sorted(centres[:, 0].tolist()) == [1.5, 5.5, 9.5]
    few = torch.tensor([[0.0], [1.0]]).repeat_interleave(torch.tensor([900, 100]), 0)
    labels, _ = balanced_assign(few, torch.tensor([[0.0], [0.0], [1.0], [1.0]]))
    assert (
        torch.bincount(labels).tolist() == [250] * 4 and cost(few, torch.tensor([[0.0], [0], [1], [1]]), labels) == 400
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: balanced_kmeans(x, 0), "0 clusters for 6 points: expected 1 to 6"),
        (lambda x: balanced_kmeans(x, 7), "7 clusters for 6 points"),
        (lambda x: balanced_kmeans(x[0], 1), r"points must be \[n, d\]"),
        (lambda x: balanced_kmeans(x / 0, 2), "of the points is not finite"),
        (lambda x: balanced_kmeans(x, 2, iterations=0), "iterations 0"),
        (lambda x: balanced_kmeans(x, 2, start=x[:3]), r"start must be \[2, 2\]"),
        (lambda x: balanced_kmeans(x, 2, start=x[:2] / 0), "of the centres is not finite"),
        (lambda x: balanced_assign(x, x[:0]), "0 clusters for 6 points"),
        (lambda x: balanced_assign(x[:2], x), "6 clusters for 2 points"),
        (lambda x: balanced_assign(x, x[:2, :1]), r"centres must be \[K, 2\]"),
        (lambda x: balanced_assign(x, x[:2], torch.tensor([3, 2])), "sum to 6"),
        (lambda x: balanced_assign(x, x[:2], torch.tensor([7, -1])), "sum to 6"),
        (lambda x: balanced_assign(x, x[:2], torch.tensor([6])), r"sizes must be \[2\]"),
        (lambda x: balanced_assign(x, x[:2], prices=torch.zeros(3)), r"prices must be \[2\]"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.arange(12.0).reshape(6, 2))
