"""Rows sorted by segment (experts): where each one's lie, and which segment a tile of rows is in.

Segment e has the rows from ends[e - 1] to ends[e].  What lies behind the last end is nobody's, and
counts as one segment more.  No tile has rows of two segments: with BLOCK rows in each, the tiles of
segment e have the numbers from start // BLOCK + e on.  That grows with e, so the last segment whose
first number isn't above a tile's is the tile's own; and a few numbers are left that are no tile's.
So a kernel finds a tile's segment by itself, with one load of all ends: no table is made before.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .config import power_of_two

_MOST_AT_ONCE = 1024


def segment_arguments(ends: Tensor | None) -> dict[str, Any]:
    """What the kernels take: ``ends`` int32 [segments], dense; None of all, if no rows are cut."""
    if ends is None:
        return {"ends": None, "segments": None, "SEGMENT_BLOCK": None}
    block = min(_MOST_AT_ONCE, power_of_two(len(ends) + 1))
    return {"ends": ends, "segments": len(ends), "SEGMENT_BLOCK": block}


def banks_of(ends: Tensor | None, tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The strides of stacked tensors from segment to segment."""
    return None if ends is None else tuple(tensor.stride(0) for tensor in tensors)


def bytes_to_find(segments: int | None) -> int:
    """What a program loads to find its tile's segment, at most."""
    return 4 * (segments + 2) if segments else 0


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
    ends, segments, i_tile, M, BLOCK_M: tl.constexpr, SEGMENT_BLOCK: tl.constexpr
):  # fmt: skip
    """(segment, first row, row behind the segment's last) of a tile; no rows, if none is left."""
    i_segment = -1
    for i_first in tl.range(0, segments + 1, SEGMENT_BLOCK, num_stages=1):
        o_segment = i_first + tl.arange(0, SEGMENT_BLOCK)
        inside = (o_segment > 0) & (o_segment <= segments)
        starts = tl.load(ends + o_segment - 1, mask=inside, other=0)  # [SEGMENT_BLOCK]
        is_before = (starts // BLOCK_M + o_segment <= i_tile) & (o_segment <= segments)
        i_segment += tl.sum(is_before.to(tl.int32), 0)
    start, end = segment_rows(ends, segments, i_segment, M)
    return i_segment, start + max(i_tile - start // BLOCK_M - i_segment, 0) * BLOCK_M, end
