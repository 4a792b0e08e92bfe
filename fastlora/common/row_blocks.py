"""Blocks of rows: work on part of a matrix at a time, so that the part stays in the cache.

The masked x of dropout and the float32 copy of a 16-bit weight are made block by block.  With it a
16-bit layer's step takes 1.05 to 1.25 × a float32 layer's on a CPU without 16-bit products
(docs/cpu.md).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Elements in one block.  On a CPU, smaller blocks save no time, and threads wait for each other
# more often (docs/cpu.md).  On a GPU, blocks are larger, because each block costs launches.
SMALLEST_BLOCK, _DEVICE_BLOCK = 2**20, 2**24


def rows_at_a_time(x: Tensor) -> int:
    """The number of rows of x in one block."""
    return block_of_rows(x.device, x.shape[-1])


def block_of_rows(device: torch.device, columns: int) -> int:
    """The number of rows in one block of a matrix with ``columns`` columns on this device."""
    return max(1, (SMALLEST_BLOCK if device.type == "cpu" else _DEVICE_BLOCK) // columns)


def slices(total: int, step: int) -> list[slice]:
    """Slices of ``step`` numbers, at least 1, that cover ``total``; the last may be shorter."""
    step = max(1, step)
    return [slice(first, min(first + step, total)) for first in range(0, total, step)]


def source_of(weight: Any) -> Any:
    """The weight as a source of rows: a plain tensor, or a packed weight with a method ``read``."""
    # torch 2.13's copy from a negated float16 view to float32 loses the sign.
    return weight.resolve_neg() if isinstance(weight, Tensor) else weight.source()


def read_rows(source: Any, first: int, out: Tensor) -> Tensor:
    """``len(out)`` rows of a source from ``first`` on, in the dtype of ``out``.

    They are written to ``out``, or are a view of the source; callers must not write to them.
    """
    if not isinstance(source, Tensor):
        return source.read(first, out)
    rows = source[first : first + out.shape[0]]
    return rows if rows.dtype == out.dtype else out.copy_(rows)


def widened(source: Any, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield all rows in the buffer's dtype, a block at a time, each with its slice of the matrix.

    A block is valid until the next one is read, because all blocks share the buffer.
    """
    step = buffer.shape[0]
    for rows in slices(source.shape[0], step):
        count = rows.stop - rows.start
        yield rows, read_rows(source, rows.start, buffer if count == step else buffer[:count])


def buffer_for(matrix: Any, dtype: torch.dtype) -> Tensor:
    """A buffer of one block of rows, for :func:`widened`."""
    if not isinstance(matrix, Tensor):
        rows, columns = matrix.shape
        step = min(rows, block_of_rows(matrix.device, columns))
        return torch.empty(step, columns, dtype=dtype, device=matrix.device)
    # empty_like keeps the order of the strides: transposing takes much longer than widening.
    return torch.empty_like(matrix[: rows_at_a_time(matrix)], dtype=dtype)
