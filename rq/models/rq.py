"""Codebooks in a row, each quantising what the ones before left over."""

from __future__ import annotations

import torch
from torch import nn

from rq.models.vq import VectorQuantizer, squared_distances


class ResidualVectorQuantizer(nn.Module):
    """One VectorQuantizer per level (RQ-VAE, Lee et al. 2022; SIDs: Rajput et al. 2023).

    Args:
        n_e_list: codes per level.
        e_dim: width of the codes.
        sk_epsilons: one per level, 0 for nearest-code assignment; None for 0 everywhere.
        beta, kmeans_init, kmeans_iters, sk_iters: those of every VectorQuantizer.

    Raises:
        ValueError: another number of epsilons than of levels.
    """

    def __init__(
        self,
        n_e_list: list[int],
        e_dim: int,
        sk_epsilons: list[float] | None = None,
        beta: float = 0.25,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sk_iters: int = 100,
    ):
        super().__init__()
        sk_epsilons = sk_epsilons or [0.0] * len(n_e_list)
        if len(sk_epsilons) != len(n_e_list):
            raise ValueError(f"{len(sk_epsilons)} Sinkhorn epsilons for {len(n_e_list)} levels")
        self.vq_layers = nn.ModuleList(
            VectorQuantizer(
                n_e,
                e_dim,
                beta=beta,
                kmeans_init=kmeans_init,
                kmeans_iters=kmeans_iters,
                sk_epsilon=epsilon,
                sk_iters=sk_iters,
            )
            for n_e, epsilon in zip(n_e_list, sk_epsilons, strict=True)
        )

    def forward(self, x: torch.Tensor, use_sk: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [n, e_dim] -> sum of the codes [n, e_dim], mean loss over levels, code numbers [n, levels]."""
        quantised, losses, indices = torch.zeros_like(x), [], []
        residual = x
        for layer in self.vq_layers:
            code, loss, index = layer(residual, use_sk)
            residual = residual - code
            quantised = quantised + code
            losses.append(loss)
            indices.append(index)
        return quantised, torch.stack(losses).mean(), torch.stack(indices, dim=-1)

    @torch.no_grad()
    def revive(self, x: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
        """Put the codes that no row of x is nearest to on rows of x.

        A row is drawn with probability proportional to its squared distance to its code, as in k-means++, so that new
        codes go where the error is. A level whose rows all lie on their codes keeps its dead codes: nothing is gained.

        Args:
            x: encoded items [n, e_dim].
            generator: of the random draws, on the CPU.

        Returns:
            The numbers of the codes that moved, level by level.
        """
        revived, residual = [], x
        for layer in self.vq_layers:
            distance, index = squared_distances(residual, layer.embedding.weight).min(dim=1)
            dead = torch.bincount(index, minlength=layer.n_e).eq(0).nonzero()[:, 0]
            weights = distance.double().cpu()
            dead = dead[: int((weights > 0).sum())]
            if len(dead):
                # Drawn by exponential races (Efraimidis & Spirakis 2006): multinomial takes at most 2^24 rows.
                keys = torch.empty_like(weights).exponential_(generator=generator) / weights
                rows = keys.topk(len(dead), largest=False).indices.to(x.device)
                layer.embedding.weight[dead] = residual[rows]
                index = squared_distances(residual, layer.embedding.weight).argmin(dim=1)
            revived.append(dead)
            residual = residual - layer.embedding(index)
        return revived
