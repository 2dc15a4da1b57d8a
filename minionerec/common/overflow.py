"""An optimizer step that float32 cannot hold, as the end of a training in one line."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

OVERFLOW = "without overflow"  # in what torch says of it


def step_or_stop(optimizer: Optimizer, stop: Callable[[str], None]) -> None:
    """Make a step of the optimizer.

    Args:
        optimizer: with its gradients.
        stop: called with the reason where the step overflows; it raises what the training ends with.
    """
    try:
        optimizer.step()
    except RuntimeError as error:
        if OVERFLOW in str(error):
            stop("the step is larger than float32 holds")
        raise
