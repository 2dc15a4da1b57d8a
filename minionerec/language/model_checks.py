"""What is asked of a loaded model: whether its weights are whole and finite, and its longest position."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from minionerec.common.files import InputError
from minionerec.common.processes import say


def check_decoder_only(config: PretrainedConfig) -> None:
    """Stop at a model that is no decoder-only language model.

    Raises:
        InputError: an encoder with a decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{config.model_type} has an encoder beside its decoder; prefix trees need a decoder-only model such as "
            "Qwen, Llama or GPT-2"
        )


def check_loading_report(report: dict[str, Any]) -> None:
    """Stop where weights and config do not fit each other.

    Args:
        report: what `from_pretrained(..., output_loading_info=True)` says.

    Raises:
        InputError: weights of another shape than the config says, or weights that are not there.
    """
    for entry in sorted(report.get("mismatched_keys") or (), key=str):
        name, found, expected = entry if isinstance(entry, tuple) and len(entry) == 3 else (entry, None, None)
        shapes = f": {list(found)} in the file, {list(expected)} by its config.json" if found is not None else ""
        raise InputError(f"weights of {name} have another shape than its config says{shapes}; one of the two is wrong")
    missing = sorted(map(str, report.get("missing_keys") or ()))
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"its files lack weights of its config: {missing[0]}{others}")


def find_broken_weights(model: torch.nn.Module) -> list[str]:
    """Names of the weights with a value that is not finite."""
    broken = []
    for name, weight in model.named_parameters():
        weight = weight.detach()
        weight = weight.to_local() if hasattr(weight, "to_local") else weight  # of FSDP: the part that is here
        if weight.is_floating_point() and weight.numel() and not weight.is_meta:
            # The extremes take NaN over and need no second tensor of the weight's size.
            extremes = torch.stack(torch.aminmax(weight))
            if not bool(torch.isfinite(extremes).all()):
                broken.append(name)
    return broken


def check_weights(model: torch.nn.Module) -> None:
    """Stop at weights that are not finite.

    Raises:
        InputError: which.
    """
    broken = find_broken_weights(model)
    if broken:
        others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise InputError(
            f"weights that are not finite (NaN or infinite): {broken[0]}{others}; its training went wrong, take an "
            "earlier checkpoint"
        )


def limit_length(cutoff_len: int, model: object, *, quiet: bool = False) -> int:
    """`cutoff_len`, or the model's longest position where that is shorter, which is said unless `quiet`.

    Args:
        model: a HF model, or an engine, which knows its own limit.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return cutoff_len
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int) or not 0 < longest < cutoff_len:
        return cutoff_len
    if not quiet:
        say(f"[model] {config.model_type} has {longest} positions: --cutoff_len {cutoff_len} becomes {longest}")
    return longest
