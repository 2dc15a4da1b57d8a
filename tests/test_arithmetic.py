"""Operations counted by formula against those that torch counts, and the measured peak."""

import pytest
import torch
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import arithmetic
from benchmarks.arithmetic import count_forward_flops, measure_peak_gflops


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("rows", "length", "changes"), [(1, 7, {}), (3, 12, {"head_dim": 24, "num_hidden_layers": 3})])
def test_the_formula_counts_what_torch_counts(kind, rows, length, changes):
    if kind == "qwen2":
        changes = {name: value for name, value in changes.items() if name != "head_dim"}
    model = tiny_model(kind, 50, **changes)
    model.set_attn_implementation("eager")  # torch does not count what sdpa does on a CPU
    tokens = torch.randint(2, 50, (rows, length))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, attention_mask=torch.zeros(rows, 1, length, length), logits_to_keep=2)
    counted = count_forward_flops(model.config, rows * length, rows * length**2, 2 * rows)
    assert counter.get_total_flops() == counted


def test_the_peak_is_the_best_size(monkeypatch):
    monkeypatch.setattr(arithmetic, "CPU_SIZES", ((64, 64, 64), (128, 64, 32)))
    peaks = [measure_peak_gflops(dtype, seconds=0.01) for dtype in (torch.float32, torch.bfloat16)]
    assert all(0 < peak < 1e6 for peak in peaks)
