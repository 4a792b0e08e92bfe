"""A matrix some rows at a time, where a whole one, or a wide copy of it, would leave the cache."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Elements in one block of dropout, or of what is made float32 for a while.  On a CPU fewer save no
# time and are more often waited for by all threads (docs/performance.md); where a launch costs more
# than memory does, blocks are larger.
SMALLEST_BLOCK, _DEVICE_BLOCK = 2**20, 2**24


def rows_at_a_time(x: Tensor) -> int:
    """How many rows of x make a block: it stays in cache, or on a device it pays its launches."""
    return block_of_rows(x.device, x.shape[-1])


def block_of_rows(device: torch.device, columns: int) -> int:
    """How many rows of so many columns make a block there."""
    return max(1, (SMALLEST_BLOCK if device.type == "cpu" else _DEVICE_BLOCK) // columns)


class Source(Protocol):
    """A matrix that gives its rows in any dtype: a dense one, or what makes them (quantized)."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def read(self, first: int, out: Tensor) -> Tensor:
        """``len(out)`` rows from ``first`` on, in out's dtype: written to ``out``, or as they lie.

        Nobody writes to what comes back.
        """


class Dense(NamedTuple):
    """The source that a plain tensor is."""

    matrix: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.matrix.shape

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def read(self, first: int, out: Tensor) -> Tensor:
        rows = self.matrix[first : first + out.shape[0]]
        return rows if rows.dtype == out.dtype else out.copy_(rows)


def source_of(weight: "Tensor | Source") -> Source:
    """What gives the rows of a weight that is plain, or a source itself."""
    # torch 2.13's copy from a negated float16 view to float32 loses the sign.
    return Dense(weight.resolve_neg()) if isinstance(weight, Tensor) else weight


def widened(source: Source, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """All rows, as many at a time as the buffer has: which, and they in its dtype until the next.

    The buffer is theirs meanwhile.
    """
    step, total = buffer.shape[0], source.shape[0]
    for first in range(0, total, step):
        count = min(step, total - first)
        yield (
            slice(first, first + count),
            source.read(first, buffer if count == step else buffer[:count]),
        )


def buffer_for(matrix: Tensor | Source, dtype: torch.dtype) -> Tensor:
    """For :func:`widened`, as many rows as make a block."""
    if not isinstance(matrix, Tensor):
        rows, columns = matrix.shape
        step = min(rows, block_of_rows(matrix.device, columns))
        return torch.empty(step, columns, dtype=dtype, device=matrix.device)
    # In the matrix's order: to transpose takes much longer than to widen.
    return torch.empty_like(matrix[: rows_at_a_time(matrix)], dtype=dtype)
