"""LoRALinear where nn.Linear works: nested tensors, torch.func, forward-mode differentiation."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import fastlora
from fastlora.reference import lora_linear as reference

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


def formula(layer: fastlora.LoRALinear, x: Tensor) -> Tensor:
    tensors = (layer.weight, layer.lora_A, layer.lora_B)
    return reference(x, *tensors, bias=layer.bias, scale=layer.scaling)


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


@LAYOUTS
def test_dropout_of_a_nested_tensor(layer, layout):
    layer.lora_dropout = 0.5
    x = torch.nested.nested_tensor([torch.randn(n, 8).double() for n in (30, 50)], layout=layout)
    dropped = layer(x).to_padded_tensor(0.0)
    whole = layer.eval()(x).to_padded_tensor(0.0)
    assert not torch.equal(dropped, whole)


def test_vmap(layer, x):
    torch.testing.assert_close(vmap(layer)(x), formula(layer, x))


def test_gradients_for_each_sample(layer, x):
    parameters = dict(layer.named_parameters())
    loss = lambda p, row: functional_call(layer, p, row).square().sum()  # noqa: E731
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, row in enumerate(x):
        expected = torch.autograd.grad(formula(layer, row).square().sum(), layer.lora_A)[0]
        torch.testing.assert_close(each["lora_A"][i], expected)


def test_jacobians_and_hessians(layer, x):
    delta = layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(jacrev(layer)(x[0]), layer.weight + delta)
    torch.testing.assert_close(jvp(layer, (x,), (x,))[1], x @ (layer.weight + delta).T)
    whole = layer.weight + delta
    found = hessian(lambda row: layer(row).square().sum())(x[0])
    torch.testing.assert_close(found, 2 * whole.T @ whole)


def test_forward_mode(layer, x):
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x)))
    torch.testing.assert_close(y.tangent, formula(layer, x) - layer.bias)


def test_a_float32_adapter_beside_16_bits(layer, x):
    layer.weight.data, layer.bias.data = layer.weight.bfloat16(), layer.bias.bfloat16()
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), layer.lora_B.float()
    y = vmap(layer)(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, layer(x.bfloat16()), rtol=0.02, atol=0.02)


def test_a_model_in_compile_still_calls_the_op(layer, x):
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), formula(layer, x))
