"""y and dx: a matrix product with a low-rank product in the same accumulator."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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
from .config import FEW_ROWS, MAX_PROJECTIONS, Call, cdiv, chosen_config, chunks, row_tiles
from .gemm_config import GemmConfig
from .launch import Launch, Work, launch, size_of, stated
from .packed import Packed, packed_tile, packed_work, tables_of
from .segments import (
    Own,
    banks_of,
    bytes_beside,
    own_number,
    row_numbers,
    segment_arguments,
    segment_of_tile,
    sorted_rows,
)
from .target import target_of


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
    columns = size_of(*q, *v)
    written = size_of(out) if arguments["order"] is None else M * N * out.element_size()
    again = written if arguments["ADD"] else 0
    packed = packed_work(arguments)
    beside, beside_by_tiles = bytes_beside(arguments, m_tiles * n_tiles, n_tiles)
    return Work(
        flops=2 * M * N * (sum(depths) + sum(ranks)) + made,
        loaded=rows + columns + size_of(a, bias) + beside + again + packed[0],
        stored=written + (0 if a is None else size_of(*u)),
        loaded_by_tiles=(rows + size_of(*p) // M * (p_rows - M)) * n_tiles
        + (columns + size_of(bias)) // (segments or 1) * m_tiles
        + size_of(a) * m_tiles * n_tiles
        + beside_by_tiles
        + again
        + packed[1],
    )


@triton.jit
def low_rank_tile(
    u, v, i_m, i_n, M, N, R, v_rows, v_columns, b_sum,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """b_sum + U V at (i_m, i_n), in steps of BLOCK_R."""
    # Not pipelined: a few steps, whose buffers would lie beside those of the main loop.
    for i_r in tl.range(0, R, BLOCK_R, num_stages=1):
        b_u = load_tile(u, i_m, i_r, M, R, R, 1, BLOCK_M, BLOCK_R)  # [BM, BR]
        b_v = load_tile(v, i_r, i_n, R, N, v_rows, v_columns, BLOCK_R, BLOCK_N)  # [BR, BN]
        b_sum = dot(b_u, cast(b_v, b_u.dtype), b_sum, PRECISION)  # [BM, BN] += [BM, BR] @ [BR, BN]
    return b_sum


# What batches and sequences of all lengths change.
@triton.jit(do_not_specialize=["M"], launch_metadata=stated(_work))
def gemm_lowrank_kernel(
    p0, p1, p2, p3, q0, q1, q2, q3, q_operands, a, u, v, bias, out, seeds, ends, order,
    own_factors, own_thresholds, M, N, K, R, factor, threshold, segments,
    p_rows, p_columns, q_rows, q_columns, a_rows, a_columns, v_rows, v_columns,
    bias_stride, out_rows, q_banks, v_banks, bias_bank,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    Q_TRANSPOSED: tl.constexpr,
    PACKING: tl.constexpr,
    LOW_RANK: tl.constexpr,
    RANKS_OF_8: tl.constexpr,
    V_COLUMNS_OF_8: tl.constexpr,
    ADD: tl.constexpr,
    SEGMENT_BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT = Σ_i P_i Q_i + Σ_i keep_i ∘ (U_i V_i) (+ bias) (+ OUT, if ADD).

    P_i [M, K_i], Q_i [K_i, N], U_i [M, R_i], V_i [R_i, N], bias [N], OUT [M, N].  With segments,
    Q_i, V_i and the bias have an axis more in front: a row's are its segment's, and OUT is zero in
    nobody's rows.  Of an ``order``, which is OUT's, and of what is a segment's own, see project.py.

    LOW_RANK says where U_i V_i goes:
    "first"  before the main loop, since a mask is its alone; behind the loop it would need a
             second accumulator of this size
    "early"  loaded before the main loop, which hides the wait, and multiplied behind it
    "last"   loaded and multiplied behind it, in steps over the rank
    "made"   the same, of U_0 = factor · P_0 A from the main loop, which is stored; A [K_0, R_0]

    PACKING, unless None, says how to make a tile of Q_i from codes and ``q_operands`` (packed.py).
    """
    # Not tuples from outside: a launch finds no descriptors inside of tuples.
    p, q = (p0, p1, p2, p3), (q0, q1, q2, q3)
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    if ends is not None:
        m_tiles = M // BLOCK_M + segments + 1
    i_first = tl.program_id(0)
    end = m_tiles * n_tiles if PERSISTENT else i_first + 1
    for i_tile in range(i_first, end, tl.num_programs(0) if PERSISTENT else 1):
        i_m, i_n = tile_of(i_tile, m_tiles, n_tiles, GROUP)
        # What there is to store; and to load, which is nothing for nobody's rows.
        end, rows, columns, i_segment = M, M, N, None
        if ends is not None:
            i_segment, start, i_m, end = segment_of_tile(
                ends, segments, i_m, M, BLOCK_M, SEGMENT_BLOCK
            )
            has_rows = (i_segment < segments) & (i_m < end)
            rows, columns = tl.where(has_rows, end, 0), tl.where(has_rows, N, 0)
            i_bank = i_segment.to(tl.int64)
            i_n = i_n * BLOCK_N
        else:
            i_m, i_n = i_m * BLOCK_M, i_n * BLOCK_N
        b_out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

        early_u, early_v = (), ()
        for i in tl.static_range(len(u)):
            r = known_multiple(R[i], RANKS_OF_8)
            v_column = known_multiple(v_columns[i], V_COLUMNS_OF_8)
            v_i = v[i]
            if ends is not None:
                v_i += i_bank * v_banks[i]
            if LOW_RANK == "first":
                b_low = low_rank_tile(
                    u[i], v_i, i_m, i_n, rows, columns, r, v_rows[i], v_column,
                    tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
                    BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
                )  # fmt: skip
                i_seed = i if own_thresholds is None else min(i_segment, segments - 1)
                i_mask = i_m if own_thresholds is None else i_m - start
                least = own_number(own_thresholds, threshold, i_segment, segments)
                keep = keep_tile(tl.load(seeds + i_seed), i_mask, i_n, least, BLOCK_M, BLOCK_N)
                b_out += tl.where(keep, b_low, 0.0)  # [BM, BN]
            elif LOW_RANK == "early":
                # [BM, BR], [BR, BN]
                b_u = load_tile(u[i], i_m, 0, rows, r, r, 1, BLOCK_M, BLOCK_R)
                b_v = load_tile(v_i, 0, i_n, r, columns, v_rows[i], v_column, BLOCK_R, BLOCK_N)
                early_u, early_v = early_u + (b_u,), early_v + (cast(b_v, b_u.dtype),)

        if LOW_RANK == "made":
            b_made = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i in tl.static_range(len(K)):
            depth, q_i = K[i], q[i]
            if ends is not None:
                depth = tl.where(has_rows, depth, 0)
                if not DESCRIPTORS:
                    q_i += i_bank * q_banks[i]
            if PACKING is not None:
                tables = tables_of(q_operands[i], PACKING)
            for i_k in range(0, depth, BLOCK_K):
                b_p = load_tile(
                    p[i],
                    i_m,
                    i_k,
                    rows,
                    K[i],
                    p_rows[i],
                    p_columns[i],
                    BLOCK_M,
                    BLOCK_K,
                    DESCRIPTORS,
                )  # [BM, BK]
                if PACKING is not None:
                    if Q_TRANSPOSED:
                        b_q = packed_tile(
                            q[i], q_operands[i], tables, i_n, i_k, N, K[i], q_columns[i],
                            BLOCK_N, BLOCK_K, PACKING, b_p.dtype,
                        ).T  # [BK, BN]  # fmt: skip
                    else:
                        b_q = packed_tile(
                            q[i], q_operands[i], tables, i_k, i_n, K[i], N, q_rows[i],
                            BLOCK_K, BLOCK_N, PACKING, b_p.dtype,
                        )  # [BK, BN]  # fmt: skip
                elif Q_TRANSPOSED:
                    b_q = load_tile(
                        q_i, i_n, i_k, N, K[i], q_columns[i], q_rows[i],
                        BLOCK_N, BLOCK_K, DESCRIPTORS, i_segment,
                    ).T  # [BK, BN]  # fmt: skip
                else:
                    b_q = load_tile(
                        q_i, i_k, i_n, K[i], N, q_rows[i], q_columns[i],
                        BLOCK_K, BLOCK_N, DESCRIPTORS, i_segment,
                    )  # [BK, BN]  # fmt: skip
                b_out = dot(b_p, b_q, b_out, PRECISION)  # [BM, BN] += [BM, BK] @ [BK, BN]
                if LOW_RANK == "made":
                    b_a = load_tile(
                        a, i_k, 0, K[0], R[0], a_rows, a_columns, BLOCK_K, BLOCK_R
                    )  # [BK, BR]
                    # [BM, BR] += [BM, BK] @ [BK, BR]
                    b_made = dot(b_p, cast(b_a, b_p.dtype), b_made, PRECISION)

        for i in tl.static_range(len(u)):
            r = known_multiple(R[i], RANKS_OF_8)
            v_column = known_multiple(v_columns[i], V_COLUMNS_OF_8)
            if LOW_RANK == "early":
                # [BM, BN] += [BM, BR] @ [BR, BN]
                b_out = dot(early_u[i], early_v[i], b_out, PRECISION)
            elif LOW_RANK == "last":
                v_i = v[i]
                if ends is not None:
                    v_i += i_bank * v_banks[i]
                b_out = low_rank_tile(
                    u[i], v_i, i_m, i_n, rows, columns, r, v_rows[i], v_column, b_out,
                    BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
                )  # fmt: skip
            elif LOW_RANK == "made":
                b_u = cast(b_made * factor, u[i].dtype.element_ty)  # [BM, BR]
                if i_n == 0:
                    store_tile(u[i], b_u, i_m, 0, M, r, r, 1)
                # [BR, BN]
                b_v = load_tile(v[i], 0, i_n, r, N, v_rows[i], v_column, BLOCK_R, BLOCK_N)
                # [BM, BN] += [BM, BR] @ [BR, BN]
                b_out = dot(b_u, cast(b_v, b_u.dtype), b_out, PRECISION)
        if bias is not None:
            o_n = i_n + tl.arange(0, BLOCK_N)
            o_bias = o_n.to(tl.int64) * bias_stride
            if ends is not None:
                o_bias += i_bank * bias_bank
            b_bias = tl.load(bias + o_bias, mask=o_n < columns, other=0.0)  # [BN]
            # Rounded as torch rounds it, which adds it in the dtype of x.
            b_out += cast(b_bias, u[0].dtype.element_ty).to(tl.float32)[None, :]
        o_at = None
        if order is not None:
            o_at = row_numbers(order, i_m, end, BLOCK_M)
        if ADD:
            b_before = load_tile(out, i_m, i_n, rows, N, out_rows, 1, BLOCK_M, BLOCK_N, o_at=o_at)
            b_out += b_before.to(tl.float32)  # [BM, BN]

        if DESCRIPTORS and ends is None:
            # In two halves: the store's buffer stays allocated, beside those of the main loop.
            halves = b_out.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
            for i in tl.static_range(2):
                out.store([i_m, i_n + i * (BLOCK_N // 2)], cast(halves[i], out.dtype))
        else:
            store_tile(out, b_out, i_m, i_n, end, N, out_rows, 1, o_at)


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
    order: Tensor | None = None,
    own: Own | None = None,
    config: GemmConfig | None = None,
    preferred: GemmConfig | None = None,
) -> None:
    """out = Σ_i p_i q_i + Σ_i keep_i ∘ (u_i v_i) (+ bias), or ``add`` that to out.

    out [M, N] and u_i [M, R_i] are contiguous; p_i [M, K_i], q_i [K_i, N] and v_i [R_i, N] have
    any strides.  out, p_i, q_i and u_i have one dtype; v_i and bias are cast as they are read.
    Or all q_i are packed alike, and lie in rows (``Packed.lies_in_rows``).

    Given ``a`` [K_0, R_0], a projection alone and without dropout also makes
    u_0 = factor · p_0 a, in the one launch: where :func:`one_launch_pays`.

    ``ends`` as in :func:`project`, without ``a``: q_i [E, K_i, N], v_i [E, R_i, N], bias [E, N].
    ``order`` and ``own``, too, without p: u's rows are added to these of out.

    ``config``, if given, must fit the call; ``preferred`` is taken if it does.
    """
    for i, part in enumerate(chunks(us, vs, ps, qs, seeds)):
        _gemm_lowrank(
            out, *part, precision, None if i else bias, dropout, add or i > 0, a, factor,
            ends, order, own, config, preferred,
        )  # fmt: skip


def _gemm_lowrank(
    out: Tensor,
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    ps: Sequence[Tensor],
    qs: Sequence[Tensor] | Sequence[Packed],
    seeds: Tensor | None,
    precision: str,
    bias: Tensor | None,
    dropout: float,
    add: bool,
    a: Tensor | None,
    factor: float,
    ends: Tensor | None,
    order: Tensor | None,
    own: Own | None,
    config: GemmConfig | None,
    preferred: GemmConfig | None,
) -> None:
    """As many as one launch takes."""
    depths, ranks = [p.shape[1] for p in ps], [u.shape[1] for u in us]
    M, N = sorted_rows(out, order), out.shape[1]
    target = target_of(out.device)
    packed = qs[0] if qs and isinstance(qs[0], Packed) else None
    if packed is not None:
        q_transposed = packed.transposed
    else:
        q_transposed = bool(qs) and all(q.stride(-2) == 1 for q in qs)
    described = [] if packed else [*ps, *(q.mT if q_transposed else q for q in qs), out]
    call = Call(
        M, N, max(ranks), out.element_size(), precision, len(us),
        masked=seeds is not None, project=a is not None, alone=not ps,
        pointers=add or packed is not None or not all(map(_has_descriptor, described)),
        packed="" if packed is None else packed.kind, segments=0 if ends is None else len(ends),
    )  # fmt: skip
    config = chosen_config("gemm_lowrank", target, call, config, preferred)
    descriptors = config.uses_descriptors(call)
    # The addresses of a group's low-rank operands, kept from tile to tile, are too many registers
    # beside its two accumulators.
    persistent = descriptors and ends is None and not (seeds is not None and len(us) > 1)
    p, q, target_out = list(ps), [q.codes if packed else q for q in qs], out
    if descriptors:
        block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
        of_one = [] if ends is None else [1]
        p = [TensorDescriptor.from_tensor(matrix, [block_m, block_k]) for matrix in ps]
        q = [
            TensorDescriptor.from_tensor(matrix.mT, [*of_one, block_n, block_k])
            if q_transposed
            else TensorDescriptor.from_tensor(matrix, [*of_one, block_k, block_n])
            for matrix in qs
        ]
        if ends is None:  # a tile's last rows may be another segment's
            target_out = TensorDescriptor.from_tensor(out, [block_m, block_n // 2])
    absent = [None] * (MAX_PROJECTIONS - len(ps))
    arguments = {
        **{f"p{i}": operand for i, operand in enumerate(p + absent)},
        **{f"q{i}": operand for i, operand in enumerate(q + absent)},
        "q_operands": () if packed is None else tuple(each.operands for each in qs),
        "a": a, "u": tuple(us), "v": tuple(vs), "bias": bias, "out": target_out, "seeds": seeds,
        **segment_arguments(ends, order, own, masked=seeds is not None),
        "q_banks": banks_of(ends, qs), "v_banks": banks_of(ends, vs),
        "bias_bank": None if ends is None or bias is None else bias.stride(0),
        "M": M, "N": N, "K": tuple(depths), "R": tuple(ranks), "factor": factor,
        "threshold": dropout_threshold(dropout),
        "p_rows": tuple(p.stride(0) for p in ps), "p_columns": tuple(p.stride(1) for p in ps),
        "q_rows": tuple(q.stride(-2) for q in qs), "q_columns": tuple(q.stride(-1) for q in qs),
        "a_rows": 0 if a is None else a.stride(0), "a_columns": 0 if a is None else a.stride(1),
        "v_rows": tuple(v.stride(-2) for v in vs), "v_columns": tuple(v.stride(-1) for v in vs),
        "bias_stride": 0 if bias is None else bias.stride(-1), "out_rows": out.stride(0),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k, "BLOCK_R": config.block_r(call), "GROUP": config.group,
        "PRECISION": precision, "DESCRIPTORS": descriptors, "PERSISTENT": persistent,
        "Q_TRANSPOSED": q_transposed, "PACKING": packed and packed.packing(target),
        "LOW_RANK": config.low_rank(target, call), "ADD": add,
        "RANKS_OF_8": all(r % 8 == 0 for r in ranks),
        "V_COLUMNS_OF_8": all(v.stride(-1) % 8 == 0 for v in vs),
    }  # fmt: skip
    count, work = config.tiles(call), partial(_work, arguments)
    grid = (min(count, target.processors) if persistent else count,)
    launch(Launch(gemm_lowrank_kernel, grid, arguments, config.warps, config.stages, work))


def one_launch_pays(x: Tensor, r: int) -> bool:
    """Whether :func:`gemm_lowrank` should make h as well, by repeating that for every tile.

    It should while the launch waits for the weight's bytes, and r is small beside a tile.
    """
    return len(x) <= FEW_ROWS and r <= 32


def _has_descriptor(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: rows that don't overlap, all at 16 bytes.

    Of stacked matrices every one lies at 16 bytes, too.
    """
    *outer, column = matrix.stride()
    aligned = not any(stride * matrix.element_size() % 16 for stride in outer)
    dense = column == 1 and outer[-1] >= matrix.shape[-1]
    return dense and aligned and matrix.data_ptr() % 16 == 0
