"""OUT_i = (keep_i ∘ X)ᵀ U_i: d lora_a and d lora_b, which are sums over rows.

    |      | OUT_i                | X         | U_i           | keep_i   | second result |
    |------|----------------------|-----------|---------------|----------|---------------|
    | dy   | d lora_b [N, r]      | dy [M, N] | h [M, r]      | -        | dh [M, r]     |
    | x    | d lora_a_iᵀ [K, r_i] | x [M, K]  | dh_i [M, r_i] | the mask | dx_low [M, K] |

The second result is optional, and saves a read of X or a launch: "one pass over dy" also computes
dh = factor · dy lora_b, and "one pass over x" dx_low = Σ_i keep_i ∘ (dh_i lora_a_i), the adapter's
part of dx.  In the kernel, XV is dh and LOW_RANK is dx_low.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot, dropout_threshold, keep_tile, load_tile, store_tile
from .config import MARGIN, Call, ThinConfig, cdiv, chosen_config, chunks, default_config, splits
from .faults import overwrites_tiles
from .launch import Launch, Work, launch, size_of, stated
from .lowrank import add_term
from .segments import (
    SegmentNumbers,
    mask_numbers,
    own_number,
    row_numbers,
    segment_arguments,
    segment_rows,
    small_operand_bytes,
    sorted_arguments,
    sorted_rows,
    strides_of,
)
from .sum_planes import planes_for, sum_planes
from .target import Target, target_of


@dataclass(frozen=True)
class WeightGradConfig(ThinConfig):
    """Tiles of :func:`weight_grad`: a program has block_n columns, in steps of block_m rows."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    width: int = 128

    def tiles(self, call: Call) -> int:
        return cdiv(call.n, self.block_n)

    def splits(self, target: Target, call: Call) -> tuple[int, int]:
        """(number of splits of the rows, steps in each).  A segment's rows aren't split."""
        # A split sums over some rows, into a float32 plane of its own (config.splits, sum_planes).
        if call.segments:
            return 1, 0
        programs = self.tiles(call) * cdiv(call.r, self.block_r(call))
        # A split of m rows should load at least 4 × the bytes of its plane's traffic.  It loads
        # 2 N m bytes of X.  Its plane, float32, is written and read: 8 N r bytes.  So m >= 16 r.
        return splits(self.capacity(target, call), programs, call.m, self.block_m, 16 * call.r)

    def sums(self, call: Call) -> int:
        thin_sums = call.projections * self.block_n + call.project * self.block_m
        # The tiles of LOW_RANK, with the products that wait for their masks (LowRankConfig.sums).
        tiles = call.low_rank * (1 + call.masked * call.projections // 2)
        return thin_sums * self.block_r(call) + tiles * self.block_m * self.block_n

    def through_l2(self, call: Call) -> float:
        # (bytes from L2) / (bytes from DRAM), with X's bytes from DRAM.  L2 serves X for every step
        # over the rank, and U for every tile of columns.
        return cdiv(call.r, self.block_r(call)) + call.projections * call.r / self.block_n

    def shared_memory(self, target: Target, call: Call) -> int:
        r, n, size = self.block_r(call), call.projections, call.itemsize
        x, u = self.block_m * self.block_n * size, n * self.block_m * r * size
        v = call.project * (self.block_n + self.block_m) * r * 4
        # A product of fewer than 64 rows reads registers (mma, also on Hopper), not shared memory
        # (wgmma), so it needs buffers for one stage less.
        rows = self.block_n if call.project else r
        copies = target.copies(self.stages) if rows >= 64 else max(1, self.stages - 1)
        low_rank = call.low_rank * (n * self.block_n * r + self.block_m * self.block_n) * size
        main = copies * (x + u) + call.masked * n * x + v + low_rank
        return max(main, self.block_n * r * 4) + MARGIN

    def why_not(self, target: Target, call: Call) -> str:
        """See :meth:`Config.why_not`; also refuses tiles with a data race in Triton's code.

        The race is possible where one loaded tile is an operand of two products
        (faults.overwrites_tiles): X in one pass over dy, U_i in one pass over x.  Not with a mask,
        because the masked X is in registers, so the loop waits for each product.
        """
        # ``kept``: the rows of the product whose sums the loop keeps, OUT or OUTᵀ.
        kept = self.block_n if call.project else self.block_r(call)
        is_exposed = call.project or (call.low_rank and not call.masked)
        if (
            is_exposed
            and call.product != "float32"
            and overwrites_tiles(target, kept, self.block_m)
        ):
            return f"tiles of {self.block_m} rows in one pass, but Triton races under 64"
        return super().why_not(target, call)


def _work_of(arguments: Mapping[str, Any]) -> Work:
    """The FLOPs and bytes of a launch.  Names that end in ``bytes`` count each element once."""
    x, u, v, xv, low_rank = (arguments[name] for name in ("x", "u", "v", "xv", "low_rank"))
    M, N, ranks, planes = (arguments[name] for name in ("M", "N", "R", "planes"))
    n_tiles, r_tiles = cdiv(N, arguments["BLOCK_N"]), arguments["R_TILES"]
    # count: the number of splits, or 0 where the rows aren't split.
    count, segments = len(planes[0]), arguments["segments"]
    programs = n_tiles * r_tiles * (max(1, count) if segments is None else segments + 1)
    small, small_by_tiles = small_operand_bytes(arguments, programs, n_tiles * r_tiles)
    x_bytes = M * N * x.element_size()
    old_low_rank_bytes = size_of(low_rank) if arguments["ADD"] else 0
    return Work(
        flops=2 * M * N * (sum(ranks) + sum(ranks[: len(v)])),
        loaded=x_bytes + size_of(*v, *u) + small + old_low_rank_bytes,
        stored=size_of(xv, low_rank) + size_of(*(planes if count else arguments["out"])),
        loaded_by_tiles=x_bytes * r_tiles
        + size_of(*u) * n_tiles
        + size_of(*v) * max(1, count)
        + small_by_tiles
        + old_low_rank_bytes,
        partial=size_of(*planes) + size_of(xv) * (n_tiles > 1),
    )


@triton.jit
def rows_of_program(ends, segments, i_split, steps, M, N, BLOCK_M: tl.constexpr):
    """(first row, row after the last, end, rows, columns) of the program with split i_split.

    The program's loop runs from the first row to the last.  Loads are masked to rows below ``rows``
    and columns below ``columns``, stores to rows below ``end``.  With ``ends``, i_split is the
    number of a segment.  For rows without a segment, ``rows`` and ``columns`` are 0, so the program
    loads zeros and its results are zero.
    """
    if ends is None:
        first = i_split * steps * BLOCK_M
        return first, min(first + steps * BLOCK_M, M), M, M, N
    else:
        first, end = segment_rows(ends, segments, i_split, M)
        has_segment = i_split < segments
        return first, end, end, tl.where(has_segment, end, 0), tl.where(has_segment, N, 0)


@triton.jit
def store_sum(out, planes, b_sum, i_r, i_n, i_split, R, columns, strides):
    """Store b_sum [BR, BN], a tile of OUTᵀ: in OUT, in OUT's segment, or in the split's plane.

    ``strides`` of OUT [columns, R]: from segment to segment (None without segments), from row to
    row, and from column to column.
    """
    stride_e, stride_n, stride_r = strides
    if stride_e is not None:
        out += i_split.to(tl.int64) * stride_e
        store_tile(out, b_sum, i_r, i_n, R, columns, stride_r, stride_n)
    elif tl.num_programs(1) == 1:
        store_tile(out, b_sum, i_r, i_n, R, columns, stride_r, stride_n)
    else:
        plane = planes + i_split.to(tl.int64) * columns * R
        store_tile(plane, b_sum, i_r, i_n, R, columns, stride_r, stride_n)


# M and steps change with the batch; Triton would compile again for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M", "steps"], launch_metadata=stated(_work_of))
def weight_grad_kernel(
    x, u, out, planes, v, xv, low_rank, seeds, ends, order, own_factors, own_thresholds,
    M, N, factor, threshold, steps, segments, x_strides, out_strides, v_strides,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    R_TILES: tl.constexpr, ADD: tl.constexpr, SEGMENT_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT_i = (keep_i ∘ X)ᵀ U_i, or the planes PLANES_i, whose sum is OUT_i; also XV or LOW_RANK.

    X [M, N], U_i [M, R_i], OUT_i [N, R_i], PLANES_i [splits, N, R_i] with the strides of OUT_i.  A
    program has BLOCK_N columns of X, and loops over the rows in steps of BLOCK_M:

        for every tile b_x of X:  sum_i += (keep_i ∘ b_x)ᵀ b_u_i

    If the rows are split, split s takes ``steps`` steps from step s · steps on, and writes its
    partial sums to plane s.

    With V_i [N, R_i], the same pass computes one of two further results:
    XV [N / BLOCK_N, M, R_0] = factor · X V_0 (dh): partial sums, one plane for each tile of
    columns, because dh sums over all columns and a program has BLOCK_N of them.
    LOW_RANK [M, N] = Σ_i keep_i ∘ (U_i V_iᵀ) (+ LOW_RANK, if ADD): the adapter's part of dx, with
    the same bits as ``lowrank`` gives if that takes one step over each rank.

    Indices: i is a projection.  i_n: the program's first column of X, which is its first row of
    OUT_i.  i_r: its first column of OUT_i.  i_m: the step's first row.  i_split: the split s, or
    with segments the segment.

    With segments (``ends``): OUT_i [segments, N, R_i] sums over each segment's rows, and V_0 is
    [segments, N, R_0].  There are no splits and no LOW_RANK.  With ``order``, row s of U_i belongs
    to row order[s] of X.  With ``own_factors`` and ``own_thresholds``, each segment has its own
    factor, seed and threshold, in place of one for the launch (many adapters).
    """
    # R_TILES programs share the same columns of X, one for each BLOCK_R columns of OUT.
    i_r, i_tile = tl.program_id(0) % R_TILES * BLOCK_R, tl.program_id(0) // R_TILES
    # The grid's second axis counts splits of the rows, or segments.
    i_n, i_split = i_tile * BLOCK_N, tl.program_id(1)
    first, last, end, rows, columns = rows_of_program(ends, segments, i_split, steps, M, N, BLOCK_M)
    # V's tiles are the same in all steps over the rows, so they are loaded once.
    b_vs = ()
    for i in tl.static_range(len(v)):
        v_i = v[i] if ends is None else v[i] + i_split.to(tl.int64) * v_strides[i][0]
        b_v = load_tile(
            v_i, i_n, 0, columns, R[i], v_strides[i][1], v_strides[i][2], BLOCK_N, BLOCK_R
        )  # [BN, BR]
        b_vs = b_vs + (b_v,)
    sums, loaded_seeds = (), ()  # an accumulator and a seed for each projection
    for i in tl.static_range(len(u)):
        # The accumulator has a tile of OUTᵀ.  In one pass over dy it has a tile of OUT, because
        # BLOCK_N is large there and OUTᵀ would spill.
        if xv is None:
            sums = sums + (tl.zeros((BLOCK_R, BLOCK_N), tl.float32),)
        else:
            sums = sums + (tl.zeros((BLOCK_N, BLOCK_R), tl.float32),)
        if seeds is not None:
            seed, threshold = mask_numbers(seeds, own_thresholds, threshold, i, i_split, segments)
            loaded_seeds = loaded_seeds + (seed,)
    factor = own_number(own_factors, factor, i_split, segments)
    # The main loop: sums[i] += (keep_i ∘ X)ᵀ U_i over this program's rows.
    for i_m in range(first, last, BLOCK_M):
        o_mem = None if order is None else row_numbers(order, i_m, rows, BLOCK_M)  # [BM]
        b_x = load_tile(
            x, i_m, i_n, rows, N, x_strides[0], x_strides[1], BLOCK_M, BLOCK_N, o_mem=o_mem
        )  # [BM, BN]
        next_sums = ()  # a tuple's entries can't be assigned, so each step makes a new tuple
        b_low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(len(u)):
            # b_u is a tile of U_iᵀ (strides 1, R_i).  If it were loaded as a tile of U_i and then
            # transposed, Triton would load only one of X and U_i more than one step ahead.
            b_u = load_tile(u[i], i_r, i_m, R[i], rows, 1, R[i], BLOCK_R, BLOCK_M)  # [BR, BM]
            keep, b_kept = None, b_x
            if seeds is not None:
                # A segment's own mask counts rows from the segment's first row.
                i_mask = i_m if own_thresholds is None else i_m - first
                keep = keep_tile(loaded_seeds[i], i_mask, i_n, threshold, BLOCK_M, BLOCK_N)
                b_kept = tl.where(keep, b_x, 0.0)
            if xv is None:  # [BR, BN] += [BR, BM] @ [BM, BN]
                next_sums = next_sums + (dot(b_u, b_kept, sums[i], PRECISION),)
            else:  # [BN, BR] += [BN, BM] @ [BM, BR]
                next_sums = next_sums + (dot(b_kept.T, b_u.T, sums[i], PRECISION),)
            if low_rank is not None:  # + keep_i ∘ (U_i V_iᵀ), with the same mask as X
                b_low = add_term(b_low, b_u.T, cast(b_vs[i], b_x.dtype).T, keep, i, PRECISION)
        sums = next_sums
        if low_rank is not None:
            if ADD:
                b_before = load_tile(low_rank, i_m, i_n, M, N, N, 1, BLOCK_M, BLOCK_N)  # [BM, BN]
                b_low += b_before.to(tl.float32)
            store_tile(low_rank, b_low, i_m, i_n, M, N, N, 1)
        if xv is not None:  # factor · X V_0 for these rows; here X is dy, which has no mask
            b_xv = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            b_xv = dot(b_x, cast(b_vs[0], b_x.dtype), b_xv, PRECISION)  # [BM, BN] @ [BN, BR]
            xv_plane = xv + i_tile.to(tl.int64) * M * R[0]
            store_tile(xv_plane, b_xv * factor, i_m, 0, end, R[0], R[0], 1)
    for i in tl.static_range(len(u)):
        b_sum = sums[i] if xv is None else sums[i].T  # [BR, BN]
        store_sum(out[i], planes[i], b_sum, i_r, i_n, i_split, R[i], columns, out_strides[i])


def weight_grad(
    x: Tensor,
    us: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    precision: str,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    b: Tensor | None = None,
    factor: float = 1.0,
    vs: Sequence[Tensor] = (),
    low_rank: Tensor | None = None,
    ends: Tensor | None = None,
    order: Tensor | None = None,
    numbers: SegmentNumbers | None = None,
    config: WeightGradConfig | None = None,
) -> Tensor | None:
    """Fill ``outs`` with out_i = (keep_i ∘ x)ᵀ u_i.  With ``b`` or ``vs``, compute another product.

    x [M, N] has any strides; u_i [M, R_i] is contiguous and in x's dtype.  out_i [N, R_i] has any
    dtype, and is contiguous or the transpose of a contiguous tensor.  ``seeds`` as in
    :func:`project`.

    With ``b`` [N, R_0]: returns factor · x b [M, R_0] in x's dtype.  With ``vs``, v_i [N, R_i]:
    fills ``low_rank`` [M, N], contiguous and in x's dtype, with Σ_i keep_i ∘ (u_i v_iᵀ).  b and v_i
    have any strides and dtype.

    ``ends``, ``order`` and ``numbers`` as in :func:`project`: out_i is [E, N, R_i], zero for a
    segment without rows, and b is [E, N, R_0].
    """
    M, N, target = sorted_rows(x, order), x.shape[1], target_of(x.device)
    xv = product = None
    # u, out and v are the lists of one launch.
    launches = chunks(us, outs, vs if b is None else [b], seeds)
    for i, (u, out, v, launch_seeds) in enumerate(launches):
        ranks = [each.shape[1] for each in u]
        call = Call(
            M, N, max(ranks), x.element_size(), precision, len(u),
            launch_seeds is not None, b is not None,
            segments=0 if ends is None else len(ends), low_rank=low_rank is not None,
        )  # fmt: skip
        tiles = chosen_config("weight_grad", target, call, config)
        count, steps = tiles.splits(target, call)
        n_tiles, block_r = tiles.tiles(call), tiles.block_r(call)
        r_tiles = cdiv(max(ranks), block_r)
        dense = [_dense(each) for each in out]
        planes = planes_for(dense, count)
        if b is not None:
            product = xv = x.new_empty(M, ranks[0])
            if n_tiles > 1:
                xv = x.new_empty(n_tiles, M, ranks[0], dtype=torch.float32)
        arguments = {
            "x": x, "u": tuple(u), "out": tuple(out), "planes": tuple(planes), "v": tuple(v),
            "xv": xv, "low_rank": low_rank, "ADD": low_rank is not None and i > 0,
            "seeds": launch_seeds, **segment_arguments(ends),
            **sorted_arguments(
                order, numbers, scaled=b is not None, masked=launch_seeds is not None
            ),
            "M": M, "N": N, "factor": factor, "threshold": dropout_threshold(dropout),
            "steps": steps, "x_strides": x.stride(), "out_strides": strides_of(out, ends),
            "v_strides": strides_of(v, ends),
            "R": tuple(ranks), "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
            "BLOCK_R": block_r, "R_TILES": r_tiles, "PRECISION": precision,
        }  # fmt: skip
        # With ``b``, one more program for the rows without a segment: their rows of XV are zero.
        grid = (n_tiles * r_tiles, count if ends is None else len(ends) + (b is not None))
        launch(Launch(weight_grad_kernel, grid, arguments, tiles.warps, tiles.stages, _work_of))
        if xv is not product:  # dh has planes: one launch adds them and the planes of ``outs``
            sum_planes([*planes, xv], [*dense, product])
        # ``second_dtype``: so that the same compiled kernel runs as for the two sums above.
        elif count > 1:
            sum_planes(planes, dense, second_dtype=x.dtype)
    return product


def one_pass_pays(x: Tensor, b: Tensor, precision: str) -> bool:
    """Whether one pass over x saves bytes: partial sums (written, read) < a second read of x."""
    (M, N), r = x.shape, b.shape[-1]
    target = target_of(x.device)
    segments = len(b) if b.dim() == 3 else 0
    call = Call(M, N, r, x.element_size(), precision, project=True, segments=segments)
    config = default_config("weight_grad", target, call)
    if config is None:
        return False
    # dh has a plane for each tile of columns, d lora_b one for each split of the rows.  A single
    # plane is the result itself.
    n_planes, (m_planes, _) = config.tiles(call), config.splits(target, call)
    floats = ((n_planes > 1) * n_planes * M + (m_planes > 1) * m_planes * N) * r
    return 2 * 4 * floats < M * N * x.element_size()


def _dense(tensor: Tensor) -> Tensor:
    """The tensor if it is contiguous, else its transpose, which is contiguous then."""
    return tensor if tensor.is_contiguous() else tensor.mT
