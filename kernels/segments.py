"""Rows sorted by segment: where each one's lie, and which segment a tile of rows is in.

Segment e has the rows from ends[e - 1] to ends[e].  What lies behind the last end is nobody's, and
counts as one segment more.  No tile has rows of two segments: with BLOCK rows in each, the tiles of
segment e have the numbers from start // BLOCK + e on.  That grows with e, so the last segment whose
first number isn't above a tile's is the tile's own; and a few numbers are left that are no tile's.
So a kernel finds a tile's segment by itself, with one load of all ends: no table is made before.

The segments are experts, or adapters.  Those of adapters have a factor and a mask each
(:class:`SegmentNumbers`), and an ``order`` [M], int32, where the rows weren't sorted before: the
number of each sorted row in x, or in the result.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .config import power_of_two
from .launch import size_of

_MOST_AT_ONCE = 1024


class SegmentNumbers(NamedTuple):
    """What each segment has of its own, in the place of a factor, and of one mask of dropout.

    A launch that takes this has one projection, and seeds, if any, for each segment.  A mask's
    first row is then the segment's first.
    """

    factors: Tensor  # float32 [segments]
    thresholds: Tensor  # int32 [segments], each of ``dropout_threshold``


def segment_arguments(ends: Tensor | None) -> dict[str, Any]:
    """What the kernels take: ``ends`` int32 [segments], dense; None of all, if no rows are cut."""
    if ends is None:
        return {"ends": None, "segments": None, "SEGMENT_BLOCK": None}
    block = min(_MOST_AT_ONCE, power_of_two(len(ends) + 1))
    return {"ends": ends, "segments": len(ends), "SEGMENT_BLOCK": block}


def sorted_arguments(
    order: Tensor | None, numbers: SegmentNumbers | None, *, scaled: bool, masked: bool
) -> dict[str, Tensor | None]:
    """Of ``numbers``, what a launch reads that is ``scaled`` or ``masked``."""
    factors, thresholds = (None, None) if numbers is None else numbers
    return {
        "order": order,
        "own_factors": factors if scaled else None,
        "own_thresholds": thresholds if masked else None,
    }


def sorted_rows(matrix: Tensor, order: Tensor | None) -> int:
    """How many rows a launch is about: those of a matrix, or as many of them as are sorted."""
    return len(matrix) if order is None else len(order)


def strides_of(tensors: Sequence[Any], ends: Tensor | None) -> tuple[tuple, ...]:
    """The strides of each, from segment to segment first: None, if no rows are cut."""
    return tuple([t.stride() if ends is not None else (None, *t.stride()) for t in tensors])


def bytes_to_find(segments: int | None) -> int:
    """What a program loads to find its tile's segment, at most."""
    return 4 * (segments + 2) if segments else 0


def bytes_beside(arguments: Mapping[str, Any], programs: int, passes: int) -> tuple[int, int]:
    """Of seeds, ends, order and own numbers: their bytes, and what so many programs load of them.

    ``passes``: how often all rows are gone over.
    """
    names = ("seeds", "ends", "order", "own_factors", "own_thresholds")
    operands = [arguments.get(name) for name in names]
    seeds, _, order, factors, thresholds = operands
    each = bytes_to_find(arguments["segments"])
    each += size_of(seeds) if thresholds is None else seeds.element_size() + 4
    each += 0 if factors is None else 4
    return size_of(*operands), each * programs + size_of(order) * passes


@triton.jit
def row_numbers(order, i_row, rows, BLOCK: tl.constexpr):
    """Where the sorted rows from i_row on lie, [BLOCK]."""
    o_row = i_row + tl.arange(0, BLOCK)
    return tl.load(order + o_row, mask=o_row < rows, other=0)


@triton.jit
def own_number(numbers, number, i_segment, segments):
    """A segment's own of these numbers, if it has; else the launch's."""
    if numbers is None:
        return number
    else:
        return tl.load(numbers + min(i_segment, segments - 1))  # nobody's are never looked at


@triton.jit
def segment_rows(ends, segments, i_segment, M):
    """(first row, row behind the last) of a segment, nobody's included; inside of M, come what may.

    Of nobody's, the first row is the last end.
    """
    start = tl.load(ends + i_segment - 1, mask=i_segment > 0, other=0)
    end = tl.load(ends + i_segment, mask=i_segment < segments, other=M)
    return min(max(start, 0), M), min(max(end, 0), M)


@triton.jit
def segment_of_tile(
    ends, segments, i_tile, M, N, BLOCK_M: tl.constexpr, SEGMENT_BLOCK: tl.constexpr
):  # fmt: skip
    """(segment, its first row, the tile's, row behind the segment's last, rows, columns) of a tile.

    Rows up to ``rows`` and columns up to ``columns`` are to be loaded, of N: of nobody's none are.
    Where no rows are cut, all are of one segment.
    """
    if ends is None:
        return 0, 0, i_tile * BLOCK_M, M, M, N
    else:
        i_segment = -1
        for i_first in tl.range(0, segments + 1, SEGMENT_BLOCK, num_stages=1):
            o_segment = i_first + tl.arange(0, SEGMENT_BLOCK)
            inside = (o_segment > 0) & (o_segment <= segments)
            starts = tl.load(ends + o_segment - 1, mask=inside, other=0)  # [SEGMENT_BLOCK]
            is_before = (starts // BLOCK_M + o_segment <= i_tile) & (o_segment <= segments)
            i_segment += tl.sum(is_before.to(tl.int32), 0)
        start, end = segment_rows(ends, segments, i_segment, M)
        i_m = start + max(i_tile - start // BLOCK_M - i_segment, 0) * BLOCK_M
        has_rows = (i_segment < segments) & (i_m < end)
        rows, columns = tl.where(has_rows, end, 0), tl.where(has_rows, N, 0)
        return i_segment, start, i_m, end, rows, columns
