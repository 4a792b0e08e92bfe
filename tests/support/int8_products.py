"""8-bit products by the kernels, checked: rounding of x and dy, integer sums, rotation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import int8
import numpy
import oracles
import torch
from judge import assert_close
from kernel_cases import F32, keep_masks, poisoned
from torch import Tensor

from fastlora.formats import rotated_int8
from fastlora.formats.format import Quantized
from fastlora.formats.rotated_int8 import rotate
from fastlora.kernels.gemm_int8_lowrank import gemm_int8_lowrank
from fastlora.kernels.quantize_rows import quantize_rows
from fastlora.projection import Base, Output

GUARD = -128  # no code


class Scales(NamedTuple):
    """A product's scales of rows, and of columns: dx has none of these."""

    rows: Sequence[Tensor]
    columns: Tensor | None = None


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def check_rounding(
    x: Tensor,
    factors: Tensor | None = None,
    *,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Round the rows of x to (codes, scales); memory around them stays unwritten.

    With factors, codes and scales have the format's bits.  Rotated, they are near, because sums
    over 64 numbers are rounded in another order.
    """
    M, K = x.shape
    memory, all_scales = torch.full((M + 2, K), GUARD, dtype=torch.int8), poisoned(M + 2)
    found = codes, scales = memory[1:-1], all_scales[1:-1]
    quantize_rows(x, codes, scales, factors, precision=precision)
    assert (memory[0] == GUARD).all()
    assert (memory[-1] == GUARD).all()
    assert all_scales[0].isnan()
    assert all_scales[-1].isnan()
    rounds_to = torch.float16 if precision == "tf32" else x.dtype  # TF32 has its mantissa
    expected, scale = rotated_int8.quantize_rows(x, factors, rotated=factors is None)
    if factors is not None:
        assert torch.equal(codes, expected)
        assert torch.equal(scales, scale)
        return found
    step = torch.finfo(rounds_to).eps  # of the largest number
    assert ((scales - scale).abs() <= 8 * step * scale).all()  # √64; 4.7 on an AMD EPYC
    away = (codes.double() - expected.double()).abs()
    assert (away <= 1).all()
    assert away.mean() <= 0.02 + 64 * step * (precision == "tf32")
    return found


def check_product(
    ps: Sequence[Tensor],
    qs: Sequence[Tensor],
    scales: Scales,
    us: Sequence[Tensor] = (),
    vs: Sequence[Tensor] = (),
    *,
    dtype: torch.dtype = F32,
    bias: Tensor | None = None,
    p: float = 0.0,
    seeds: Tensor | None = None,
    precision: str = "ieee",
    config: object = None,
) -> Tensor:
    """Compare a product of int8 with its exact integer sums, scaled (and rotated) in float64."""
    M, N = len(ps[0]), qs[0].shape[1]
    memory = poisoned(M + 4, N, dtype=dtype)
    options = {"bias": bias, "dropout": p, "seeds": seeds, "precision": precision}
    gemm_int8_lowrank(memory[2:-2], ps, qs, us, vs, *scales, config=config, **options)
    assert memory[:2].isnan().all()
    assert memory[-2:].isnan().all()
    masks = keep_masks(seeds, (M, N), p, len(us))

    def formula(wide: torch.dtype, absolute: bool = False) -> Tensor:
        def of(tensor: Tensor) -> Tensor:
            return tensor.abs() if absolute else tensor

        total = torch.zeros(M, N, dtype=wide)
        for left, right, rows in zip(ps, qs, scales.rows, strict=True):
            sums = left.long() @ right.long()  # exact
            scaled = of(sums).to(wide) * rows.to(wide)[:, None]
            total += scaled if scales.columns is None else scaled * scales.columns.to(wide)
        if scales.columns is None:
            total = (
                total.abs().amax(1, keepdim=True).expand_as(total) if absolute else rotate(total)
            )
        for left, right, mask in zip(us, vs, masks, strict=True):
            term = of(left.to(wide)) @ of(right.to(dtype).to(wide))
            total = total + torch.where(mask, term, 0)
        return total if bias is None else total + of(bias.to(dtype).to(wide))

    truth, size = formula(torch.float64), formula(torch.float64, absolute=True)
    # float32, rounded to dtype; TF32 rotates in float16's mantissa
    eager = formula(torch.float32).to(dtype)
    rounded = torch.float16 if precision == "tf32" and scales.columns is None else dtype
    assert_close("out", memory[2:-2], truth, eager, size, rounded)
    if dtype == F32 and not us and bias is None and precision == "ieee" and is_of_ones(scales):
        assert torch.equal(memory[2:-2].double(), truth)
    return memory[2:-2]


def is_of_ones(scales: Scales) -> bool:
    numbers = [*scales.rows, *(() if scales.columns is None else (scales.columns,))]
    return all(bool((each == 1).all()) for each in numbers)


class _Product(torch.autograd.Function):
    """x weightᵀ by exact integer sums; dx from the rounded dy.  x must rotate exactly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantized) -> Tensor:
        ctx.weight = weight
        return int8.linear(x, weight, wide=numpy.float64).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dx = int8.rotated(int8.before_rotation(dy, ctx.weight, numpy.float64).numpy())
        return torch.from_numpy(dx).to(dy.dtype), None


def over(weights: Sequence, outputs: Sequence[Output]) -> list[Output]:
    """The outputs with these base weights."""
    pairs = zip(weights, outputs, strict=True)
    return [o._replace(base=Base(weight, o.base.bias)) for weight, o in pairs]


def lora_linears(x: Tensor, outputs: Sequence[Output], **options: Any) -> tuple[Tensor, ...]:
    """The oracle, with the base products of packed weights in 8 bits."""
    weights = [output.base.weight for output in outputs]
    dense = [w.dense(x.dtype).zero_() if isinstance(w, Quantized) else w for w in weights]
    ys = zip(oracles.lora_linears(x, over(dense, outputs), **options), weights, strict=True)
    return tuple([y + _Product.apply(x, w) if isinstance(w, Quantized) else y for y, w in ys])
