"""The contracts of ``tile_of`` and ``segment_of_tile``, and their proofs from the source."""

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import z3

from fastlora.kernels import common, segments
from fastlora.kernels.config import LONGEST

from . import values
from .engine import Fact, Proof, Relation
from .values import Int, Operand, Pointer, as_int


def tile_of(i_tile: Any, m_tiles: Any, n_tiles: Any, group: Any) -> tuple[Int, Int]:
    """Tile numbers 0 … m_tiles · n_tiles - 1 belong to tiles one to one."""
    proof, (i, m, n, group) = values.proof, map(as_int, (i_tile, m_tiles, n_tiles, group))
    count = Int(m.poly, 64) * n
    proof.prove(z3.And(i.z >= 0, i.z < count.z), f"number of a tile: {proof.where()}")
    proof.fits(group * n)
    row, column = proof.unknown("m_tile"), proof.unknown("n_tile")
    proof.facts.append(Fact(_is_tile(row, column, m, n), True))

    def laws(one: Relation, other: Relation) -> list[z3.BoolRef]:
        same = [a == b for a, b in zip(one.results, other.results, strict=True)]
        return [z3.Implies(z3.And(same), one.arguments[0] == other.arguments[0])]

    proof.relations.append(Relation("tile_of", [i.z], [row.z, column.z], laws))
    return row, column


def _is_tile(row: Int, column: Int, m: Int, n: Int) -> z3.BoolRef:
    return z3.And(row.z >= 0, row.z < m.z, column.z >= 0, column.z < n.z)


def one_to_one(proof: Proof, function: Callable) -> None:
    """Numbers give tiles, and different numbers different tiles.  There are as many of each."""
    m, n, group = proof.size("m_tiles"), proof.size("n_tiles"), proof.size("GROUP", 1, 16)
    proof.given((m * n).z < 2**31, (group * n).z < 2**31)
    numbers = [proof.unknown("i_tile") for _ in range(2)]
    for i in numbers:
        proof.given(i.z >= 0, i.z < (m * n).z)
    proof.inside = True
    (a, b), (c, d) = [function(i, m, n, group) for i in numbers]
    proof.prove(_is_tile(a, b, m, n), "a number gives a tile")
    same = z3.And(a.z == c.z, b.z == d.z)
    proof.prove(numbers[0].z == numbers[1].z, "tile_of is one to one", same)


def segment_of_tile(
    ends: Any, count: Any, i_tile: Any, M: Any, N: Any, BLOCK_M: Any, SEGMENT_BLOCK: Any
) -> tuple:
    proof = values.proof
    if ends is None:
        return 0, 0, i_tile * BLOCK_M, M, M, N
    i, M, N, BM = map(as_int, (i_tile, M, N, BLOCK_M))
    most = M // BM + count
    proof.prove(z3.And(i.z >= 0, i.z <= most.z), f"number of a tile of rows: {proof.where()}")
    names = ("i_segment", "segment_start", "segment_row", "segment_end", "rows", "columns")
    results = [proof.unknown(name) for name in names]
    proof.given(*_of_tile(results, count, M, N, BM))
    proof.relations.append(_disjoint([i.z], [each.z for each in results], BM.z, ends.operand))
    return tuple(results)


def _of_tile(results: list[Int], count: Int, M: Int, N: Int, BM: Int) -> list[z3.BoolRef]:
    """A tile's properties under any ends."""
    segment, start, row, end, rows, columns = (each.z for each in results)
    has_rows = z3.And(segment < count.z, row < end)
    return [
        segment >= 0, segment <= count.z, start >= 0, start <= M.z, end >= 0, end <= M.z,
        row >= start, row <= (M + (count + 2) * BM).z,
        z3.If(has_rows, z3.And(rows == end, columns == N.z), z3.And(rows == 0, columns == 0)),
    ]  # fmt: skip


def _disjoint(arguments: list, results: list, BM: Any, ends: Operand) -> Relation:
    """With sorted ends, no two tiles store the same row."""

    def laws(one: Relation, other: Relation) -> list[z3.BoolRef]:
        (i,), (j,) = one.arguments, other.arguments
        (_, _, row, end, *_), (_, _, next_row, next_end, *_) = one.results, other.results
        apart = z3.Or(row >= end, next_row >= next_end, row + BM <= next_row, end <= next_row)
        return [z3.Implies(i < j, apart)] if ends.ordered else []

    return Relation("segment_of_tile", arguments, results, laws)


def tile_of_row(proof: Proof, ends: Operand, row: Int, count: Int, M: Int, BM: Int) -> Int:
    """The number of the tile that has a row; with sorted ends there is one."""
    i = proof.unknown("tile of the row")
    names = ("segment", "start", "first row", "end", "rows", "columns")
    results = [proof.unknown(f"{name} of the row") for name in names]
    proof.given(i.z >= 0, i.z <= (M // BM + count).z)
    first, end = results[2].z, results[3].z
    proof.given(first <= row.z, row.z < first + BM.z, row.z < end)
    proof.relations.append(_disjoint([i.z], [each.z for each in results], BM.z, ends))
    return i


def segment_of_row(proof: Proof, ends: Operand, row: Int, M: Int) -> tuple[Int, Int]:
    """(segment, its first row): a row is in the first segment that ends behind it."""
    (count,) = ends.shape
    segment, bounds = proof.unknown("segment of the row"), []
    proof.given(segment.z >= 0, segment.z <= count.z)
    for at, outside in ((segment - 1, 0), (segment, M)):
        inside = z3.And(at.z >= 0, at.z < count.z)
        bounds.append(proof.loaded(ends, [at], values.Bool(inside), outside))
    start, end = bounds
    proof.given(start.z <= row.z, row.z < end.z)
    return segment, start


class Segments:
    """Any sizes of ``segment_of_tile``.  Its ends are sorted, or any numbers of 32 bits."""

    def __init__(self, proof: Proof, function: Callable, is_sorted: bool = True) -> None:
        self.proof, self.function = proof, function
        self.M, self.N = (proof.size(name, 1, LONGEST) for name in "MN")
        self.count, self.BM = proof.size("segments"), proof.size("BLOCK_M", 16)
        self.step = proof.size("SEGMENT_BLOCK", 1, 1024)
        proof.given((self.M + (self.count + 2) * self.BM).z < 2**31)
        bounds = (0, self.M + 1, 32) if is_sorted else (-(2**31), 2**31, 32)
        proof.solver.least |= {"BLOCK_M": 16, "SEGMENT_BLOCK": 4}
        proof.last_counted = partial(_last_counted, proof, self.count, is_sorted)
        self.ends = Operand(self.count, name="ends", ordered=is_sorted, values=bounds)

    def tile(self, wanted: Int | None = None) -> tuple[Int, list[Int]]:
        """A tile's number, and the results for it."""
        proof, number = self.proof, self.proof.unknown("i_tile")
        proof.given(number.z >= 0, number.z <= (self.M // self.BM + self.count).z)
        if wanted is not None:
            proof.given(number.z == wanted.z)
        proof.inside = True
        ends, sizes = Pointer(self.ends), (self.M, self.N, self.BM, self.step)
        tile = self.function(ends, self.count, number, *sizes)
        proof.inside = False
        return number, [*map(as_int, tile)]


def promises(proof: Proof, function: Callable, is_sorted: bool) -> None:
    of = Segments(proof, function, is_sorted)
    _, tile = of.tile()
    for i, claim in enumerate(_of_tile(tile, of.count, of.M, of.N, of.BM)):
        proof.prove(claim, f"segment_of_tile, promise {i}")


def each_row(proof: Proof, function: Callable) -> None:
    of, row = Segments(proof, function), proof.unknown("row")
    proof.given(row.z >= 0, row.z < of.M.z)
    segment, start = segment_of_row(proof, of.ends, row, of.M)
    before, tiles = start // of.BM + (row - start) // of.BM, proof.unknown("tiles before")
    proof.given(tiles.z == before.z, (tiles * of.BM).z == (before * of.BM).z)
    _, tile = of.tile(before + segment)
    proof.prove(tile[0].z == segment.z, "segment_of_tile finds a row's segment")
    proof.given(tile[0].z == segment.z)
    claim = z3.And(tile[2].z <= row.z, row.z < (tile[2] + of.BM).z, row.z < tile[3].z)
    proof.prove(claim, "segment_of_tile finds each row")


def two_tiles(proof: Proof, function: Callable) -> None:
    of = Segments(proof, function)
    tiles = [of.tile(), of.tile()]
    one, other = [
        _disjoint([number.z], [each.z for each in tile], of.BM.z, of.ends) for number, tile in tiles
    ]
    (law,) = one.laws(one, other)
    proof.prove(law, "segment_of_tile gives no row twice")


def _last_counted(
    proof: Proof, count: Int, is_sorted: bool, start: Int, end: Int, holds: Callable
) -> Generator[Int, None, Int]:
    """The number of the last segment whose condition holds.

    The loop visits each number from 0 to ``count`` once.  The condition holds for 0, for no
    number above ``count``, and with sorted ends for each number before one for which it holds.  So
    the sum says for which numbers it holds.
    """
    proof.prove(z3.And(start.z == 0, end.z == (count + 1).z), "each segment is counted")
    with proof.scope():
        number = proof.unknown("any segment").z
        proof.given(number >= 0)
        is_counted = yield from holds(number)
        no_other = z3.Implies(number > count.z, z3.Not(is_counted))
        proof.prove(no_other, "no other number is counted")
        proof.prove(z3.Implies(number == 0, is_counted), "segment 0 is counted")
        if is_sorted:
            next_is_counted = yield from holds(number + 1)
            proof.prove(is_counted, "a segment before a counted one is counted", next_is_counted)
    last = proof.unknown("last segment")
    proof.given(last.z >= 0, last.z <= count.z)
    if is_sorted:
        is_counted = yield from holds(last.z)
        next_is_counted = yield from holds(last.z + 1)
        proof.given(is_counted, z3.Or(last.z == count.z, z3.Not(next_is_counted)))
    return last


CONTRACTS: dict[str, Callable] = {"tile_of": tile_of, "segment_of_tile": segment_of_tile}
# The function of each lemma, and its proof from the function's source.
LEMMAS: dict[str, tuple[Any, Callable[[Proof, Callable], None]]] = {
    "tile_of": (common.tile_of, one_to_one),
    "segment_of_tile": (segments.segment_of_tile, partial(promises, is_sorted=True)),
    "any segment_of_tile": (segments.segment_of_tile, partial(promises, is_sorted=False)),
    "segment_of_tile of a row": (segments.segment_of_tile, each_row),
    "segment_of_tile of two tiles": (segments.segment_of_tile, two_tiles),
}
