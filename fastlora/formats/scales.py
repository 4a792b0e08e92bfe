"""Which scales belong to some rows, where a scale is for a block of rows and columns."""

from torch import Tensor


def of_rows(values: Tensor, first: int, count: int, block_rows: int) -> Tensor:
    """Those of ``count`` rows from ``first`` on: [count, n], or [1, n] if they are in one block.

    ``values``: [blocks of rows, n].
    """
    some = values[first // block_rows : (first + count - 1) // block_rows + 1]
    if block_rows == 1 or len(some) == 1:
        return some
    ahead = first % block_rows
    return some.repeat_interleave(block_rows, 0)[ahead : ahead + count]
