"""OUT_i = Σ_s PLANES_i[s]: add the partial sums that split kernels wrote, in a fixed order.

``project`` and ``weight_grad`` split the axis that they sum over where there are too few tiles to
occupy a device.  Each split s writes its sums to a float32 matrix of its own, plane s.  Adding the
planes in a fixed order, without atomics, gives the same bits every time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, known_multiple
from .config import MAX_PROJECTIONS, cdiv
from .launch import Launch, Work, launch, size_of, stated

_BLOCK = 1024


def _work_of(arguments: Mapping[str, Any]) -> Work:
    """The FLOPs and bytes of a launch; sums without planes take none."""
    planes = [p for p in arguments["planes"] if p.numel()]
    outs = [o for p, o in zip(arguments["planes"], arguments["out"], strict=True) if p.numel()]
    loaded, flops = size_of(*planes), sum(plane.numel() for plane in planes)
    return Work(flops, loaded, size_of(*outs), loaded_by_tiles=loaded, partial=loaded)


# One argument for each sum: sizes and counts change with the number of rows, and do_not_specialize
# takes names of arguments.
_SIZES = [f"size{i}" for i in range(MAX_PROJECTIONS)]
_COUNTS = [f"count{i}" for i in range(MAX_PROJECTIONS)]


@triton.jit(do_not_specialize=_SIZES + _COUNTS, launch_metadata=stated(_work_of))
def sum_planes_kernel(
    planes, out,
    size0, size1, size2, size3, count0, count1, count2, count3,
    SIZES_OF_8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT_i = Σ_s PLANES_i[s], in the order of s.

    PLANES_i [count_i, size_i], OUT_i [size_i].  The index i is the sum's number.
    """
    # The tuples are made here.  If an argument were a tuple, Triton would compile again for numbers
    # in it that are 1 or that 16 divides.
    sizes, counts = (size0, size1, size2, size3), (count0, count1, count2, count3)
    # One grid for all sums: the first blocks belong to sum 0, the next to sum 1, and so on.
    i_block = tl.program_id(0)
    for i in tl.static_range(len(planes)):
        size = known_multiple(sizes[i], SIZES_OF_8)
        # Here i_block counts from the sum's first block.  It is negative in programs of earlier
        # sums, and at least ``blocks`` in programs of later sums.
        o_element = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = o_element < size
        blocks = tl.cdiv(size.to(tl.int64), BLOCK)
        if (i_block >= 0) & (i_block < blocks):
            b_sum = tl.zeros((BLOCK,), tl.float32)
            pointers = planes[i] + o_element
            for _ in range(counts[i]):
                b_sum += tl.load(pointers, mask=inside, other=0.0)  # [BLOCK]
                pointers += size  # to the next plane
            tl.store(out[i] + o_element, cast(b_sum, out[i].dtype.element_ty), mask=inside)
        i_block -= blocks


def planes_for(sums: Sequence[Tensor], count: int) -> list[Tensor]:
    """Memory for ``count`` float32 planes of each sum [count, *its shape].

    A kernel that isn't split (``count`` 1) writes to the sum itself.  Its planes are empty, and not
    None, so that both cases compile to the same kernel.
    """
    if count == 1:
        return [sums[0].new_empty(0, dtype=torch.float32)] * len(sums)
    return [each.new_empty(count, *each.shape, dtype=torch.float32) for each in sums]


def sum_planes(
    planes: Sequence[Tensor], out: Sequence[Tensor], second_dtype: torch.dtype | None = None
) -> None:
    """out_i = Σ_s planes_i[s].  planes_i: float32 [S_i, …].  out_i: contiguous […], any dtype.

    An out_i with no plane (S_i = 0) isn't written.  A single sum gets an empty second sum with the
    dtype ``second_dtype``.  So it uses the kernel that is compiled anyway for the two sums of a
    layer's backward.
    """
    sums = list(zip(planes, out, strict=True))
    if len(sums) == 1 and second_dtype is not None:
        sums.append((planes[0].new_empty(0), out[0].new_empty(0, dtype=second_dtype)))
    sums.sort(key=lambda each: str(each[1].dtype))
    counts = [len(each) for each, _ in sums]
    sizes = [total.numel() if len(each) else 0 for each, total in sums]
    absent = [None] * (MAX_PROJECTIONS - len(sums))
    arguments = {
        "planes": tuple(each for each, _ in sums), "out": tuple(total for _, total in sums),
        **dict(zip(_SIZES, sizes + absent, strict=True)),
        **dict(zip(_COUNTS, counts + absent, strict=True)),
        # Decided by the last axis, because the others may be a number of rows, which varies.
        "SIZES_OF_8": all(total.shape[-1] % 8 == 0 for _, total in sums), "BLOCK": _BLOCK,
    }  # fmt: skip
    grid = (sum(cdiv(size, _BLOCK) for size in sizes),)
    launch(Launch(sum_planes_kernel, grid, arguments, warps=4, stages=2, work_of=_work_of))
