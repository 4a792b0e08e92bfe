"""The matrix products of the torch backend; in float32 where this CPU multiplies 16 bits slowly.

Most CPUs have no instructions for 16-bit products (AVX512-BF16, AMX, Arm's bf16).  There torch
multiplies bfloat16 and float16 one number at a time, and dy weight is its slowest product.  On such
a CPU a 16-bit call is a *wide call* (:mod:`.formula`): rows of x, y and dy, the adapters and h are
converted to float32, and sums are float32.  This module converts ("widens") the weight a block of
rows at a time, with the code that unpacks a packed weight.  Each result is rounded once, so it has
a smaller error than torch's own 16-bit product.  A bfloat16 step of Gemma 3 270M takes 1.14 × the
time of its float32 step; with PEFT's own layers, 64 × (docs/cpu.md).

A CPU's calls of a dtype are wide unless torch reports that oneDNN multiplies the dtype on this CPU
(:func:`is_slow`), so all processes on a machine decide the same.  The decision isn't measured,
because on a busy machine threads wait for each other, and float32 looks as slow as 16 bits.
"""

import os
import threading
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..call.projection import HALF_DTYPES, Base, Output
from ..common.row_blocks import read_rows, slices, source_of, widened
from ..formats.format import Quantized

# For tests and measurements: True or False replaces :func:`is_slow`'s decision for this CPU.
FORCED = {"0": False, "1": True}.get(os.environ.get("FASTLORA_WIDE_PRODUCTS", ""))

_LINEAR = torch.ops.aten.linear.out  # linear(x, weight, bias), written to ``out``
_FLAGS = {  # names of torch's functions that report oneDNN's 16-bit products
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
# A block of the weight has at most _BLOCK bytes after it is widened or unpacked, and from
# _FEWEST_OF_WEIGHT to _MOST_OF_WEIGHT rows.  MKL copies x into its own layout for each block.  On a
# Xeon, blocks of 512 rows took up to 8 % more time than 1024, and 2048 took little less.
_BLOCK, _FEWEST_OF_WEIGHT, _MOST_OF_WEIGHT = 2**23, 64, 1024
_ROWS = 2**20  # elements of a float32 block of x, y or dy (4 MiB)
_KEPT = 2 * _BLOCK  # bytes of the largest buffer that a thread keeps after a call
# Rows of x in a block.  Each block of x widens the whole weight again, so it must have many rows.
_FEWEST_ROWS, _MOST_ROWS = 256, 512
# Unused elements between rows of the widened weight.  Without the gap, rows that are a power of 2
# apart map to the same few cache sets.  With it, dy weight took 14 % less time at 16 rows of dy,
# and 3 to 5 % less at 64.
_GAP = 16
# Elements in a block of dx that is summed in float32 while its products have 16 bits
# (``_add_rounding_once``).
_SUMMED = 2**21


def are_wide(x: Tensor) -> bool:
    """Whether products with x run in float32 instead of its own 16-bit dtype.

    Never for a meta or empty tensor, or on a GPU.
    """
    return x.shape[0] > 0 and h_dtype(x.dtype, x.device) != x.dtype


def is_slow(dtype: torch.dtype) -> bool:
    """Whether a CPU's calls of this 16-bit dtype run wide."""
    return not _torch_has(dtype) if FORCED is None else FORCED


def h_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of h, for x of this dtype and device: float32 where calls run wide."""
    return torch.float32 if device.type == "cpu" and dtype in _FLAGS and is_slow(dtype) else dtype


@cache
def _torch_has(dtype: torch.dtype) -> bool:
    """Whether torch says that oneDNN multiplies this dtype on this CPU."""
    flag = getattr(torch.ops.mkldnn, _FLAGS[dtype], None)
    return flag is not None and flag()


class Scratch(threading.local):
    """Buffers that a thread reuses between calls, one for each (use, dtype, memory order).

    ``use`` is a name for the buffer's purpose.  Taking a buffer overwrites the last one with the
    same use and dtype.  Each file has its own Scratch, so files can't overwrite each other's
    buffers.

    Without reuse, each call would get fresh pages from the operating system, which takes longer
    than the work in them.
    """

    def __init__(self) -> None:
        self.matrices: dict[tuple[str, torch.dtype, bool], tuple[Tensor, Tensor]] = {}

    def take(
        self,
        use: str,
        rows: int,
        columns: int,
        dtype: torch.dtype = torch.float32,
        by_columns: bool = False,
        gap: int = 0,
    ) -> Tensor:
        """An uninitialized matrix, valid until the next one for this use is taken.

        ``by_columns``: columns are contiguous instead of rows.  ``gap``: unused elements after each
        row, or after each column with ``by_columns``.
        """
        # A vector is a row, or with ``by_columns`` a column; ``distance`` is from one to the next.
        buffer, matrix = self.matrices.get((use, dtype, by_columns), (None, None))
        # Each use has one gap, so equal shapes have equal strides.
        if matrix is not None and matrix.shape == (rows, columns):
            return matrix
        vectors, distance = (columns, rows + gap) if by_columns else (rows, columns + gap)
        size = vectors * distance
        # A buffer made in inference mode could not be used by later calls outside of it.
        with torch.inference_mode(False):
            if buffer is None or buffer.numel() < size:
                buffer = torch.empty(size, dtype=dtype, device="cpu")
            strides = (1, distance) if by_columns else (distance, 1)
            matrix = buffer.as_strided((rows, columns), strides)
        if size * matrix.element_size() <= _KEPT:
            self.matrices[use, dtype, by_columns] = buffer, matrix
        return matrix

    def widen(self, use: str, matrix: Tensor) -> Tensor:
        """A float32 copy of the matrix, valid until the next one for this use is taken.

        It has the matrix's memory order: a copy between row-major and column-major order would take
        70 times as long.
        """
        (rows, columns), by_columns = matrix.shape, is_by_columns(matrix)
        return self.take(use, rows, columns, by_columns=by_columns).copy_(matrix)

    def matrix_like(self, use: str, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialized matrix of x's shape, valid until the next one for this use is taken.

        On a CPU it is a buffer of the thread.  Under a dispatch mode it is a new tensor, because
        tensors may be fake there.
        """
        dtype = x.dtype if dtype is None else dtype
        if not x.is_cpu or torch._C._len_torch_dispatch_stack():
            return x.new_empty(x.shape, dtype=dtype)
        last = self.matrices.get((use, dtype, False))
        if last is not None and last[1].shape == x.shape:  # as ``take``, without a call
            return last[1]
        return self.take(use, x.shape[0], x.shape[1], dtype)


SCRATCH = Scratch()


def is_by_columns(matrix: Tensor) -> bool:
    """Whether the matrix is stored column by column."""
    return matrix.stride(0) < matrix.stride(1)


def wide_rows(x: Tensor, outputs: Sequence[Output]) -> list[slice]:
    """The blocks of x's rows for a wide call of these outputs, as slices.

    The widest tensor of a block (x, y or dy) has at most _ROWS elements, within the bounds of rows.
    """
    widths = [base.weight.shape[0] for base, _ in outputs if base.weight is not None]
    step = max(_FEWEST_ROWS, min(_MOST_ROWS, _ROWS // max(x.shape[1], *widths, 1)))
    return slices(x.shape[0], step)


def rows_of(tensor, rows: slice):
    """These rows of a tensor, or the tensor itself if they are all of its rows; None for None."""
    if tensor is None or (rows.start == 0 and tensor.shape[0] <= rows.stop):
        return tensor
    return tensor[rows]


def weight_rows(weight: Tensor | Quantized, dtype: torch.dtype) -> Iterable[tuple[slice, Tensor]]:
    """Blocks of the weight in ``dtype``, each with its slice (:func:`widened`)."""
    # rows = _BLOCK bytes / bytes of a row, clamped to [_FEWEST_OF_WEIGHT, _MOST_OF_WEIGHT].
    total, columns = weight.shape
    rows = _BLOCK // dtype.itemsize // max(1, columns)  # in one block
    rows = min(total, _MOST_OF_WEIGHT, max(_FEWEST_OF_WEIGHT, rows))
    source = source_of(weight)
    if isinstance(source, Tensor):
        by_columns = is_by_columns(source)
        buffer = SCRATCH.take("weight", rows, columns, by_columns=by_columns, gap=_GAP)
    else:  # no gap, because unpacking is faster into contiguous rows
        buffer = SCRATCH.take("packed", rows, columns, dtype)
    if rows == total:
        return [(slice(0, total), read_rows(source, 0, buffer))]
    return widened(source, buffer)


def _unpacked(weight: Any, x: Tensor) -> Tensor | None:
    """A weight that isn't in x's dtype, as one matrix for a product with x.

    None: on a CPU, the product unpacks or widens the weight a block of rows at a time.
    """
    if isinstance(weight, Tensor):
        return None if x.is_cpu else weight
    return None if x.is_cpu and weight.format.by_rows else weight.dense(x.dtype)


def base_linear(x: Tensor, base: Base[Tensor], into: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias [M, N], a new tensor or written ``into`` this one.

    The weight may be packed.  A GPU unpacks the whole weight for this product, a CPU block by block
    if the format can.
    """
    weight, bias = base.weight, None if base.bias is None else base.bias.to(x.dtype)
    # ``whole``: the weight as one matrix in x's dtype, or None: multiply block by block.
    in_dtype = isinstance(weight, Tensor) and weight.dtype == x.dtype
    whole = weight if in_dtype else _unpacked(weight, x)
    if whole is not None:
        return linear(x, whole, bias) if into is None else _LINEAR(x, whole, bias, out=into)
    y = x.new_empty(x.shape[0], weight.shape[0]) if into is None else into
    for rows, weight_block in weight_rows(weight, x.dtype):
        _LINEAR(x, weight_block, None if bias is None else bias[rows], out=y[:, rows])
        del weight_block  # free this unpacked block before the next one is unpacked
    return y


def add_dy_weight(dx: Tensor, dy: Tensor, weight: Any, beta: float) -> None:
    """dx = beta · dx + dy weight, in the dtype of dx, in place."""
    in_dtype = isinstance(weight, Tensor) and weight.dtype == dx.dtype
    whole = weight if in_dtype else _unpacked(weight, dx)
    if whole is not None:
        torch.addmm(dx, dy, whole, beta=beta, out=dx)
    elif dx.dtype in HALF_DTYPES:
        _add_rounding_once(dx, dy, weight, beta)
    else:
        for rows, weight_block in weight_rows(weight, dx.dtype):
            torch.addmm(dx, dy[:, rows], weight_block, beta=beta, out=dx)
            del weight_block
            beta = 1.0  # the next blocks of the weight add to dx


def _add_rounding_once(dx: Tensor, dy: Tensor, weight: Tensor | Quantized, beta: float) -> None:
    """:func:`add_dy_weight` for a 16-bit dx.  The products of the weight's blocks have 16 bits.

    Their sum is float32 and is rounded once, so its error doesn't grow with the number of blocks.
    """
    columns = dx.shape[1]
    for block in slices(dx.shape[0], _SUMMED // columns):
        dx_rows, dy_rows = dx[block], dy[block]
        total = SCRATCH.take("total", len(dx_rows), columns)
        total.copy_(dx_rows) if beta else total.zero_()
        product = SCRATCH.take("product", len(dx_rows), columns, dx_rows.dtype)
        for rows, weight_block in weight_rows(weight, dx.dtype):
            total.add_(torch.mm(dy_rows[:, rows], weight_block, out=product))
            del weight_block
        dx_rows.copy_(total)


def product(left: Tensor, right: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """factor · left right.  The factor is applied in the accumulator, before rounding."""
    if out is None:
        out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=factor, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left right, in place."""
    # With equal dtypes the sum is formed in the accumulator and rounded once.
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    return total.add_(torch.mm(left, right))


def thin_gradient(dy: Tensor, h: Tensor) -> Tensor:
    """dyᵀ h, [N, r]."""
    if h.shape[0] >= 256 and h.dtype == torch.float32:
        # With many rows, (hᵀ dy)ᵀ and the copy take as little as half the time on some CPUs.
        return torch.mm(h.T, dy).T.contiguous()
    return torch.mm(dy.T, h)


def cast(tensor, dtype):
    """The tensor in this dtype; None for None."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
