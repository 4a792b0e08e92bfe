"""U_i = factor_i · (keep_i ∘ X) V_i: thin products of a group, in one pass over X.

In the forward, X is x, V_i is lora_aᵀ and U_i is h = scale · drop(x) lora_aᵀ.  In the backward, X
is dy, V_i is lora_b, there is no mask, and U_i is dh.  A product is thin if its result has only a
few columns, here R_i (the rank).  Then reading X takes most of the time, so one pass over X serves
all projections of a group.

If the base product multiplies int8, the launch also rounds X to int8 (:class:`Rounded`), in a
second pass over its rows, which the L2 cache still holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    cast,
    dot,
    dropout_threshold,
    hadamard_matrix,
    keep_tile,
    known_multiple,
    load_tile,
    rotate_tile,
    store_tile,
)
from .config import MARGIN, Call, ThinConfig, cdiv, chosen_config, chunks, row_tiles, splits
from .faults import overwrites_operands
from .launch import Launch, Work, launch, size_of, stated
from .segments import (
    SegmentNumbers,
    own_number,
    row_numbers,
    segment_arguments,
    segment_of_tile,
    small_operand_bytes,
    sorted_arguments,
    sorted_rows,
    strides_of,
)
from .sum_planes import sum_planes
from .target import Target, target_of


class Rounded(NamedTuple):
    """Tensors that :func:`project` fills with the rows of X [M, K], rounded: X' ≈ codes · scales.

    codes int8 [M, K], contiguous, and scales float32 [M].  X' is X with its columns multiplied by
    ``factors``, float32 [K]; without ``factors``, X with its columns rotated, in blocks of 64.
    """

    codes: Tensor
    scales: Tensor
    factors: Tensor | None = None


@dataclass(frozen=True)
class ProjectConfig(ThinConfig):
    """Tiles of :func:`project`: a program has block_m rows of X, in steps of block_k columns."""

    block_m: int
    block_k: int
    warps: int
    stages: int
    width: int = 128

    def why_not(self, target: Target, call: Call) -> str:
        # A product of 64 rows or more (wgmma) reads the masked tile from registers.  ptxas may let
        # other code overwrite them while it still reads (faults.overwrites_operands).
        is_exposed = call.masked and call.product == "tf32" and self.block_m >= 64
        if is_exposed and overwrites_operands(target):
            return f"ptxas before 13.3 miscompiles masked TF32 in tiles of {self.block_m} rows"
        if call.int8 and self.block_k % 64:
            return f"steps of {self.block_k} columns, but 64 are rotated at once"
        return super().why_not(target, call)

    def tiles(self, call: Call) -> int:
        return call.row_tiles(self.block_m)

    def sums(self, call: Call) -> int:
        # The masked tile of x; with int8, the largest magnitudes [BM, BK] and the rotated tile.
        tiles = (call.masked + 2 * bool(call.int8)) * self.block_k
        return self.block_m * (call.projections * self.block_r(call) + tiles)

    def through_l2(self, call: Call) -> float:
        # DRAM serves X once.  L2 serves X for every step over the rank, and V (float32, 4 bytes)
        # for every tile of rows.
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
        if call.int8:
            rotation = 64 * 64 * size
            # For AMD, the compiler gives this matrix the same memory as the copies.
            rounded = max(rounded, rotation) if target.kind == "hip" else rounded + rotation
        main = target.copies(self.stages) * (x + v * 4) + rounded
        return max(main, self.block_m * r * 4) + MARGIN


_ROUNDED = ("codes", "row_scales", "column_factors")  # the kernel's names for ``Rounded``


def _work_of(arguments: Mapping[str, Any]) -> Work:
    """The FLOPs and bytes of a launch.  Names that end in ``bytes`` count each element once."""
    x, v, planes = (arguments[name] for name in ("x", "v", "planes"))
    # count: the number of splits, or 0 if K isn't split.
    (M, K), ranks = (arguments["M"], arguments["K"]), arguments["R"]
    segments, r_tiles, count = arguments["segments"], arguments["R_TILES"], len((*planes, ())[0])
    m_tiles, passes = row_tiles(M, arguments["BLOCK_M"], segments), r_tiles * max(1, count)
    small, small_by_tiles = small_operand_bytes(arguments, m_tiles * passes, passes)
    x_bytes, codes = M * K * x.element_size(), arguments["codes"]
    rounds, f_bytes = codes is not None, size_of(arguments["column_factors"])
    return Work(
        flops=2 * M * K * sum(ranks),
        loaded=x_bytes + size_of(*v) + small + f_bytes,
        stored=size_of(*(planes if count else arguments["u"]), codes, arguments["row_scales"]),
        loaded_by_tiles=(x_bytes + f_bytes * m_tiles) * (r_tiles + rounds)
        + size_of(*v) // (segments or 1) * m_tiles
        + small_by_tiles,
        partial=size_of(*planes),
    )


# M and steps change with the batch; Triton would compile again for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M", "steps"], launch_metadata=stated(_work_of))
def project_kernel(
    x, v, u, planes, seeds, ends, order, own_factors, own_thresholds,
    codes, row_scales, column_factors,
    M, K, factors, threshold, steps, segments, x_strides, v_strides,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_TILES: tl.constexpr,
    V_ROWS_OF_8: tl.constexpr,
    SEGMENT_BLOCK: tl.constexpr,
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

    With CODES int8 [M, K] and ROW_SCALES [M]: X' is X rotated, or X times COLUMN_FACTORS [K]
    (:class:`Rounded`).  The first pass also finds the largest magnitude of each row of X'.  A
    second pass rounds the row: CODES = round(X' · 127 / largest), ties to even, and ROW_SCALES =
    largest / 127.  A row with NaN or infinity has the scale NaN or infinity.
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
            i_seed = i if own_thresholds is None else min(i_segment, segments - 1)
            loaded_seeds = loaded_seeds + (tl.load(seeds + i_seed),)
    threshold = own_number(own_thresholds, threshold, i_segment, segments)
    # A mask counts rows from 0, or, with per-segment numbers, from the segment's first row.
    i_mask = i_m if own_thresholds is None else i_m - start
    o_mem = None
    if order is not None:
        o_mem = row_numbers(order, i_m, end, BLOCK_M)  # [BM]
    if codes is not None:
        # The bits of magnitudes, as integers.  Integers have the same order as the magnitudes, with
        # infinity and NaN above all others.  One for each element of a tile, so that only the end
        # needs a reduction over columns.
        b_largest = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
        b_hadamard = None
        if column_factors is None:
            b_hadamard = hadamard_matrix(x.dtype.element_ty)
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
        if codes is not None:
            b_number = numbers_to_round(b_x, column_factors, b_hadamard, i_k, K, PRECISION)
            b_largest = tl.maximum(b_largest, b_number.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    for i in tl.static_range(len(v)):
        # The factor multiplies the float32 sum, before the store rounds it.
        b_u = sums[i] * own_number(own_factors, factors[i], i_segment, segments)  # [BM, BR]
        if tl.num_programs(1) == 1:
            store_tile(u[i], b_u, i_m, i_r, end, R[i], R[i], 1)
        else:
            plane = planes[i] + i_split.to(tl.int64) * M * R[i]
            store_tile(plane, b_u, i_m, i_r, end, R[i], R[i], 1)
    if codes is not None:
        round_rows(
            x, codes, row_scales, column_factors, b_largest, b_hadamard, i_m, i_r, end, K,
            x_strides, BLOCK_M, BLOCK_K, PRECISION,
        )  # fmt: skip


@triton.jit
def round_rows(
    x, codes, row_scales, column_factors, b_largest, b_hadamard, i_m, i_r, end, K, x_strides,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The second pass of ``project_kernel``, run by the first of the programs with these rows.

    ``b_largest``: the bits of the largest magnitudes in the first pass, [BM, BK].
    """
    if i_r == 0:
        # 2⁻¹⁰⁰ replaces a smaller largest magnitude, so that 127 / largest is finite.
        b_bits = tl.maximum(tl.max(b_largest, 1), 27 << 23)
        b_most = b_bits.to(tl.float32, bitcast=True)  # [BM]
        o_m = i_m + tl.arange(0, BLOCK_M)
        tl.store(row_scales + o_m, tl.div_rn(b_most, 127.0), mask=o_m < end)
        b_inverse = tl.div_rn(127.0, b_most)[:, None]
        for i_k in range(0, K, BLOCK_K):
            b_x = load_tile(
                x, i_m, i_k, end, K, x_strides[0], x_strides[1], BLOCK_M, BLOCK_K
            )  # [BM, BK]
            b_number = numbers_to_round(b_x, column_factors, b_hadamard, i_k, K, PRECISION)
            # Adding 1.5 · 2²³ rounds to an integer, ties to even, in the lower bits.  The minimum
            # keeps the compiler from fusing product and sum into one operation, which would round
            # only once.
            b_number = tl.minimum(b_number * b_inverse, 127.0) + 12582912.0
            b_code = b_number.to(tl.int32, bitcast=True) - 0x4B400000
            store_tile(codes, b_code, i_m, i_k, end, K, K, 1)


@triton.jit
def numbers_to_round(b_x, column_factors, b_hadamard, i_k, K, PRECISION: tl.constexpr):
    """The numbers to round to 8 bits, in float32: x times factors, or x rotated in its dtype.

    A float16 x is rotated in float32, because a rotated number may exceed 65504.
    """
    if column_factors is None:
        b_number = rotate_tile(b_x, b_hadamard, i_k, K, PRECISION)
        return b_number if b_x.dtype == tl.float16 else cast(b_number, b_x.dtype).to(tl.float32)
    else:
        o_k = i_k + tl.arange(0, b_x.shape[1])
        b_factor = tl.load(column_factors + o_k, mask=o_k < K, other=0.0)  # [BK]
        return b_x.to(tl.float32) * b_factor[None, :]


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
    rounded: Rounded | None = None,
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

    ``rounded``, only without ``ends`` and ``order``: the call also fills its codes and scales.
    ``adapters`` may then be empty.
    """
    M, K, target = sorted_rows(x, order), x.shape[1], target_of(x.device)
    results: list[Tensor] = []
    for vs, launch_factors, launch_seeds in chunks(adapters, factors, seeds):
        ranks = [v.shape[-1] for v in vs]
        call = Call(
            M, K, max(ranks, default=1), x.element_size(), precision, len(vs),
            launch_seeds is not None, segments=0 if ends is None else len(ends),
            int8="" if rounded is None else "int8",
        )  # fmt: skip
        tiles = chosen_config("project", target, call, config)
        block_r = tiles.block_r(call)
        r_tiles = cdiv(call.r, block_r)
        programs = tiles.tiles(call) * r_tiles
        # A split should load at least four times the bytes that its plane costs.  The plane costs
        # 8 · M · r bytes, because it is written and read.  For each column, a split loads 2 · M
        # bytes of x and 4 · r bytes of V.  So 16 r columns are enough because of x, or 8 M columns
        # because of V.  A row that is rounded isn't split, because it needs its largest magnitude.
        least = min(16 * call.r, 8 * M) if rounded is None else K
        count, steps = splits(tiles.capacity(target, call), programs, K, tiles.block_k, least)
        us = [x.new_empty(M, r) for r in ranks]
        if count > 1:
            planes = [x.new_empty(count, M, r, dtype=torch.float32) for r in ranks]
        else:  # empty planes, so that both cases compile to the same kernel
            planes = [x.new_empty(0, dtype=torch.float32)] * len(vs)
        arguments = {
            "x": x, "v": tuple(vs), "u": tuple(us), "planes": tuple(planes),
            "seeds": launch_seeds, **segment_arguments(ends),
            **sorted_arguments(order, numbers, scaled=True, masked=launch_seeds is not None),
            **dict(zip(_ROUNDED, rounded or (None,) * 3, strict=True)),
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
        rounded = None  # the first launch has rounded x
    return results
