"""The matrix products of the torch backend; in float32 where this CPU multiplies 16 bits slowly.

Most CPUs have no 16-bit products (AVX512-BF16, AMX, Arm's bf16).  There torch multiplies bfloat16
and float16 number by number, dy weight worst of all.  A call of these dtypes *runs wide* on such a
CPU (:mod:`.formula`): rows of x, y and dy are float32, and so are adapters, h and sums.  The weight
is widened a block of rows at a time, here, as a packed one is made.  What comes out is rounded
once, so it is closer to the truth than torch's own product.

Who runs wide is the same in every process on a machine: whoever torch doesn't say of that oneDNN
multiplies his dtype.  (No measurement decides: on a busy machine float32 is as slow, since one
thread waits for another.)
"""

import os
import threading
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..blocks import Dense, Source, source_of, widened
from ..formats.format import Quantized
from ..projection import HALF_DTYPES, Base, Output

# For tests and measurements: True or False decides in the place of this CPU, for all 16-bit calls.
FORCED = {"0": False, "1": True}.get(os.environ.get("FASTLORA_WIDE_PRODUCTS", ""))

_FLAGS = {  # torch's, of 16-bit dtypes
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
# Bytes and rows of a block of the weight, widened or unpacked.  MKL packs x anew for each block:
# with 512 rows a product took up to 1.08 of the time with 1024 on a Xeon; 2048 save little more.
_BLOCK, _FEWEST_OF_WEIGHT, _MOST_OF_WEIGHT = 2**23, 64, 1024
_ROWS = 2**20  # elements of a block of x, y or dy, widened (4 MiB)
_KEPT = 2 * _BLOCK  # bytes of the largest buffer that stays
# Rows of x in a block: enough to pay for widening the weight.
_FEWEST_ROWS, _MOST_ROWS = 256, 512
# Elements between the weight's rows: a power of 2 apart, few sets of the cache would hold them.
# dy weight took 0.86 of the time so at 16 rows, 0.95 to 0.97 at 64.
_GAP = 16
# Elements of dx that are summed in float32 at once, where dy and a packed weight have 16 bits.
_SUMMED = 2**21


def are_wide(x: Tensor) -> bool:
    """Whether products with x run in float32 in the place of its own dtype: not of a stand-in."""
    if x.dtype not in _FLAGS or not x.is_cpu or not x.shape[0]:
        return False
    return is_slow(x.dtype)


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


class _Scratch(threading.local):
    """Buffers that a thread keeps between calls, one for each use and dtype.

    Fresh pages would take longer than what is done in them.
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
        """A matrix with anything in it, its own until the next one for this use is taken.

        ``gap``: elements between its rows, or between its columns if they are dense.
        """
        buffer, matrix = self.matrices.get((use, dtype, by_columns), (None, None))
        if matrix is not None and matrix.shape == (rows, columns):
            return matrix
        lines, step = (columns, rows + gap) if by_columns else (rows, columns + gap)
        size = lines * step
        with torch.inference_mode(False):  # what is made inside could not be used outside
            if buffer is None or buffer.numel() < size:
                buffer = torch.empty(size, dtype=dtype, device="cpu")
            strides = (1, step) if by_columns else (step, 1)
            matrix = buffer.as_strided((rows, columns), strides)
        if size * matrix.element_size() <= _KEPT:
            self.matrices[use, dtype, by_columns] = buffer, matrix
        return matrix

    def take_like(self, use: str, matrix: Tensor, rows: int, gap: int = 0) -> Tensor:
        """The same for so many rows of this matrix: another order would be 70 times as slow."""
        first, second = matrix.stride()
        return self.take(use, rows, matrix.shape[1], by_columns=first < second, gap=gap)

    def widen(self, use: str, matrix: Tensor) -> Tensor:
        """The matrix in float32, until the next one for this use is taken."""
        return self.take_like(use, matrix, matrix.shape[0]).copy_(matrix)


SCRATCH = _Scratch()


def matrix_like(use: str, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A matrix of x's shape, with anything in it, until the next one for this use is taken.

    On a CPU it is the thread's own, but under a dispatch mode: there tensors may be fake.
    """
    dtype = x.dtype if dtype is None else dtype
    if x.is_cpu and not torch._C._len_torch_dispatch_stack():
        return SCRATCH.take(use, x.shape[0], x.shape[1], dtype)
    return x.new_empty(x.shape, dtype=dtype)


def wide_rows(x: Tensor, outputs: Sequence[Output]) -> list[slice]:
    """The blocks of x's rows in which a wide call of these outputs goes."""
    widths = [base.weight.shape[0] for base, _ in outputs if base.weight is not None]
    step = max(_FEWEST_ROWS, min(_MOST_ROWS, _ROWS // max(x.shape[1], *widths, 1)))
    return [slice(first, first + step) for first in range(0, x.shape[0], step)]


def rows_of(tensor, rows: slice):
    """These rows; None stays None."""
    if tensor is None or (rows.start == 0 and tensor.shape[0] <= rows.stop):
        return tensor
    return tensor[rows]


def columns_of(matrix: Tensor, columns: slice) -> Tensor:
    if columns.start == 0 and matrix.shape[1] <= columns.stop:
        return matrix
    return matrix[:, columns]


def _rows_of_weight(columns: int, dtype: torch.dtype) -> int:
    """In a block."""
    rows = _BLOCK // dtype.itemsize // max(1, columns)
    return min(_MOST_OF_WEIGHT, max(_FEWEST_OF_WEIGHT, rows))


def weight_rows(weight: Tensor | Source, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Which rows of the weight, and they in ``dtype``, as :func:`widened` has them."""
    (total, columns), source = weight.shape, source_of(weight)
    rows = min(total, _rows_of_weight(columns, dtype))
    if isinstance(source, Dense):
        buffer = SCRATCH.take_like("weight", source.matrix, rows, _GAP)
    else:  # it is made faster where nothing lies between the rows
        buffer = SCRATCH.take("packed", rows, columns, dtype)
    return widened(source, buffer)


def _comes_in_blocks(weight: Tensor | Quantized, x: Tensor) -> bool:
    """Whether it is made for a product with x on a CPU: unpacked, or widened for a wide x."""
    return x.is_cpu and (isinstance(weight, Quantized) or weight.dtype != x.dtype)


def base_linear(x: Tensor, base: Base[Tensor], into: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias [M, N], new or written ``into`` this; of a plain weight or a packed one.

    On a GPU a packed weight is made as a whole, for this one product.
    """
    weight, bias = base
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if _comes_in_blocks(weight, x):
        y = x.new_empty(x.shape[0], weight.shape[0]) if into is None else into
        for rows, some in weight_rows(weight, x.dtype):
            _write_linear(columns_of(y, rows), x, some, None if bias is None else bias[rows])
            del some  # before the next block is made
        return y
    if isinstance(weight, Quantized):
        weight = weight.dense(x.dtype)
    return linear(x, weight, bias) if into is None else _write_linear(into, x, weight, bias)


def _write_linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.T, out=y)
    return torch.addmm(bias, x, weight.T, out=y)


def add_dy_weight(dx: Tensor, dy: Tensor, weight: Tensor | Quantized, beta: float) -> None:
    """dx = beta · dx + dy weight, in dx's dtype."""
    if not _comes_in_blocks(weight, dx):
        dense = weight.dense(dx.dtype) if isinstance(weight, Quantized) else weight
        torch.addmm(dx, dy, dense, beta=beta, out=dx)
    elif dx.dtype in HALF_DTYPES:
        _add_rounding_once(dx, dy, weight, beta)
    else:
        for rows, some in weight_rows(weight, dx.dtype):
            torch.addmm(dx, columns_of(dy, rows), some, beta=beta, out=dx)
            del some
            beta = 1.0


def _add_rounding_once(dx: Tensor, dy: Tensor, weight: Tensor | Quantized, beta: float) -> None:
    """The same in 16 bits: the products of blocks are summed in float32."""
    columns = dx.shape[1]
    step = max(1, _SUMMED // columns)
    for first in range(0, dx.shape[0], step):
        some, dy_rows = dx[first : first + step], dy[first : first + step]
        total = SCRATCH.take("total", len(some), columns)
        total.copy_(some) if beta else total.zero_()
        product = SCRATCH.take("product", len(some), columns, some.dtype)
        for rows, made in weight_rows(weight, dx.dtype):
            total.add_(torch.mm(columns_of(dy_rows, rows), made, out=product))
            del made
        some.copy_(total)


def product(left: Tensor, right: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """factor · left right, scaled in the accumulator, before the product is rounded."""
    if out is None:
        out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=factor, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left right, in place."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    return total.add_(torch.mm(left, right))


def thin_gradient(dy: Tensor, h: Tensor) -> Tensor:
    """dyᵀ h, [N, r]."""
    if h.shape[0] >= 256 and h.dtype == torch.float32:
        # Over many rows (hᵀ dy)ᵀ is up to twice as fast on some CPUs, and worth the copy.
        return torch.mm(h.T, dy).T.contiguous()
    return torch.mm(dy.T, h)


def cast(tensor, dtype):
    """The tensor in this dtype; None stays None."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
