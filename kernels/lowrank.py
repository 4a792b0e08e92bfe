"""OUT = Σ_i keep_i ∘ (U_i V_i) (+ bias): the low-rank term without a base product.

It serves plans "in place" (plan.py), where torch computes the base product.  In a layer, it writes
the term to a new output, and torch then adds its product.  For experts and many adapters, torch's
product comes first, and the kernel adds the term.  :func:`gemm_lowrank` also calls it for adapters
that are left after the last base product.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    cast,
    dot,
    dropout_threshold,
    keep_tile,
    known_multiple,
    load_tile,
    store_tile,
    tile_of,
)
from .config import MARGIN, Call, Config, cdiv, chosen_config, chunks, power_of_two, row_tiles
from .launch import Launch, Work, launch, size_of, stated
from .segments import (
    SegmentNumbers,
    mask_numbers,
    row_numbers,
    segment_arguments,
    segment_of_tile,
    small_operand_bytes,
    sorted_rows,
    strides_of,
)
from .target import Target, target_of


@dataclass(frozen=True)
class LowRankConfig(Config):
    """Tiles of :func:`lowrank`: OUT is cut into block_m x block_n.  Loops aren't pipelined."""

    block_m: int
    block_n: int
    warps: int
    stages: int = 1
    group: int = 8  # rows of tiles that advance together and share L2 (common.tile_of)

    def block_r(self, call: Call) -> int:
        return rank_step(call.r)

    def tiles(self, call: Call) -> int:
        return call.row_tiles(self.block_m) * cdiv(call.n, self.block_n)

    def sums(self, call: Call) -> int:
        # Besides the output's sum, a call with masks holds products that wait for their masks.
        # Compiled code holds two of them for four projections.
        return self.block_m * self.block_n * (1 + call.masked * call.projections // 2)

    def through_l2(self, call: Call) -> float:
        # DRAM serves OUT once.  L2 serves U (itemsize bytes) for every tile of columns, and V
        # (float32, 4 bytes) for every tile of rows.
        each = 1 / self.block_n + 4 / (self.block_m * call.itemsize)
        return 1 + call.projections * call.r * each

    def shared_memory(self, target: Target, call: Call) -> int:
        operands = self.block_m * call.itemsize + self.block_n * 4
        store = self.block_m * self.block_n * call.itemsize
        at_once = call.projections if loads_at_once(target, call) else 1
        return at_once * operands * rank_step(call.r) + store + MARGIN

    def tensor_memory(self, target: Target, call: Call) -> int:
        return self.block_n * power_of_two(call.projections) if target.tensor_memory else 0


def rank_step(r: int) -> int:
    """BLOCK_R of a program that holds a tile of OUT: the whole rank up to 64, then 32 or 16."""
    # If 16 doesn't divide the rank, Triton may use a pointer for each loaded element.  Steps of 16
    # columns limit the registers that these pointers take.
    return min(max(16, power_of_two(r)), 64 if r <= 64 else 32 if r % 16 == 0 else 16)


def loads_at_once(target: Target, call: Call) -> bool:
    """Whether a program loads the tiles of all U and V before it multiplies the first pair.

    Then the loads overlap.  On Hopper and newer, loaded tiles wait in shared memory.  On older
    devices, they wait in registers, where only small tiles fit.
    """
    one_step = call.r <= rank_step(call.r) and not call.masked
    return one_step and (target.descriptors or call.r * call.projections <= 16)


def _work_of(arguments: Mapping[str, Any]) -> Work:
    """The FLOPs and bytes of a launch.  Names that end in ``bytes`` count each element once."""
    u, v, bias, out = (arguments[name] for name in ("u", "v", "bias", "out"))
    M, N, segments = (arguments[name] for name in ("M", "N", "segments"))
    m_tiles = row_tiles(M, arguments["BLOCK_M"], segments)
    n_tiles = cdiv(N, arguments["BLOCK_N"])
    # Every tile of columns loads the rows of U; every tile of rows loads V and the bias.
    u_bytes, v_bytes, out_bytes = size_of(*u), size_of(*v, bias), M * N * out.element_size()
    old_out_bytes = out_bytes if arguments["ADD"] else 0
    small, small_by_tiles = small_operand_bytes(arguments, m_tiles * n_tiles, n_tiles)
    return Work(
        flops=2 * M * N * sum(arguments["R"]),
        loaded=u_bytes + v_bytes + small + old_out_bytes,
        stored=out_bytes,
        loaded_by_tiles=u_bytes * n_tiles
        + v_bytes // (segments or 1) * m_tiles
        + small_by_tiles
        + old_out_bytes,
    )


@triton.jit
def v_operand(v, i_segment, R, strides, MULTIPLES_OF_8: tl.constexpr):
    """One adapter's operand V [R, N] as a tuple: (pointer, R, row stride, column stride).

    ``strides``: from one segment's matrix to the next (None without segments), from row to row, and
    from column to column.  With segments, the pointer is moved to the segment's matrix.
    MULTIPLES_OF_8: whether 8 divides R, and whether it divides the column stride.
    """
    if strides[0] is not None:
        v += i_segment.to(tl.int64) * strides[0]
    r = known_multiple(R, MULTIPLES_OF_8[0])
    return v, r, strides[1], known_multiple(strides[2], MULTIPLES_OF_8[1])


@triton.jit
def load_u_v_tiles(
    u, v, i_m, i_r, i_n, M, N,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Load one step over the rank: U's tile at (i_m, i_r), and V's at (i_r, i_n) in U's dtype.

    U [M, R] is contiguous.  ``v`` comes from :func:`v_operand`.
    """
    v, r, stride_r, stride_n = v
    b_u = load_tile(u, i_m, i_r, M, r, r, 1, BLOCK_M, BLOCK_R)  # [BM, BR]
    b_v = load_tile(v, i_r, i_n, r, N, stride_r, stride_n, BLOCK_R, BLOCK_N)  # [BR, BN]
    return b_u, cast(b_v, b_u.dtype)


@triton.jit
def low_rank_tile(
    u, v, i_m, i_n, M, N, b_sum,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """b_sum [BM, BN] plus the tile of U V at (i_m, i_n), in steps of BLOCK_R over the rank."""
    # Not pipelined, because there are few steps, and their buffers would need shared memory in
    # addition to the main loop's.  v[1] is the rank (v_operand).
    for i_r in tl.range(0, v[1], BLOCK_R, num_stages=1):
        b_u, b_v = load_u_v_tiles(u, v, i_m, i_r, i_n, M, N, BLOCK_M, BLOCK_R, BLOCK_N)
        b_sum = dot(b_u, b_v, b_sum, PRECISION)  # [BM, BN] += [BM, BR] @ [BR, BN]
    return b_sum


@triton.jit
def masked_low_rank_tile(
    u, v, seeds, threshold, i_m, i_n, rows, columns,
    i: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of keep_i ∘ (U V) at (i_m, i_n), in its own accumulator, because masks differ."""
    b_low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_low = low_rank_tile(
        u, v, i_m, i_n, rows, columns, b_low, BLOCK_M, BLOCK_R, BLOCK_N, PRECISION
    )
    # keep_i [BM, BN], from the same seed as in the forward
    keep = keep_tile(tl.load(seeds + i), i_m, i_n, threshold, BLOCK_M, BLOCK_N)
    return tl.where(keep, b_low, 0.0)  # [BM, BN]


@triton.jit
def add_kept(b_sum, b_term, keep, i: tl.constexpr):
    """b_sum + keep ∘ b_term.  For the first term (i = 0), b_sum is zero and is left out."""
    b_kept = tl.where(keep, b_term, 0.0)
    return b_kept + b_sum if i > 0 else b_kept


@triton.jit
def add_term(b_sum, b_u, b_v, keep, i: tl.constexpr, PRECISION: tl.constexpr):
    """b_sum + keep ∘ (b_u @ b_v), [BM, BN] + [BM, BR] @ [BR, BN]; without a mask, keep is None."""
    if keep is None:
        return dot(b_u, b_v, b_sum, PRECISION)
    else:
        b_term = dot(b_u, b_v, tl.zeros(b_sum.shape, tl.float32), PRECISION)
        return add_kept(b_sum, b_term, keep, i)


@triton.jit
def load_bias_row(bias, i_n, i_segment, N, strides, BLOCK_N: tl.constexpr, dtype: tl.constexpr):
    """The bias [1, BN] of a tile's columns, in float32 after rounding to ``dtype``.

    torch's linear also casts the bias to x's dtype.  ``strides``: from one segment's bias to the
    next (None without segments), and from element to element.
    """
    o_n = i_n + tl.arange(0, BLOCK_N)
    o_bias = o_n.to(tl.int64) * strides[1]
    if strides[0] is not None:
        o_bias += i_segment.to(tl.int64) * strides[0]
    b_bias = tl.load(bias + o_bias, mask=o_n < N, other=0.0)  # [BN]
    return cast(b_bias, dtype).to(tl.float32)[None, :]


# M changes with the batch; Triton would compile again for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M"], launch_metadata=stated(_work_of))
def lowrank_kernel(
    u, v, bias, out, seeds, ends, order, own_thresholds,
    M, N, R, threshold, segments, v_strides, bias_strides, out_row_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, MULTIPLES_OF_8: tl.constexpr, AT_ONCE: tl.constexpr, ADD: tl.constexpr,
    SEGMENT_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT = Σ_i keep_i ∘ (U_i V_i) (+ bias) (+ OUT, if ADD).

    U_i [M, R_i], V_i [R_i, N], bias [N], OUT [M, N].  For y, the index i runs over the adapters of
    a layer; for dx, over all projections that read x.  A program computes one tile of OUT, whose
    first row and column are i_m and i_n.

    With segments (``ends``): V_i [segments, R_i, N], bias [segments, N].  A row uses the matrices
    of its segment; rows without a segment get zero.  With ``order``, row s of U_i belongs to row
    order[s] of OUT.  With ``own_thresholds``, each segment has its own seed and threshold.

    AT_ONCE: load all U_i and V_i first, then multiply, so that the loads overlap.
    """
    m_tiles = tl.cdiv(M, BLOCK_M) if ends is None else M // BLOCK_M + segments + 1
    i_program = tl.program_id(0)
    # This loop has one step.  Without it, the compiled code needs up to a tenth more registers for
    # the masks of several projections.
    for i_tile in range(i_program, i_program + 1):
        i_row_tile, i_column_tile = tile_of(i_tile, m_tiles, tl.cdiv(N, BLOCK_N), GROUP)
        i_n = i_column_tile * BLOCK_N
        # The tile loads rows below ``rows`` and columns below ``columns``, both 0 for rows without
        # a segment, and stores rows below ``end``.
        i_segment, start, i_m, end, rows, columns = segment_of_tile(
            ends, segments, i_row_tile, M, N, BLOCK_M, SEGMENT_BLOCK
        )
        b_out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        b_us, b_vs = (), ()
        for i in tl.static_range(len(u)):
            v_i = v_operand(v[i], i_segment, R[i], v_strides[i], MULTIPLES_OF_8)
            if AT_ONCE:
                b_u, b_v = load_u_v_tiles(
                    u[i], v_i, i_m, 0, i_n, rows, columns, BLOCK_M, BLOCK_R, BLOCK_N
                )
                b_us, b_vs = b_us + (b_u,), b_vs + (b_v,)
            elif seeds is None:
                b_out = low_rank_tile(
                    u[i], v_i, i_m, i_n, rows, columns, b_out, BLOCK_M, BLOCK_R, BLOCK_N, PRECISION
                )
            else:  # in a sum of its own, because the mask must not change the other terms
                b_term = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                b_term = low_rank_tile(
                    u[i], v_i, i_m, i_n, rows, columns, b_term, BLOCK_M, BLOCK_R, BLOCK_N, PRECISION
                )
                seed, own_threshold = mask_numbers(
                    seeds, own_thresholds, threshold, i, i_segment, segments
                )
                i_mask = i_m if own_thresholds is None else i_m - start
                keep = keep_tile(seed, i_mask, i_n, own_threshold, BLOCK_M, BLOCK_N)
                b_out = add_kept(b_out, b_term, keep, i)
        # AT_ONCE: all loads are under way, so now multiply.
        for i in tl.static_range(len(b_us)):
            b_out = dot(b_us[i], b_vs[i], b_out, PRECISION)  # [BM, BN] += [BM, BR] @ [BR, BN]
        if bias is not None:
            dtype: tl.constexpr = out.dtype.element_ty
            b_out += load_bias_row(bias, i_n, i_segment, columns, bias_strides, BLOCK_N, dtype)
        # With ``order``, the rows of a tile aren't consecutive in OUT: load their numbers.
        o_mem = None if order is None else row_numbers(order, i_m, end, BLOCK_M)  # [BM]
        if ADD:
            b_before = load_tile(
                out, i_m, i_n, rows, N, out_row_stride, 1, BLOCK_M, BLOCK_N, o_mem=o_mem
            )
            b_out += b_before.to(tl.float32)  # [BM, BN]
        store_tile(out, b_out, i_m, i_n, end, N, out_row_stride, 1, o_mem)


def lowrank(
    out: Tensor,
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    precision: str,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    add: bool = False,
    ends: Tensor | None = None,
    order: Tensor | None = None,
    numbers: SegmentNumbers | None = None,
    config: LowRankConfig | None = None,
) -> None:
    """Fill ``out`` with Σ_i keep_i ∘ (u_i v_i) (+ bias), or add that if ``add``.

    out [M, N] and u_i [M, R_i] are contiguous and have the same dtype; ``us`` may be empty.  v_i
    [R_i, N] has any strides.  v_i and bias [N] are cast to out's dtype when they are loaded.

    ``ends``, ``order`` and ``numbers`` as in :func:`project`, with v_i [E, R_i, N] and bias [E, N].
    With ``order``, row s of u_i belongs to row order[s] of out.  ``config`` must fit the call.
    """
    M, N, target = sorted_rows(out, order), out.shape[1], target_of(out.device)
    segments = segment_arguments(ends)
    for i, (u, v, launch_seeds) in enumerate(chunks(us, vs, seeds)):
        # Only the first launch adds the bias; later ones add to the first one's output.
        bias, ranks = None if i else bias, [each.shape[1] for each in u]
        call = Call(
            M, N, max(ranks, default=0), out.element_size(), precision, len(u),
            launch_seeds is not None, segments=segments["segments"] or 0,
        )  # fmt: skip
        tiles = chosen_config("lowrank", target, call, config)
        thresholds = None if numbers is None or launch_seeds is None else numbers.thresholds
        arguments = {
            "u": tuple(u), "v": tuple(v), "bias": bias, "out": out,
            "seeds": launch_seeds, **segments, "order": order,
            "own_thresholds": thresholds,
            "M": M, "N": N, "R": tuple(ranks), "threshold": dropout_threshold(dropout),
            "v_strides": strides_of(v, ends), "bias_strides": bias_strides(bias, ends),
            "out_row_stride": out.stride(0), "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
            "BLOCK_R": tiles.block_r(call), "GROUP": tiles.group,
            "MULTIPLES_OF_8": multiples_of_8(u, v),
            "AT_ONCE": loads_at_once(target, call),
            "ADD": add or i > 0, "PRECISION": precision,
        }  # fmt: skip
        grid = (tiles.tiles(call),)
        launch(Launch(lowrank_kernel, grid, arguments, tiles.warps, tiles.stages, _work_of))


def bias_strides(bias: Tensor | None, ends: Tensor | None) -> tuple | None:
    return None if bias is None else strides_of([bias], ends)[0]


def multiples_of_8(us: Sequence[Tensor], vs: Sequence[Tensor]) -> tuple[bool, bool]:
    """Whether 8 divides all ranks, and whether it divides the column stride of every v."""
    return all(u.shape[1] % 8 == 0 for u in us), all(v.stride(-1) % 8 == 0 for v in vs)
