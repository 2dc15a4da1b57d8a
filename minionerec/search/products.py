"""Matrix products in float32 on CPUs: by oneDNN where torch would take a slower library.

On CPUs that are not Intel's, MKL takes slower paths than oneDNN, which torch has on board and keeps for other
precisions. Both sum float32 in float32; results differ by rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear


@functools.cache
def find_onednn() -> torch._ops.OpOverloadPacket | None:
    """oneDNN's product, where it is the faster one: tried once, on a small product."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return None
    try:
        if "GenuineIntel" in Path("/proc/cpuinfo").read_text():
            return None
        product = torch.ops.mkldnn._linear_pointwise
        left, right = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
        works = torch.equal(product(left, right, None, "none", [], ""), left @ right.T)
    except (OSError, AttributeError, RuntimeError):  # another system, another version of torch
        return None
    return product if works else None


def multiply(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` without gradient, by the faster library."""
    if _is_for_onednn(weight) and states.dtype == torch.float32:
        return find_onednn()(states, weight, bias, "none", [], "")
    return linear(states, weight, bias)


def _is_for_onednn(weight: torch.Tensor) -> bool:
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    return plain and not torch.is_autocast_enabled("cpu") and find_onednn() is not None


@contextmanager
def fast_products(model: torch.nn.Module) -> Iterator[None]:
    """Inside, and without gradients, the linear layers of a model use the faster library."""
    changed = []
    try:
        for module in model.modules():
            if type(module) is torch.nn.Linear and "forward" not in vars(module) and _is_for_onednn(module.weight):
                module.forward = partial(_forward, module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _forward(module: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    return multiply(states, module.weight, module.bias)
