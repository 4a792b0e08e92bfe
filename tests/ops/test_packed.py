"""Calls with packed weights: how much is unpacked at a time, and errors."""

import weakref

import pytest
import torch
from judge import (
    call_experts,
    ends_of,
    make_experts,
    make_projection,
    peak_bytes,
    run_torch_backend,
)
from packed import random_four_bit, random_int8, stack

import fastlora
from fastlora.backends import formula, products
from fastlora.call.projection import Projection, as_outputs
from fastlora.formats.bitsandbytes import FourBit
from fastlora.formats.format import Quantized


def projection(n: int, k: int, r: int, dtype: torch.dtype) -> Projection:
    weight = random_four_bit(n, k, "nf4", block=32, nested=4)
    return make_projection(n, k, r, dtype)._replace(weight=weight)


@pytest.fixture(params=[True, False], ids=["wide", "native"])
def wide(request, monkeypatch):
    """Both paths for 16-bit products on a CPU, independent of this CPU."""
    monkeypatch.setattr(products, "FORCED", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("wide")
def test_a_step_never_holds_the_dense_weight(dtype, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK", 2**17)
    for each in (products, formula):
        each.SCRATCH.matrices.clear()
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


def other(tensor):
    return torch.empty_like(tensor, device="meta")


WRONG = {
    "corrupt": (
        lambda t: t[:-1],
        ValueError,
        r"weight is not valid NF4: its packed has shape \(23,\)",
    ),
    "device": (other, ValueError, "a packed weight is on meta, but x is on cpu"),
    "kind": (lambda t: None, TypeError, "a packed weight must be a tensor, not NoneType"),
}


@pytest.mark.parametrize(("change", "error", "match"), WRONG.values(), ids=WRONG.keys())
def test_wrong_packed_tensors_are_refused(change, error, match):
    one = projection(6, 8, 2, torch.float32)
    first, *rest = one.weight.tensors
    wrong = Quantized(one.weight.format, (change(first), *rest))
    with pytest.raises(error, match=match):
        fastlora.lora_linears(torch.randn(3, 8), [one._replace(weight=wrong)])


def test_nested_tensors_have_no_packed_weights():
    one = projection(6, 8, 2, torch.float32)
    nested = torch.nested.nested_tensor([torch.randn(3, 8)], layout=torch.jagged)
    with pytest.raises(TypeError, match="x is nested, but a packed weight"):
        fastlora.lora_linears(nested, [one])


def test_a_stack_with_a_missing_expert():
    experts = make_experts(4, 24, 32, 3, torch.float32, bias=True)
    codes, scales = (weight := stack([random_int8(24, 32) for _ in range(4)])).tensors
    x, ends = torch.randn(9, 32), ends_of([3, 3, 3, 0])
    for tensors, words in (
        ((codes, scales[:3]), "of .* experts"),
        ((codes[:, :-1], scales), "weight is not valid int8"),
        ((codes.mT.contiguous().mT, scales), "call .contiguous"),
        ((codes[0], scales[0]), "weight has shape"),
        ((codes[None], scales[None]), "weight"),
    ):
        wrong = experts._replace(weight=Quantized(weight.format, tensors))
        with pytest.raises(ValueError, match=words):
            call_experts(x, wrong, ends)
