"""Device functions that all kernels share: dot product, loads, tile order, dropout mask.

A launch handles a group of *projections*, the layers that read the same x (q, k and v).  Operands
that exist once per projection are tuples; ``tl.static_range`` unrolls over them.

Names inside a kernel:

* M, N, K, R: the sizes of the axes.  M counts rows (tokens), N columns, K the axis that a product
  sums over (its depth), R the rank.  Each kernel's docstring gives the shapes of its operands;
* ``i``: a projection's number; ``i_m``, ``i_n``, ``i_k``, ``i_r``: a tile's first index on the axis
  with that letter; ``i_tile``, ``i_segment``, ``i_split``: a tile's, segment's, split's number;
* ``o_``: offsets, a vector of indices on one axis; ``b_``: a tile in registers (a block);
* ``BLOCK_M``, ``BLOCK_N``, ``BLOCK_K``, ``BLOCK_R``: a tile's size on that axis.  Comments shorten
  them to BM, BN, BK and BR.
"""

import triton
import triton.language as tl

# Whether TRITON_INTERPRET=1 runs kernels on a CPU; @triton.jit also reads this at import.  Device
# functions receive it as a default argument and not as a global, because at every launch Triton
# checks that no global has changed.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(
    b_left, b_right, b_sum, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr = INTERPRETED
):  # fmt: skip
    """b_sum + b_left @ b_right, accumulated in float32; in int32 for int8."""
    # The interpreter stores bfloat16 as integers, and its tl.dot would multiply these integers.
    if INTERPRETED and b_sum.dtype == tl.float32:
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    # Triton 3.6 doesn't take the dtype of the result from the sum.
    return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION, out_dtype=b_sum.dtype)


@triton.jit
def cast(b_tile, dtype: tl.constexpr, INTERPRETED: tl.constexpr = INTERPRETED):
    """The tile in another dtype, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's .to() truncates the lower bits
        bits = b_tile.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
        bits = tl.where(b_tile == b_tile, rounded, bits | 0x400000)  # NaN stays NaN
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return b_tile.to(dtype)


@triton.jit
def load_tile(
    source, i_row, i_column, rows, columns, row_stride, column_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr = False,
    i_segment=None, o_mem=None,
):  # fmt: skip
    """The tile of a matrix [rows, columns] at (i_row, i_column), zero outside of the matrix.

    ``source`` is a pointer, or a tensor descriptor (TMA) that knows rows, columns and strides.
    With ``i_segment``, the descriptor has one matrix for each segment: [segments, rows, columns].
    ``o_mem`` [BLOCK_ROWS]: the rows' numbers in memory.  A launch that visits rows in sorted order
    needs them, because a tile's rows then aren't consecutive in memory (segments.py).
    """
    if DESCRIPTOR and i_segment is not None:
        return source.load([i_segment, i_row, i_column]).reshape(BLOCK_ROWS, BLOCK_COLUMNS)
    elif DESCRIPTOR:
        return source.load([i_row, i_column])
    else:
        o_row = i_row + tl.arange(0, BLOCK_ROWS)
        o_column = i_column + tl.arange(0, BLOCK_COLUMNS)
        inside = (o_row < rows)[:, None] & (o_column < columns)[None, :]
        if o_mem is not None:
            o_row = o_mem  # only for the addresses; ``inside`` is about the sorted rows
        pointers = tile_pointers(source, o_row, o_column, row_stride, column_stride)
        return tl.load(pointers, mask=inside, other=0.0)  # [BLOCK_ROWS, BLOCK_COLUMNS]


@triton.jit
def hadamard_matrix(dtype: tl.constexpr):
    """Sylvester's matrix [64, 64], divided by 8: symmetric, and its own inverse."""
    o_entry = tl.arange(0, 64)
    # An entry's sign is the parity of the bits that its row and its column share.
    b_parity = o_entry[:, None] & o_entry[None, :]
    b_parity ^= b_parity >> 4
    b_parity ^= b_parity >> 2
    b_parity ^= b_parity >> 1
    return cast(tl.where(b_parity % 2 == 0, 0.125, -0.125), dtype)


@triton.jit
def rotate_tile(b_tile, b_hadamard, i_column, columns, PRECISION: tl.constexpr):
    """The tile at column i_column of a matrix, with each block of 64 columns rotated, in float32.

    The last ``columns`` % 64 columns of the matrix aren't rotated.  ``b_hadamard`` is
    :func:`hadamard_matrix` in the tile's dtype.  For a float32 tile it may be in bfloat16: the tile
    is then multiplied in two bfloat16 parts, the rounded numbers and what rounding removed.
    """
    ROWS: tl.constexpr = b_tile.shape[0]
    COLUMNS: tl.constexpr = b_tile.shape[1]
    b_blocks = b_tile.reshape(ROWS * COLUMNS // 64, 64)
    b_sum = tl.zeros((ROWS * COLUMNS // 64, 64), tl.float32)
    if b_tile.dtype != b_hadamard.dtype:
        b_upper = cast(b_blocks, b_hadamard.dtype)
        b_sum = dot(
            cast(b_blocks - b_upper.to(tl.float32), b_hadamard.dtype), b_hadamard, b_sum, PRECISION
        )
        b_blocks = b_upper
    b_rotated = dot(b_blocks, b_hadamard, b_sum, PRECISION).reshape(ROWS, COLUMNS)
    is_rotated = i_column + tl.arange(0, COLUMNS) < columns // 64 * 64
    return tl.where(is_rotated[None, :], b_rotated, b_tile.to(tl.float32))


@triton.jit
def known_multiple(number, OF_8: tl.constexpr):
    """The same number; if OF_8, in a form that shows the compiler that 8 divides it.

    Then the compiler loads 16 bytes at once.  Triton detects by itself that 16 divides an argument,
    but not that 8 does, and 8 is a common rank.
    """
    return number // 8 * 8 if OF_8 else number


@triton.jit
def store_tile(
    target, b_tile, i_row, i_column, rows, columns, row_stride, column_stride, o_mem=None
):  # fmt: skip
    """Store a tile at (i_row, i_column) of a matrix [rows, columns], cast to the matrix's dtype.

    Elements outside of the matrix are not stored.  ``o_mem`` as in :func:`load_tile`.
    """
    o_row = i_row + tl.arange(0, b_tile.shape[0])
    o_column = i_column + tl.arange(0, b_tile.shape[1])
    inside = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    if o_mem is not None:
        o_row = o_mem
    pointers = tile_pointers(target, o_row, o_column, row_stride, column_stride)
    tl.store(pointers, cast(b_tile, target.dtype.element_ty), mask=inside)


@triton.jit
def tile_pointers(base, o_row, o_column, row_stride, column_stride):
    """Pointers to a tile, [rows, columns].  A matrix may have over 2³¹ elements: 64-bit offsets."""
    o_row, o_column = o_row.to(tl.int64), o_column.to(tl.int64)
    return base + o_row[:, None] * row_stride + o_column[None, :] * column_stride


@triton.jit
def tile_of(i_tile, m_tiles, n_tiles, GROUP: tl.constexpr):
    """(row, column) of tile number i_tile, in tiles.

    Tiles are numbered column by column inside a group of GROUP rows of tiles.  Programs that run at
    the same time have neighboring numbers.  So they share rows of the left operand and columns of
    the right one, which the L2 cache then serves.
    """
    group_size = GROUP * n_tiles  # tiles in a group
    i_first = i_tile // group_size * GROUP  # the group's first row of tiles
    height = min(m_tiles - i_first, GROUP)  # the last group may be smaller
    return i_first + i_tile % group_size % height, i_tile % group_size // height


@triton.jit
def keep_tile(
    seed, i_row, i_column, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """True where dropout keeps an element: a function of only (seed, row, column).

    ``seed`` is an int64, ``i_column`` even, ``threshold`` from :func:`dropout_threshold`.  An
    element's random word is the product of a row key and a column key, and the element is kept if
    the word is at least the threshold.  fastlora/backends/dropout.py explains the keys.
    """
    OF_SECOND_COLUMN: tl.constexpr = 0x2C9277B5
    row_keys = _hash(i_row + tl.arange(0, BLOCK_ROWS)) ^ (seed.to(tl.int32) * 2 + 1)
    # Not tl.join: with a join before a product, Triton before 3.8 computes that product in TF32 on
    # sm_100 where exact float32 was requested.
    o_column = i_column + tl.arange(0, BLOCK_COLUMNS)
    pairs = _hash(~(o_column // 2))
    # Two columns share a hash, which saves instructions; the second multiplies it by a constant.
    column_hashes = tl.where(o_column % 2 == 0, pairs, pairs * OF_SECOND_COLUMN)
    column_keys = column_hashes ^ ((seed >> 32).to(tl.int32) * 2 + 1)
    return row_keys[:, None] * column_keys[None, :] >= threshold  # [BLOCK_ROWS, BLOCK_COLUMNS]


@triton.jit
def _hash(o_number):
    """Twice a hash of each int32: even, so that ``^ (2 · seed + 1)`` gives an odd key."""
    FIRST_MIX: tl.constexpr = 0x7FEB352D
    SECOND_MIX: tl.constexpr = 0x846CA68B
    word = o_number.to(tl.uint32)
    word *= FIRST_MIX
    word ^= word >> 16
    word *= SECOND_MIX
    word ^= word >> 15
    return word.to(tl.int32) * 2


def dropout_threshold(p: float) -> int:
    """The smallest int32 word that dropout keeps: round(p · 2¹⁶) - 2¹⁵ in its upper 16 bits."""
    return (min(round(p * 2**16), 2**16 - 1) - 2**15) << 16
