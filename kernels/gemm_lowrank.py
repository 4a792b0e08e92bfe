"""OUT = Σ_i P_i Q_i + Σ_i keep_i ∘ (U_i V_i) (+ bias): a base product and its low-rank term.

A layer computes y = x Wᵀ + scale · drop(x) Aᵀ Bᵀ (+ bias), with A = lora_a and B = lora_b.
``project`` computes h = scale · drop(x) Aᵀ first, so that y = x Wᵀ + h Bᵀ (+ bias).  Both products
have y's shape and go into the same float32 accumulator.  dx has the same form, so one kernel serves
both:

    |      | P_i          | Q_i              | U_i           | V_i              | keep_i   |
    |------|--------------|------------------|---------------|------------------|----------|
    | y    | x [M, K]     | weightᵀ [K, N]   | h [M, r]      | lora_bᵀ [r, N]   | -        |
    | dx   | dy_i [M, N_i]| weight_i [N_i, K]| dh_i [M, r_i] | lora_a_i [r_i, K]| the mask |

Here K and N are the layer's input and output features.  y has one product P_0 Q_0, and a term
U_i V_i for each active adapter.  dx sums over all projections that read x, because their gradients
add up.  Only dx has a mask.  For y, dropout is already part of h.  In the backward, the mask
applies to the adapter's part of dx, and not to dy weight.

Inside the kernel, the letters belong to OUT = P Q: OUT is [M, N], and K_i is the depth of product
i.  So for dx, the kernel's N is the layer's K, and its K_i is the layer's N_i.

P_i and Q_i may be int8, with scales (:class:`Scales`).  Their products are summed exactly in int32.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import (
    cast,
    dot,
    dropout_threshold,
    hadamard_matrix,
    keep_tile,
    load_tile,
    rotate_tile,
    store_tile,
    tile_of,
)
from .config import FEW_ROWS, MAX_PROJECTIONS, Call, cdiv, chosen_config, chunks, row_tiles
from .faults import races_when_turned, small_views_fault
from .gemm_config import GemmConfig
from .launch import Launch, Work, launch, size_of, stated
from .lowrank import (
    bias_strides,
    load_bias_row,
    load_u_v_tiles,
    low_rank_tile,
    lowrank,
    multiples_of_8,
    v_operand,
)
from .packed import Packed, packed_work, tables_of, unpack_tile
from .segments import segment_arguments, segment_of_tile, small_operand_bytes, strides_of
from .target import Target, target_of


class Scales(NamedTuple):
    """The scales of int8 operands: a product is rows_i ∘ (P_i Q_i) ∘ columns, in float32.

    All are float32: rows_i [M] for each i, and columns [N].  y has columns (the weight's scales).
    dx has none, because dy is multiplied by these scales before it is rounded; the sum of its
    products is then rotated, in blocks of 64 columns of OUT.
    """

    rows: Sequence[Tensor]
    columns: Tensor | None = None


def _work_of(arguments: Mapping[str, Any]) -> Work:
    """The FLOPs and bytes of a launch.  Names that end in ``bytes`` count each element once."""
    a, u, v, bias, out = (arguments[name] for name in ("a", "u", "v", "bias", "out"))
    p, q = ([arguments[f"{name}{i}"] for i in range(MAX_PROJECTIONS)] for name in "pq")
    M, N, depths, ranks = (arguments[name] for name in ("M", "N", "K", "R"))
    segments, n_tiles = arguments["segments"], cdiv(N, arguments["BLOCK_N"])
    m_tiles = row_tiles(M, arguments["BLOCK_M"], segments)
    # A load by descriptor doesn't stop at a segment's end, so it loads all rows of a tile of P.
    loads_full_tiles = segments is not None and arguments["DESCRIPTORS"]
    p_rows = m_tiles * arguments["BLOCK_M"] if loads_full_tiles else M
    # FLOPs of h = x lora_aᵀ, if this launch computes it.  Every tile of columns repeats this
    # product, but ``flops`` counts it once.
    h_flops = 0 if a is None else 2 * M * depths[0] * ranks[0]
    # Every tile of columns loads the rows of P and U; every tile of rows loads Q, V and the bias.
    p_u_bytes = size_of(*p) + (size_of(*u) if a is None else 0)
    q_v_bytes, old_out_bytes = size_of(*q, *v), size_of(out) if arguments["ADD"] else 0
    scales = packed_work(arguments)  # (bytes counted once, bytes as all tiles load them)
    row_scales, column_scales = arguments["scales"]  # of int8
    p_u_bytes, q_v_bytes = p_u_bytes + size_of(*row_scales), q_v_bytes + size_of(column_scales)
    small, small_by_tiles = small_operand_bytes(arguments, m_tiles * n_tiles, n_tiles)
    return Work(
        flops=2 * M * N * (sum(depths) + sum(ranks)) + h_flops,
        loaded=p_u_bytes + q_v_bytes + size_of(a, bias) + small + old_out_bytes + scales[0],
        stored=size_of(out) + (0 if a is None else size_of(*u)),
        loaded_by_tiles=(p_u_bytes + size_of(*p) // M * (p_rows - M)) * n_tiles
        + (q_v_bytes + size_of(bias)) // (segments or 1) * m_tiles
        + size_of(a) * m_tiles * n_tiles
        + small_by_tiles
        + old_out_bytes
        + scales[1],
    )


@triton.jit
def load_q_tile(
    q, operands, tables, i_k, i_n, i_segment, K, N, strides,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PACKING: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """The tile [BK, BN] of Q [K, N] at (i_k, i_n).

    ``strides`` of Q: from one segment's matrix to the next (None without segments), from row to
    row, and from column to column.  TRANSPOSED: the rows of Qᵀ are contiguous in memory, as with a
    weight in the forward.  Then a tile of Qᵀ is loaded and transposed, because a load is fastest
    along contiguous memory.  ``operands`` and ``tables`` belong to a packed Q (packed.py).
    """
    if TRANSPOSED:
        return load_stored_tile(
            q, operands, tables, i_n, i_k, i_segment, N, K, strides[0], strides[2], strides[1],
            BLOCK_N, BLOCK_K, DESCRIPTOR, PACKING, dtype,
        ).T  # fmt: skip
    else:
        return load_stored_tile(
            q, operands, tables, i_k, i_n, i_segment, K, N, strides[0], strides[1], strides[2],
            BLOCK_K, BLOCK_N, DESCRIPTOR, PACKING, dtype,
        )  # fmt: skip


@triton.jit
def load_stored_tile(
    q, operands, tables, i_row, i_column, i_segment, rows, columns,
    stride_e, row_stride, column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PACKING: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """The tile [ROWS, COLUMNS] of a matrix [rows, columns] in memory, unpacked if it is packed.

    ``stride_e``: with segments, the elements from one segment's matrix to the next; None without.
    """
    if PACKING is not None:
        if stride_e is not None:
            # The experts' packed weights are one tall matrix, so rows count from the first expert.
            i_row += i_segment * rows
            rows *= i_segment + 1  # the row after this expert's last
        return unpack_tile(
            q, operands, tables, i_row, i_column, rows, columns, row_stride,
            ROWS, COLUMNS, PACKING, dtype,
        )  # fmt: skip
    else:
        i_matrix = None
        if stride_e is not None:
            # A descriptor describes all matrices and takes the matrix's number; a pointer is moved.
            i_matrix = i_segment
            if not DESCRIPTOR:
                q += i_segment.to(tl.int64) * stride_e
        return load_tile(
            q, i_row, i_column, rows, columns, row_stride, column_stride, ROWS, COLUMNS,
            DESCRIPTOR, i_matrix,
        )  # fmt: skip


@triton.jit
def store_in_halves(out, b_out, i_m, i_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store a tile [BM, BN] by descriptor, in two steps of BN / 2 columns.

    A store by descriptor goes through shared memory.  In a persistent program its buffer stays
    allocated beside the main loop's buffers; half a tile needs half the buffer.
    """
    halves = b_out.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()  # [BM, BN / 2] each
    for i in tl.static_range(2):
        out.store([i_m, i_n + i * (BLOCK_N // 2)], cast(halves[i], out.dtype))


@triton.jit
def masked_low_rank_tile(
    u, v, seeds, threshold, i_m, i_n, rows, columns,
    i: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
def scaled_sum(
    b_sum, row_scales, column_scales, i_m, i_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The int32 sums of a tile times their scales, in float32 [BM, BN]."""
    o_m = i_m + tl.arange(0, BLOCK_M)
    b_row = tl.load(row_scales + o_m, mask=o_m < M, other=0.0)  # [BM]
    b_scaled = b_sum.to(tl.float32) * b_row[:, None]
    if column_scales is not None:
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_scaled *= tl.load(column_scales + o_n, mask=o_n < N, other=0.0)[None, :]
    return b_scaled


# M changes with the batch; Triton would compile again for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M"], launch_metadata=stated(_work_of))
def gemm_lowrank_kernel(
    p0, p1, p2, p3, q0, q1, q2, q3, q_operands, scales, a, u, v, bias, out, seeds, ends,
    M, N, K, R, factor, threshold, segments,
    p_strides, q_strides, a_strides, v_strides, bias_strides, out_row_stride,
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

    P_i [M, K_i], Q_i [K_i, N], U_i [M, R_i], V_i [R_i, N], bias [N], OUT [M, N].  The module's
    docstring has a table of these operands in y and in dx.

    A program computes tiles [BM, BN] of OUT, each in one accumulator and four stages:

        1. before the main loop    the low-rank term, if LOW_RANK is "before"
        2. the main loop           accumulator += P_i Q_i for every i, in steps over K_i
        3. after the main loop     the low-rank term otherwise
        4. the epilogue            + bias, + OUT, round, store

    LOW_RANK says where the low-rank term Σ_i keep_i ∘ (U_i V_i) is computed.
    ``GemmConfig.low_rank`` chooses one of these:
    "before"      with dropout: load, multiply and mask U_i V_i before the main loop.  The mask
                  applies only to this term.  After the main loop, the term would need a second
                  accumulator until it is masked; before it, the main accumulator is still free
    "prefetched"  load U_i and V_i before the main loop, which hides the wait, and multiply after it
    "after"       load and multiply after the main loop, in steps over the rank
    "masked"      with dropout and int8 products: like "before", but after the main loop and the
                  rotation of its sums, because the low-rank term isn't rotated
    "projects"    like "after", but the main loop computes U_0 = factor · P_0 A, with A [K_0, R_0],
                  from the tiles of P_0 that it loads anyway.  For y, P_0 is x, A is lora_aᵀ and U_0
                  is h, which is also stored, because the backward reads it

    Indices: i is a projection.  i_m, i_n: the tile's first row and column in OUT.  i_k: the step's
    first column of P_i, which is its first row of Q_i.  i_segment: the tile's segment.

    With segments (``ends``): Q_i [segments, K_i, N], V_i [segments, R_i, N], bias [segments, N].  A
    row uses the matrices of its segment; rows without a segment get zero.  PACKING, unless None:
    Q_i is packed, q_i has its codes and ``q_operands`` its scales and tables (packed.py).  With
    row scales in ``scales`` (row scales, column scales), P_i and Q_i are int8 (:class:`Scales`).
    """
    # One argument for each P_i and Q_i: Triton's launcher finds no descriptors inside of tuples.
    p, q = (p0, p1, p2, p3), (q0, q1, q2, q3)
    # OUT's dtype.  P and Q have the same dtype, unless they are int8, or Q is packed.
    dtype: tl.constexpr = out.dtype if DESCRIPTORS and ends is None else out.dtype.element_ty
    is_int8: tl.constexpr = len(scales[0]) > 0
    # The number of tiles of rows, and of columns.  With segments, the first is an upper bound,
    # because each segment may end with a partly filled tile (segments.py).
    m_tiles = tl.cdiv(M, BLOCK_M) if ends is None else M // BLOCK_M + segments + 1
    n_tiles = tl.cdiv(N, BLOCK_N)
    # PERSISTENT: there are as many programs as processors, and each takes every num_programs-th
    # tile, so that a tile's loads overlap the store of the tile before.  Otherwise a program
    # computes one tile.
    i_program = tl.program_id(0)
    tiles_end = m_tiles * n_tiles if PERSISTENT else i_program + 1
    for i_tile in range(i_program, tiles_end, tl.num_programs(0) if PERSISTENT else 1):
        # Programs that run at the same time should share rows of P and columns of Q in the L2
        # cache, so GROUP rows of tiles advance together, column by column.
        i_m, i_n = tile_of(i_tile, m_tiles, n_tiles, GROUP)  # in tiles
        i_n = i_n * BLOCK_N  # in columns
        # i_m becomes the tile's first row of OUT.  The tile loads rows below ``rows`` and columns
        # below ``columns``, both 0 for rows without a segment, and stores rows below ``end``.
        i_segment, _, i_m, end, rows, columns = segment_of_tile(
            ends, segments, i_m, M, N, BLOCK_M, SEGMENT_BLOCK
        )
        # 1. Before the main loop: b_out = Σ_i keep_i ∘ (U_i V_i) with dropout, otherwise 0.
        # "before" multiplies here, while b_out holds no sums that the mask must not change.
        # "prefetched" only starts the loads of U_i and V_i, which arrive during the main loop.
        b_out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        b_us, b_vs = (), ()
        for i in tl.static_range(len(u)):
            v_i = v_operand(v[i], i_segment, R[i], v_strides[i], MULTIPLES_OF_8)
            if LOW_RANK == "before":
                # b_out is zero for the first term, but the addition stays.  Compiled for sm_90
                # without it, the kernel has a fifth more instructions.
                b_out += masked_low_rank_tile(
                    u[i], v_i, seeds, threshold, i_m, i_n, rows, columns,
                    i, BLOCK_M, BLOCK_R, BLOCK_N, PRECISION,
                )  # fmt: skip
            elif LOW_RANK == "prefetched":
                b_u, b_v = load_u_v_tiles(
                    u[i], v_i, i_m, 0, i_n, rows, columns, BLOCK_M, BLOCK_R, BLOCK_N
                )
                b_us, b_vs = b_us + (b_u,), b_vs + (b_v,)  # [BM, BR], [BR, BN]

        # 2. The main loop: b_out += Σ_i P_i Q_i.  For y, this is x Wᵀ.  For dx, it is Σ_i dy_i W_i:
        # the loop runs over the depths K_i of all projections, one after the other.
        b_u_sum = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i in tl.static_range(len(K)):
            # Rows without a segment take no steps.
            depth = K[i] if ends is None else tl.where(rows > 0, K[i], 0)
            operands, tables = None, None
            if PACKING is not None:
                operands, tables = q_operands[i], tables_of(q_operands[i], PACKING)
            if is_int8:  # an accumulator for each product, because each has its own scales
                b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
            # The compiler pipelines this loop: loads run num_stages - 1 steps ahead of products.
            for i_k in range(0, depth, BLOCK_K):
                b_p = load_tile(
                    p[i], i_m, i_k, rows, K[i], p_strides[i][0], p_strides[i][1],
                    BLOCK_M, BLOCK_K, DESCRIPTORS,
                )  # [BM, BK]  # fmt: skip
                b_q = load_q_tile(
                    q[i], operands, tables, i_k, i_n, i_segment, K[i], N, q_strides[i],
                    BLOCK_K, BLOCK_N, Q_TRANSPOSED, DESCRIPTORS, PACKING, dtype,
                )  # [BK, BN]  # fmt: skip
                if is_int8:  # [BM, BN] += [BM, BK] @ [BK, BN]
                    b_sum = dot(b_p, b_q, b_sum, PRECISION)
                else:
                    b_out = dot(b_p, b_q, b_out, PRECISION)
                # P_0 A, for y x Aᵀ, from the tile of x that is loaded anyway.
                if LOW_RANK == "projects":
                    b_a = load_tile(
                        a, i_k, 0, K[0], R[0], a_strides[0], a_strides[1], BLOCK_K, BLOCK_R
                    )  # [BK, BR]
                    # [BM, BR] += [BM, BK] @ [BK, BR]
                    b_u_sum = dot(b_p, cast(b_a, dtype), b_u_sum, PRECISION)
            if is_int8:
                b_out += scaled_sum(
                    b_sum, scales[0][i], scales[1], i_m, i_n, rows, N, BLOCK_M, BLOCK_N
                )
        if is_int8 and scales[1] is None:
            # For a 16-bit OUT, rotate_tile splits the float32 sums into two bfloat16 parts.
            b_hadamard = hadamard_matrix(tl.float32 if dtype == tl.float32 else tl.bfloat16)
            b_out = rotate_tile(b_out, b_hadamard, i_n, N, PRECISION)

        # 3. After the main loop: b_out += Σ_i U_i V_i, for y h Bᵀ.  These terms have no mask, so
        # they go into the same accumulator, and U_i is needed only now.
        for i in tl.static_range(len(u)):
            v_i = v_operand(v[i], i_segment, R[i], v_strides[i], MULTIPLES_OF_8)
            if LOW_RANK == "prefetched":
                b_out = dot(b_us[i], b_vs[i], b_out, PRECISION)  # [BM, BN] += [BM, BR] @ [BR, BN]
            elif LOW_RANK == "after":
                b_out = low_rank_tile(
                    u[i], v_i, i_m, i_n, rows, columns, b_out, BLOCK_M, BLOCK_R, BLOCK_N, PRECISION
                )
            elif LOW_RANK == "masked":
                b_out += masked_low_rank_tile(
                    u[i], v_i, seeds, threshold, i_m, i_n, rows, columns,
                    i, BLOCK_M, BLOCK_R, BLOCK_N, PRECISION,
                )  # fmt: skip
            elif LOW_RANK == "projects":
                # U_0 = factor · P_0 A, for y h = scale · x Aᵀ, rounded as ``project`` rounds h.
                b_u = cast(b_u_sum * factor, dtype)  # [BM, BR]
                v_0, r, stride_r, stride_n = v_i
                # Every tile of columns computes the same h; only the first stores it.
                if i_n == 0:
                    store_tile(u[i], b_u, i_m, 0, M, r, r, 1)
                b_v = load_tile(v_0, 0, i_n, r, N, stride_r, stride_n, BLOCK_R, BLOCK_N)  # [BR, BN]
                # [BM, BN] += [BM, BR] @ [BR, BN]
                b_out = dot(b_u, cast(b_v, dtype), b_out, PRECISION)

        # 4. The epilogue: bias and the old OUT are added in float32, and the store rounds once.
        if bias is not None:
            # [BM, BN] += [1, BN]
            b_out += load_bias_row(bias, i_n, i_segment, columns, bias_strides, BLOCK_N, dtype)
        if ADD:
            b_before = load_tile(out, i_m, i_n, rows, N, out_row_stride, 1, BLOCK_M, BLOCK_N)
            b_out += b_before.to(tl.float32)  # [BM, BN]

        # A segment may end inside of the tile.  A store by descriptor would write the rows after
        # that end, which belong to another tile; pointers have a mask.
        if DESCRIPTORS and ends is None:
            store_in_halves(out, b_out, i_m, i_n, BLOCK_M, BLOCK_N)
        else:
            store_tile(out, b_out, i_m, i_n, end, N, out_row_stride, 1)


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
    scales: Scales | None = None,
    config: GemmConfig | None = None,
    preferred: GemmConfig | None = None,
) -> None:
    """Fill ``out`` with Σ_i p_i q_i + Σ_i keep_i ∘ (u_i v_i) (+ bias), or add that if ``add``.

    out [M, N] and u_i [M, R_i] are contiguous.  p_i [M, K_i], q_i [K_i, N] and v_i [R_i, N] have
    any strides.  out, p_i, q_i and u_i have one dtype; v_i and bias [N] are cast to it when they
    are loaded.  Without adapters, ``us`` and ``vs`` are empty.  The q_i may be packed, all in the
    same format (``Packed.is_like``), if ``Packed.lies_in_rows`` is true.

    With ``dropout``, ``seeds`` (int64) has one seed for each u_i.  With ``a`` [K_0, R_0], the
    launch also fills u_0 with factor · p_0 a; that needs one projection and no dropout, and
    :func:`one_launch_pays` says when it saves time.

    ``ends`` as in :func:`project`, without ``a``: q_i [E, K_i, N], v_i [E, R_i, N], bias [E, N]; a
    packed q_i has E experts.

    ``scales``, without ``a`` and ``ends``: p_i and q_i are int8, with at most 133,000 columns of
    p_i.

    ``config`` must fit the call; ``preferred`` is used only if it fits.
    """
    target, (M, N) = target_of(out.device), out.shape
    # One launch for every MAX_PROJECTIONS projections: the first fills ``out``, the others add.
    # u, v, p and q are the lists of one launch.
    row_scales, column_scales = scales or (None, None)
    launches = chunks(us, ps, vs, qs, seeds, row_scales)
    for i, (u, p, v, q, launch_seeds, its_row_scales) in enumerate(launches):
        if not p:  # earlier launches had all products; adapters are left
            options = {"precision": precision, "dropout": dropout, "ends": ends}
            lowrank(out, u, v, add=True, seeds=launch_seeds, **options)
            continue
        bias, ranks = None if i else bias, [each.shape[1] for each in u]
        packed = q[0] if isinstance(q[0], Packed) else None
        # A weight is stored row by row.  In the forward q is its transpose, for dx the weight.
        transposed = packed.transposed if packed else all(each.stride(-2) == 1 for each in q)
        matrices = [] if packed else [*p, *(each.mT if transposed else each for each in q), out]
        adds, size = add or i > 0, out.element_size()
        call = Call(
            M, N, max(ranks, default=0), size, precision, max(len(u), len(p) * bool(scales)),
            masked=launch_seeds is not None, project=a is not None,
            pointers=adds or packed is not None
            or (not transposed and races_when_turned(target, precision, size))
            or not all(_has_descriptor(each, target) for each in matrices),
            packed="" if packed is None else packed.kind, segments=0 if ends is None else len(ends),
            int8="" if scales is None else "rotated int8" if column_scales is None else "int8",
        )  # fmt: skip
        tiles = chosen_config("gemm_lowrank", target, call, config, preferred)
        descriptors = tiles.uses_descriptors(call)
        # A call with several dropout masks isn't persistent.  Otherwise the addresses of its
        # low-rank operands would stay in registers from tile to tile, beside two accumulators.
        persistent = descriptors and ends is None and not (launch_seeds is not None and len(u) > 1)
        p_operands, q_operands, out_operand = (
            _described(p, q, out, tiles, transposed, ends)
            if descriptors
            else (p, [each.codes if packed else each for each in q], out)
        )
        absent = [None] * (MAX_PROJECTIONS - len(p))  # for the unused ones of p0 … p3
        arguments = {
            **{f"p{i}": operand for i, operand in enumerate([*p_operands, *absent])},
            **{f"q{i}": operand for i, operand in enumerate([*q_operands, *absent])},
            "q_operands": () if packed is None else tuple(each.operands for each in q),
            "scales": (tuple(its_row_scales or ()), column_scales),
            "a": a, "u": tuple(u), "v": tuple(v), "bias": bias, "out": out_operand,
            "seeds": launch_seeds, **segment_arguments(ends),
            "M": M, "N": N, "K": tuple(each.shape[1] for each in p), "R": tuple(ranks),
            "factor": factor, "threshold": dropout_threshold(dropout),
            "p_strides": tuple(each.stride() for each in p), "q_strides": strides_of(q, ends),
            "a_strides": None if a is None else a.stride(), "v_strides": strides_of(v, ends),
            "bias_strides": bias_strides(bias, ends), "out_row_stride": out.stride(0),
            "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k,
            "BLOCK_R": tiles.block_r(call), "GROUP": tiles.group, "DESCRIPTORS": descriptors,
            "PERSISTENT": persistent, "Q_TRANSPOSED": transposed,
            "PACKING": packed and packed.packing(target),
            "LOW_RANK": tiles.low_rank(target, call), "MULTIPLES_OF_8": multiples_of_8(u, v),
            "ADD": adds, "PRECISION": precision,
        }  # fmt: skip
        n_tiles = tiles.tiles(call)
        grid = (min(n_tiles, target.processors) if persistent else n_tiles,)
        launch(Launch(gemm_lowrank_kernel, grid, arguments, tiles.warps, tiles.stages, _work_of))


def _described(
    ps: Sequence[Tensor],
    qs: Sequence[Tensor],
    out: Tensor,
    config: GemmConfig,
    transposed: bool,
    ends: Tensor | None,
) -> tuple[list[TensorDescriptor], list[TensorDescriptor], TensorDescriptor | Tensor]:
    """Descriptors of p, q and out, with the shapes of the tiles that the kernel loads and stores.

    With segments, out stays a tensor: a store must stop at a segment's end, inside of a tile.
    """
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    q_tile = [block_n, block_k] if transposed else [block_k, block_n]
    q_tile = q_tile if ends is None else [1, *q_tile]
    describe = TensorDescriptor.from_tensor
    return (
        [describe(p, [block_m, block_k]) for p in ps],
        [describe(q.mT if transposed else q, q_tile) for q in qs],
        # The kernel stores a tile in two halves (store_in_halves).
        describe(out, [block_m, block_n // 2]) if ends is None else out,
    )


def one_launch_pays(x: Tensor, r: int) -> bool:
    """Whether a forward should compute h inside of :func:`gemm_lowrank`, which saves a launch.

    Every tile of columns then computes h again.  With few rows that should cost no time, because
    the launch waits for the weight's bytes.  With r of at most 32, the product with lora_a has few
    FLOPs compared with the base product.  Both limits are assumptions; no GPU has measured them.
    """
    return len(x) <= FEW_ROWS and r <= 32


def _has_descriptor(matrix: Tensor, target: Target) -> bool:
    """Whether a tensor descriptor can describe a matrix, or a stack of matrices.

    Columns must be contiguous, rows mustn't overlap, and every row and every matrix must begin at a
    multiple of 16 bytes.
    """
    *outer, column = matrix.stride()
    size = matrix.element_size()
    is_aligned = not any(stride * size % 16 for stride in outer)
    if column != 1 or outer[-1] < matrix.shape[-1] or not is_aligned or matrix.data_ptr() % 16:
        return False
    if matrix.is_contiguous() or not small_views_fault(target):
        return True
    # The bytes from the first to the last element: a view of less than 128 KiB may fault.
    axes = zip(matrix.shape, matrix.stride(), strict=True)
    return sum((length - 1) * stride for length, stride in axes) * size >= 2**17
