"""Multi-layer perceptron used as encoder and decoder."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn


class MLPLayers(nn.Module):
    """Linear layers with ReLU between them and none after the last.

    forward: [..., layers[0]] -> [..., layers[-1]] (with bn: [n, layers[0]] only).

    State dicts have the names of the published implementation: dropout, linear, batch norm and ReLU are numbered
    through in `mlp_layers`, so dropout stands there at probability 0 too.

    Args:
        layers: widths from input to output, at least two.
        dropout: applied to the input of every layer.
        bn: batch norm before each activation.

    Raises:
        ValueError: fewer than two widths.
    """

    def __init__(self, layers: list[int], dropout: float = 0.0, bn: bool = False):
        super().__init__()
        if len(layers) < 2:
            raise ValueError(f"an MLP needs an input and an output width, got {layers}")
        modules: list[nn.Module] = []
        for position, (width_in, width_out) in enumerate(pairwise(layers)):
            modules.append(nn.Dropout(dropout))
            linear = nn.Linear(width_in, width_out)
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            modules.append(linear)
            if position < len(layers) - 2:
                if bn:
                    modules.append(nn.BatchNorm1d(width_out))
                modules.append(nn.ReLU())
        self.mlp_layers = nn.Sequential(*modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp_layers(x)
