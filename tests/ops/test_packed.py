"""Calls with packed weights: those of the dequantised one, and what is kept for them."""

import weakref

import pytest
import torch
from judge import USUAL_DTYPES, check_against_oracle, make_projection
from memory import peak_bytes, run_torch_backend, saved_bytes
from packed import random_four_bit, random_int8

import fastlora
from fastlora.backends import products
from fastlora.formats.format import Quantised
from fastlora.formats.four_bit import FourBit
from fastlora.ops.dora import dora_linear, dora_norm
from fastlora.projection import Base, Output, Projection, as_outputs


def packed(n: int, k: int, kind: str = "nf4") -> Quantised:
    if kind == "int8":
        return random_int8(n, k)
    return random_four_bit(n, k, kind, block=32, nested=4)


def projection(n, k, r, dtype, adapter_dtype=None, bias=False, kind="nf4") -> Projection:
    plain = make_projection(n, k, r, dtype, adapter_dtype, bias)
    return plain._replace(weight=packed(n, k, kind))


@pytest.fixture(params=[True, False], ids=["wide", "native"])
def wide(request, monkeypatch):
    """Both ways of a CPU with 16 bits, whichever this one is."""
    monkeypatch.setattr(products, "FORCED", request.param)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("dtypes", USUAL_DTYPES.values(), ids=USUAL_DTYPES.keys())
@pytest.mark.parametrize("p", [0.0, 0.2], ids=["", "dropout"])
def test_a_group_of_all_kinds(dtypes, p, backend, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK", 512)  # so that every weight is many blocks
    monkeypatch.setattr(products, "_FEWEST_OF_WEIGHT", 4)
    torch.manual_seed(0)
    dtype, adapter_dtype = dtypes
    one = projection(37, 24, 3, dtype, adapter_dtype, bias=True)
    two = make_projection(9, 24, 2, dtype, adapter_dtype)
    three = projection(20, 24, 4, dtype, adapter_dtype, kind="int8")
    more = make_projection(20, 24, 1, dtype, adapter_dtype)._replace(weight=None)
    outputs = [*as_outputs([one, two, three, more]), Output(Base(packed(6, 24, "fp4")))]
    check_against_oracle(torch.randn(2, 5, 24).to(dtype).requires_grad_(), outputs, p)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("m", [0, 1, 30, 300])
def test_any_number_of_rows(m, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    outputs = [projection(70, 51, 4, torch.float32, bias=True)]
    check_against_oracle(torch.randn(m, 51, requires_grad=True), outputs, 0.1 if m else 0.0)


def test_sixteen_bits_are_rounded_once_over_many_blocks(monkeypatch):
    monkeypatch.setattr(products, "FORCED", False)
    monkeypatch.setattr(products, "_BLOCK", 2**10)
    monkeypatch.setattr(products, "_FEWEST_OF_WEIGHT", 4)
    x = torch.randn(30, 64).bfloat16().requires_grad_()
    check_against_oracle(x, [projection(512, 64, 4, torch.bfloat16)])


def test_gradients_of_gradients():
    one = projection(6, 8, 2, torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x, a, b: fastlora.lora_linear(x, one.weight, a, b), (x, one.lora_a, one.lora_b)
    )


def test_transforms_take_the_textbook():
    one = projection(6, 8, 2, torch.float32)
    x = torch.randn(3, 8)
    with torch.no_grad():
        y = torch.func.vmap(lambda row: fastlora.lora_linears(row, [one])[0])(x)
        torch.testing.assert_close(y, fastlora.lora_linears(x, [one])[0])


def test_autocast_makes_the_weight_in_its_dtype():
    one, x = projection(6, 8, 2, torch.float32), torch.randn(3, 8)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        (y,) = fastlora.lora_linears(x, [one])
        (expected,) = fastlora.lora_linears(
            x, [one._replace(weight=one.weight.dense(torch.bfloat16))]
        )
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, atol=0.02, rtol=0.02)


def test_dora():
    one = projection(6, 8, 2, torch.float32)
    weight, lora_a, lora_b = one.weight, one.lora_a, one.lora_b
    dense = weight.dense(torch.float32)
    norm = dora_norm(weight, lora_a, lora_b, 0.5)
    torch.testing.assert_close(norm, dora_norm(dense, lora_a, lora_b, 0.5))
    x, magnitude = torch.randn(3, 8, requires_grad=True), torch.rand(6, requires_grad=True)
    leaves = (x, lora_a, lora_b, magnitude)
    ys = [dora_linear(x, w, lora_a, lora_b, magnitude, scale=0.5) for w in (weight, dense)]
    for found, expected in zip(*[torch.autograd.grad(y.sum(), leaves) for y in ys], strict=True):
        torch.testing.assert_close(found, expected)


def test_what_is_kept_is_x_and_h_and_what_is_packed():
    m, n, k, r = 64, 512, 1024, 4
    one = projection(n, k, r, torch.float32)
    x = torch.randn(m, k, requires_grad=True)
    given = [x, one.lora_a, one.lora_b, *one.weight.tensors]
    kept = saved_bytes(lambda: fastlora.lora_linears(x, [one])[0], apart_from=given)
    assert sum(kept.values()) == 4 * m * r


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("wide")
def test_a_step_never_holds_the_dense_weight(dtype, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK", 2**17)
    products.SCRATCH.matrices.clear()
    m, n, k, r = 16, 1024, 1024, 4
    one, x = projection(n, k, r, dtype), torch.randn(m, k, dtype=dtype, requires_grad=True)
    given = [x, one.lora_a, one.lora_b, *one.weight.tensors]
    outputs = as_outputs([one])
    before, peak, _ = peak_bytes(given, lambda: run_torch_backend(x, outputs, 0.0, frozen=True))
    assert peak - before < n * k  # a quarter of the dense weight in float32


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_dropped_before_the_next_one_is_made(dtype, monkeypatch):
    monkeypatch.setattr(products, "_MOST_OF_WEIGHT", 4)
    made = []

    def make(self, tensors, first, count, dtype):
        assert all(block() is None for block in made)
        block = self.read(tensors, first, torch.empty(count, self.columns, dtype=dtype))
        made.append(weakref.ref(block))
        return block

    monkeypatch.setattr(FourBit, "make", make)
    one, x = projection(12, 16, 2, dtype), torch.randn(70, 16, dtype=dtype, requires_grad=True)
    fastlora.lora_linears(x, [one])[0].sum().backward()
    assert len(made) == 2 * 3


def test_compiled_without_a_break():
    one = projection(6, 8, 2, torch.float32, bias=True)
    x = torch.randn(3, 8, requires_grad=True)

    def run(x):
        return fastlora.lora_linears(x, [one])[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ys = run(x), compiled(x)
    torch.testing.assert_close(*ys)
    leaves = (x, one.lora_a, one.lora_b, one.bias)
    for found, expected in zip(*[torch.autograd.grad(y.sum(), leaves) for y in ys], strict=True):
        torch.testing.assert_close(found, expected)


def other(tensor):
    return torch.empty_like(tensor, device="meta")


WRONG = {
    "corrupt": (lambda t: t[:-1], ValueError, r"weight is no NF4: its packed has shape \(23,\)"),
    "device": (other, ValueError, "a packed weight is on meta, but x is on cpu"),
    "kind": (lambda t: None, TypeError, "a packed weight must be a tensor, not NoneType"),
}


@pytest.mark.parametrize(("change", "error", "match"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tensors_raise_at_the_door(change, error, match):
    one = projection(6, 8, 2, torch.float32)
    first, *rest = one.weight.tensors
    wrong = Quantised(one.weight.format, (change(first), *rest))
    with pytest.raises(error, match=match):
        fastlora.lora_linears(torch.randn(3, 8), [one._replace(weight=wrong)])


def test_nested_tensors_have_no_packed_weights():
    one = projection(6, 8, 2, torch.float32)
    nested = torch.nested.nested_tensor([torch.randn(3, 8)], layout=torch.jagged)
    with pytest.raises(TypeError, match="x is nested, and a packed weight is not"):
        fastlora.lora_linears(nested, [one])
