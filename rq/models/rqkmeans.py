"""Models whose codes live in the space of the embeddings: plain residual k-means, and RQ-KMeans+."""

from __future__ import annotations

import torch
from torch import nn

from rq.models.layers import MLPLayers
from rq.models.rq import ResidualVectorQuantizer
from rq.models.rqvae import RQVAE


class RQKMeans(nn.Module):
    """Residual k-means: given codebooks, one [K, dim] per level, and no encoder. The same attributes as an RQVAE."""

    def __init__(self, codebooks: list[torch.Tensor]):
        super().__init__()
        self.encoder, self.decoder = nn.Identity(), nn.Identity()
        sizes, dim = [len(codes) for codes in codebooks], codebooks[0].shape[1]
        self.config = {"in_dim": dim, "num_emb_list": sizes}
        self.rq = ResidualVectorQuantizer(sizes, dim)
        for layer, codes in zip(self.rq.vq_layers, codebooks, strict=True):
            layer.embedding.weight.data.copy_(codes)


class ResidualMLP(nn.Module):
    """x + MLP(x), the MLP's last layer starting at zero, so that training starts from the identity."""

    def __init__(self, mlp: MLPLayers):
        super().__init__()
        self.mlp = mlp
        last = [module for module in mlp.mlp_layers if isinstance(module, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class RQKMeansPlus(RQVAE):
    """RQ-KMeans+ (introduced with GPR, 2025): an RQ-VAE with residual encoder and codes as wide as the embeddings.

    With the codebooks of a k-means run it starts as exactly that run: same codes, and, the decoder being residual too,
    the same reconstruction.
    """

    def __init__(self, in_dim: int, num_emb_list: list[int], layers: list[int] | None = None, **options):
        options = {**options, "e_dim": in_dim, "kmeans_init": False}
        super().__init__(in_dim, num_emb_list, layers=layers, **options)
        self.encoder, self.decoder = ResidualMLP(self.encoder), ResidualMLP(self.decoder)

    def start_from(self, codebooks: list[torch.Tensor]) -> None:
        """Copy codebooks, one [K, in_dim] per level."""
        with torch.no_grad():
            for layer, codes in zip(self.rq.vq_layers, codebooks, strict=True):
                layer.embedding.weight.copy_(codes)
