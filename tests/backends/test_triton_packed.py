"""Packed weights on the Triton backend: the oracle's numbers, and when a weight is made dense."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from judge import ends_of, make_projection
from kernel_cases import recorded
from marks import DEVICE
from packed import random_float8, random_four_bit, random_int8, random_mxfp4, random_nvfp4, stack

import fastlora
from fastlora.backends.triton import at_once, experts
from fastlora.backends.triton.packed import has_kernel
from fastlora.formats.bitsandbytes import FourBit
from fastlora.formats.float8 import Float8
from fastlora.formats.format import Format, Quantized
from fastlora.formats.microscaled import MXFP4
from fastlora.formats.torchao import Affine
from fastlora.kernels.config import FEW_ROWS
from fastlora.kernels.plan import IN_PLACE, use_plan
from fastlora.projection import Adapter, Base, Output, as_outputs

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="expects the interpreter's launches")


@dataclass(frozen=True)
class Another(Format):
    """A format of 8-bit integers that no kernel can read."""

    names = ("codes",)
    label = "another"

    def check(self, tensors) -> None:
        """Accepts any tensors."""

    def read(self, tensors, first, out):
        return out.copy_(tensors[0][first : first + len(out)])


def without_kernel(n: int, k: int) -> Quantized:
    codes = torch.randint(-2, 3, (n, k), dtype=torch.int8)
    return Quantized(Another(n, k), (codes,))


def adapted(weights) -> list[Output]:
    """Each with a bias and an adapter."""
    layers = []
    for weight in weights:
        layer = make_projection(*weight.shape, 3, torch.float32, bias=True)
        layers.append(layer._replace(weight=weight, bias=layer.bias.detach()))
    return as_outputs(layers)


def run(outputs, m: int, dtype=torch.float32, dropout: float = 0.0, ends=None, backend="triton"):
    """All outputs and gradients, and the names of the launched kernels."""
    torch.manual_seed(1)
    x = torch.randn(m, outputs[0].base.weight.shape[-1]).to(dtype).requires_grad_()
    with fastlora.use_backend(backend), recorded() as launches:
        if ends is None:
            ys = fastlora.lora_linears(x, outputs, dropout=dropout)
        else:
            ((weight, bias), ((lora_a, lora_b, scale),)) = outputs[0]
            options = {"bias": bias, "scale": scale, "dropout": dropout}
            ys = [fastlora.grouped_lora_linear(x, weight, lora_a, lora_b, ends, **options)]
        dys = [torch.randn(y.shape).to(y.dtype) for y in ys]
        leaves = [x, *(each for output in outputs for a in output.adapters for each in a[:2])]
        gradients = torch.autograd.grad(ys, leaves, dys)
    return [*ys, *gradients], list(map(name_of, launches))


def name_of(launch) -> str:
    """The kernel's name, with ``*`` if it unpacks, and ``+`` if it adds the low-rank part of dx."""
    makes_more = launch.arguments.get("low_rank") is not None
    return launch.name + "*" * bool(launch.arguments.get("PACKING")) + "+" * makes_more


def count_of(names: list[str]) -> dict[str, int]:
    kinds = {"dequant*": "dense", "gemm_lowrank*": "unpacking", "gemm_lowrank": "product"}
    kinds |= {"gemm_lowrank_few_rows*": "unpacking", "gemm_lowrank_few_rows": "product"}
    kinds |= dict.fromkeys(("lowrank", "weight_grad+"), "in-place")
    return dict(Counter(kinds[name] for name in names if name in kinds))


def assert_numbers(found, kept, truth) -> None:
    """Replayed calls have equal bits, and differ from the truth only by rounding."""
    for value, again, true in zip(found, kept, truth, strict=True):
        assert torch.equal(value, again)
        largest = float(true.detach().abs().amax())
        torch.testing.assert_close(value, true, rtol=1e-5, atol=1e-5 * largest)


CASES = {
    # makers of weights, rows, dropout; expected launches of a forward and a backward
    "few-rows": ([lambda: random_four_bit(24, 64, nested=2)], 5, 0.0, {"unpacking": 2}),
    "as-many-as-are-few": ([lambda: random_int8(24, 40)], FEW_ROWS, 0.3, {"unpacking": 2}),
    "one-more": ([lambda: random_int8(24, 40)], FEW_ROWS + 1, 0.0, {"dense": 2, "product": 2}),
    "blocks-over-rows": ([lambda: random_four_bit(24, 40)], 5, 0.3, {"dense": 2, "product": 2}),
    "group-few": ([lambda: random_int8(24, 40), lambda: random_int8(9, 40)], 5, 0.3,
                  {"unpacking": 3}),
    # dx in place: there is memory for one dense weight at a time
    "group-many": ([lambda: random_int8(24, 40), lambda: random_int8(9, 40)], 70, 0.3,
                   {"dense": 4, "product": 2, "in-place": 1}),
    "unlike-few": ([lambda: random_int8(24, 64), lambda: random_four_bit(9, 64)], 5, 0.0,
                   {"unpacking": 2, "dense": 2, "in-place": 1}),
    "beside-a-dense-one": ([lambda: random_int8(24, 40), lambda: torch.randn(9, 40)], 5, 0.0,
                           {"unpacking": 1, "dense": 1, "product": 1, "in-place": 1}),
    "e2m1-few": ([lambda: random_mxfp4(24, 64), lambda: random_mxfp4(9, 64)], 5, 0.3,
                 {"unpacking": 3}),
    "e2m1-many": ([lambda: random_nvfp4(24, 48)], 70, 0.0, {"dense": 2, "product": 2}),
    "float8-few": ([lambda: random_float8(24, 40, 16, 16, scale=torch.float32)], 5, 0.0,
                    {"unpacking": 2}),
    "float8-many": ([lambda: random_float8(24, 40, 16, 16)], 70, 0.0,
                    {"dense": 2, "product": 2}),
    "float8-with-one-scale": ([lambda: random_float8(24, 40, 24, 40, scale=torch.bfloat16)], 5, 0.0,
                              {"unpacking": 2}),
    "without-a-kernel": ([lambda: without_kernel(24, 40), lambda: random_int8(9, 40)], 5, 0.0,
                         {"product": 1, "in-place": 1, "unpacking": 1, "dense": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_packed_and_dense_weights_give_the_same_numbers(case):
    makers, m, dropout, expected = CASES[case]
    packed = adapted([make() for make in makers])
    dense = [
        replace_weight(output, output.base.weight.dense(torch.float32))
        if isinstance(output.base.weight, Quantized)
        else output
        for output in packed
    ]
    found, names = run(packed, m, dropout=dropout)
    kept, _ = run(packed, m, dropout=dropout)
    truth, _ = run(dense, m, dropout=dropout, backend="torch")
    assert count_of(names) == expected
    assert_numbers(found, kept, truth)


EXPERTS = {
    # maker of one expert's weight, rows of each expert, dropout; expected launches
    "few rows": (lambda: random_four_bit(24, 64), [5, 0, 9], 0.0, {"unpacking": 2}),
    "few rows of e2m1": (lambda: random_nvfp4(24, 48), [5, 0, 9], 0.3, {"unpacking": 2}),
    "many rows of e2m1": (lambda: random_mxfp4(24, 64), [100, 31], 0.0,
                          {"dense": 2, "product": 2}),
    "few rows of each": (lambda: random_float8(24, 40, 8, 8), [40, 0, 31], 0.3, {"unpacking": 2}),
    "few rows of one scale": (lambda: random_float8(24, 40, 24, 40), [5, 0, 9], 0.0,
                              {"unpacking": 2}),
    "many rows": (lambda: random_int8(24, 40), [100, 31], 0.3, {"dense": 2, "product": 2}),
    "many rows of one scale": (lambda: random_float8(24, 40, 24, 40), [100, 31], 0.0,
                               {"dense": 2, "product": 2}),
    "too large": (lambda: random_four_bit(24, 64), [100, 31], 0.0, {"unpacking": 2}),
    "ragged blocks": (lambda: random_float8(24, 40, 16, 8), [5, 0, 9], 0.0, {"product": 2}),
    "nested": (lambda: random_four_bit(24, 64, nested=2), [5, 0, 9], 0.0, {"product": 2}),
    "without a kernel": (lambda: without_kernel(24, 40), [5, 0, 9], 0.3, {"product": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_have_the_numbers_of_dense_ones(case, monkeypatch):
    make, counts, p, expected = EXPERTS[case]
    if case == "too large":
        monkeypatch.setattr(experts, "_LARGEST", 2 * 24 * 64)
    weight = stack([make() for _ in counts])
    n, k = weight.shape[1:]
    count = len(counts)
    lora_a = torch.randn(count, 4, k).requires_grad_()
    lora_b = torch.randn(count, n, 4).requires_grad_()
    packed = Output(Base(weight, torch.randn(count, n)), (Adapter(lora_a, lora_b, 0.75),))
    rows = {"m": sum(counts) + 2, "ends": ends_of(counts), "dropout": p}
    found, names = run([packed], **rows)
    kept, _ = run([packed], **rows)
    dense = replace_weight(packed, weight.dense(torch.float32))
    truth, _ = run([dense], **rows, backend="torch")
    assert count_of(names) == expected
    assert_numbers(found, kept, truth)


def test_experts_of_torch_s_own_product(monkeypatch):
    """If torch has a grouped_mm kernel, it takes the weights that were made dense."""
    monkeypatch.setattr(at_once, "_has_kernel", lambda device: True)
    weight = stack([random_int8(24, 40) for _ in range(3)])
    adapter = Adapter(
        torch.randn(3, 4, 40).requires_grad_(), torch.randn(3, 24, 4).requires_grad_()
    )
    rows = {"m": 200, "dtype": torch.bfloat16, "ends": ends_of([150, 3, 47])}
    dense = weight.dense(torch.bfloat16)
    with use_plan(IN_PLACE):
        found, names = run([Output(Base(weight), (adapter,))], **rows)
        truth, _ = run([Output(Base(dense), (adapter,))], **rows)
    assert count_of(names) == {"dense": 2, "in-place": 2}
    for value, true in zip(found, truth, strict=True):
        assert torch.equal(value, true)


E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
READ = {  # whether a kernel reads one weight, and many experts' weights at once
    "blocks-in-rows": (FourBit(9, 64, "nf4", 64), True, True),
    "blocks-over-rows": (FourBit(9, 66, "nf4", 64), True, False),
    "nested": (FourBit(9, 64, "nf4", 64, 2), True, False),
    "a-scale-for-each": (FourBit(9, 64, "nf4", 1), False, False),
    "48": (FourBit(9, 96, "nf4", 48), False, False),
    "too-long-in-one-row": (FourBit(2**16, 2**16 - 1, "nf4", 64), False, False),
    "as-long-in-rows": (FourBit(2**16, 2**16, "nf4", 64), True, True),
    "too-long-rows": (MXFP4(1, 2**31), False, False),
    "e2m1": (MXFP4(9, 64), True, True),
    "e4m3": (Float8(32, 64, E4M3, 16, 16), True, True),
    "e4m3-ragged": (Float8(24, 64, E4M3, 16, 16), True, False),
    "e4m3-one-scale": (Float8(24, 40, E4M3, 24, 40), True, True),
    "e4m3-24": (Float8(48, 64, E4M3, 24, 64), False, False),
    "e5m2": (Float8(32, 64, E5M2, 16, 16), False, False),
    "int8-rows": (Affine(9, 64, 8, 1, 64), True, True),
    "int8-groups": (Affine(9, 64, 8, 1, 32), False, False),
    "int8-zero-points": (Affine(9, 64, 8, 1, 64, shifted=True), False, False),
    "another": (Another(9, 64), False, False),
}


@pytest.mark.parametrize("case", READ)
def test_which_formats_kernels_read(case):
    format, one, many = READ[case]
    assert (has_kernel(format), has_kernel(format, of_experts=True)) == (one, many)


def replace_weight(output: Output, weight: torch.Tensor) -> Output:
    return Output(Base(weight, output.base.bias), output.adapters)


def test_a_frozen_packed_layer_in_16_bits():
    """Without adapters, and with a backward for x only."""
    weight = random_four_bit(24, 64)
    (y, dx), names = run([Output(Base(weight))], 5, torch.bfloat16)
    (true_y, true_dx), _ = run([Output(Base(weight.dense(torch.bfloat16)))], 5, torch.bfloat16)
    assert torch.equal(y, true_y)
    assert torch.equal(dx, true_dx)
    assert names == ["dequant*", "dequant*"]
