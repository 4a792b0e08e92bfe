"""U_i = factor_i · (keep_i ∘ X) V_i: thin products of a group, in one pass over X.

In the forward, X is x, V_i is lora_aᵀ and U_i is h = scale · drop(x) lora_aᵀ.  In the backward, X
is dy, V_i is lora_b, there is no mask, and U_i is dh.  A product is thin if its result has only a
few columns, here R_i (the rank).  Then reading X takes most of the time, so one pass over X serves
all projections of a group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot, dropout_threshold, keep_tile, known_multiple, load_tile, store_tile
from .config import MARGIN, Call, ThinConfig, cdiv, chosen_config, chunks, row_tiles, splits
from .faults import overwrites_operands
from .launch import Launch, Work, launch, size_of, stated
from .segments import (
    SegmentNumbers,
    mask_numbers,
    own_number,
    row_numbers,
    segment_arguments,
    segment_of_tile,
    small_operand_bytes,
    sorted_arguments,
    sorted_rows,
    strides_of,
)
from .sum_planes import planes_for, sum_planes
from .target import Target, target_of


@dataclass(frozen=True)
class ProjectConfig(ThinConfig):
    """Tiles of :func:`project`: a program has block_m rows of X, in steps of block_k columns."""

    block_m: int
    block_k: int
    warps: int
    stages: int
    width: int = 128

    def why_not(self, target: Target, call: Call) -> str:
        # wgmma (products of 64 rows or more) reads the masked tile from registers, asynchronously.
        # ptxas may let other code overwrite them before it has read (faults.overwrites_operands).
        is_exposed = call.masked and call.product == "tf32" and self.block_m >= 64
        if is_exposed and overwrites_operands(target):
            return f"ptxas before 13.3 miscompiles masked TF32 in tiles of {self.block_m} rows"
        return super().why_not(target, call)

    def tiles(self, call: Call) -> int:
        return call.row_tiles(self.block_m)

    def sums(self, call: Call) -> int:
        masked = call.masked * self.block_k  # the masked tile of x
        return self.block_m * (call.projections * self.block_r(call) + masked)

    def through_l2(self, call: Call) -> float:
        # (bytes from L2) / (bytes from DRAM), with X's bytes from DRAM.  L2 serves X for every step
        # over the rank, and V (float32, 4 bytes) for every tile of rows.
        v = 4 * call.projections * call.r / (self.block_m * call.itemsize)
        return cdiv(call.r, self.block_r(call)) + v

    def shared_memory(self, target: Target, call: Call) -> int:
        r, n, size = self.block_r(call), call.projections, call.itemsize
        x, v = self.block_m * self.block_k * size, n * self.block_k * r
        # Tensor cores read a second copy of the operands, in another layout.  In 16 bits on devices
        # before Hopper, they read registers instead, and only a masked X has a copy in shared
        # memory.
        rounded = v * size + call.masked * n * x
        if size == 2 and not target.descriptors:
            rounded = call.masked * x
        main = target.copies(self.stages) * (x + v * 4) + rounded
        return max(main, self.block_m * r * 4) + MARGIN


def _work_of(arguments: Mapping[str, Any]) -> Work:
    """The FLOPs and bytes of a launch.  Names that end in ``bytes`` count each element once."""
    x, v, planes = (arguments[name] for name in ("x", "v", "planes"))
    # planes[i] is projection i's, [splits, M, R_i]; planes is () without splits.  So count is the
    # number of splits, or 0 if K isn't split.
    (M, K), ranks = (arguments["M"], arguments["K"]), arguments["R"]
    segments, r_tiles, count = arguments["segments"], arguments["R_TILES"], len((*planes, ())[0])
    m_tiles, passes = row_tiles(M, arguments["BLOCK_M"], segments), r_tiles * max(1, count)
    small, small_by_tiles = small_operand_bytes(arguments, m_tiles * passes, passes)
    x_bytes = M * K * x.element_size()
    return Work(
        flops=2 * M * K * sum(ranks),
        loaded=x_bytes + size_of(*v) + small,
        stored=size_of(*(planes if count else arguments["u"])),
        loaded_by_tiles=x_bytes * r_tiles
        + size_of(*v) // (segments or 1) * m_tiles
        + small_by_tiles,
        partial=size_of(*planes),
    )


# M and steps change with the batch; Triton would compile again for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M", "steps"], launch_metadata=stated(_work_of))
def project_kernel(
    x, v, u, planes, seeds, ends, order, own_factors, own_thresholds,
    M, K, factors, threshold, steps, segments, x_strides, v_strides,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    R_TILES: tl.constexpr, V_ROWS_OF_8: tl.constexpr, SEGMENT_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U_i = factor_i · (keep_i ∘ X) V_i, or the planes PLANES_i, whose sum is U_i.

    X [M, K], V_i [K, R_i], U_i [M, R_i], PLANES_i [splits, M, R_i].  keep_i [M, K] is dropout's
    mask, which each tile computes from seed i.  A program computes BLOCK_M rows and BLOCK_R columns
    of all U_i.  If the columns of X are split, split s takes ``steps`` steps of BLOCK_K columns,
    from step s · steps on, and writes its partial sums to plane s.

    Indices: i is a projection.  i_m: the program's first row.  i_r: its first column of U_i.  i_k:
    the step's first column of X, which is its first row of V_i.  i_split: the split s.

    With segments (``ends``): V_i [segments, K, R_i].  A row uses its segment's matrix; rows without
    a segment get zero.  With ``order``, X's rows in memory aren't sorted, and row s of U is row
    order[s] of X.  With ``own_factors`` and ``own_thresholds``, each segment has its own factor,
    seed and threshold (segments.py).
    """
    # R_TILES programs share the same rows of X, one for each BLOCK_R columns of U.  They have
    # neighboring numbers, so that they run at the same time and L2 serves X.
    i_r, i_tile = tl.program_id(0) % R_TILES * BLOCK_R, tl.program_id(0) // R_TILES
    # depth is K, or 0 for rows without a segment: their loop has no steps, so U is zero.
    i_segment, start, i_m, end, _, depth = segment_of_tile(
        ends, segments, i_tile, M, K, BLOCK_M, SEGMENT_BLOCK
    )
    i_split = tl.program_id(1)
    sums, loaded_seeds = (), ()  # an accumulator [BM, BR] and a seed for each projection
    for i in tl.static_range(len(v)):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),)
        if seeds is not None:
            seed, threshold = mask_numbers(seeds, own_thresholds, threshold, i, i_segment, segments)
            loaded_seeds = loaded_seeds + (seed,)
    i_mask = i_m if own_thresholds is None else i_m - start  # the tile's first row in its mask
    o_mem = None if order is None else row_numbers(order, i_m, end, BLOCK_M)  # [BM]
    # The main loop: sums[i] += (keep_i ∘ X) V_i, over this split's part of K.
    split_start = i_split * steps * BLOCK_K
    for i_k in range(split_start, min(split_start + steps * BLOCK_K, depth), BLOCK_K):
        b_x = load_tile(
            x, i_m, i_k, end, K, x_strides[0], x_strides[1], BLOCK_M, BLOCK_K, o_mem=o_mem
        )  # [BM, BK]
        next_sums = ()  # a tuple's entries can't be assigned, so each step makes a new tuple
        for i in tl.static_range(len(v)):
            v_i, v_row_stride = v[i], known_multiple(v_strides[i][1], V_ROWS_OF_8)
            if ends is not None:
                v_i += i_segment.to(tl.int64) * v_strides[i][0]
            b_v = load_tile(
                v_i, i_k, i_r, K, R[i], v_row_stride, v_strides[i][2], BLOCK_K, BLOCK_R
            )  # [BK, BR]
            # Dropout zeroes elements of X; its scale 1 / (1 - p) is part of the factor.
            b_kept = b_x
            if seeds is not None:
                keep = keep_tile(loaded_seeds[i], i_mask, i_k, threshold, BLOCK_M, BLOCK_K)
                b_kept = tl.where(keep, b_x, 0.0)
            # [BM, BR] += [BM, BK] @ [BK, BR]
            next_sums = next_sums + (dot(b_kept, cast(b_v, b_x.dtype), sums[i], PRECISION),)
        sums = next_sums
    for i in tl.static_range(len(v)):
        # The factor multiplies the float32 sum, before the store rounds it.
        b_u = sums[i] * own_number(own_factors, factors[i], i_segment, segments)  # [BM, BR]
        if tl.num_programs(1) == 1:
            store_tile(u[i], b_u, i_m, i_r, end, R[i], R[i], 1)
        else:
            plane = planes[i] + i_split.to(tl.int64) * M * R[i]
            store_tile(plane, b_u, i_m, i_r, end, R[i], R[i], 1)


def project(
    x: Tensor,
    adapters: Sequence[Tensor],
    factors: Sequence[float],
    *,
    precision: str,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    ends: Tensor | None = None,
    order: Tensor | None = None,
    numbers: SegmentNumbers | None = None,
    config: ProjectConfig | None = None,
) -> list[Tensor]:
    """Returns factor_i · (keep_i ∘ x) v_i for every v_i of ``adapters``: [M, R_i] in x's dtype.

    x [M, K] and v_i [K, R_i] have any strides.  v_i has a floating dtype of at most 32 bits and is
    cast to x's when it is loaded.  With ``dropout``, ``seeds`` (int64) has one seed for each v_i.

    ``ends``, int32 [E], contiguous: the rows are cut into segments (segments.py).  v_i is [E, K,
    R_i], and rows without a segment give zero.  ``order``, int32 [rows]: sorted row s is row
    order[s] of x, and the results have the rows in sorted order.  ``numbers``: a factor and dropout
    for each segment, in place of ``factors`` and ``dropout``; then there is one v_i, and ``seeds``
    is [E].
    """
    M, K, target = sorted_rows(x, order), x.shape[1], target_of(x.device)
    results: list[Tensor] = []
    for vs, launch_factors, launch_seeds in chunks(adapters, factors, seeds):
        ranks = [v.shape[-1] for v in vs]
        call = Call(
            M, K, max(ranks, default=1), x.element_size(), precision, len(vs),
            launch_seeds is not None, segments=0 if ends is None else len(ends),
        )  # fmt: skip
        tiles = chosen_config("project", target, call, config)
        block_r = tiles.block_r(call)
        r_tiles = cdiv(call.r, block_r)
        programs = tiles.tiles(call) * r_tiles
        # A split of c columns should load at least 4 × the bytes of its plane's traffic.  It loads
        # 2 M c bytes of x and 4 r c of V.  Its plane, float32, is written and read: 8 M r bytes.
        # 2 M c >= 4 · 8 M r from c = 16 r on; 4 r c >= 4 · 8 M r from c = 8 M on.  One is enough.
        least = min(16 * call.r, 8 * M)
        count, steps = splits(tiles.capacity(target, call), programs, K, tiles.block_k, least)
        us = [x.new_empty(M, r) for r in ranks]
        planes = planes_for(us, count)
        arguments = {
            "x": x, "v": tuple(vs), "u": tuple(us), "planes": tuple(planes),
            "seeds": launch_seeds, **segment_arguments(ends),
            **sorted_arguments(order, numbers, scaled=True, masked=launch_seeds is not None),
            "M": M, "K": K, "factors": tuple(launch_factors),
            "threshold": dropout_threshold(dropout), "steps": steps,
            "x_strides": x.stride(), "v_strides": strides_of(vs, ends),
            "R": tuple(ranks), "BLOCK_M": tiles.block_m, "BLOCK_K": tiles.block_k,
            "BLOCK_R": block_r, "R_TILES": r_tiles, "PRECISION": precision,
            "V_ROWS_OF_8": all(v.stride(-2) % 8 == 0 for v in vs),
        }  # fmt: skip
        grid = (programs, count)
        launch(Launch(project_kernel, grid, arguments, tiles.warps, tiles.stages, _work_of))
        if count > 1:
            sum_planes(planes, us, second_dtype=vs[0].dtype)
        results += us
    return results
