"""8-bit products of the torch backend: every integer sum is the oracle's, and so are the calls."""

from itertools import product
from unittest import mock

import call_kinds
import int8
import pytest
import torch
from dora_layers import dora_linear
from int8 import exact, random_weight

import fastlora
from fastlora.backends import int8 as backend
from fastlora.backends import products
from fastlora.call.projection import Base, Output
from fastlora.formats.format import Quantized
from fastlora.formats.packing import pack_weight
from fastlora.formats.rotated_int8 import RotatedInt8, rotate
from fastlora.ops.dora import dora_norm

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])


@pytest.fixture(autouse=True)
def torch_backend_only():
    with fastlora.use_backend("torch"):
        yield


# Several blocks in every loop: rows, columns, sums that are scaled at once, long sums.
BLOCKS = {"_MOST_ROWS": 24, "_SUMS": 24 * 40, "_AT_ONCE": 200, "LONGEST_SUM": 48}
# Changes of the backend's constants, by the paths that calls take then.
PATHS = {
    "whole": {},
    "blocks": BLOCKS,
    # As on a CPU that multiplies 16 bits slowly: x and y are float32 in blocks.
    "blocks in float32": BLOCKS | {"FORCED": True},
    # As on a GPU, or on a CPU whose integer product saturates.
    "float32 sums": {"_sums_are_exact": lambda: False, "_EXACT": 48},
}


def linear(x: torch.Tensor, weight: Quantized, bias: torch.Tensor | None = None) -> torch.Tensor:
    return fastlora.lora_linears(x, [Output(Base(weight, bias))])[0]


def step(x, weight: Quantized, dy, bias=None) -> tuple[torch.Tensor, torch.Tensor]:
    """y and dx."""
    x = x.detach().requires_grad_()
    y = linear(x, weight, bias)
    return y.detach(), *torch.autograd.grad(y, x, dy)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of a rotation's sums, which depends on the number of rows."""
    eps = 4 * torch.finfo(expected.dtype).eps
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=eps, atol=eps * largest)


SHAPES = [*product([1, 2, 7, 16, 17, 33], [64, 100, 192], [1, 48, 65]), (70, 63, 9)]
SHAPES += [(40, 1, 1), (7, 1, 33), (33, 65, 2)]


@dtypes
@pytest.mark.parametrize("changes", PATHS.values(), ids=PATHS)
def test_every_sum_is_exact(monkeypatch, dtype, changes):
    for name, value in changes.items():
        monkeypatch.setattr(products if name == "FORCED" else backend, name, value)
    torch.manual_seed(0)
    for m, k, n in SHAPES:
        x, dy, weight = exact(m, k, dtype=dtype), exact(m, n, dtype=dtype), random_weight(n, k)
        bias = torch.randn(n)
        y, dx = step(x, weight, dy, bias)
        assert torch.equal(y, int8.linear(x, weight, bias).to(dtype)), (m, k, n)
        assert_near(dx, rotate(int8.before_rotation(dy, weight).to(dtype)))


@pytest.mark.parametrize(("n", "k"), [(3, 140_000), (140_000, 3)])
def test_the_largest_sums_don_t_overflow(n, k):
    """Contractions of 140,000 in both directions: a head's vocabulary, for example."""
    codes = torch.full((n, k), 127, dtype=torch.int8)
    weight = Quantized(RotatedInt8(n, k, "float32"), (codes, torch.ones(n)))
    y, dx = step(rotate(torch.ones(17, k)), weight, torch.ones(17, n))
    torch.testing.assert_close(y, torch.full_like(y, 127.0 * k))
    torch.testing.assert_close(dx, rotate(torch.full_like(dx, 127.0 * n)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_isn_t_finite_stays_alone(value):
    x, weight, dy = exact(20, 128), random_weight(48, 128), exact(20, 48)
    expected = step(x, weight, dy)
    x[3, 5], dy[7, 2] = value, value
    for found, truth, row in zip(step(x, weight, dy), expected, (3, 7), strict=True):
        assert not found[row].isfinite().any()
        others = [i for i in range(20) if i != row]
        assert torch.equal(found[others], truth[others])


def test_float16_overflows_only_in_the_result(monkeypatch):
    """Rotated, the numbers of x and of dx are 8 × larger."""
    monkeypatch.setattr(products, "FORCED", False)
    x, dy = (torch.full((20, size), 3e4, dtype=F16) for size in (128, 48))
    y, dx = step(x, pack_weight(torch.full((48, 128), 1 / 64), "int8"), dy)
    torch.testing.assert_close(y, torch.full_like(y, 60000), rtol=0.01, atol=0)
    torch.testing.assert_close(dx, torch.full_like(dx, 22500), rtol=0.01, atol=0)


def relative(found, truth) -> float:
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).norm() / truth.norm())


@dtypes
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "native"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("name", ["layer", "group", "experts", "bank", "adapters"])
def test_calls_are_near_those_of_the_dense_weight(monkeypatch, name, p, wide, dtype):
    """The gradients of adapters and biases are exact: x and dy aren't rounded for them."""
    monkeypatch.setattr(products, "FORCED", wide)  # both paths for 16 bits, whatever this CPU has
    monkeypatch.setattr(call_kinds, "K", 192)
    torch.manual_seed(0)
    kind, found = call_kinds.made(name, dtype, F32), []
    weights = {n: t for n, t in kind.tensors.items() if n.startswith("weight")}
    packed = {n: pack_weight(t, "int8") for n, t in weights.items()}
    leaves = {n: t for n, t in kind.tensors.items() if n not in packed}
    for each in (packed, {n: weight.dense(dtype) for n, weight in packed.items()}):
        torch.manual_seed(1)
        y = kind.call(*(kind.tensors | each).values(), dropout=p)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        gradients = torch.autograd.grad(y, leaves.values(), dy)
        found.append({"y": y} | dict(zip(leaves, gradients, strict=True)))
    for n, one, other in zip(found[0], *(each.values() for each in found), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        is_exact, rounding = n not in ("y", "x"), 1e-6 if dtype == F32 else 1e-2
        assert relative(one, other) < (rounding if is_exact else 0.03), n


def test_x_is_rounded_once_for_all_outputs(monkeypatch):
    run = mock.Mock(wraps=backend.quantize_rows)
    monkeypatch.setattr(backend, "quantize_rows", run)
    x, sizes = torch.randn(40, 128, requires_grad=True), (64, 32, 96)
    weights = [random_weight(n, 128) for n in sizes]
    ys = fastlora.lora_linears(x, [Output(Base(weight)) for weight in weights])
    assert run.call_count == 1
    (dx,) = torch.autograd.grad(sum(y.sum() for y in ys), x)
    assert [call.args[0].shape[1] for call in run.call_args_list] == [128, *sizes]
    apart = [step(x, weight, torch.ones(40, len(weight.tensors[1]))) for weight in weights]
    assert all(torch.equal(y, part[0]) for y, part in zip(ys, apart, strict=True))
    torch.testing.assert_close(dx, sum(part[1] for part in apart), rtol=1e-5, atol=1e-5)


def test_shapes_of_x():
    weight, x = random_weight(48, 128), exact(20, 128)
    y = linear(x, weight)
    assert torch.equal(linear(x[3], weight), y[3])
    assert linear(x[:0], weight).shape == (0, 48)
    assert torch.equal(linear(x.view(2, 2, 5, 128), weight), y.view(2, 2, 5, 48))
    assert torch.equal(linear(x.T.contiguous().T, weight), y)
    assert torch.equal(linear(x.repeat(1, 2)[:, :128], weight), y)
    assert torch.equal(linear(x[::2], weight), y[::2])
    assert torch.equal(linear(x[:1].expand(5, 128), weight), y[:1].expand(5, 48))
    with torch.autocast("cpu", BF16):
        assert torch.equal(linear(x, weight), linear(x.bfloat16(), weight))


def test_float64_transforms_and_second_gradients_use_the_dense_weight():
    weight, x = random_weight(48, 128), torch.randn(20, 128, dtype=torch.float64)
    dense = weight.dense(torch.float64)
    y, dx = step(x, weight, torch.ones(20, 48, dtype=torch.float64))
    torch.testing.assert_close(y, x @ dense.T)
    torch.testing.assert_close(dx, dense.sum(0).expand(20, 128))
    small, run = x.float(), lambda row: linear(row, weight)
    mapped, jacobian = torch.func.vmap(run)(small), torch.func.jacrev(run)(small[0])
    torch.testing.assert_close(mapped, small @ dense.float().T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(jacobian, dense.float(), rtol=1e-4, atol=1e-4)


def test_dora_over_a_base_in_8_bits():
    weight, x = pack_weight(torch.randn(48, 128), "int8"), torch.randn(20, 128)
    lora_a, lora_b = torch.randn(4, 128) / 10, torch.randn(48, 4) / 10
    how, magnitude = {"bias": None, "scale": 0.5, "drop": None}, torch.rand(48) + 1
    ys = []
    for each in (weight, weight.dense(F32)):
        norm = dora_norm(each, lora_a, lora_b, 0.5)
        ys.append(dora_linear(x, each, lora_a, lora_b, magnitude, norm=norm, **how))
    assert relative(*ys) < 0.02
