"""Rotated int8: 8-bit weights for 8-bit products.

Each block of 64 input features is multiplied by a Hadamard matrix (rotated), so that no feature is
much larger than the others of its row.  Then each row of the weight, and in a call each row of x,
is rounded to 8 bits with one scale.  The rotations of x and of the weight cancel in x weightᵀ.

This file also reads and writes the weight of fastlora's layer ``layers.int8.Int8Linear``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common.other_packages import is_class
from ..common.row_blocks import slices
from .arithmetic import packed_by_rows
from .format import Expected, Format, Quantized, name_of
from .vendor import PackedLayer, checked

BLOCK = 64  # features in one block of the rotation
LARGEST = 127  # the largest code; -128 isn't used
# A sum of more products could overflow int32: 2³¹ / 127² = 133,144.
LONGEST_SUM = 133_000
# The least value of a row's largest magnitude, so that 127 / largest is finite.
_NOTHING = 2.0**-100
# The elements that a CPU rounds at once: their float32 copy, 512 KiB, stays in a core's cache.
_AT_ONCE = 2**17


@dataclass(frozen=True)
class RotatedInt8(Format):
    """weight = rotate(codes · scale), computed in float32 and rounded once to the result's dtype.

    codes int8 [rows, columns], from -127 to 127; scale float32 [rows].  ``compute`` is the dtype of
    the weight before it was packed.  8-bit products multiply the codes by the codes of a rotated x:

    xq, x_scale = quantize_rows(rotate(x))      y = (xq codesᵀ) · x_scale · scale

    The sums xq codesᵀ are exact in int32, up to 133,000 products in a sum.
    """

    compute: str

    label: ClassVar[str] = "rotated int8"
    product: ClassVar[str] = "int8"

    def expected(self) -> Expected:
        if not getattr(getattr(torch, self.compute, None), "is_floating_point", False):
            raise ValueError(f"{self.compute} came as the weight's dtype, but must be floating")
        codes = (self.rows, self.columns), (torch.int8,)
        return {"codes": codes, "scale": ((self.rows,), (torch.float32,))}

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        codes, scale = (tensor[first : first + len(out)] for tensor in tensors)
        return out.copy_(rotate(codes.float().mul_(scale[:, None])))


@cache
def hadamard(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix [64, 64], divided by 8: symmetric, and its own inverse.  Entries ± 1/8."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < BLOCK:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / BLOCK**0.5


def rotate(x: Tensor) -> Tensor:
    """x [M, K] with each block of 64 columns multiplied by :func:`hadamard`.

    The last K % 64 columns are copied.  The result has x's dtype; for 16 bits, sums are computed in
    float32 and rounded once.  A second rotation gives x back within rounding.
    """
    whole = x.shape[1] // BLOCK * BLOCK
    blocks = x[:, :whole].reshape(-1, BLOCK)
    rotated = torch.mm(blocks, hadamard(x.dtype, x.device)).view(len(x), whole)
    return rotated if whole == x.shape[1] else torch.cat([rotated, x[:, whole:]], 1)


def rotate_in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """x cast to this dtype and rotated.

    float32 replaces float16, because a rotation makes numbers up to 8 × larger, and the larger ones
    may exceed float16's range.
    """
    return rotate(x.to(torch.float32 if dtype == torch.float16 else dtype))


def quantize_rows(
    x: Tensor,
    factor: Tensor | None = None,
    codes: Tensor | None = None,
    rotated: bool = False,
) -> tuple[Tensor, Tensor]:
    """Round rows of x [M, K] to codes int8 [M, K] and a scale float32 [M]: x ≈ codes · scale.

    v is x; with ``factor`` [K], it is x · factor; with ``rotated``, it is rotate_in(x's dtype, x).
    largest is the largest |v| of a row, or 2⁻¹⁰⁰ if that is larger.  In float32:

        codes = round(v · (127 / largest)), ties to even          scale = largest / 127

    A row with NaN has the scale NaN, and a row with infinity has the scale infinity.  The codes of
    such a row are unspecified, and no product with it is finite.  If ``codes`` is a tensor, the
    codes are written to it.
    """
    M, K = x.shape
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device) if codes is None else codes
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    # A tensor, because torch may replace a division by a number with a multiplication.
    most = scale.new_full((), LARGEST)
    step = max(1, _AT_ONCE // max(1, K) if x.is_cpu else M)
    buffer = torch.empty(min(step, M), K, dtype=torch.float32, device=x.device)
    for rows in slices(M, step):
        values = buffer[: rows.stop - rows.start]
        values.copy_(rotate_in(x.dtype, x[rows]) if rotated else x[rows])
        if factor is not None:
            values.mul_(factor)
        # amax and amin of v take 20 % less time than amax of |v|, which needs a buffer for |v|.
        largest = torch.maximum(values.amax(1), values.amin(1).neg_(), out=scale[rows])
        values.mul_(torch.div(most, largest.clamp_min_(_NOTHING))[:, None])
        codes[rows].copy_(values.round_())
    return codes, scale.div_(most)


def pack_rotated(weight: Tensor) -> Quantized:
    """A dense weight [N, K] in this format.  NaN and infinity aren't checked here."""
    (N, K), dtype = weight.shape, name_of(weight.dtype)
    tensors = packed_by_rows(weight, partial(quantize_rows, rotated=True))
    return Quantized(RotatedInt8(N, K, dtype), tensors)


# fastlora's layer.


def owns(layer: Any, kind: type[nn.Module]) -> bool:
    return is_class(kind, f"{__package__.partition('.')[0]}.layers.int8", "Int8Linear")


@checked("its int8 weight is")
def read(layer: Any) -> PackedLayer:
    tensors = layer.codes.view(torch.int8), layer.scale.view(torch.float32)
    return PackedLayer(Quantized(layer.format, tensors))
