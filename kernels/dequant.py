"""OUT = number(CODES) · scales: unpack a whole packed weight to a dense matrix, in one launch."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .common import store_tile
from .config import cdiv, power_of_two
from .launch import Launch, Work, launch, size_of, stated
from .packed import Packed, scale_bytes, tables_of, unpack_tile
from .target import target_of

# A tile's elements, its most columns, and warps.  With four warps, 4096 codes of four bits are 16
# bytes for each thread: one load.
_TILE, _WIDEST, _WARPS = 4096, 512, 4


def _work_of(arguments: Mapping[str, Any]) -> Work:
    """The FLOPs and bytes of a launch."""
    codes, operands, out = (arguments[name] for name in ("codes", "operands", "out"))
    rows, columns, block_columns = (arguments[n] for n in ("rows", "columns", "BLOCK_COLUMNS"))
    programs = cdiv(rows, arguments["BLOCK_ROWS"]) * cdiv(columns, block_columns)
    return Work(
        flops=out.numel(),
        loaded=size_of(codes, *operands),
        stored=size_of(out),
        loaded_by_tiles=size_of(codes)
        + scale_bytes(operands, arguments["PACKING"], rows, columns, block_columns)
        + size_of(operands[3]) * programs,  # the offset of nested scales
    )


@triton.jit(launch_metadata=stated(_work_of))
def dequant_kernel(
    codes, operands, out,
    rows, columns, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    PACKING: tl.constexpr,
):  # fmt: skip
    """OUT = the unpacked weight.

    CODES [rows, width] (bytes), OUT [rows, columns].  ``operands``: scales and tables
    (``Packed.operands``).  A program computes one tile, whose first row and column are i_row and
    i_column.
    """
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    i_row = tl.program_id(0) // column_tiles * BLOCK_ROWS
    i_column = tl.program_id(0) % column_tiles * BLOCK_COLUMNS
    tables = tables_of(operands, PACKING)
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    b_out = unpack_tile(
        codes, operands, tables, i_row, i_column, rows, columns, width,
        BLOCK_ROWS, BLOCK_COLUMNS, PACKING, out.dtype.element_ty,
    )  # fmt: skip
    store_tile(out, b_out, i_row, i_column, rows, columns, columns, 1)


def dequant(packed: Packed, out: Tensor) -> Tensor:
    """Fill ``out`` with the unpacked weight, computed in float32 and rounded once; returns ``out``.

    ``out`` [rows, columns] or [experts, rows, columns] is contiguous and has 16 or 32 bits.  The
    weight has fewer than 2³¹ elements, unless ``packed.lies_in_rows``.
    """
    packed = packed.of_all_experts
    # Where a byte or a block of scales crosses rows, the whole weight is handled as one long row.
    if not packed.lies_in_rows:
        packed = replace(packed, rows=1, columns=packed.rows * packed.columns)
    rows, columns = packed.rows, packed.columns
    block_columns = min(_TILE if rows == 1 else _WIDEST, max(16, power_of_two(columns)))
    block_rows = min(_TILE // block_columns, power_of_two(rows))
    arguments = {
        "codes": packed.codes, "operands": packed.operands, "out": out,
        "rows": rows, "columns": columns, "width": packed.width,
        "BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns,
        "PACKING": packed.packing(target_of(out.device)),
    }  # fmt: skip
    grid = (cdiv(rows, block_rows) * cdiv(columns, block_columns),)
    launch(Launch(dequant_kernel, grid, arguments, warps=_WARPS, stages=1, work_of=_work_of))
    return out
