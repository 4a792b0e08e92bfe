"""Sums of planes: what splits over rows or columns left, added in a fixed order."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .common import cast
from .config import cdiv
from .launch import Launch, Work, launch, size_of

_BLOCK = 1024


@triton.jit
def sum_planes_kernel(planes, out, sizes, counts, BLOCK: tl.constexpr):
    """OUT_i = Σ_s PLANES_i[s], in the order of s.

    PLANES_i [counts_i, sizes_i], OUT_i [sizes_i].
    """
    # One grid for all sums: a block belongs to the first i whose blocks still hold it.
    i_block = tl.program_id(0)
    for i in tl.static_range(len(planes)):
        o_element = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = (o_element >= 0) & (o_element < sizes[i])
        blocks = (sizes[i] - 1) // BLOCK + 1
        if (i_block >= 0) & (i_block < blocks):
            b_sum = tl.zeros((BLOCK,), tl.float32)
            pointers = planes[i] + o_element
            for _ in range(counts[i]):
                b_sum += tl.load(pointers, mask=inside, other=0.0)
                pointers += sizes[i]
            tl.store(out[i] + o_element, cast(b_sum, out[i].dtype.element_ty), mask=inside)
        i_block -= blocks


def sum_planes(planes: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """out_i = Σ_s planes_i[s]: float32 [S_i, …], and contiguous [...] of any dtype."""

    def work() -> Work:
        loaded = size_of(*planes)
        flops = sum(plane.numel() for plane in planes)
        return Work(flops, loaded, size_of(*out), loaded_by_tiles=loaded, partial=loaded)

    sizes = tuple(tensor.numel() for tensor in out)
    arguments = {
        "planes": tuple(planes),
        "out": tuple(out),
        "sizes": sizes,
        "counts": tuple(len(plane) for plane in planes),
        "BLOCK": _BLOCK,
    }
    grid = (sum(cdiv(size, _BLOCK) for size in sizes),)
    launch(Launch(sum_planes_kernel, grid, arguments, 4, 2, work))
