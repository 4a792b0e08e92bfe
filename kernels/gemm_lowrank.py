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
add up.  keep_i is a mask of zeros and ones, computed from a seed (``keep_tile``).  Only dx has it:
in the backward, it applies to the adapter's part of dx, and not to dy weight.  For y, dropout is
already part of h.  Its factor 1 / (1 - p) is in h and in dh.

Inside the kernel, the letters belong to OUT = P Q: OUT is [M, N], and K_i is the depth of product
i.  So for dx, the kernel's N is the layer's K, and its K_i is the layer's N_i.

Two other kernels compute the same equation: ``gemm_lowrank_few_rows``, which also computes h, and
``gemm_int8_lowrank``, whose P_i and Q_i are int8.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .base_product import finish_tile, load_q_tile, operands_of, product_work
from .common import dot, load_tile, tile_of
from .config import chunks
from .gemm_config import GemmConfig
from .launch import stated
from .lowrank import load_u_v_tiles, low_rank_tile, lowrank, masked_low_rank_tile, v_operand
from .packed import Packed, tables_of
from .segments import segment_arguments, segment_of_tile


# M changes with the batch; Triton would compile again for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M"], launch_metadata=stated(product_work))
def gemm_lowrank_kernel(
    p0, p1, p2, p3, q0, q1, q2, q3, q_operands, u, v, bias, out, seeds, ends,
    M, N, K, R, threshold, segments, strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr,
    Q_TRANSPOSED: tl.constexpr, PACKING: tl.constexpr, LOW_RANK: tl.constexpr,
    MULTIPLES_OF_8: tl.constexpr, ADD: tl.constexpr, SEGMENT_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT = Σ_i P_i Q_i + Σ_i keep_i ∘ (U_i V_i) (+ bias) (+ OUT, if ADD).

    P_i [M, K_i], Q_i [K_i, N], U_i [M, R_i], V_i [R_i, N], bias [N], OUT [M, N].  The module's
    docstring has a table of these operands in y and in dx.

    A program computes tiles [BM, BN] of OUT.  For each tile, with one float32 accumulator b_out:

        1. b_out  = Σ_i keep_i ∘ (U_i V_i)   if LOW_RANK is "before", otherwise 0
        2. b_out += Σ_i P_i Q_i              the main loop, in steps of BLOCK_K over each K_i
        3. b_out += Σ_i U_i V_i              unless LOW_RANK is "before"
        4. OUT    = b_out (+ bias) (+ OUT), rounded once

    On a first reading, take ``ends`` and PACKING as None, and DESCRIPTORS and PERSISTENT as False.
    Then there is one segment (all rows), Q_i is dense, loads take pointers, and a program has one
    tile.

    LOW_RANK, from ``GemmConfig.low_rank``, says when the low-rank term is computed:
    "before"      with dropout.  The mask applies only to this term.  After the main loop, the term
                  would need a second accumulator until it is masked; before it, b_out is still free
    "prefetched"  load U_i and V_i before the main loop, which hides the wait, and multiply after it
    "after"       load and multiply after the main loop, in steps over the rank

    Indices: i is the number of a product or of a low-rank term: for dx a projection, for y an
    adapter.  i_m, i_n: the tile's first row and column in OUT.  i_k: the step's first column of
    P_i, which is its first row of Q_i.  i_segment: the tile's segment.  K and R are tuples: K[i] is
    K_i.  An element is kept if its random word >= ``threshold`` (``dropout_threshold``).

    With segments (``ends``): Q_i [segments, K_i, N], V_i [segments, R_i, N], bias [segments, N].  A
    row uses the matrices of its segment; rows without a segment get zero.  PACKING, unless None:
    Q_i is packed, q_i has its codes and ``q_operands`` its scales and tables (packed.py).
    ``strides``: of each P_i, Q_i and V_i, of the bias, and of OUT's rows.  Q_TRANSPOSED: each Q_iᵀ
    has contiguous rows (in the forward, Q_0ᵀ is the weight).  MULTIPLES_OF_8: whether 8 divides all
    R_i, and whether it divides all column strides of V_i.  ``operands_of`` (base_product.py) makes
    most arguments.
    """
    # One argument for each P_i and Q_i: Triton's launcher finds no descriptors inside of tuples.
    p, q = (p0, p1, p2, p3), (q0, q1, q2, q3)
    p_strides, q_strides, v_strides, bias_strides, out_row_stride = strides
    # With segments, OUT is a pointer: a segment may end inside of the tile, and a store by
    # descriptor would write the rows after that end, which belong to another tile.
    OUT_DESCRIPTOR: tl.constexpr = DESCRIPTORS and ends is None
    # OUT's dtype, in which products run: P has it, and Q gets it when it is unpacked.
    dtype: tl.constexpr = out.dtype if OUT_DESCRIPTOR else out.dtype.element_ty
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
        i_row_tile, i_column_tile = tile_of(i_tile, m_tiles, n_tiles, GROUP)
        i_n = i_column_tile * BLOCK_N
        # The tile loads rows below ``rows`` and columns below ``columns``, both 0 for rows without
        # a segment, and stores rows below ``end``.  Without segments, these are M, N and M.
        i_segment, _, i_m, end, rows, columns = segment_of_tile(
            ends, segments, i_row_tile, M, N, BLOCK_M, SEGMENT_BLOCK
        )
        # 1. The low-rank term with dropout; without dropout, loads for step 3.
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
        for i in tl.static_range(len(K)):
            # Rows without a segment take no steps.
            depth = K[i] if ends is None else tl.where(rows > 0, K[i], 0)
            operands, tables = None, None
            if PACKING is not None:
                operands, tables = q_operands[i], tables_of(q_operands[i], PACKING)
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
                b_out = dot(b_p, b_q, b_out, PRECISION)  # [BM, BN] += [BM, BK] @ [BK, BN]
        # 3. The low-rank term without dropout: b_out += Σ_i U_i V_i.  For y, this is h lora_bᵀ.
        for i in tl.static_range(len(u)):
            v_i = v_operand(v[i], i_segment, R[i], v_strides[i], MULTIPLES_OF_8)
            if LOW_RANK == "prefetched":
                b_out = dot(b_us[i], b_vs[i], b_out, PRECISION)  # [BM, BN] += [BM, BR] @ [BR, BN]
            elif LOW_RANK == "after":
                b_out = low_rank_tile(
                    u[i], v_i, i_m, i_n, rows, columns, b_out, BLOCK_M, BLOCK_R, BLOCK_N, PRECISION
                )
        # 4. The epilogue
        finish_tile(
            out, b_out, bias, i_m, i_n, i_segment, rows, columns, end, N, bias_strides,
            out_row_stride, ADD, OUT_DESCRIPTOR,
        )  # fmt: skip


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
    ends: Tensor | None = None,
    config: GemmConfig | None = None,
    preferred: GemmConfig | None = None,
) -> None:
    """Fill ``out`` with Σ_i p_i q_i + Σ_i keep_i ∘ (u_i v_i) (+ bias), or add that if ``add``.

    out [M, N] and u_i [M, R_i] are contiguous.  p_i [M, K_i], q_i [K_i, N] and v_i [R_i, N] have
    any strides.  out, p_i, q_i and u_i have one dtype; v_i and bias [N] are cast to it when they
    are loaded.  Without adapters, ``us`` and ``vs`` are empty.  The q_i may be packed, all in the
    same format (``Packed.is_like``), if ``Packed.lies_in_rows`` is true.

    With ``dropout``, ``seeds`` (int64) has one seed for each u_i.

    ``ends`` as in :func:`project`: q_i [E, K_i, N], v_i [E, R_i, N], bias [E, N]; a packed q_i has
    E experts.

    ``config`` must fit the call; ``preferred`` is used only if it fits.
    """
    # A launch takes at most MAX_PROJECTIONS (4) products and terms.  If there are more, ``chunks``
    # cuts the lists, and u, p, v and q are the lists of one launch.  The first launch fills
    # ``out``, the others add to it.
    for i, (u, p, v, q, launch_seeds) in enumerate(chunks(us, ps, vs, qs, seeds)):
        # Earlier launches had all products, and low-rank terms are left: y with over 4 adapters.
        if not p:
            options = {"precision": precision, "dropout": dropout, "ends": ends}
            lowrank(out, u, v, add=True, seeds=launch_seeds, **options)
            continue
        adds, masked = add or i > 0, launch_seeds is not None
        # The config, descriptors, and the arguments that all kernels with a base product share.
        operands = operands_of(
            out, p, q, u, v, None if i else bias, precision, (config, preferred),
            adds=adds, ends=ends, masked=masked,
        )  # fmt: skip
        packed = q[0] if isinstance(q[0], Packed) else None
        arguments = operands.of_group(u, v, launch_seeds, dropout) | {
            "q_operands": () if packed is None else tuple(each.operands for each in q),
            "PACKING": packed and packed.packing(operands.target), **segment_arguments(ends),
            "LOW_RANK": operands.tiles.low_rank(operands.target, operands.call), "ADD": adds,
        }  # fmt: skip
        operands.run(gemm_lowrank_kernel, arguments, product_work)
