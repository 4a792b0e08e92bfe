"""8-bit products of the torch backend, with a weight of the format ``RotatedInt8``.

For the weight's ``codes`` [N, K] and ``scale`` [N]:

    xq, s = quantize_rows(rotate(x))         y  = (xq codesᵀ) · s · scale + bias
    dq, s = quantize_rows(dy · scale)        dx = rotate((dq codes) · s)

The products xq codesᵀ and dq codes are summed exactly in int32, and both read the same codes.  The
later steps are computed in float32 and rounded once, in blocks of rows that stay in the cache.
Outputs with the same x share xq, and their parts of dx are summed before the rotation.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..call.projection import Base
from ..common.row_blocks import slices
from ..formats.format import Quantized
from ..formats.rotated_int8 import LARGEST, LONGEST_SUM, quantize_rows, rotate_in
from .products import Scratch, rows_of

SCRATCH = Scratch()
# The int32 sums that one product computes (16 MiB), and the sums that are scaled at once (512 KiB).
_SUMS, _AT_ONCE = 2**22, 2**17
_MOST_ROWS = 4096
# A float32 sum of so many products of two codes is exact, also on tensor cores (TF32).
_EXACT = 1024


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and the scale of x, rotated and in 8 bits; valid until the next call."""
    return quantize_rows(x, rotated=True, codes=SCRATCH.matrix_like("codes", x, torch.int8))


def linear_in_8_bits(
    x: tuple[Tensor, Tensor], base: Base[Any], dtype: torch.dtype, into: Tensor | None = None
) -> Tensor:
    """x weightᵀ + bias [M, N] in this dtype: a new tensor, or ``into``, which is overwritten.

    x has the form that :func:`rounded` returns.
    """
    (xq, x_scale), (codes, scale), bias = x, base.weight.tensors, base.bias
    y = x_scale.new_empty(len(xq), len(codes), dtype=dtype) if into is None else into
    for rows in slices(len(y), _MOST_ROWS):
        for columns in slices(len(codes), _SUMS // (rows.stop - rows.start)):
            place, matrix = y[rows, columns], codes[columns].t()
            for some, made in _scaled("scaled y", xq[rows], x_scale[rows], matrix, place):
                made.mul_(scale[columns])
                place[some] = made if bias is None else made.add_(bias[columns])
    return y


def add_dy_in_8_bits(dx: Tensor, pairs: Sequence[tuple[Tensor, Quantized]], beta: float) -> None:
    """dx = beta · dx + Σ dy weight, in place, over pairs (dy [M, N], weight [N, K])."""
    step = min(_MOST_ROWS, _SUMS // max(dx.shape[1], *[dy.shape[1] for dy, _ in pairs]))
    for rows in slices(len(dx), step):
        parts, place = [], dx[rows]
        for i, (dy, weight) in enumerate(pairs):
            (codes, scale), some = weight.tensors, dy[rows]
            quantized = quantize_rows(some, scale, SCRATCH.matrix_like(f"dy {i}", some, torch.int8))
            parts.append(_scaled(f"scaled dx {i}", *quantized, codes, place))
        # All pairs yield the same blocks of rows, one after another.
        for (some, made), *others in zip(*parts, strict=True):
            for _, other in others:
                made.add_(other)
            into, rotated = place[some], rotate_in(dx.dtype, made)
            # beta is 0 or 1.
            into.add_(rotated) if beta else into.copy_(rotated)


def _scaled(
    use: str, codes: Tensor, scale: Tensor, matrix: Tensor, like: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (codes matrix) · scale in float32, a block of rows at a time, each with its slice.

    codes int8 [M, L], scale [M], matrix int8 [L, columns]; ``like`` [M, columns].
    """
    # Usually one product.  If L exceeds LONGEST_SUM, several are added in float32.
    sums = [
        int_product(codes[:, part], rows_of(matrix, part), f"{use}, {part.start}", like)
        for part in slices(len(matrix), LONGEST_SUM)
    ]
    step = _AT_ONCE // like.shape[1] if like.is_cpu else len(like)
    for rows in slices(len(like), step):
        made = SCRATCH.matrix_like(use, like[rows], torch.float32).copy_(sums[0][rows])
        for other in sums[1:]:
            made.add_(other[rows])
        yield rows, made.mul_(scale[rows, None])


def int_product(left: Tensor, right: Tensor, use: str, like: Tensor) -> Tensor:
    """The exact int32 product of two int8 matrices, of the shape of ``like``."""
    out = SCRATCH.matrix_like(use, like, torch.int32)
    # torch._int_mm gives wrong sums if ``right`` is a transposed column, because it misreads the
    # strides (torch 2.13).  On a GPU it raises for few rows, odd sizes and rows with gaps.
    if left.is_cpu and len(right) > 1 and _sums_are_exact():
        return torch._int_mm(left, right, out=out)
    out.zero_()
    for part in slices(len(right), _EXACT):
        out += torch.mm(left[:, part].float(), right[part].float()).int()
    return out


@cache
def _sums_are_exact() -> bool:
    """Whether ``torch._int_mm`` is exact on this CPU.

    Without VNNI, oneDNN adds pairs of products in 16 bits, which saturate.
    """
    codes = torch.full((32, 64), LARGEST, dtype=torch.int8, device="cpu")
    return bool((torch._int_mm(codes, codes.t()) == 64 * LARGEST**2).all())
