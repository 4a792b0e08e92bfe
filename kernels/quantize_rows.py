"""CODES · row scales ≈ X': the rows of X', rounded to int8 with one scale for each row.

X' is x rotated, in blocks of 64 columns, or dy with its columns multiplied by factors (the weight's
scales).  ``gemm_int8_lowrank`` multiplies the codes.
"""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .common import cast, hadamard_matrix, load_tile, rotate_tile, store_tile
from .config import LONGEST, cdiv
from .launch import Launch, Work, launch, size_of, stated


def _work_of(arguments: Mapping[str, Any]) -> Work:
    """The bytes of a launch.  A program loads its rows twice, the second time from L2."""
    x_bytes = arguments["M"] * arguments["K"] * arguments["x"].element_size()
    factors = size_of(arguments["column_factors"])
    m_tiles = cdiv(arguments["M"], arguments["BLOCK_M"])
    return Work(
        flops=0,
        loaded=x_bytes + factors,
        stored=size_of(arguments["codes"], arguments["row_scales"]),
        loaded_by_tiles=2 * (x_bytes + factors * m_tiles),
    )


@triton.jit
def numbers_to_round(b_x, column_factors, b_hadamard, i_k, K, PRECISION: tl.constexpr):
    """A tile of X' in float32: x times factors, or x rotated in its dtype.

    A float16 x is rotated in float32, because a rotated number may exceed 65504.
    """
    if column_factors is None:
        b_number = rotate_tile(b_x, b_hadamard, i_k, K, PRECISION)
        return b_number if b_x.dtype == tl.float16 else cast(b_number, b_x.dtype).to(tl.float32)
    else:
        o_k = i_k + tl.arange(0, b_x.shape[1])
        b_factor = tl.load(column_factors + o_k, mask=o_k < K, other=0.0)  # [BK]
        return b_x.to(tl.float32) * b_factor[None, :]


# M changes with the batch; Triton would compile again for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["M"], launch_metadata=stated(_work_of))
def quantize_rows_kernel(
    x, codes, row_scales, column_factors, M, K, x_strides,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CODES = round(X' · 127 / largest), ties to even; ROW_SCALES = largest / 127.

    X [M, K], CODES int8 [M, K], ROW_SCALES float32 [M].  X' is X · COLUMN_FACTORS [K], or without
    these, X rotated: each block of 64 columns is multiplied by a Hadamard matrix.  ``largest`` is a
    row's largest magnitude in X'; a row with NaN or infinity has the scale NaN or infinity.

    A program has BLOCK_M whole rows and passes over them twice: for ``largest``, then for the
    codes.  The second pass loads X from L2.
    """
    i_m = tl.program_id(0) * BLOCK_M
    b_hadamard = None
    if column_factors is None:
        b_hadamard = hadamard_matrix(x.dtype.element_ty)
    # The bits of magnitudes, as integers.  Integers have the same order as the magnitudes, with
    # infinity and NaN above all others.  One for each element of a tile, so that only the end needs
    # a reduction over columns.
    b_largest = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for i_k in range(0, K, BLOCK_K):
        b_x = load_tile(x, i_m, i_k, M, K, x_strides[0], x_strides[1], BLOCK_M, BLOCK_K)
        b_number = numbers_to_round(b_x, column_factors, b_hadamard, i_k, K, PRECISION)
        b_largest = tl.maximum(b_largest, b_number.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    # 2⁻¹⁰⁰ replaces a smaller largest magnitude, so that 127 / largest is finite.
    b_bits = tl.maximum(tl.max(b_largest, 1), 27 << 23)
    b_most = b_bits.to(tl.float32, bitcast=True)  # [BM]
    o_m = i_m + tl.arange(0, BLOCK_M)
    tl.store(row_scales + o_m, tl.div_rn(b_most, 127.0), mask=o_m < M)
    b_inverse = tl.div_rn(127.0, b_most)[:, None]
    for i_k in range(0, K, BLOCK_K):
        b_x = load_tile(x, i_m, i_k, M, K, x_strides[0], x_strides[1], BLOCK_M, BLOCK_K)
        b_number = numbers_to_round(b_x, column_factors, b_hadamard, i_k, K, PRECISION)
        # Adding 1.5 · 2²³ rounds to an integer, ties to even, in the lower bits.  The minimum keeps
        # the compiler from fusing product and sum into one operation, which would round only once.
        b_number = tl.minimum(b_number * b_inverse, 127.0) + 12582912.0
        b_code = b_number.to(tl.int32, bitcast=True) - 0x4B400000
        store_tile(codes, b_code, i_m, i_k, M, K, K, 1)


def quantize_rows(
    x: Tensor, codes: Tensor, row_scales: Tensor, factors: Tensor | None = None, *, precision: str
) -> None:
    """Fill ``codes`` and ``row_scales`` with the rows of x [M, K], rounded: X' ≈ codes · scales.

    codes int8 [M, K] is contiguous, row_scales float32 [M].  X' is x with its columns multiplied by
    ``factors``, float32 [K]; without ``factors``, x with its columns rotated, in blocks of 64.  x
    has any strides.
    """
    (M, K), block_m = x.shape, 32
    assert max(M, K) <= LONGEST
    arguments = {
        "x": x, "codes": codes, "row_scales": row_scales, "column_factors": factors,
        "M": M, "K": K, "x_strides": x.stride(),
        "BLOCK_M": block_m, "BLOCK_K": 64, "PRECISION": precision,
    }  # fmt: skip
    # From compilation: an exact rotation in float32 takes 200 registers with eight warps.
    warps = 8 if x.element_size() == 4 and precision == "ieee" else 4
    launch(Launch(quantize_rows_kernel, (cdiv(M, block_m),), arguments, warps, 1, _work_of))
