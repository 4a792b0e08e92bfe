"""Features of nn.Linear in LoRALinear and the op: files, nested tensors, transforms."""

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.call.projection import Adapter, Base, Output

LAYOUTS = pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)


@pytest.fixture
def layer() -> fastlora.LoRALinear:
    torch.manual_seed(1)
    layer = fastlora.LoRALinear(8, 6, r=2, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 8, dtype=torch.float64)


@LAYOUTS
def test_a_nested_tensor_is_each_of_its_parts(layer, layout):
    parts = [torch.randn(n, 8, dtype=torch.float64) for n in (3, 5)]
    y = layer(torch.nested.nested_tensor(parts, layout=layout))
    assert y.is_nested
    for found, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(found, layer(part))
    y.to_padded_tensor(0.0).square().sum().backward()
    nested = layer.lora_A.grad.clone(), layer.lora_B.grad.clone()
    layer.zero_grad()
    sum(layer(part).square().sum() for part in parts).backward()
    torch.testing.assert_close(nested, (layer.lora_A.grad, layer.lora_B.grad))


def test_a_wide_adapter_beside_a_nested_tensor_of_16_bits():
    layer = nn.Sequential(nn.Linear(8, 6).bfloat16())
    fastlora.replace_linears(layer, ["0"], r=8, lora_alpha=16)
    assert layer[0].lora_A.dtype == torch.float32
    nn.init.normal_(layer[0].lora_B)
    parts = [torch.randn(n, 8).bfloat16() for n in (3, 5)]
    for found, part in zip(layer(torch.nested.nested_tensor(parts)).unbind(), parts, strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, layer(part), rtol=0.05, atol=0.1)


def group() -> list:
    """A layer with two adapters, one with a bias, and a frozen layer."""
    tensors = {name: torch.randn(shape).double() for name, shape in SHAPES.items()}
    adapter = Adapter(tensors["lora_a"], tensors["lora_b"], 0.5)
    second = Adapter(tensors["lora_a"] * 2, tensors["lora_b"] + 1, -1.5)
    return [
        Output(Base(tensors["weight"]), (adapter, second)),
        fastlora.Projection(tensors["weight"] + 1, *adapter[:2], tensors["bias"], 2.0),
        Output(Base(tensors["weight"] * 2)),
    ]


SHAPES = {"weight": (6, 8), "lora_a": (2, 8), "lora_b": (6, 2), "bias": (6,)}


@LAYOUTS
def test_a_group_of_a_nested_tensor(layout):
    parts, outputs = [torch.randn(n, 8).double() for n in (3, 5)], group()
    ys = fastlora.lora_linears(torch.nested.nested_tensor(parts, layout=layout), outputs)
    for i, part in enumerate(parts):
        found = tuple(y.unbind()[i] for y in ys)
        torch.testing.assert_close(found, fastlora.lora_linears(part, outputs))


NESTED = {
    "features": ([torch.ones(3, 7)] * 2, ValueError, "but x has 7 features"),
    "ragged-features": ([torch.ones(3, 8), torch.ones(3, 7)], ValueError, "parts differ"),
    "vectors": ([torch.ones(8)] * 2, TypeError, "has 2 dimensions, .* contiguous, or jagged"),
    "none": ([], ValueError, "but x has 0 features"),
    "dtype": ([torch.ones(3, 8).double()], TypeError, "weight has dtype torch.float32"),
}


@pytest.mark.parametrize(("parts", "error", "message"), NESTED.values(), ids=NESTED)
def test_a_nested_tensor_that_does_not_fit(parts, error, message):
    with pytest.raises(error, match=message):
        fastlora.LoRALinear(8, 6)(torch.nested.nested_tensor(parts))
