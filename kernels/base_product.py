"""Parts of the kernels with a base product Σ P_i Q_i: tiles of Q and OUT, descriptors, stated work.

``gemm_lowrank``, ``gemm_lowrank_few_rows`` and ``gemm_int8_lowrank`` are these kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import cast, dropout_threshold, load_tile, store_tile
from .config import LONGEST, MAX_PROJECTIONS, Call, cdiv, chosen_config, row_tiles
from .faults import races_when_turned, small_views_fault
from .gemm_config import GemmConfig
from .launch import Launch, Work, launch, size_of
from .lowrank import bias_strides, load_bias_row, multiples_of_8
from .packed import Packed, packed_work, unpack_tile
from .segments import small_operand_bytes, strides_of
from .target import Target, target_of


def product_work(arguments: Mapping[str, Any]) -> Work:
    """The FLOPs and bytes of a launch.  Names that end in ``bytes`` count each element once."""
    u, v, bias, out = (arguments[name] for name in ("u", "v", "bias", "out"))
    p, q = ([arguments[f"{name}{i}"] for i in range(MAX_PROJECTIONS)] for name in "pq")
    M, N, depths, ranks = (arguments[name] for name in ("M", "N", "K", "R"))
    segments, n_tiles = arguments.get("segments"), cdiv(N, arguments["BLOCK_N"])
    m_tiles = row_tiles(M, arguments["BLOCK_M"], segments)
    # A load by descriptor doesn't stop at a segment's end, so it loads all rows of a tile of P.
    loads_full_tiles = segments is not None and arguments["DESCRIPTORS"]
    p_rows = m_tiles * arguments["BLOCK_M"] if loads_full_tiles else M
    # Every tile of columns loads the rows of P and U; every tile of rows loads Q, V and the bias.
    p_u_bytes = size_of(*p, *u, *arguments.get("row_scales", ()))
    q_v_bytes = size_of(*q, *v, arguments.get("column_scales"))
    old_out_bytes = size_of(out) if arguments["ADD"] else 0
    scales = packed_work(arguments)  # (bytes counted once, bytes as all tiles load them)
    small, small_by_tiles = small_operand_bytes(arguments, m_tiles * n_tiles, n_tiles)
    return Work(
        flops=2 * M * N * (sum(depths) + sum(ranks)),
        loaded=p_u_bytes + q_v_bytes + size_of(bias) + small + old_out_bytes + scales[0],
        stored=size_of(out),
        loaded_by_tiles=(p_u_bytes + size_of(*p) // M * (p_rows - M)) * n_tiles
        + (q_v_bytes + size_of(bias)) // (segments or 1) * m_tiles
        + small_by_tiles
        + old_out_bytes
        + scales[1],
    )


@triton.jit
def load_q_tile(
    q, operands, tables, i_k, i_n, i_segment, K, N, strides,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr, DESCRIPTOR: tl.constexpr, PACKING: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The tile [BK, BN] of Q [K, N] at (i_k, i_n), unpacked if Q is packed.

    ``strides`` of Q: from one segment's matrix to the next (None without segments), from row to
    row, and from column to column.  TRANSPOSED: the rows of Qᵀ are contiguous in memory, as with a
    weight in the forward.  Then a tile of Qᵀ is loaded and transposed, because a load is fastest
    along contiguous memory.  ``operands`` and ``tables`` belong to a packed Q (packed.py).
    """
    # The matrix in memory is Qᵀ or Q.
    ROWS: tl.constexpr = BLOCK_N if TRANSPOSED else BLOCK_K
    COLUMNS: tl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_N
    i_row, i_column, rows, columns = (i_n, i_k, N, K) if TRANSPOSED else (i_k, i_n, K, N)
    stride_e, stride_k, stride_n = strides
    row_stride, column_stride = (stride_n, stride_k) if TRANSPOSED else (stride_k, stride_n)
    if PACKING is not None:
        if stride_e is not None:
            # The experts' packed weights are one tall matrix, so rows count from the first expert.
            i_row += i_segment * rows
            rows *= i_segment + 1  # the row after this expert's last
        b_q = unpack_tile(
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
        b_q = load_tile(
            q, i_row, i_column, rows, columns, row_stride, column_stride, ROWS, COLUMNS,
            DESCRIPTOR, i_matrix,
        )  # fmt: skip
    return b_q.T if TRANSPOSED else b_q


@triton.jit
def finish_tile(
    out, b_out, bias, i_m, i_n, i_segment, rows, columns, end, N, bias_strides, out_row_stride,
    ADD: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Store b_out (+ bias) (+ OUT, if ADD) as OUT's tile [BM, BN] at (i_m, i_n).

    The sum is float32, and the store rounds it once.  DESCRIPTOR: ``out`` is a tensor descriptor.
    """
    BLOCK_M: tl.constexpr = b_out.shape[0]
    BLOCK_N: tl.constexpr = b_out.shape[1]
    dtype: tl.constexpr = out.dtype if DESCRIPTOR else out.dtype.element_ty
    if bias is not None:
        # [BM, BN] += [1, BN]
        b_out += load_bias_row(bias, i_n, i_segment, columns, bias_strides, BLOCK_N, dtype)
    if ADD:
        b_before = load_tile(out, i_m, i_n, rows, N, out_row_stride, 1, BLOCK_M, BLOCK_N)
        b_out += b_before.to(tl.float32)  # [BM, BN]
    if DESCRIPTOR:
        # Two steps of BN / 2 columns.  A store by descriptor goes through shared memory.  In a
        # persistent program its buffer stays allocated beside the main loop's buffers; half a tile
        # needs half the buffer.
        halves = b_out.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            out.store([i_m, i_n + i * (BLOCK_N // 2)], cast(halves[i], dtype))  # [BM, BN / 2]
    else:
        store_tile(out, b_out, i_m, i_n, end, N, out_row_stride, 1)


class Operands(NamedTuple):
    """The operands of one launch, and the choice of its tiles."""

    target: Target
    call: Call
    tiles: GemmConfig
    ps: Sequence[Tensor] | Sequence[TensorDescriptor]
    qs: Sequence[Tensor] | Sequence[TensorDescriptor]  # codes, if packed
    arguments: dict[str, Any]  # of all kernels with a base product

    def of_group(
        self, us: Sequence[Tensor], vs: Sequence[Tensor], seeds: Tensor | None, dropout: float
    ) -> dict[str, Any]:
        """The arguments of kernels that take several P_i, Q_i, U_i and V_i, with masks."""
        absent = [None] * (MAX_PROJECTIONS - len(self.ps))  # for the unused ones of p0 … p3
        # A call with several dropout masks isn't persistent.  Otherwise the addresses of its
        # low-rank operands would stay in registers from tile to tile, beside two accumulators.
        has_masks = self.call.masked and len(us) > 1
        is_persistent = self.arguments["DESCRIPTORS"] and not (self.call.segments or has_masks)
        return {
            **{f"p{i}": each for i, each in enumerate([*self.ps, *absent])},
            **{f"q{i}": each for i, each in enumerate([*self.qs, *absent])},
            "u": tuple(us), "v": tuple(vs), "seeds": seeds,
            "threshold": dropout_threshold(dropout), "PERSISTENT": is_persistent,
        }  # fmt: skip

    def run(self, kernel: Any, arguments: dict[str, Any], work: Callable) -> None:
        """Launch a program for each tile; a persistent launch has one for each processor."""
        count, tiles = self.tiles.tiles(self.call), self.tiles
        assert count <= LONGEST  # a persistent program adds the number of processors
        if arguments.get("PERSISTENT"):
            count = min(count, self.target.processors)
        arguments = self.arguments | arguments
        launch(Launch(kernel, (count,), arguments, tiles.warps, tiles.stages, work))


def operands_of(
    out: Tensor,
    ps: Sequence[Tensor],
    qs: Sequence[Tensor] | Sequence[Packed],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    bias: Tensor | None,
    precision: str,
    configs: tuple[GemmConfig | None, GemmConfig | None],
    *,
    adds: bool = False,
    ends: Tensor | None = None,
    **properties: Any,
) -> Operands:
    """Choose the config of a launch, and whether it loads by descriptor; collect its arguments.

    ``configs``: the launcher's ``config`` and ``preferred``.  ``properties``: more fields of Call.
    """
    target, (M, N), size = target_of(out.device), out.shape, out.element_size()
    packed = qs[0] if isinstance(qs[0], Packed) else None
    # A weight is stored row by row.  In the forward q is its transpose, for dx the weight.
    transposed = packed.transposed if packed else all(each.stride(-2) == 1 for each in qs)
    matrices = [] if packed else [*ps, *(q.mT if transposed else q for q in qs), out]
    ranks = [each.shape[1] for each in us]
    assert max(each.shape[1] for each in ps) <= LONGEST
    call = Call(
        M, N, max(ranks, default=0), size, precision,
        max(len(us), len(ps) * ("int8" in properties)),
        pointers=adds or packed is not None
        or (not transposed and races_when_turned(target, precision, size))
        or not all(_has_descriptor(each, target) for each in matrices),
        packed="" if packed is None else packed.kind,
        segments=0 if ends is None else len(ends), **properties,
    )  # fmt: skip
    tiles = chosen_config("gemm_lowrank", target, call, *configs)
    descriptors = tiles.uses_descriptors(call)
    arguments = {
        "bias": bias, "out": out, "M": M, "N": N,
        "K": tuple(each.shape[1] for each in ps), "R": tuple(ranks),
        "strides": (
            tuple(each.stride() for each in ps), strides_of(qs, ends), strides_of(vs, ends),
            bias_strides(bias, ends), out.stride(0),
        ),
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k,
        "BLOCK_R": tiles.block_r(call), "GROUP": tiles.group, "DESCRIPTORS": descriptors,
        "Q_TRANSPOSED": transposed, "MULTIPLES_OF_8": multiples_of_8(us, vs),
        "PRECISION": precision,
    }  # fmt: skip
    if packed:
        qs = [each.codes for each in qs]
    if descriptors:
        describe, block_k = TensorDescriptor.from_tensor, tiles.block_k
        q_tile = [tiles.block_n, block_k] if transposed else [block_k, tiles.block_n]
        if ends is not None:
            q_tile = [1, *q_tile]
        else:  # stored in two halves (finish_tile); with segments, out stays a pointer
            arguments["out"] = describe(out, [tiles.block_m, tiles.block_n // 2])
        ps = [describe(p, [tiles.block_m, block_k]) for p in ps]
        qs = [describe(q.mT if transposed else q, q_tile) for q in qs]
    return Operands(target, call, tiles, ps, qs, arguments)


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
