"""One codebook: nearest-code and Sinkhorn assignment, k-means start, straight-through gradients."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from minionerec.common.processes import is_main_process
from minionerec.common.sharing import broadcast_tensor, gather_rows, take_part


def squared_distances(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """[n, e_dim], [K, e_dim] -> squared Euclidean distances [n, K], never below 0."""
    distances = x.pow(2).sum(1, keepdim=True) + codes.pow(2).sum(1) - 2 * x @ codes.t()
    return distances.clamp_min(0)


def sinkhorn(distances: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """The transport plan that spreads n points of equal mass evenly over K codes.

    Entropy-regularised optimal transport (Cuturi, 2013) in the log domain: distances are first brought to [-1, 1], then
    the columns (mass 1/K each) and rows of exp(-d / epsilon) are scaled in turn, rows last. Leading dimensions are
    separate problems.

    n >= K: rows have mass 1/n. n < K: rows have mass 1/K, and one further row, dropped at the end, takes the mass of
    the codes that stay empty. Without it every code, however far, would have to be filled, and the largest entry of a
    row would be decided by rounding.

    Args:
        distances: [..., n, K].
        epsilon: regularisation, above 0.
        iterations: scalings of columns and rows.

    Returns:
        The plan [..., n, K], float64.
    """
    distances = distances.double()
    low, high = distances.amin((-2, -1), keepdim=True), distances.amax((-2, -1), keepdim=True)
    log_plan = -(2 * (distances - low) / (high - low).clamp_min(1e-12) - 1) / epsilon
    n, codes = distances.shape[-2:]
    log_mass = log_plan.new_full((n, 1), -math.log(max(n, codes)))
    if n < codes:
        log_plan = F.pad(log_plan, (0, 0, 0, 1))
        log_mass = torch.cat([log_mass, log_mass.new_full((1, 1), math.log((codes - n) / codes))])
    for _ in range(iterations):
        log_plan = log_plan - torch.logsumexp(log_plan, dim=-2, keepdim=True) - math.log(codes)
        log_plan = log_plan - torch.logsumexp(log_plan, dim=-1, keepdim=True) + log_mass
    return log_plan[..., :n, :].exp()


def kmeans_centres(x: torch.Tensor, n_codes: int, iterations: int) -> torch.Tensor:
    """[n, dim] -> n_codes centres [n_codes, dim] by k-means (k-means++ start); random state from torch's generator.

    With fewer distinct points than codes, the centres left over are points with a little noise, so that no two agree.
    """
    from sklearn.cluster import KMeans

    seed = int(torch.randint(2**31 - 1, (1,)))
    points = x.detach().double().cpu().numpy()
    distinct = np.unique(points, axis=0)
    if len(distinct) > n_codes:
        centres = KMeans(n_codes, n_init=1, max_iter=iterations, random_state=seed).fit(points).cluster_centers_
    else:
        random = np.random.default_rng(seed)
        extra = distinct[random.integers(len(distinct), size=n_codes - len(distinct))]
        scale = 1e-2 * max(float(points.std()), 1e-3)
        centres = np.concatenate([distinct, extra + scale * random.standard_normal(extra.shape)])
    return torch.as_tensor(centres, dtype=x.dtype, device=x.device)


class VectorQuantizer(nn.Module):
    """A codebook (VQ-VAE, van den Oord et al. 2017).

    Args:
        n_e: codes.
        e_dim: width of the codes.
        beta: weight of the commitment term.
        kmeans_init: start from k-means over the first training batch.
        kmeans_iters: rounds of that k-means, at most.
        sk_epsilon: above 0, Sinkhorn assignment with that regularisation wherever `use_sk` is asked for; 0: always the
            nearest code.
        sk_iters: scalings of a Sinkhorn assignment.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sk_epsilon: float = 0.0,
        sk_iters: int = 100,
    ):
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.kmeans_iters = kmeans_iters
        self.sk_epsilon, self.sk_iters = sk_epsilon, sk_iters
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)
        self.started = not kmeans_init

    def _load_from_state_dict(self, *arguments, **keywords) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self.started = True  # loaded codes are never started over

    @torch.no_grad()
    def start_from(self, x: torch.Tensor) -> None:
        """Put the codes on the k-means centres of x [n, e_dim], the parts of all processes together."""
        x = gather_rows(x)
        centres = torch.empty_like(self.embedding.weight, dtype=x.dtype)
        if is_main_process():
            centres = kmeans_centres(x, self.n_e, self.kmeans_iters)
        self.embedding.weight.copy_(broadcast_tensor(centres))
        self.started = True

    @torch.no_grad()
    def assign(self, x: torch.Tensor, use_sk: bool) -> torch.Tensor:
        """Code numbers [n] of x [n, e_dim]; a transport plan is that of the rows of all processes together."""
        if use_sk and self.sk_epsilon > 0:
            distances = squared_distances(gather_rows(x), self.embedding.weight)
            return take_part(sinkhorn(distances, self.sk_epsilon, self.sk_iters).argmax(dim=-1))
        return squared_distances(x, self.embedding.weight).argmin(dim=-1)

    def forward(self, x: torch.Tensor, use_sk: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [n, e_dim] -> its codes [n, e_dim] with the gradient passed straight to x, the loss, the code numbers [n].

        loss = |sg(x) - code|^2 + beta |x - sg(code)|^2, mean over elements.
        """
        if self.training and not self.started:
            self.start_from(x)
        indices = self.assign(x, use_sk)
        code = self.embedding(indices)
        loss = F.mse_loss(code, x.detach()) + self.beta * F.mse_loss(x, code.detach())
        return x + (code - x).detach(), loss, indices
