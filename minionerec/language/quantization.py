"""A frozen base in 4 bits under LoRA (QLoRA, arXiv 2305.14314) by bitsandbytes, and the way back to a plain model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel

from minionerec.common.files import InputError
from minionerec.common.processes import process_state


def check_4bit() -> None:
    """Stop where there is no bitsandbytes.

    Raises:
        InputError: how to get it.
    """
    if find_spec("bitsandbytes") is None:
        raise InputError("--load_in_4bit True: needs bitsandbytes, which is not installed (requirements-gpu.txt)")


def quantize_on_loading() -> dict[str, Any]:
    """Arguments of `from_pretrained` for NF4 weights with quantised scales, computed in bf16 on a GPU.

    Only the linear layers of the decoder are quantised; embedding, output layer and norms keep their precision.
    """
    device = process_state().device
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_layout(model: PreTrainedModel) -> None:
    """Let 4-bit layers on a CPU keep the one layout that has gradients.

    Where the CPU has AVX512-BF16, bitsandbytes repacks them in the first forward pass in evaluation mode, that is
    in the first validation, for a kernel without a backward pass; training would go on with wrong gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_in_4bit(model: torch.nn.Module) -> bool:
    """Whether a model, plain or wrapped by peft, was loaded in 4 bits."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return bool(getattr(base, "is_loaded_in_4bit", False))


def merge_4bit_layers(model: PeftModel) -> None:
    """Replace the 4-bit layers by plain ones on the CPU, into whose float32 weights their LoRA matrices are merged.

    A weight W + scale * B A is that of the trained model, where W is the dequantised one. peft itself would quantise
    the sum again, which moves every weight.

    Args:
        model: with LoRA; changed in place. What else it has of adapters stays.
    """
    import bitsandbytes as bnb
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

    base = model.get_base_model()
    layers = {
        name: part for name, part in base.named_modules() if isinstance(part, (bnb.nn.Linear4bit, LoraLinear4bit))
    }
    for name, layer in layers.items():
        if name.endswith(".base_layer"):
            continue  # inside a layer with LoRA
        quantised = layer.base_layer if isinstance(layer, LoraLinear4bit) else layer
        weight = bnb.functional.dequantize_4bit(quantised.weight.data, quantised.weight.quant_state).float()
        if layer is not quantised:
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).float()
        bias = quantised.bias
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(weight.detach().cpu(), requires_grad=False)
        if bias is not None:
            plain.bias = torch.nn.Parameter(bias.detach().float().cpu(), requires_grad=False)
        base.set_submodule(name, plain)
    base.hf_quantizer.remove_quantization_config(base)
    base.is_loaded_in_4bit = False
    base.cpu()
