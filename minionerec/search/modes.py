"""How a model is set while it is searched, and set back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def use_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, a model has this attention implementation; its own is restored afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def without_autocast(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model computes in the precision of its weights, also one that accelerate has put under autocast.

    accelerate wraps the forward pass of the object; that of its class lies below.
    """
    wrapped = model.__dict__.pop("forward", None)
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        if wrapped is not None:
            model.forward = wrapped
