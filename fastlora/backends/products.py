"""The matrix products of the torch backend; in float32 where this CPU multiplies 16 bits slowly.

Most CPUs have no 16-bit products (AVX512-BF16, AMX, Arm's bf16).  There torch multiplies bfloat16
and float16 number by number, dy weight worst of all.  A call of these dtypes *runs wide* on such a
CPU: x goes through in blocks of rows that are float32, and so are adapters, h and sums; the weight
and dy, which are large, are widened a block at a time, here.  What comes out is rounded once, so it
is closer to the truth than torch's own product.  Everywhere else each function is torch's product.

Who runs wide is decided once for a process and dtype: not if torch says that oneDNN multiplies it;
else by a measurement, at the first call that would.  Nothing is measured at import or while
compiling.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from ..blocks import Dense, source_of, widened
from ..projection import Output

# For tests and measurements: True or False decides in the place of this CPU, for all 16-bit calls.
FORCED = {"0": False, "1": True}.get(os.environ.get("FASTLORA_WIDE_PRODUCTS", ""))

_FLAGS = {  # torch's, of 16-bit dtypes
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
# A 16-bit product that takes longer than this many float32 ones is slow: where torch has none of
# its own it takes 15 to 20, measured on a Xeon kept to AVX2; where it has one, 0.5 to 2.
_SLOW = 4.0
_SHAPE = (16, 64, 64)  # small enough for one thread, which waits for no other on a busy machine
# Bytes and rows of a block of the weight, widened or unpacked.  MKL packs x anew for each block:
# with 512 rows a product took up to 1.08 of the time with 1024 on a Xeon; 2048 save little more.
_BLOCK, _FEWEST_OF_WEIGHT, _MOST_OF_WEIGHT = 2**23, 64, 1024
# Elements of a block of x, widened (4 MiB), and of y or dy (1 MiB).  y has at least as many columns
# as the weight's block has rows: 2 MiB with the most rows of x.
_ROWS, _PART = 2**20, 2**18
_KEPT = 2 * _BLOCK  # bytes of the largest buffer that stays
# Rows of x in a block: enough to pay for widening the weight.
_FEWEST_ROWS, _MOST_ROWS = 256, 512
# Elements between the weight's rows: a power of 2 apart, few sets of the cache would hold them.
# dy weight took 0.86 of the time so at 16 rows, 0.95 to 0.97 at 64.
_GAP = 16
# For so many rows x weightᵀ is faster with y transposed, its copy apart: 0.7 to 0.85 of the time at
# 16 rows, 0.93 to 1.07 at 64; at 2 and 3 rows it takes up to twice as long (MKL, a Xeon).
FEW = range(8, 65)


def are_wide(x: Tensor) -> bool:
    """Whether products with x run in float32 in the place of its own dtype: not of a stand-in."""
    if x.dtype not in _FLAGS or not x.is_cpu or not x.shape[0]:
        return False
    return is_slow(x.dtype)


def is_slow(dtype: torch.dtype) -> bool:
    """Whether a CPU's calls of this 16-bit dtype run wide."""
    return _is_slow(dtype) if FORCED is None else FORCED


def h_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which h is kept, for x of this dtype and device.

    float32 where calls may run wide.  It measures nothing, so it can be asked while compiling.
    """
    if dtype not in _FLAGS or device.type != "cpu":
        return dtype
    may_be_wide = not _torch_has(dtype) if FORCED is None else FORCED
    return torch.float32 if may_be_wide else dtype


@cache
def _torch_has(dtype: torch.dtype) -> bool:
    """Whether torch says that oneDNN multiplies this dtype on this CPU."""
    flag = getattr(torch.ops.mkldnn, _FLAGS[dtype], None)
    return flag is not None and flag()


@cache
def _is_slow(dtype: torch.dtype) -> bool:
    return not _torch_has(dtype) and _time(dtype) > _SLOW * _time(torch.float32)


def _time(dtype: torch.dtype) -> float:
    """Seconds of a small dy weight, at best."""
    m, n, k = _SHAPE
    dy, weight = torch.ones(m, n, dtype=dtype), torch.ones(n, k, dtype=dtype)
    times = []
    for _ in range(6):  # the first one warms up
        start = time.perf_counter()
        torch.mm(dy, weight)
        times.append(time.perf_counter() - start)
    return min(times)


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


def wide_rows(x: Tensor, fewest: int | None = None) -> list[slice]:
    """The blocks of x's rows in which a wide call goes."""
    fewest = _FEWEST_ROWS if fewest is None else fewest
    return _slices(x.shape[0], max(fewest, min(_MOST_ROWS, _ROWS // x.shape[1])))


def _slices(count: int, step: int) -> list[slice]:
    return [slice(first, first + step) for first in range(0, count, step)]


def rows_of(tensor, rows: slice):
    """These rows; None stays None."""
    if tensor is None or (rows.start == 0 and tensor.shape[0] <= rows.stop):
        return tensor
    return tensor[rows]


def columns_of(matrix: Tensor, columns: slice) -> Tensor:
    if columns.start == 0 and matrix.shape[1] <= columns.stop:
        return matrix
    return matrix[:, columns]


def _rows_of_weight(columns: int, dtype: torch.dtype = torch.float32) -> int:
    """In a block."""
    rows = _BLOCK // dtype.itemsize // max(1, columns)
    return min(_MOST_OF_WEIGHT, max(_FEWEST_OF_WEIGHT, rows))


def weight_rows(
    weight: Tensor, dtype: torch.dtype = torch.float32, some: slice | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Which rows of the weight, and they in ``dtype``, as :func:`widened` has them."""
    total = weight.shape[0] if some is None else min(weight.shape[0], some.stop) - some.start
    columns, source = weight.shape[1], source_of(weight)
    rows = min(total, _rows_of_weight(columns, dtype))
    if isinstance(source, Dense):
        buffer = SCRATCH.take_like("weight", weight, rows, _GAP)
    else:  # it is made faster where nothing lies between the rows
        buffer = SCRATCH.take("packed", rows, columns, dtype)
    return widened(source, buffer, some)


def write_linear(out: Tensor, x: Tensor, output: Output[Tensor], hs: Sequence[Tensor]) -> None:
    """x weightᵀ + bias + Σ h lora_bᵀ, rounded once to ``out``.

    x, every h and the adapters are float32.
    """
    (weight, bias), adapters = output
    (n, k), m = weight.shape, x.shape[0]
    few = m in FEW
    if few:
        x = for_few_rows(x)
    for part in _slices(n, max(_rows_of_weight(k), _PART // m)):
        count = min(n, part.stop) - part.start
        y = SCRATCH.take("part", m, count, by_columns=few)
        for rows, wide in weight_rows(weight, some=part):
            torch.mm(x, wide.T, out=columns_of(y, rows))
            del wide  # before the next block is made
        if bias is not None:
            y.add_(rows_of(bias, part))
        for h, adapter in zip(hs, adapters, strict=True):
            y.addmm_(h, rows_of(adapter.lora_b, part).T)
        if few:  # torch transposes fast, and it rounds fast, but not both at once
            y = SCRATCH.take("rounded", m, count, out.dtype, by_columns=True).copy_(y)
        columns_of(out, part).copy_(y)


def for_few_rows(x: Tensor) -> Tensor:
    """x as its product with a transposed y reads it fastest, until the next one is taken.

    On one thread a copy whose columns are dense, for which MKL packs nothing: 0.93 of the time at
    64 rows.  On two threads the copy costs more than it saves: 1.03.
    """
    if torch.get_num_threads() > 1:
        return x
    rows, columns = x.shape
    return SCRATCH.take("columns", columns, rows, x.dtype).copy_(x.T).T


def widen_small(dys: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """In float32 if together they are small, since each is read twice: else block by block."""
    if sum([dy.numel() for dy in dys if dy is not None]) > _PART:
        return dys
    return [None if dy is None else SCRATCH.widen(f"dy{i}", dy) for i, dy in enumerate(dys)]


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


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ x, [N, K]."""
    if not are_wide(x):
        return torch.mm(dy.T, x)
    out = x.new_empty(dy.shape[1], x.shape[1])
    step = _rows_of_weight(x.shape[1])
    for first in range(0, len(out), step):
        some, total = slice(first, first + step), None
        for rows in wide_rows(x):
            left, right = SCRATCH.widen("part", dy[rows, some]).T, SCRATCH.widen("x", x[rows])
            total = torch.mm(left, right) if total is None else total.addmm_(left, right)
        assert total is not None  # a wide x has rows
        out[some] = total
    return out


def cast(tensor, dtype):
    """The tensor in this dtype; None stays None."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
