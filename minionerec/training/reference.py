"""The frozen reference of the KL term, held in less memory without another result."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def store_linear_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Hold the weights of linear layers in the dtype that autocast multiplies them in.

    Autocast would round these weights in every forward pass, so that the results stay the same to the last bit.
    Embeddings and norms stay as they are, and so does an output layer that is tied to the embedding.

    Args:
        model: frozen, and run under autocast only.
        dtype: of autocast.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in embeddings:
            module.to(dtype)
