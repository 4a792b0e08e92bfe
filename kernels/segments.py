"""Segments of sorted rows: the rows of each segment, and the segment of each tile of rows.

A segment is the rows of one expert or one adapter.  Segment e has the rows from ends[e - 1] up to
ends[e].  Rows behind the last end have no segment (no expert or adapter); kernels treat them as one
more segment, number ``segments``, whose results are zero.

A tile is multiplied by one segment's matrices, so it has rows of one segment only.  With BLOCK rows
in a tile:

    first_tile(e) = start(e) // BLOCK + e                      grows with e
    segment(tile) = the largest e with first_tile(e) <= tile

For example, BLOCK 16 and ends [20, 24]:

    segment   rows      first number       tiles
    0         0 … 19    0 // 16 + 0 = 0    0 (rows 0 … 15), 1 (rows 16 … 19)
    1         20 … 23   20 // 16 + 1 = 2   2 (rows 20 … 23)
    none      24 …      24 // 16 + 2 = 3   3 …

If a segment needs fewer tiles than there are numbers up to the next first_tile, the last numbers
are tiles that start after the segment's end.  They load and store nothing.  Every program finds its
segment by one load of all ends, so no table has to be computed before the launch.

Adapters have a factor and a mask for each segment (:class:`SegmentNumbers`).  Where the rows of x
aren't sorted by segment in memory, the launch visits them in sorted order: ``order`` [M], int32,
has the row number in x, or in the result, of each sorted row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .config import power_of_two
from .launch import size_of

_MOST_AT_ONCE = 1024  # the most ends in one load


class SegmentNumbers(NamedTuple):
    """Per-segment factor and dropout, in place of one for the whole launch.

    A launch with these numbers has one projection, and with dropout one seed for each segment.  Row
    0 of a segment's mask is the segment's first row.
    """

    factors: Tensor  # float32 [segments]
    thresholds: Tensor  # int32 [segments], from ``dropout_threshold``


def segment_arguments(ends: Tensor | None) -> dict[str, Any]:
    """A kernel's arguments for ``ends``, int32 [segments], contiguous; without it, all are None."""
    if ends is None:
        return {"ends": None, "segments": None, "SEGMENT_BLOCK": None}
    block = min(_MOST_AT_ONCE, power_of_two(len(ends) + 1))
    return {"ends": ends, "segments": len(ends), "SEGMENT_BLOCK": block}


def sorted_arguments(
    order: Tensor | None, numbers: SegmentNumbers | None, *, scaled: bool, masked: bool
) -> dict[str, Tensor | None]:
    """A kernel's arguments for ``order`` and ``numbers``.

    ``scaled``: whether the launch multiplies by factors.  ``masked``: whether it applies dropout.
    """
    factors, thresholds = (None, None) if numbers is None else numbers
    return {
        "order": order,
        "own_factors": factors if scaled else None,
        "own_thresholds": thresholds if masked else None,
    }


def sorted_rows(matrix: Tensor, order: Tensor | None) -> int:
    """The number of rows of a launch: the matrix's, or with ``order`` the sorted ones."""
    return len(matrix) if order is None else len(order)


def strides_of(tensors: Sequence[Any], ends: Tensor | None) -> tuple[tuple, ...]:
    """The strides of each tensor; the first is from segment to segment, None without segments."""
    return tuple([t.stride() if ends is not None else (None, *t.stride()) for t in tensors])


def small_operand_bytes(
    arguments: Mapping[str, Any], programs: int, passes: int
) -> tuple[int, int]:
    """Bytes of a launch's small operands: seeds, ends, order, per-segment factors and thresholds.

    Returns (bytes with each element counted once, bytes as all programs load them).  ``passes``:
    how many programs load the order of one row.
    """
    names = ("seeds", "ends", "order", "own_factors", "own_thresholds")
    operands = [arguments.get(name) for name in names]
    seeds, _, order, factors, thresholds = operands
    segments = arguments.get("segments")
    # To find its tile's segment, a program loads at most all ends (int32), and two of them again.
    each = 4 * (segments + 2) if segments else 0
    each += size_of(seeds) if thresholds is None else seeds.element_size() + 4
    each += 0 if factors is None else 4
    return size_of(*operands), each * programs + size_of(order) * passes


@triton.jit
def row_numbers(order, i_row, rows, BLOCK: tl.constexpr):
    """The row numbers in memory of BLOCK sorted rows, from sorted row i_row on."""
    o_row = i_row + tl.arange(0, BLOCK)
    return tl.load(order + o_row, mask=o_row < rows, other=0)


@triton.jit
def own_number(numbers, number, i_segment, segments):
    """numbers[i_segment], for one number per segment; ``number`` if ``numbers`` is None."""
    if numbers is None:
        return number
    else:
        return tl.load(numbers + min(i_segment, segments - 1))  # rows without a segment ignore it


@triton.jit
def mask_numbers(seeds, own_thresholds, threshold, i, i_segment, segments):
    """(seed, threshold) of projection i's mask; with ``own_thresholds``, of the segment's mask.

    A mask counts rows from 0; a segment's own mask counts them from the segment's first row.
    """
    i_seed = i if own_thresholds is None else min(i_segment, segments - 1)
    return tl.load(seeds + i_seed), own_number(own_thresholds, threshold, i_segment, segments)


@triton.jit
def segment_rows(ends, segments, i_segment, M):
    """(first row, row after the last) of segment i_segment: ends[i_segment - 1], ends[i_segment].

    Both are clamped to 0 … M, so wrong ``ends`` cause no access outside of the tensors.

    i_segment = ``segments`` has the rows without a segment, from the last end to M.
    """
    start = tl.load(ends + i_segment - 1, mask=i_segment > 0, other=0)
    end = tl.load(ends + i_segment, mask=i_segment < segments, other=M)
    return min(max(start, 0), M), min(max(end, 0), M)


@triton.jit
def segment_of_tile(
    ends, segments, i_tile, M, N, BLOCK_M: tl.constexpr, SEGMENT_BLOCK: tl.constexpr
):  # fmt: skip
    """(segment, its first row, the tile's first row, the segment's end, rows, columns) of a tile.

    The tile loads rows below ``rows`` and columns below ``columns`` of a matrix [M, N].  Both are 0
    for rows without a segment, so their results are zero.  The tile stores rows below the segment's
    end.  Without ``ends``, all rows are one segment.
    """
    if ends is None:
        return 0, 0, i_tile * BLOCK_M, M, M, N
    else:
        # i_segment = (number of e with start(e) // BLOCK_M + e <= i_tile) - 1, where start(e) is
        # ends[e - 1].  start(0) is 0, which isn't loaded, so e = 0 is always counted.
        i_segment = -1
        for i_first in tl.range(0, segments + 1, SEGMENT_BLOCK, num_stages=1):
            o_segment = i_first + tl.arange(0, SEGMENT_BLOCK)
            inside = (o_segment > 0) & (o_segment <= segments)
            starts = tl.load(ends + o_segment - 1, mask=inside, other=0)  # [SEGMENT_BLOCK]
            is_before = (starts // BLOCK_M + o_segment <= i_tile) & (o_segment <= segments)
            i_segment += tl.sum(is_before.to(tl.int32), 0)
        start, end = segment_rows(ends, segments, i_segment, M)
        # The max keeps i_m in range if ``ends`` isn't sorted.
        i_m = start + max(i_tile - start // BLOCK_M - i_segment, 0) * BLOCK_M
        has_rows = (i_segment < segments) & (i_m < end)
        rows, columns = tl.where(has_rows, end, 0), tl.where(has_rows, N, 0)
        return i_segment, start, i_m, end, rows, columns
