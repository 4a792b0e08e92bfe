"""DoRA's op against the oracle, and its norm against the norm of the merged matrix."""

from functools import partial

import pytest
import torch
from dora_layers import dora_linear
from judge import USUAL_DTYPES, saved_bytes
from torch import nn

from fastlora.backends import find_backend
from fastlora.ops.dora import dora_norm

pytestmark = pytest.mark.usefixtures("backend", "poisoned_memory")

dtypes = pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), USUAL_DTYPES.values(), ids=USUAL_DTYPES
)


def make(shape, n, r, dtype, adapter_dtype, bias):
    """x and the layer's tensors; all but the weight require gradients; magnitudes aren't norms."""
    k = shape[-1]

    def leaf(*size, dtype):
        return torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_()

    tensors = {
        "x": leaf(*shape, dtype=dtype),
        "weight": leaf(n, k, dtype=dtype).detach(),
        "lora_a": leaf(r, k, dtype=adapter_dtype),
        "lora_b": leaf(n, r, dtype=adapter_dtype),
        "magnitude": leaf(n, dtype=adapter_dtype),
    }
    if bias:
        tensors["bias"] = leaf(n, dtype=dtype)
    with torch.no_grad():
        weight, lora_a, lora_b = (tensors[k].double() for k in ("weight", "lora_a", "lora_b"))
        norm = (weight + 0.5 * lora_b @ lora_a).norm(dim=1)
        tensors["magnitude"].copy_(norm * (1 + 0.3 * torch.randn(n, dtype=torch.float64)))
    return tensors


@pytest.mark.parametrize("p", [0.0, 0.6], ids="p{}".format)
def test_gradients_and_their_gradients(p):
    """The norm is passed in, because DoRA sends no gradient through it."""
    tensors = make((2, 3, 5), 4, 2, torch.float64, torch.float64, True)
    mask = (torch.rand(2, 3, 5) >= p).double() / (1 - p)
    weight = tensors["weight"]
    norm = torch.rand(4, dtype=torch.float64) + 0.5

    def run(x, lora_a, lora_b, magnitude, bias):
        drop = (lambda x: x * mask) if p else None
        settings = {"scale": 0.5, "drop": drop, "p": p, "norm": norm}
        return dora_linear(x, weight, lora_a, lora_b, magnitude, bias=bias, **settings)

    leaves = [tensors[name] for name in ("x", "lora_a", "lora_b", "magnitude", "bias")]
    x, lora_a, lora_b, magnitude, bias = leaves
    xd = x * mask
    z = xd @ (weight + 0.5 * lora_b @ lora_a).T
    torch.testing.assert_close(run(*leaves), magnitude / norm * z + (x - xd) @ weight.T + bias)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_the_magnitude_s_gradient_has_one_rounding_with_dropout(dtype):
    """Where the terms of z cancel, a rounding of x / (1 - p) would exceed z's own rounding."""
    tensors = make((1, 64), 512, 2, dtype, torch.float32, False)
    tensors["lora_b"] = torch.zeros_like(tensors["lora_b"])
    mask = torch.rand(1, 64) >= 0.1
    y = dora_linear(**tensors, drop=lambda x: x * mask / 0.9, p=0.1)
    (found,) = torch.autograd.grad(y, tensors["magnitude"], torch.ones_like(y))
    x, weight = tensors["x"].detach().double(), tensors["weight"].double()
    truth = ((x * mask / 0.9) @ weight.T)[0] / weight.norm(dim=1)
    assert ((found - truth).abs() <= 0.51 * torch.finfo(dtype).eps * truth.abs()).all()


@dtypes
@pytest.mark.parametrize("size", [0.02, 1.0, 50.0])
def test_a_gain_of_any_size_costs_one_rounding(size, dtype, adapter_dtype):
    """z is exact here, so y and dx may each differ from the formula by half a unit only."""
    tensors = make((3, 5), 8, 2, dtype, adapter_dtype, True)
    tensors["x"] = torch.eye(5).to(dtype).requires_grad_()
    tensors["lora_b"] = torch.zeros_like(tensors["lora_b"])
    tensors["bias"] = torch.randn(8).mul(size).to(dtype)
    weight = tensors["weight"].double()
    norm = weight.norm(dim=1)
    tensors["magnitude"] = (size * norm).to(adapter_dtype)
    y, biased = dora_linear(**tensors | {"bias": None}), dora_linear(**tensors)
    gain = (tensors["magnitude"].double() / norm)[None]
    truth = gain * weight.T
    unit = torch.finfo(dtype).eps * 4 if dtype.itemsize > 2 else torch.finfo(dtype).eps * 0.51
    assert ((y - truth).abs() <= unit * truth.abs() + 1e-30).all()
    rounded = weight.T.abs() + tensors["bias"].double().abs()
    assert ((biased - truth - tensors["bias"]).abs() <= (1 + gain) * unit * 2 * rounded).all()
    (dx,) = torch.autograd.grad(y, tensors["x"], torch.ones_like(y))
    expected = (gain[0].to(dtype).double()[:, None] * weight).sum(0)
    assert ((dx - expected).abs() <= 4 * torch.finfo(dtype).eps * (gain.max() + 1) * 8).all()


@dtypes
@pytest.mark.parametrize(("n", "k"), [(3, 5), (70, 2000), (2000, 700)], ids=str)
def test_norm(n, k, dtype, adapter_dtype):
    """All terms are computed in float32, so the error doesn't depend on the weight's dtype."""
    weight = torch.randn(n, k, dtype=torch.float64).to(dtype)
    lora_a = torch.randn(4, k, dtype=torch.float64).to(adapter_dtype).requires_grad_()
    lora_b = torch.randn(n, 4, dtype=torch.float64).to(adapter_dtype)
    norm = dora_norm(weight, lora_a, lora_b, 0.75)
    truth = (weight.double() + 0.75 * lora_b.double() @ lora_a.double()).norm(dim=1)
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    assert not norm.requires_grad
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(norm.double(), truth.detach(), rtol=tolerance, atol=0)


def test_norm_of_rows_that_cancel():
    """weight = - scale lora_b lora_a: rounding may leave a small norm, but no NaN."""
    lora_a, lora_b = torch.randn(4, 50), torch.randn(30, 4)
    norm = dora_norm(-0.5 * lora_b @ lora_a, lora_a, lora_b, 0.5)
    assert (norm < 0.02).all()


@dtypes
def test_an_adapter_that_starts_at_zero_changes_nothing(dtype, adapter_dtype):
    """The norm is then bit-equal to torch's norm of the weight, also for a row of zeros."""
    weight = torch.randn(300, 5000, dtype=torch.float64).to(dtype)
    weight[7] = 0
    lora_a, lora_b = torch.randn(4, 5000).to(adapter_dtype), torch.zeros(300, 4).to(adapter_dtype)
    wide = weight.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(dora_norm(weight, lora_a, lora_b, 0.75), torch.linalg.norm(wide, dim=1))


@pytest.mark.parametrize("drop", [None, nn.Dropout(0.5)], ids=["p0", "p0.5"])
def test_dora_saves_x_h_and_one_output(drop):
    """It saves no float32 copy of x or of the weight, and only one tensor of the output's size.

    With dropout, it also saves x with zeros, and the mask as uint8.
    """
    tensors = make((64, 32), 48, 4, torch.bfloat16, torch.float32, True)
    call = partial(dora_linear, **tensors, scale=0.5, drop=drop, p=0.0 if drop is None else drop.p)
    storages = saved_bytes(call, tensors.values())
    x_bytes, y_bytes, vectors = 64 * 32 * 2, 64 * 48 * 2, 48 * 4
    h_bytes = 64 * 4 * find_backend().h_dtype(torch.bfloat16, torch.get_default_device()).itemsize
    dropped = [] if drop is None else [x_bytes // 2, x_bytes]
    kept = sorted(size for size in storages.values() if size > vectors)
    assert kept == sorted([h_bytes, *dropped, y_bytes])
