"""gated and gated_backward: act(gate) ∘ up and its gradients, against float64."""

import oracles
import pytest
import torch
from kernel_cases import BF16, DEVICE, F32, counted_launches, dtypes, poisoned, random
from torch import Tensor

from fastlora.backends import GatedProduct, find_backend
from fastlora.backends.gated_products import ACTIVATIONS as OF_TORCH
from fastlora.kernels.gated import ACTIVATIONS, gated, gated_backward, why_not_gated

pytestmark = pytest.mark.usefixtures("poisoned_memory")

activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def truth(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> list[Tensor]:
    """y, d_gate and d_up in float64."""
    gate, up = gate.double().requires_grad_(), up.double().requires_grad_()
    y = oracles.gated(gate, up, activation)
    return [y.detach(), *torch.autograd.grad(y, (gate, up), dy.double())]


def check(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """Require results that are computed in float32 and rounded once."""
    found = [poisoned(*gate.shape, dtype=gate.dtype) for _ in range(3)]
    assert gated(gate, up, activation, found[0]) is found[0]
    gated_backward(dy, gate, up, activation, found[1], found[2])
    size = (1.0 + dy.double().abs()) * (1.0 + gate.double().abs()) * (1.0 + up.double().abs())
    info = torch.finfo(gate.dtype)
    for value, expected in zip(found, truth(dy, gate, up, activation), strict=True):
        limit = info.eps * expected.abs() + 8 * torch.finfo(F32).eps * size + info.tiny
        assert ((value.double() - expected).abs() <= limit).all()


def operands(m: int, n: int, dtype: torch.dtype = F32) -> list[Tensor]:
    dy, gate, up = (random(m, n, dtype) for _ in range(3))
    return [dy, gate.mul_(3.0), up]


def test_the_same_activations_as_torch_s_backend():
    assert set(ACTIVATIONS) == set(OF_TORCH)


@dtypes
@activations
def test_any_activation(activation, dtype):
    check(*operands(6, 50, dtype), activation)


@pytest.mark.parametrize("n", [1, 7, 1023, 1024, 1025, 2100])
@pytest.mark.parametrize("m", [1, 3])
def test_any_shape(m, n):
    check(*operands(m, n), "silu")


@pytest.mark.parametrize("layout", ["window", "every-second-row"])
def test_rows_of_any_stride(layout):
    dy, gate, up = (random(5, 40, BF16, layout) for _ in range(3))
    check(dy, gate, up, "silu")


def test_halves_of_one_matrix():
    """Experts have gate and up as halves of one matrix; the gradients are halves also."""
    both, dy = random(5, 80), random(5, 40)
    gate, up = both.chunk(2, dim=1)
    gradients = poisoned(5, 80)
    gated_backward(dy, gate, up, "silu", *gradients.chunk(2, dim=1))
    _, *expected = truth(dy, gate, up, "silu")
    torch.testing.assert_close(gradients.double(), torch.cat(expected, 1), rtol=1e-5, atol=1e-5)


@activations
def test_in_the_place_of_dy(activation):
    dy, gate, up = operands(5, 40, BF16)
    expected = [torch.empty_like(dy) for _ in range(2)]
    gated_backward(dy, gate, up, activation, *expected)
    d_up = torch.empty_like(dy)
    gated_backward(dy, gate, up, activation, dy, d_up)
    assert torch.equal(dy, expected[0])
    assert torch.equal(d_up, expected[1])


@activations
def test_large_numbers_infinities_and_nan(activation):
    """Both backends must agree with torch's own operations."""
    gate = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4, torch.nan]])
    gate = gate.to(DEVICE)
    dy, up = torch.full_like(gate, 0.5), torch.full_like(gate, 2.0)
    leaf = gate.clone().requires_grad_()
    expected = OF_TORCH[activation].function(leaf) * up
    (slope,) = torch.autograd.grad(expected, leaf, dy)
    assert_close = torch.testing.assert_close
    for backend in ("torch", "triton"):
        module = find_backend(backend)
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(gate)
        product = GatedProduct(gate, up, activation)
        module.gated_backward(dy, product, d_gate, d_up)
        assert_close(module.gated(product), expected.detach(), equal_nan=True)
        assert_close(d_up, expected.detach() / 4, equal_nan=True)
        assert_close(d_gate[:, :-1], slope[:, :-1])


@dtypes
def test_bytes_are_as_stated(dtype):
    dy, gate, up = operands(3, 1500, dtype)
    with counted_launches() as launches:
        out = gated(gate, up, "silu", torch.empty_like(gate))
        gated_backward(dy, gate, up, "silu", out, torch.empty_like(gate))
    assert [counted.launch.name for counted in launches] == ["gated", "gated_backward"]
    size = gate.numel() * dtype.itemsize
    for counted, (loaded, stored) in zip(launches, ((2, 1), (3, 2)), strict=True):
        assert counted.stated.loaded == counted.loads.total == loaded * size
        assert counted.stated.loaded_by_tiles == counted.stated.loaded
        assert counted.stated.stored == counted.stores.total == stored * size


def test_reasons_against_operands():
    assert why_not_gated(random(3, 4)) == ""
    assert why_not_gated(random(3, 1, layout="window")) == ""
    assert "aren't contiguous" in why_not_gated(random(3, 4, layout="column-major"))
    assert "negated" in why_not_gated(torch.ones(2, 2, dtype=torch.cfloat).conj().imag[:, :1])
    assert "programs" in why_not_gated(random(1, 4)[:0])
