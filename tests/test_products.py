"""Products by the faster library: the same within rounding, for the model that is searched and only meanwhile."""

import pytest
import torch
from tiny import tiny_model

from minionerec.search import products
from minionerec.search.products import fast_products, multiply


@pytest.fixture
def counted(monkeypatch):
    """oneDNN's product on any CPU, counted; skipped where torch is built without it."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    shapes = []

    def product(states, weight, *others):
        shapes.append((tuple(states.shape), tuple(weight.shape)))
        return torch.ops.mkldnn._linear_pointwise(states, weight, *others)

    monkeypatch.setattr(products, "find_onednn", lambda: product)
    return shapes


@pytest.mark.parametrize("shape", [(3, 5, 8), (1, 8), (0, 8), (2, 0, 8), (4, 1, 7, 8)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_usual_product(counted, shape, with_bias):
    generator = torch.Generator().manual_seed(len(shape))
    states, weight = torch.randn(shape, generator=generator), torch.randn(6, 8, generator=generator)
    bias = torch.randn(6, generator=generator) if with_bias else None
    expected = torch.nn.functional.linear(states, weight, bias)
    torch.testing.assert_close(multiply(states, weight, bias), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        multiply(states.transpose(0, -2), weight, bias), expected.transpose(0, -2), atol=1e-5, rtol=1e-5
    )
    assert len(counted) == 2
    # Parts of a matrix, as of an output layer; and what is not float32 stays where it was.
    part = multiply(states, weight[2:5], None if bias is None else bias[2:5])
    torch.testing.assert_close(part, expected[..., 2:5], atol=1e-5, rtol=1e-5)
    before = len(counted)
    assert multiply(states.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu"):
        assert multiply(states, weight).dtype == torch.bfloat16
    assert len(counted) == before


def test_a_model_is_changed_only_inside(counted):
    model, row = tiny_model("qwen2", 40), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected = model(row).logits
        with pytest.raises(KeyError), fast_products(model):
            torch.testing.assert_close(model(row).logits, expected, atol=1e-5, rtol=1e-5)
            assert len(counted) == 7 * 2 + 1
            raise KeyError
        assert torch.equal(model(row).logits, expected) and len(counted) == 15
        # Another precision is left to torch.
        with fast_products(model.bfloat16()):
            model(row)
    assert len(counted) == 15 and not any("forward" in vars(module) for module in model.modules())


def test_where_it_is_not_faster_nothing_changes(monkeypatch):
    model = tiny_model("llama", 40)
    monkeypatch.setattr(products, "find_onednn", lambda: None)
    with fast_products(model):
        assert not any("forward" in vars(module) for module in model.modules())
    states = torch.randn(3, 32)
    assert torch.equal(multiply(states, model.lm_head.weight), model.lm_head(states))
