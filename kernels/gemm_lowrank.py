"""y and dx: a matrix product with a low-rank product in the same accumulator."""

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import cast, dot, dropout_threshold, keep_tile, load_tile, store_tile, tile_of
from .config import FEW_ROWS, MAX_PROJECTIONS, Call, cdiv, chosen_config, chunks, row_tiles
from .faults import races_when_turned, small_views_fault
from .gemm_config import GemmConfig
from .launch import Launch, Work, launch, size_of, stated
from .lowrank import (
    bias_row,
    bias_strides,
    low_rank_tile,
    lowrank,
    multiples_of_8,
    u_v_tiles,
    v_operand,
)
from .packed import Packed, packed_tile, packed_work, tables_of
from .segments import bytes_beside, segment_arguments, segment_of_tile, strides_of
from .target import Target, target_of


def _work(arguments: Mapping[str, Any]) -> Work:
    a, u, v, bias, out = (arguments[name] for name in ("a", "u", "v", "bias", "out"))
    p, q = ([arguments[f"{name}{i}"] for i in range(MAX_PROJECTIONS)] for name in "pq")
    M, N, depths, ranks = (arguments[name] for name in ("M", "N", "K", "R"))
    segments, n_tiles = arguments["segments"], cdiv(N, arguments["BLOCK_N"])
    m_tiles = row_tiles(M, arguments["BLOCK_M"], segments)
    # A descriptor's tile doesn't stop where the segment does.
    whole = segments is not None and arguments["DESCRIPTORS"]
    p_rows = m_tiles * arguments["BLOCK_M"] if whole else M
    made = 0 if a is None else 2 * M * depths[0] * ranks[0]
    rows = size_of(*p) + (size_of(*u) if a is None else 0)
    columns, again = size_of(*q, *v), size_of(out) if arguments["ADD"] else 0
    packed = packed_work(arguments)
    beside, beside_by_tiles = bytes_beside(arguments, m_tiles * n_tiles, n_tiles)
    return Work(
        flops=2 * M * N * (sum(depths) + sum(ranks)) + made,
        loaded=rows + columns + size_of(a, bias) + beside + again + packed[0],
        stored=size_of(out) + (0 if a is None else size_of(*u)),
        loaded_by_tiles=(rows + size_of(*p) // M * (p_rows - M)) * n_tiles
        + (columns + size_of(bias)) // (segments or 1) * m_tiles
        + size_of(a) * m_tiles * n_tiles
        + beside_by_tiles
        + again
        + packed[1],
    )


@triton.jit
def q_tile(
    q, operands, tables, i_k, i_n, i_segment, K, N, strides,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PACKING: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """The tile [BK, BN] of Q [K, N] at (i_k, i_n); TRANSPOSED: from where Qᵀ lies in rows."""
    if TRANSPOSED:
        return stored_tile(
            q, operands, tables, i_n, i_k, i_segment, N, K, strides[0], strides[2], strides[1],
            BLOCK_N, BLOCK_K, DESCRIPTOR, PACKING, dtype,
        ).T  # fmt: skip
    else:
        return stored_tile(
            q, operands, tables, i_k, i_n, i_segment, K, N, strides[0], strides[1], strides[2],
            BLOCK_K, BLOCK_N, DESCRIPTOR, PACKING, dtype,
        )  # fmt: skip


@triton.jit
def stored_tile(
    q, operands, tables, i_row, i_column, i_segment, rows, columns, bank, row_stride, column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PACKING: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """The tile of a matrix, or of its segment's, as it is stored: packed or not."""
    if PACKING is not None:
        if bank is not None:  # the experts' weights are one matrix, below each other
            i_row += i_segment * rows
            rows *= i_segment + 1
        return packed_tile(
            q, operands, tables, i_row, i_column, rows, columns, row_stride,
            ROWS, COLUMNS, PACKING, dtype,
        )  # fmt: skip
    else:
        i_bank = None
        if bank is not None:
            i_bank = i_segment
            if not DESCRIPTOR:
                q += i_segment.to(tl.int64) * bank
        return load_tile(
            q, i_row, i_column, rows, columns, row_stride, column_stride, ROWS, COLUMNS,
            DESCRIPTOR, i_bank,
        )  # fmt: skip


@triton.jit
def store_in_halves(out, b_out, i_m, i_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """By descriptor: the store's buffer stays allocated, beside those of the main loop."""
    halves = b_out.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    for i in tl.static_range(2):
        out.store([i_m, i_n + i * (BLOCK_N // 2)], cast(halves[i], out.dtype))


# What batches and sequences of all lengths change.
@triton.jit(do_not_specialize=["M"], launch_metadata=stated(_work))
def gemm_lowrank_kernel(
    p0, p1, p2, p3, q0, q1, q2, q3, q_operands, a, u, v, bias, out, seeds, ends,
    M, N, K, R, factor, threshold, segments,
    p_strides, q_strides, a_strides, v_strides, bias_strides, out_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    Q_TRANSPOSED: tl.constexpr,
    PACKING: tl.constexpr,
    LOW_RANK: tl.constexpr,
    MULTIPLES_OF_8: tl.constexpr,
    ADD: tl.constexpr,
    SEGMENT_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT = Σ_i P_i Q_i + Σ_i keep_i ∘ (U_i V_i) (+ bias) (+ OUT, if ADD).

    P_i [M, K_i], Q_i [K_i, N], U_i [M, R_i], V_i [R_i, N], bias [N], OUT [M, N].  With segments,
    Q_i, V_i and the bias have an axis more in front: a row's are its segment's, and OUT is zero in
    nobody's rows.  PACKING, unless None, says how to make Q_i of ``q_operands`` (packed.py).

    LOW_RANK says where U_i V_i goes:
    "first"  before the main loop, since a mask is its alone; behind the loop it would need a
             second accumulator of this size
    "early"  loaded before the main loop, which hides the wait, and multiplied behind it
    "last"   loaded and multiplied behind it, in steps over the rank
    "made"   the same, of U_0 = factor · P_0 A from the main loop, which is stored; A [K_0, R_0]
    """
    # Not tuples from outside: a launch finds no descriptors inside of tuples.
    p, q = (p0, p1, p2, p3), (q0, q1, q2, q3)
    dtype: tl.constexpr = p0.dtype if DESCRIPTORS else p0.dtype.element_ty
    m_tiles = tl.cdiv(M, BLOCK_M) if ends is None else M // BLOCK_M + segments + 1
    n_tiles = tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0)
    last = m_tiles * n_tiles if PERSISTENT else first + 1
    for i_tile in range(first, last, tl.num_programs(0) if PERSISTENT else 1):
        i_m, i_n = tile_of(i_tile, m_tiles, n_tiles, GROUP)
        i_n = i_n * BLOCK_N
        i_segment, _, i_m, end, rows, columns = segment_of_tile(
            ends, segments, i_m, M, N, BLOCK_M, SEGMENT_BLOCK
        )
        b_out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        b_us, b_vs = (), ()
        for i in tl.static_range(len(u)):
            v_i = v_operand(v[i], i_segment, R[i], v_strides[i], MULTIPLES_OF_8)
            if LOW_RANK == "first":
                b_low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                b_low = low_rank_tile(
                    u[i], v_i, i_m, i_n, rows, columns, b_low, BLOCK_M, BLOCK_R, BLOCK_N, PRECISION
                )
                keep = keep_tile(tl.load(seeds + i), i_m, i_n, threshold, BLOCK_M, BLOCK_N)
                # From compilation for sm_90: without the 0 of the first, a fifth more instructions.
                b_out += tl.where(keep, b_low, 0.0)  # [BM, BN]
            elif LOW_RANK == "early":
                b_u, b_v = u_v_tiles(
                    u[i], v_i, i_m, 0, i_n, rows, columns, BLOCK_M, BLOCK_R, BLOCK_N
                )
                b_us, b_vs = b_us + (b_u,), b_vs + (b_v,)

        b_made = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i in tl.static_range(len(K)):
            depth = K[i] if ends is None else tl.where(rows > 0, K[i], 0)
            operands, tables = None, None
            if PACKING is not None:
                operands, tables = q_operands[i], tables_of(q_operands[i], PACKING)
            for i_k in range(0, depth, BLOCK_K):
                b_p = load_tile(
                    p[i], i_m, i_k, rows, K[i], p_strides[i][0], p_strides[i][1],
                    BLOCK_M, BLOCK_K, DESCRIPTORS,
                )  # [BM, BK]  # fmt: skip
                b_q = q_tile(
                    q[i], operands, tables, i_k, i_n, i_segment, K[i], N, q_strides[i],
                    BLOCK_K, BLOCK_N, Q_TRANSPOSED, DESCRIPTORS, PACKING, dtype,
                )  # [BK, BN]  # fmt: skip
                b_out = dot(b_p, b_q, b_out, PRECISION)  # [BM, BN] += [BM, BK] @ [BK, BN]
                if LOW_RANK == "made":
                    b_a = load_tile(
                        a, i_k, 0, K[0], R[0], a_strides[0], a_strides[1], BLOCK_K, BLOCK_R
                    )  # [BK, BR]
                    b_made = dot(b_p, cast(b_a, dtype), b_made, PRECISION)  # [BM, BR]

        for i in tl.static_range(len(u)):
            v_i = v_operand(v[i], i_segment, R[i], v_strides[i], MULTIPLES_OF_8)
            if LOW_RANK == "early":
                b_out = dot(b_us[i], b_vs[i], b_out, PRECISION)  # [BM, BN] += [BM, BR] @ [BR, BN]
            elif LOW_RANK == "last":
                b_out = low_rank_tile(
                    u[i], v_i, i_m, i_n, rows, columns, b_out, BLOCK_M, BLOCK_R, BLOCK_N, PRECISION
                )
            elif LOW_RANK == "made":
                b_u = cast(b_made * factor, dtype)  # [BM, BR]
                v_0, r, row, column = v_i
                if i_n == 0:
                    store_tile(u[i], b_u, i_m, 0, M, r, r, 1)
                b_v = load_tile(v_0, 0, i_n, r, N, row, column, BLOCK_R, BLOCK_N)  # [BR, BN]
                b_out = dot(b_u, cast(b_v, dtype), b_out, PRECISION)
        if bias is not None:
            b_out += bias_row(bias, i_n, i_segment, columns, bias_strides, BLOCK_N, dtype)
        if ADD:
            b_before = load_tile(out, i_m, i_n, rows, N, out_rows, 1, BLOCK_M, BLOCK_N)
            b_out += b_before.to(tl.float32)  # [BM, BN]

        if DESCRIPTORS and ends is None:
            store_in_halves(out, b_out, i_m, i_n, BLOCK_M, BLOCK_N)
        else:
            store_tile(out, b_out, i_m, i_n, end, N, out_rows, 1)


def gemm_lowrank(
    out: Tensor,
    ps: Sequence[Tensor],
    qs: Sequence[Tensor] | Sequence[Packed],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    precision: str,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    add: bool = False,
    a: Tensor | None = None,
    factor: float = 1.0,
    ends: Tensor | None = None,
    config: GemmConfig | None = None,
    preferred: GemmConfig | None = None,
) -> None:
    """out = Σ_i p_i q_i + Σ_i keep_i ∘ (u_i v_i) (+ bias), or ``add`` that to out.

    out [M, N] and u_i [M, R_i] are contiguous; p_i [M, K_i], q_i [K_i, N] and v_i [R_i, N] have
    any strides.  out, p_i, q_i and u_i have one dtype; v_i and bias are cast as they are read.
    Without an adapter there is no u_i, and v_i.
    Or all q_i are packed alike, and lie in rows (``Packed.lies_in_rows``); with ``ends`` experts'.

    Given ``a`` [K_0, R_0], a projection alone and without dropout also makes
    u_0 = factor · p_0 a, in the one launch: where :func:`one_launch_pays`.

    ``ends`` as in :func:`project`, without ``a``: q_i [E, K_i, N], v_i [E, R_i, N], bias [E, N].

    ``config``, if given, must fit the call; ``preferred`` is taken if it does.
    """
    target, (M, N) = target_of(out.device), out.shape
    for i, (u, v, p, q, keys) in enumerate(chunks(us, vs, ps, qs, seeds)):
        if not p:  # more adapters than products
            options = {"precision": precision, "dropout": dropout, "seeds": keys, "ends": ends}
            lowrank(out, u, v, add=True, **options)
            continue
        bias, ranks = None if i else bias, [each.shape[1] for each in u]
        packed = q[0] if isinstance(q[0], Packed) else None
        transposed = packed.transposed if packed else all(each.stride(-2) == 1 for each in q)
        described = [] if packed else [*p, *(each.mT if transposed else each for each in q), out]
        adds, size = add or i > 0, out.element_size()
        call = Call(
            M, N, max(ranks, default=0), size, precision, len(u),
            masked=keys is not None, project=a is not None,
            pointers=adds or packed is not None
            or (not transposed and races_when_turned(target, precision, size))
            or not all(_has_descriptor(each, target) for each in described),
            packed="" if packed is None else packed.kind, segments=0 if ends is None else len(ends),
        )  # fmt: skip
        tiles = chosen_config("gemm_lowrank", target, call, config, preferred)
        descriptors = tiles.uses_descriptors(call)
        # The addresses of a group's low-rank operands, kept from tile to tile, are too many
        # registers beside its two accumulators.
        persistent = descriptors and ends is None and not (keys is not None and len(u) > 1)
        operands = (
            _described(p, q, out, tiles, transposed, ends)
            if descriptors
            else (p, [each.codes if packed else each for each in q], out)
        )
        absent = [None] * (MAX_PROJECTIONS - len(p))
        arguments = {
            **{f"p{i}": operand for i, operand in enumerate([*operands[0], *absent])},
            **{f"q{i}": operand for i, operand in enumerate([*operands[1], *absent])},
            "q_operands": () if packed is None else tuple(each.operands for each in q),
            "a": a, "u": tuple(u), "v": tuple(v), "bias": bias, "out": operands[2],
            "seeds": keys, **segment_arguments(ends),
            "M": M, "N": N, "K": tuple(each.shape[1] for each in p), "R": tuple(ranks),
            "factor": factor, "threshold": dropout_threshold(dropout),
            "p_strides": tuple(each.stride() for each in p), "q_strides": strides_of(q, ends),
            "a_strides": None if a is None else a.stride(), "v_strides": strides_of(v, ends),
            "bias_strides": bias_strides(bias, ends), "out_rows": out.stride(0),
            "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k,
            "BLOCK_R": tiles.block_r(call), "GROUP": tiles.group, "DESCRIPTORS": descriptors,
            "PERSISTENT": persistent, "Q_TRANSPOSED": transposed,
            "PACKING": packed and packed.packing(target),
            "LOW_RANK": tiles.low_rank(target, call), "MULTIPLES_OF_8": multiples_of_8(u, v),
            "ADD": adds, "PRECISION": precision,
        }  # fmt: skip
        count = tiles.tiles(call)
        grid = (min(count, target.processors) if persistent else count,)
        launch(Launch(gemm_lowrank_kernel, grid, arguments, tiles.warps, tiles.stages, _work))


def _described(
    ps: Sequence[Tensor],
    qs: Sequence[Tensor],
    out: Tensor,
    config: GemmConfig,
    transposed: bool,
    ends: Tensor | None,
) -> tuple[list[TensorDescriptor], list[TensorDescriptor], TensorDescriptor | Tensor]:
    """The operands by descriptor, but for the output of segments: a tile may have two's rows."""
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    shape = [block_n, block_k] if transposed else [block_k, block_n]
    shape = shape if ends is None else [1, *shape]
    describe = TensorDescriptor.from_tensor
    return (
        [describe(p, [block_m, block_k]) for p in ps],
        [describe(q.mT if transposed else q, shape) for q in qs],
        describe(out, [block_m, block_n // 2]) if ends is None else out,
    )


def one_launch_pays(x: Tensor, r: int) -> bool:
    """Whether :func:`gemm_lowrank` should make h as well, by repeating that for every tile.

    It should while the launch waits for the weight's bytes, and r is small beside a tile.
    """
    return len(x) <= FEW_ROWS and r <= 32


def _has_descriptor(matrix: Tensor, target: Target) -> bool:
    """Whether a tensor descriptor can describe it: rows that don't overlap, all at 16 bytes.

    Of stacked matrices every one lies at 16 bytes, too.
    """
    *outer, column = matrix.stride()
    size = matrix.element_size()
    aligned = not any(stride * size % 16 for stride in outer)
    if column != 1 or outer[-1] < matrix.shape[-1] or not aligned or matrix.data_ptr() % 16:
        return False
    if matrix.is_contiguous() or not small_views_fault(target):
        return True
    ends = zip(matrix.shape, matrix.stride(), strict=True)
    return sum((length - 1) * stride for length, stride in ends) * size >= 2**17
