"""OUT = Σ_i rows_i ∘ (P_i Q_i) ∘ columns + Σ_i keep_i ∘ (U_i V_i) (+ bias), with int8 P_i and Q_i.

This is ``gemm_lowrank`` for 8-bit products.  P_i is x or dy_i, whose rows :func:`quantize_rows`
rounded to codes, and Q_i is a weight of codes:

    |    | P_i Q_i   | rows_i [M]      | columns [N] | then           |
    |----|-----------|-----------------|-------------|----------------|
    | y  | xq Wqᵀ    | scales of xq    | scales of W | -              |
    | dx | dq_i Wq_i | scales of dq_i  | -           | rotate columns |

dx has no column scales, because dy was multiplied by the weight's scales before it was rounded.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .base_product import finish_tile, load_q_tile, operands_of, product_work
from .common import dot, hadamard_matrix, load_tile, rotate_tile, tile_of
from .config import chunks
from .gemm_config import GemmConfig
from .launch import stated
from .lowrank import low_rank_tile, lowrank, masked_low_rank_tile, v_operand


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
@triton.jit(do_not_specialize=["M"], launch_metadata=stated(product_work))
def gemm_int8_lowrank_kernel(
    p0, p1, p2, p3, q0, q1, q2, q3, row_scales, column_scales, u, v, bias, out, seeds,
    M, N, K, R, threshold, strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr,
    Q_TRANSPOSED: tl.constexpr, MULTIPLES_OF_8: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT = Σ_i rows_i ∘ (P_i Q_i) ∘ columns + Σ_i keep_i ∘ (U_i V_i) (+ bias) (+ OUT, if ADD).

    P_i int8 [M, K_i], Q_i int8 [K_i, N], ROW_SCALES_i [M] and COLUMN_SCALES [N] in float32, U_i
    [M, R_i], V_i [R_i, N], bias [N], OUT [M, N].  Without COLUMN_SCALES, the scaled sum is rotated:
    each block of 64 columns of OUT is multiplied by a Hadamard matrix.

    A program computes tiles [BM, BN] of OUT as ``gemm_lowrank_kernel`` does.  Each product P_i Q_i
    has an int32 accumulator of its own, because it has its own scales.  The low-rank terms come
    after the rotation, which doesn't apply to them.
    """
    p, q = (p0, p1, p2, p3), (q0, q1, q2, q3)
    p_strides, q_strides, v_strides, bias_strides, out_row_stride = strides
    dtype: tl.constexpr = out.dtype if DESCRIPTORS else out.dtype.element_ty
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    i_program = tl.program_id(0)
    tiles_end = m_tiles * n_tiles if PERSISTENT else i_program + 1
    for i_tile in range(i_program, tiles_end, tl.num_programs(0) if PERSISTENT else 1):
        i_m, i_n = tile_of(i_tile, m_tiles, n_tiles, GROUP)
        i_m, i_n = i_m * BLOCK_M, i_n * BLOCK_N  # the tile's first row and column
        b_out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(len(K)):
            b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)  # exact
            for i_k in range(0, K[i], BLOCK_K):
                b_p = load_tile(
                    p[i], i_m, i_k, M, K[i], p_strides[i][0], p_strides[i][1],
                    BLOCK_M, BLOCK_K, DESCRIPTORS,
                )  # [BM, BK]  # fmt: skip
                b_q = load_q_tile(
                    q[i], None, None, i_k, i_n, 0, K[i], N, q_strides[i],
                    BLOCK_K, BLOCK_N, Q_TRANSPOSED, DESCRIPTORS, None, dtype,
                )  # [BK, BN]  # fmt: skip
                b_sum = dot(b_p, b_q, b_sum, PRECISION)  # [BM, BN] += [BM, BK] @ [BK, BN]
            b_out += scaled_sum(
                b_sum, row_scales[i], column_scales, i_m, i_n, M, N, BLOCK_M, BLOCK_N
            )
        if column_scales is None:
            # For a 16-bit OUT, rotate_tile splits the float32 sums into two bfloat16 parts.
            b_hadamard = hadamard_matrix(tl.float32 if dtype == tl.float32 else tl.bfloat16)
            b_out = rotate_tile(b_out, b_hadamard, i_n, N, PRECISION)
        for i in tl.static_range(len(u)):
            v_i = v_operand(v[i], 0, R[i], v_strides[i], MULTIPLES_OF_8)
            if seeds is None:
                b_out = low_rank_tile(
                    u[i], v_i, i_m, i_n, M, N, b_out, BLOCK_M, BLOCK_R, BLOCK_N, PRECISION
                )
            else:  # in an accumulator of its own, because the mask applies only to this term
                b_out += masked_low_rank_tile(
                    u[i], v_i, seeds, threshold, i_m, i_n, M, N,
                    i, BLOCK_M, BLOCK_R, BLOCK_N, PRECISION,
                )  # fmt: skip
        finish_tile(
            out, b_out, bias, i_m, i_n, 0, M, N, M, N, bias_strides, out_row_stride,
            ADD, DESCRIPTORS,
        )  # fmt: skip


def gemm_int8_lowrank(
    out: Tensor,
    ps: Sequence[Tensor],
    qs: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    row_scales: Sequence[Tensor],
    column_scales: Tensor | None = None,
    *,
    precision: str,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    config: GemmConfig | None = None,
) -> None:
    """Fill ``out`` with Σ_i rows_i ∘ (p_i q_i) ∘ columns + Σ_i keep_i ∘ (u_i v_i) (+ bias).

    p_i and q_i are int8, and p_i has at most 133,000 columns.  ``row_scales``: float32 [M] for each
    p_i.  ``column_scales``: float32 [N]; without them, the sum of the scaled products is rotated.
    The other operands as in :func:`gemm_lowrank`.
    """
    launches = chunks(us, ps, vs, qs, seeds, row_scales)
    for i, (u, p, v, q, launch_seeds, scales) in enumerate(launches):
        if not p:  # earlier launches had all products; adapters are left
            options = {"precision": precision, "dropout": dropout}
            lowrank(out, u, v, add=True, seeds=launch_seeds, **options)
            continue
        kind = "rotated int8" if column_scales is None else "int8"
        operands = operands_of(
            out, p, q, u, v, None if i else bias, precision, (config, None),
            adds=i > 0, masked=launch_seeds is not None, int8=kind,
        )  # fmt: skip
        arguments = operands.of_group(u, v, launch_seeds, dropout)
        arguments |= {"row_scales": tuple(scales), "column_scales": column_scales, "ADD": i > 0}
        operands.run(gemm_int8_lowrank_kernel, arguments, product_work)
