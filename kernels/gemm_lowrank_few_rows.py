"""OUT = P Q + U V (+ bias) with U = factor · P A: a layer's forward with few rows, in one launch.

P is x, Q is weightᵀ, A is lora_aᵀ, V is lora_bᵀ, U is h and OUT is y.  There is no dropout.
"""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .base_product import finish_tile, load_q_tile, operands_of
from .common import cast, dot, load_tile, store_tile, tile_of
from .config import FEW_ROWS, cdiv
from .gemm_config import GemmConfig
from .launch import Work, size_of, stated
from .lowrank import v_operand
from .packed import Packed, packed_work, tables_of


def _work_of(arguments: Mapping[str, Any]) -> Work:
    """The FLOPs and bytes of a launch.  Every tile of columns computes U, which counts once."""
    p, q, a, u, v = (arguments[name] for name in ("p", "q", "a", "u", "v"))
    bias, out = arguments["bias"], arguments["out"]
    M, N, (K,), (R,) = (arguments[name] for name in ("M", "N", "K", "R"))
    m_tiles, n_tiles = cdiv(M, arguments["BLOCK_M"]), cdiv(N, arguments["BLOCK_N"])
    scales = packed_work(arguments)  # (bytes counted once, bytes as all tiles load them)
    q_v_bytes = size_of(q, v, bias)
    return Work(
        flops=2 * M * (N * K + N * R + K * R),
        loaded=size_of(p, a) + q_v_bytes + scales[0],
        stored=size_of(out, u),
        loaded_by_tiles=size_of(p) * n_tiles
        + q_v_bytes * m_tiles
        + size_of(a) * m_tiles * n_tiles
        + scales[1],
    )


# M changes with the batch; Triton would compile again for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M"], launch_metadata=stated(_work_of))
def gemm_lowrank_few_rows_kernel(
    p, q, q_operands, a, u, v, bias, out, M, N, K, R, factor, a_strides, strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, Q_TRANSPOSED: tl.constexpr,
    PACKING: tl.constexpr, MULTIPLES_OF_8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U = factor · P A and OUT = P Q + U V (+ bias).

    P [M, K], A [K, R], U [M, R], Q [K, N], V [R, N], bias [N], OUT [M, N].  A program computes one
    tile [BM, BN] of OUT.  Its loop over K multiplies each tile of P by Q and by A.  BLOCK_R columns
    hold the whole rank, so the program then has its rows of U, which it rounds and multiplies by V.
    Every tile of columns computes the same U; the first one stores it, because the backward needs
    it.

    K, R, ``q_operands`` and ``strides`` have one entry for each product, as in
    ``gemm_lowrank_kernel``; here there is one.
    """
    p_strides, q_strides, v_strides, bias_strides, out_row_stride = strides
    dtype: tl.constexpr = out.dtype if DESCRIPTORS else out.dtype.element_ty
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    i_m, i_n = i_m * BLOCK_M, i_n * BLOCK_N  # the tile's first row and column
    operands, tables = None, None
    if PACKING is not None:
        operands, tables = q_operands[0], tables_of(q_operands[0], PACKING)
    b_out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_u_sum = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i_k in range(0, K[0], BLOCK_K):
        b_p = load_tile(
            p, i_m, i_k, M, K[0], p_strides[0][0], p_strides[0][1], BLOCK_M, BLOCK_K, DESCRIPTORS
        )  # [BM, BK]
        b_q = load_q_tile(
            q, operands, tables, i_k, i_n, 0, K[0], N, q_strides[0],
            BLOCK_K, BLOCK_N, Q_TRANSPOSED, DESCRIPTORS, PACKING, dtype,
        )  # [BK, BN]  # fmt: skip
        b_out = dot(b_p, b_q, b_out, PRECISION)  # [BM, BN] += [BM, BK] @ [BK, BN]
        b_a = load_tile(a, i_k, 0, K[0], R[0], a_strides[0], a_strides[1], BLOCK_K, BLOCK_R)
        b_u_sum = dot(b_p, cast(b_a, dtype), b_u_sum, PRECISION)  # [BM, BR] += [BM, BK] @ [BK, BR]
    b_u = cast(b_u_sum * factor, dtype)  # [BM, BR], rounded as ``project`` rounds it
    v, r, stride_r, stride_n = v_operand(v, 0, R[0], v_strides[0], MULTIPLES_OF_8)
    if i_n == 0:
        store_tile(u, b_u, i_m, 0, M, r, r, 1)
    b_v = load_tile(v, 0, i_n, r, N, stride_r, stride_n, BLOCK_R, BLOCK_N)  # [BR, BN]
    b_out = dot(b_u, cast(b_v, dtype), b_out, PRECISION)  # [BM, BN] += [BM, BR] @ [BR, BN]
    finish_tile(
        out, b_out, bias, i_m, i_n, 0, M, N, M, N, bias_strides, out_row_stride, False, DESCRIPTORS
    )


def gemm_lowrank_few_rows(
    out: Tensor,
    p: Tensor,
    q: Tensor | Packed,
    a: Tensor,
    u: Tensor,
    v: Tensor,
    factor: float,
    *,
    precision: str,
    bias: Tensor | None = None,
    config: GemmConfig | None = None,
    preferred: GemmConfig | None = None,
) -> None:
    """Fill u [M, R] with factor · p a, and ``out`` [M, N] with p q + u v (+ bias).

    p [M, K], q [K, N], a [K, R] and v [R, N] as in :func:`gemm_lowrank`; a is cast to p's dtype
    when it is loaded.  The rank must fit into one step.  :func:`one_launch_pays` says when the
    launch saves time.
    """
    lists = [p], [q], [u], [v]
    operands = operands_of(out, *lists, bias, precision, (config, preferred), project=True)
    packed = q if isinstance(q, Packed) else None
    arguments = {
        "p": operands.ps[0], "q": operands.qs[0], "q_operands": packed and (packed.operands,),
        "a": a, "u": u, "v": v, "factor": factor, "a_strides": a.stride(),
        "PACKING": packed and packed.packing(operands.target),
    }  # fmt: skip
    operands.run(gemm_lowrank_few_rows_kernel, arguments, _work_of)


def one_launch_pays(x: Tensor, r: int) -> bool:
    """Whether a forward should compute h inside of :func:`gemm_lowrank_few_rows`.

    That saves a launch, but every tile of columns then computes h again.  With few rows this should
    cost no time, because the launch waits for the weight's bytes.  With r of at most 32, the
    product with lora_a has few FLOPs compared with the base product.  Both limits are assumptions;
    no GPU has measured them.
    """
    return len(x) <= FEW_ROWS and r <= 32
