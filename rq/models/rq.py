"""Codebooks in a row, each quantising what the ones before left over."""

from __future__ import annotations

import torch
from torch import nn

from rq.models.vq import VectorQuantizer


class ResidualVectorQuantizer(nn.Module):
    """One VectorQuantizer per level, of sizes n_e_list (RQ-VAE, Lee et al. 2022; SIDs: Rajput et al. 2023).

    sk_epsilons: one per level, 0 for nearest-code assignment; None for 0 everywhere.
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
            VectorQuantizer(n_e, e_dim, beta, kmeans_init, kmeans_iters, epsilon, sk_iters)
            for n_e, epsilon in zip(n_e_list, sk_epsilons)
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
