"""Packed weights: a record of codes and scales, and the device functions that unpack a tile.

An element is number(code) · scale, computed in float32 and rounded once to the product's dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import cast, load_tile
from .config import LONGEST, cdiv, row_tiles
from .launch import size_of
from .target import Target

FOUR_BIT, INT8, FLOAT8 = "four-bit", "int8", "float8"


@dataclass(frozen=True)
class Packed:
    """A weight [rows, columns]: a code for each element, and a scale for each block of elements.

    ``codes`` is one of these, by ``kind``:

    * "four-bit": uint8, two elements in a byte, row after row without gaps.  The first element is
      in the upper half, or in the lower half if ``low_first``.  ``table`` has the number of each of
      the 16 codes;
    * "int8": int8 [rows, columns];
    * "float8": e4m3, as uint8 [rows, columns].

    A block of ``block_rows`` x ``block_columns`` elements shares a scale.  Both are powers of two,
    or 0 for all rows or columns.  ``scales`` has one entry for each block, row by row, in one of
    two forms:

    * numbers in a floating dtype of at most 32 bits, which are multiplied by ``factor`` and rounded
      to that dtype;
    * nested: uint8 codes.  ``outer`` then has three float32 tensors: a scale for every
      ``outer_block`` codes, a table [256], and an offset.  A block's scale is table[code] · outer
      scale + offset, in float32.

    Codes and scales are contiguous.  With ``experts``, all weights follow each other in them, and
    ``block_rows`` divides the rows.  ``transposed``: the weight is [columns, rows], the transpose.
    """

    kind: str
    codes: Tensor
    scales: Tensor
    rows: int
    columns: int
    block_rows: int
    block_columns: int
    table: tuple[float, ...] = ()
    outer: tuple[Tensor, Tensor, Tensor] | None = None
    outer_block: int = 0
    factor: float = 1.0
    low_first: bool = False
    transposed: bool = False
    experts: int = 0

    @property
    def mT(self) -> "Packed":  # noqa: N802  # the name that tensors use
        return replace(self, transposed=not self.transposed)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        return (self.experts, *shape) if self.experts else shape

    @property
    def width(self) -> int:
        """Bytes of codes in a row."""
        return cdiv(self.columns, 2) if self.kind == FOUR_BIT else self.columns

    def stride(self) -> tuple[int, ...]:
        """Strides of the codes, in bytes."""
        strides = (1, self.width) if self.transposed else (self.width, 1)
        return (self.rows * self.width, *strides) if self.experts else strides

    @property
    def lies_in_rows(self) -> bool:
        return lies_in_rows(self.kind, self.columns, self.block_columns)

    @property
    def of_all_experts(self) -> "Packed":
        """The experts' weights as one matrix, one below the other."""
        return replace(self, rows=max(1, self.experts) * self.rows, experts=0)

    def tensors(self) -> list[Tensor]:
        return [self.codes, *(each for each in self.operands if each is not None)]

    @property
    def operands(self) -> tuple:
        """The kernel operands besides the codes: (scales, outer scales, outer table, offset)."""
        return self.scales, *(self.outer or (None, None, None))

    def is_like(self, other: "Packed") -> bool:
        """Whether one launch can read both weights."""
        ours, theirs = (
            (each.kind, each.block_rows, each.block_columns, each.table, each.outer_block)
            + (each.factor, each.scales.dtype, each.low_first)
            for each in (self, other)
        )
        return ours == theirs

    def packing(self, target: Target) -> "Packing":
        """The compile-time constants of a kernel that reads this weight."""
        # Indices of 32 bits count the rows of all experts, and the columns.
        assert max(1, self.experts) * self.rows <= LONGEST >= self.columns
        assert self.columns + self.block_columns < 2**31
        kind = self.kind if self.kind != FLOAT8 or target.float8 else f"{FLOAT8} by bits"
        outer_block = self.outer_block if self.outer else 0
        numbers = self.block_rows, self.block_columns, outer_block, self.factor
        return Packing(kind, *numbers, self.table, 0 if self.low_first else 4)


class Packing(NamedTuple):
    """A kernel's argument PACKING: how codes and scales become numbers, known when compiling."""

    kind: str
    block_rows: int
    block_columns: int
    outer_block: int  # 0: scales aren't nested
    factor: float
    table: tuple[float, ...]  # of 16 numbers
    shift: int  # bits to shift a byte right for the first of its two codes


def lies_in_rows(kind: str, columns: int, block_columns: int) -> bool:
    """Whether every row begins a new byte and a new block of scales."""
    return kind != FOUR_BIT or columns % max(2, block_columns) == 0


def scale_bytes(operands: tuple, packing: Packing, rows: int, columns: int, width: int) -> int:
    """Bytes of scales that are loaded if tiles of ``width`` columns cover the weight once."""
    count = rows * cdiv(columns, min(width, packing.block_columns or columns))
    # A nested scale also loads a float32 from the table and an outer scale.
    return count * (operands[0].element_size() + (8 if packing.outer_block else 0))


def packed_work(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of scales and tables of packed weights.

    Returns (bytes with each element counted once, bytes as all tiles load them).
    """
    packing, transposed = arguments.get("PACKING"), arguments["Q_TRANSPOSED"]
    if packing is None:
        return 0, 0
    N, depths = arguments["N"], arguments["K"]
    block_n, block_k = arguments["BLOCK_N"], arguments["BLOCK_K"]
    m_tiles = row_tiles(arguments["M"], arguments["BLOCK_M"], arguments.get("segments"))
    n_tiles = cdiv(N, block_n)
    once = by_tiles = 0
    for operands, K in zip(arguments["q_operands"], depths, strict=True):
        shape = (N, K, block_k) if transposed else (K, N, block_n)
        once += size_of(*operands)
        by_tiles += m_tiles * scale_bytes(operands, packing, *shape)
        by_tiles += m_tiles * n_tiles * size_of(operands[3])  # the offset
    return once, by_tiles


@triton.jit
def tables_of(operands, PACKING: tl.constexpr):
    """(table of four-bit codes [16], offset of nested scales): loaded once, used by every tile.

    An operand that the format doesn't have is 0.0, because Triton 3.6 can't return None.
    """
    b_table, offset_of_scales = 0.0, 0.0
    if PACKING.kind == "four-bit":
        # The table is known when compiling, so it is built from constants in registers.
        b_table = tl.zeros((16,), tl.float32)
        for i in tl.static_range(16):
            b_table = tl.where(tl.arange(0, 16) == i, PACKING.table[i], b_table)
    if PACKING.outer_block > 0:
        offset_of_scales = tl.load(operands[3])
    return b_table, offset_of_scales


@triton.jit
def scale_tile(
    operands, offset, i_row, i_column, rows, columns,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr, PACKING: tl.constexpr,
):  # fmt: skip
    """The scales of the tile at (i_row, i_column), float32 [ROWS, GROUPS].

    GROUPS is the number of blocks of columns in a row of the tile: each has one scale.
    """
    scales, outer, outer_table, _ = operands
    o_row = i_row + tl.arange(0, ROWS)
    o_group = tl.arange(0, GROUPS)
    groups = 1  # blocks in a row of the whole weight; one if a block has all columns
    inside = (o_row < rows)[:, None]
    if PACKING.block_columns > 0:
        o_group += i_column // PACKING.block_columns
        groups = tl.cdiv(columns, PACKING.block_columns)
        inside = (o_row < rows)[:, None] & (o_group < groups)[None, :]
    # o_block: the row of blocks of each row.  o_scale: the scale's number; they are stored by rows.
    o_block = o_row // PACKING.block_rows if PACKING.block_rows > 0 else o_row * 0
    o_scale = o_block.to(tl.int64)[:, None] * groups + o_group[None, :]
    b_scale = tl.load(scales + o_scale, mask=inside, other=0)  # [ROWS, GROUPS]
    if PACKING.outer_block > 0:
        b_inner = tl.load(outer_table + b_scale.to(tl.int32), mask=inside, other=0.0)
        b_outer = tl.load(outer + o_scale // PACKING.outer_block, mask=inside, other=0.0)
        # The format rounds the product before it adds the offset.  The minimum keeps the compiler
        # from fusing both into one multiply-add, which rounds only once.
        b_scale = tl.minimum(b_inner * b_outer, 3.0e38, propagate_nan=tl.PropagateNan.ALL) + offset
    elif PACKING.factor != 1.0:
        b_scale = cast(b_scale.to(tl.float32) * PACKING.factor, b_scale.dtype)
    return b_scale.to(tl.float32)


@triton.jit
def scaled(b_code, b_scale):
    """Numbers [ROWS, COLUMNS] times their scales [ROWS, GROUPS], in float32."""
    ROWS: tl.constexpr = b_code.shape[0]
    COLUMNS: tl.constexpr = b_code.shape[1]
    GROUPS: tl.constexpr = b_scale.shape[1]
    if GROUPS > 1:  # repeat each scale for the columns of its group
        b_wide = b_scale[:, :, None].broadcast_to(ROWS, GROUPS, COLUMNS // GROUPS)
        b_scale = b_wide.reshape(ROWS, COLUMNS)
    return b_code * b_scale


@triton.jit
def float8_of(b_bits):
    """Convert e4m3's bits to float32, for GPUs without an instruction that does."""
    bits = b_bits.to(tl.int32)
    # Move sign, exponent and mantissa to their places in float32.  float32's exponent bias is
    # greater by 120 (127 - 7), hence the factor 2¹²⁰; it also makes subnormal numbers right.
    b_number = ((bits & 0x7F) << 20 | (bits & 0x80) << 24).to(tl.float32, bitcast=True) * 2.0**120
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), b_number)


@triton.jit
def unpack_tile(
    codes, operands, tables, i_row, i_column, rows, columns, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PACKING: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The tile of a packed weight [rows, columns] at (i_row, i_column), rounded to ``dtype`` once.

    ``width``: bytes of codes in a row.  Elements outside of the weight are arbitrary finite
    numbers.  They have no effect: a product multiplies them by zeros of its other operand, or its
    store leaves them out.
    """
    BLOCK_COLUMNS: tl.constexpr = PACKING.block_columns
    GROUPS: tl.constexpr = max(1, COLUMNS // BLOCK_COLUMNS) if BLOCK_COLUMNS > 0 else 1
    b_table, offset = tables
    b_scale = scale_tile(operands, offset, i_row, i_column, rows, columns, ROWS, GROUPS, PACKING)
    if PACKING.kind == "four-bit":
        b_byte = load_tile(
            codes, i_row, i_column // 2, rows, width, width, 1, ROWS, COLUMNS // 2
        )  # [ROWS, COLUMNS / 2]
        # [ROWS, COLUMNS / 2] each: the elements of even and of odd columns
        b_even = scaled(looked_up(b_table, b_byte >> PACKING.shift & 15), b_scale)
        b_odd = scaled(looked_up(b_table, b_byte >> (4 - PACKING.shift) & 15), b_scale)
        # The cast comes after the reshape, because Triton 3.9 fails if a product reads a reshaped
        # tile directly.
        return cast(tl.join(b_even, b_odd).reshape(ROWS, COLUMNS), dtype)
    else:
        # [ROWS, COLUMNS]
        b_code = load_tile(codes, i_row, i_column, rows, width, width, 1, ROWS, COLUMNS)
        if PACKING.kind == "float8":
            b_number = b_code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        elif PACKING.kind == "float8 by bits":
            b_number = float8_of(b_code)
        else:  # int8
            b_number = b_code.to(tl.float32)
        return cast(scaled(b_number, b_scale), dtype)


@triton.jit
def looked_up(b_table, b_code):
    """table[code] for each code of a tile.  tl.gather takes vectors, so the tile is flattened."""
    ROWS: tl.constexpr = b_code.shape[0]
    COLUMNS: tl.constexpr = b_code.shape[1]
    flat = tl.gather(b_table, b_code.to(tl.int32).reshape(ROWS * COLUMNS), 0)
    return flat.reshape(ROWS, COLUMNS)
