"""Packed weights: codes and scales, and how a kernel makes a tile of the weight from them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .common import cast, load_tile
from .config import cdiv, row_tiles
from .launch import size_of
from .target import Target

FOUR_BIT, INT8, FLOAT8 = "four-bit", "int8", "float8"


@dataclass(frozen=True)
class Packed:
    """A weight [rows, columns]: a code for each element, and numbers that the codes are scaled by.

    ``codes``, one of these:

    * "four-bit": uint8, two elements a byte, the earlier one in the upper half, or in the lower
      one if ``low_first``; one element comes after the other over the whole weight.  ``table`` says
      what each of the 16 codes stands for;
    * "int8": int8 [rows, columns];
    * "float8": e4m3, as uint8 [rows, columns].

    Each ``block_rows`` x ``block_columns`` of the weight, powers of two, have a scale in common; 0
    stands for all there are.  ``scales`` hold them row by row, in any floating dtype of at most 32
    bits, in which they are multiplied by ``factor``; or as codes of their own, uint8, of which
    ``outer`` has a scale for every ``outer_block`` of them, a table [256], and what is added to
    all: float32, as is the sum.

    Codes and scales lie end to end, also those of ``experts`` weights, if there are several: then
    ``block_rows`` divides the rows.  ``transposed``: columns and rows change places.
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
    def mT(self) -> "Packed":  # noqa: N802  # as tensors have it
        return replace(self, transposed=not self.transposed)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        return (self.experts, *shape) if self.experts else shape

    @property
    def width(self) -> int:
        """The codes of a row, in bytes."""
        return cdiv(self.columns, 2) if self.kind == FOUR_BIT else self.columns

    def stride(self) -> tuple[int, ...]:
        """Of the codes, in bytes."""
        strides = (1, self.width) if self.transposed else (self.width, 1)
        return (self.rows * self.width, *strides) if self.experts else strides

    @property
    def lies_in_rows(self) -> bool:
        return lies_in_rows(self.kind, self.columns, self.block_columns)

    @property
    def in_one_row(self) -> "Packed":
        """The same elements as a matrix of one row, where ``block_rows`` is 1."""
        return replace(self, rows=1, columns=self.rows * self.columns)

    @property
    def of_all_experts(self) -> "Packed":
        """Their weights as one matrix, below each other."""
        return replace(self, rows=max(1, self.experts) * self.rows, experts=0)

    def tensors(self) -> list[Tensor]:
        return [self.codes, *(each for each in self.operands if each is not None)]

    @property
    def operands(self) -> tuple:
        """What a kernel reads besides the codes."""
        return self.scales, *(self.outer or (None, None, None))

    def is_like(self, other: "Packed") -> bool:
        """Whether one kernel reads both."""
        ours, theirs = (
            (each.kind, each.block_rows, each.block_columns, each.table, each.outer_block)
            + (each.factor, each.scales.dtype, each.low_first)
            for each in (self, other)
        )
        return ours == theirs

    def packing(self, target: Target) -> tuple:
        """What a kernel is compiled for: its PACKING, whose parts it takes by these places.

        0 kind, 1 block_rows, 2 block_columns, 3 outer_block (0: scales aren't nested), 4 factor,
        5 table of 16, 6 by how many bits a byte is shifted for the earlier of its two codes.
        """
        kind = self.kind if self.kind != FLOAT8 or target.float8 else f"{FLOAT8} by bits"
        outer_block = self.outer_block if self.outer else 0
        numbers = self.block_rows, self.block_columns, outer_block, self.factor
        return kind, *numbers, self.table, 0 if self.low_first else 4


def lies_in_rows(kind: str, columns: int, block_columns: int) -> bool:
    """Whether no byte, and no block of scales, goes on from one row into the next."""
    return kind != FOUR_BIT or columns % max(2, block_columns) == 0


def scale_bytes(operands: tuple, packing: tuple, rows: int, columns: int, tile_columns: int) -> int:
    """Bytes that are read of the scales if each tile of so many columns reads its own."""
    _, _, block_columns, outer_block, *_ = packing
    count = rows * cdiv(columns, min(tile_columns, block_columns or columns))
    return count * (operands[0].element_size() + (8 if outer_block else 0))


def packed_work(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """What packed weights have to be read besides their codes; the same again for every tile."""
    packing, transposed = arguments["PACKING"], arguments["Q_TRANSPOSED"]
    if packing is None:
        return 0, 0
    N, depths = arguments["N"], arguments["K"]
    block_n, block_k = arguments["BLOCK_N"], arguments["BLOCK_K"]
    m_tiles = row_tiles(arguments["M"], arguments["BLOCK_M"], arguments["segments"])
    n_tiles = cdiv(N, block_n)
    once = by_tiles = 0
    for operands, K in zip(arguments["q_operands"], depths, strict=True):
        shape = (N, K, block_k) if transposed else (K, N, block_n)
        once += size_of(*operands)
        by_tiles += m_tiles * scale_bytes(operands, packing, *shape)
        by_tiles += m_tiles * n_tiles * size_of(operands[3])
    return once, by_tiles


@triton.jit
def tables_of(operands, PACKING: tl.constexpr):
    """What every tile needs: the numbers that codes of four bits stand for, and an offset."""
    KIND: tl.constexpr = PACKING[0]
    OUTER_BLOCK: tl.constexpr = PACKING[3]
    TABLE: tl.constexpr = PACKING[5]
    b_table, offset_of_scales = 0.0, 0.0  # Triton 3.6 hands on no None from here
    if KIND == "four-bit":
        b_table = tl.zeros((16,), tl.float32)
        for i in tl.static_range(16):
            b_table = tl.where(tl.arange(0, 16) == i, TABLE[i], b_table)
    if OUTER_BLOCK > 0:
        offset_of_scales = tl.load(operands[3])
    return b_table, offset_of_scales


@triton.jit
def scale_tile(
    operands, offset, i_row, i_column, rows, columns,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    PACKING: tl.constexpr,
):  # fmt: skip
    """The scales of a tile, float32 [ROWS, GROUPS]."""
    scales, outer, outer_table, _ = operands
    BLOCK_ROWS: tl.constexpr = PACKING[1]
    BLOCK_COLUMNS: tl.constexpr = PACKING[2]
    OUTER_BLOCK: tl.constexpr = PACKING[3]
    FACTOR: tl.constexpr = PACKING[4]
    o_row = i_row + tl.arange(0, ROWS)
    o_group = tl.arange(0, GROUPS)
    groups = 1
    inside = (o_row < rows)[:, None] & (o_group < 1)[None, :]
    if BLOCK_COLUMNS > 0:
        o_group += i_column // BLOCK_COLUMNS
        groups = tl.cdiv(columns, BLOCK_COLUMNS)
        inside = (o_row < rows)[:, None] & (o_group < groups)[None, :]
    o_block = o_row // BLOCK_ROWS if BLOCK_ROWS > 0 else o_row * 0
    o_scale = o_block.to(tl.int64)[:, None] * groups + o_group[None, :]
    b_scale = tl.load(scales + o_scale, mask=inside, other=0)
    if OUTER_BLOCK > 0:
        b_inner = tl.load(outer_table + b_scale.to(tl.int32), mask=inside, other=0.0)
        b_outer = tl.load(outer + o_scale // OUTER_BLOCK, mask=inside, other=0.0)
        # Rounded, and then added to: a minimum in between can't become one multiply-add.
        b_scale = tl.minimum(b_inner * b_outer, 3.0e38, propagate_nan=tl.PropagateNan.ALL) + offset
    elif FACTOR != 1.0:
        b_scale = cast(b_scale.to(tl.float32) * FACTOR, b_scale.dtype)
    return b_scale.to(tl.float32)


@triton.jit
def scaled(b_code, b_scale):
    """Codes [ROWS, C] times their scales [ROWS, GROUPS], in float32."""
    ROWS: tl.constexpr = b_code.shape[0]
    COLUMNS: tl.constexpr = b_code.shape[1]
    GROUPS: tl.constexpr = b_scale.shape[1]
    if GROUPS > 1:
        b_wide = b_scale[:, :, None].broadcast_to(ROWS, GROUPS, COLUMNS // GROUPS)
        b_scale = b_wide.reshape(ROWS, COLUMNS)
    return b_code * b_scale


@triton.jit
def float8_of(b_bits):
    """What e4m3's bits stand for, in float32."""
    bits = b_bits.to(tl.int32)
    # In the place of float32's exponent and mantissa, whose bias is greater by 120.
    b_number = ((bits & 0x7F) << 20 | (bits & 0x80) << 24).to(tl.float32, bitcast=True) * 2.0**120
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), b_number)


@triton.jit
def packed_tile(
    codes, operands, tables, i_row, i_column, rows, columns, width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKING: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """The tile of a packed weight [rows, columns] at (i_row, i_column), rounded to ``dtype`` once.

    ``width``: the codes of a row, in bytes.
    Where it sticks out it has some number or other.
    """
    KIND: tl.constexpr = PACKING[0]
    BLOCK_COLUMNS: tl.constexpr = PACKING[2]
    EARLIER: tl.constexpr = PACKING[6]
    GROUPS: tl.constexpr = max(1, COLUMNS // BLOCK_COLUMNS) if BLOCK_COLUMNS > 0 else 1
    b_table, offset = tables
    b_scale = scale_tile(operands, offset, i_row, i_column, rows, columns, ROWS, GROUPS, PACKING)
    if KIND == "four-bit":
        b_byte = load_tile(
            codes, i_row, i_column // 2, rows, width, width, 1, ROWS, COLUMNS // 2
        )  # [ROWS, COLUMNS / 2]
        b_even = scaled(looked_up(b_table, b_byte >> EARLIER & 15), b_scale)
        b_odd = scaled(looked_up(b_table, b_byte >> (4 - EARLIER) & 15), b_scale)
        # Rounded behind the reshape: Triton 3.9 fails on one that a product reads as it is.
        return cast(tl.join(b_even, b_odd).reshape(ROWS, COLUMNS), dtype)
    else:
        b_code = load_tile(codes, i_row, i_column, rows, width, width, 1, ROWS, COLUMNS)
        if KIND == "float8":
            b_number = b_code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        elif KIND == "float8 by bits":
            b_number = float8_of(b_code)
        else:
            b_number = b_code.to(tl.float32)
        return cast(scaled(b_number, b_scale), dtype)


@triton.jit
def looked_up(b_table, b_code):
    """The entry of a table [16] for each code of a tile."""
    ROWS: tl.constexpr = b_code.shape[0]
    COLUMNS: tl.constexpr = b_code.shape[1]
    flat = tl.gather(b_table, b_code.to(tl.int32).reshape(ROWS * COLUMNS), 0)
    return flat.reshape(ROWS, COLUMNS)
