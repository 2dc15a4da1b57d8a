"""The autoencoder whose bottleneck is residual-quantised."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from rq.models.layers import MLPLayers
from rq.models.rq import ResidualVectorQuantizer
from rq.settings import HIDDEN_WIDTHS

LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}


class RQVAE(nn.Module):
    """Encoder MLP in_dim -> layers -> e_dim, residual quantiser, decoder MLP the other way round.

    `config` holds the arguments, so that `RQVAE(**config)` builds the model of a checkpoint.

    Args:
        in_dim: width of the embeddings.
        num_emb_list: codes per level.
        e_dim: width of the codes.
        layers: hidden widths of the encoder, default 2048, 1024, 512, 256, 128, 64.
        dropout_prob: dropout on the input of every layer.
        bn: batch norm before each activation.
        loss_type: reconstruction loss, mse or l1.
        quant_loss_weight: weight of the quantisation loss.
        beta: weight of the commitment term in it.
        kmeans_init, kmeans_iters: start of the codes from k-means over the first training batch.
        sk_epsilons, sk_iters: Sinkhorn assignment in training, one epsilon per level, 0 for the nearest code.

    Raises:
        ValueError: another loss_type, or another number of epsilons than of levels.
    """

    def __init__(
        self,
        in_dim: int,
        num_emb_list: list[int],
        e_dim: int = 32,
        layers: list[int] | None = None,
        *,
        dropout_prob: float = 0.0,
        bn: bool = False,
        loss_type: str = "mse",
        quant_loss_weight: float = 1.0,
        beta: float = 0.25,
        kmeans_init: bool = True,
        kmeans_iters: int = 100,
        sk_epsilons: list[float] | None = None,
        sk_iters: int = 50,
    ):
        super().__init__()
        if loss_type not in LOSSES:
            raise ValueError(f"loss_type {loss_type!r}: expected one of {', '.join(LOSSES)}")
        layers = list(HIDDEN_WIDTHS if layers is None else layers)
        self.config = {
            "in_dim": in_dim,
            "num_emb_list": list(num_emb_list),
            "e_dim": e_dim,
            "layers": layers,
            "dropout_prob": dropout_prob,
            "bn": bn,
            "loss_type": loss_type,
            "quant_loss_weight": quant_loss_weight,
            "beta": beta,
            "kmeans_init": kmeans_init,
            "kmeans_iters": kmeans_iters,
            "sk_epsilons": sk_epsilons,
            "sk_iters": sk_iters,
        }
        self.loss_type, self.quant_loss_weight = loss_type, quant_loss_weight
        widths = [in_dim, *layers, e_dim]
        self.encoder = MLPLayers(widths, dropout_prob, bn)
        self.rq = ResidualVectorQuantizer(
            num_emb_list,
            e_dim,
            sk_epsilons=sk_epsilons,
            beta=beta,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sk_iters=sk_iters,
        )
        self.decoder = MLPLayers(widths[::-1], dropout_prob, bn)

    def forward(self, x: torch.Tensor, use_sk: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [n, in_dim] -> reconstruction [n, in_dim], quantisation loss, code numbers [n, levels]."""
        # Under autocast the MLPs give bfloat16; distances and the loss need x's own precision.
        encoded = self.encoder(x).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            quantised, quant_loss, indices = self.rq(encoded, use_sk)
        return self.decoder(quantised).to(x.dtype), quant_loss, indices

    @torch.no_grad()
    def get_indices(self, xs: torch.Tensor, use_sk: bool = False) -> torch.Tensor:
        """Code numbers [n, levels] of xs [n, in_dim]."""
        return self.rq(self.encoder(xs), use_sk)[2]

    def compute_loss(
        self, out: torch.Tensor, quant_loss: torch.Tensor, xs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(reconstruction + quant_loss_weight * quantisation, reconstruction), means over elements."""
        reconstruction = LOSSES[self.loss_type](out, xs)
        return reconstruction + self.quant_loss_weight * quant_loss, reconstruction
