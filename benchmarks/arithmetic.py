"""How much of a benchmark's time its arithmetic alone would take: counted operations over the measured peak.

The peak is measured in the process of the benchmark, not read from a data sheet, so that clock, threads and whatever
else the machine does are in it. What it reaches is a bound for every way to compute the same products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer
from transformers import PretrainedConfig

# (rows, inner, columns) of the products that are tried: square ones, and those of a batch with a model's matrices.
CPU_SIZES = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (400, 576, 1536), (400, 1536, 576))
GPU_SIZES = ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096))
BACKWARD = 2  # a backward pass takes two products for every one of the forward pass: by the inputs, by the weights


def measure_peak_gflops(
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seconds: float = 0.2,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.nn.functional.linear,
) -> float:
    """The most that products of matrices reach here, in 10^9 floating-point operations per second.

    Args:
        dtype: of the matrices. On a GPU, float32 products follow `torch.get_float32_matmul_precision`.
        device: where they are multiplied, with as many threads as torch uses now.
        seconds: how long each size is repeated.
        product: what multiplies [m, k] and [n, k].

    Returns:
        2 m k n / the shortest time, of the size where that is largest.
    """
    device = torch.device(device)
    best = 0.0
    for rows, inner, columns in CPU_SIZES if device.type == "cpu" else GPU_SIZES:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(columns, inner, device=device).to(dtype)
        timer = Timer(
            "product(left, right)",
            globals={"product": product, "left": left, "right": right},
            num_threads=torch.get_num_threads(),
        )
        measured = timer.blocked_autorange(min_run_time=seconds)
        best = max(best, 2 * rows * inner * columns / min(measured.times) / 1e9)
    return best


def count_forward_flops(config: PretrainedConfig, tokens: int, attended_pairs: int, logit_rows: int) -> int:
    """Floating-point operations of the matrix products of a forward pass, 2 for every multiply-add.

    Per layer and token, 2 x the weights: queries and output 2 h a d, keys and values 2 h k d, gated MLP 3 h i; per
    layer and attended pair 4 a d (scores, and the sum of the values); per row of logits 2 h v. Norms, rotations and
    softmax are left out.

    Args:
        config: of a decoder-only model with a gated MLP, such as Llama, Qwen2 or Qwen3: hidden size h, a attention
            heads and k key heads of width d, intermediate size i, vocabulary v.
        tokens: that go through the layers.
        attended_pairs: (query, key) pairs, summed over the rows.
        logit_rows: hidden states whose logits are computed.
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    attention_weights = 2 * config.hidden_size * width * (heads + key_heads)
    weights = attention_weights + 3 * config.hidden_size * config.intermediate_size
    layers = config.num_hidden_layers * (2 * tokens * weights + 4 * heads * width * attended_pairs)
    return layers + 2 * logit_rows * config.hidden_size * config.vocab_size
