"""The contracts of ``tile_of`` and ``segment_of_tile``, and their proofs from the source."""

from collections.abc import Callable
from typing import Any

import z3

from fastlora.kernels import common, segments
from fastlora.kernels.config import LONGEST

from . import values
from .engine import CONDITION, Fact, Proof, Relation
from .numbers import expression, names_of, times, variable
from .once import renaming
from .source import Edit, Source
from .values import Int, Operand, Pointer, Tally, as_int


def tile_of(i_tile: Any, m_tiles: Any, n_tiles: Any, group: Any) -> tuple[Int, Int]:
    """Tile numbers 0 … m_tiles · n_tiles - 1 belong to tiles one to one."""
    proof, (i, m, n, group) = values.proof, map(as_int, (i_tile, m_tiles, n_tiles, group))
    count = Int(m.poly, 64) * n
    proof.prove(z3.And(i.z >= 0, i.z < count.z), f"number of a tile: {proof.where()}")
    proof.fits(group * n)
    row, column = proof.unknown("m_tile"), proof.unknown("n_tile")
    proof.facts.append(Fact(_is_tile(row, column, m, n), CONDITION))

    def laws(one: Relation, other: Relation) -> list[z3.BoolRef]:
        same = [a == b for a, b in zip(one.results, other.results, strict=True)]
        return [z3.Implies(z3.And(same), one.arguments[0] == other.arguments[0])]

    proof.relations.append(Relation("tile_of", [i.z], [row.z, column.z], laws))
    return row, column


def _is_tile(row: Int, column: Int, m: Int, n: Int) -> z3.BoolRef:
    return z3.And(row.z >= 0, row.z < m.z, column.z >= 0, column.z < n.z)


def prove_tile_of(edit: Edit | None = None) -> Proof:
    """Numbers give tiles, and different numbers different tiles.  There are as many of each."""
    proof = Proof()
    results: list[tuple[Int, Int]] = []

    def twice(jitted: Any) -> None:
        m, n, group = proof.size("m_tiles"), proof.size("n_tiles"), proof.size("GROUP", 1, 16)
        proof.given((m * n).z < 2**31, (group * n).z < 2**31)
        numbers = [proof.unknown("i_tile") for _ in range(2)]
        for i in numbers:
            proof.given(i.z >= 0, i.z < (m * n).z)
        proof.inside = True
        results[:] = [jitted(i, m, n, group) for i in numbers]
        (a, b), (c, d) = results
        proof.prove(_is_tile(a, b, m, n), "a number gives a tile")
        same = z3.And(a.z == c.z, b.z == d.z)
        proof.prove(numbers[0].z == numbers[1].z, "tile_of is one to one", same)

    _alone(proof, common.tile_of, twice, edit)
    return proof


def _alone(proof: Proof, jitted: Any, body: Callable, edit: Edit | None = None) -> None:
    for _ in proof.paths():
        try:
            body(Source({}, edit).function(jitted))
        except values.UnsupportedError as error:
            proof.failed("not proved", str(error))


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


def prove_segment_of_tile(is_sorted: bool, edit: Edit | None = None) -> Proof:
    """``is_sorted``: the ends; otherwise they are any numbers of 32 bits."""
    proof = Proof()

    def setup() -> tuple[Operand, list[Int]]:
        M, N = (proof.size(name, 1, LONGEST) for name in "MN")
        count, BM = proof.size("segments"), proof.size("BLOCK_M", 16)
        step = proof.size("SEGMENT_BLOCK", 1, 1024)
        proof.given((M + (count + 2) * BM).z < 2**31)
        bounds = (0, M + 1, 32) if is_sorted else (-(2**31), 2**31, 32)
        proof.solver.least |= {"BLOCK_M": 16, "SEGMENT_BLOCK": 4}
        proof.tally = lambda tally: _counted(proof, tally, count, step, is_sorted)
        ends = Operand(count, name="ends", ordered=is_sorted, values=bounds)
        return ends, [M, N, count, BM, step]

    def called(jitted: Any, ends: Operand, sizes: list[Int], wanted: Int | None = None) -> tuple:
        M, N, count, BM, step = sizes
        number = proof.unknown("i_tile")
        proof.given(number.z >= 0, number.z <= (M // BM + count).z)
        if wanted is not None:
            proof.given(number.z == wanted.z)
        proof.inside = True
        tile = list(map(as_int, jitted(Pointer(ends), count, number, M, N, BM, step)))
        proof.inside = False
        return number, tile

    def any_tile(jitted: Any) -> None:
        ends, (M, N, count, BM, step) = setup()
        _, tile = called(jitted, ends, [M, N, count, BM, step])
        for i, claim in enumerate(_of_tile(tile, count, M, N, BM)):
            proof.prove(claim, f"segment_of_tile, promise {i}")

    def each_row(jitted: Any) -> None:
        ends, sizes = setup()
        M, _, _, BM, _ = sizes
        row = proof.unknown("row")
        proof.given(row.z >= 0, row.z < M.z)
        segment, start = segment_of_row(proof, ends, row, M)
        before, tiles = start // BM + (row - start) // BM, proof.unknown("tiles before")
        proof.given(tiles.z == before.z, (tiles * BM).z == (before * BM).z)
        _, tile = called(jitted, ends, sizes, before + segment)
        proof.prove(tile[0].z == segment.z, "segment_of_tile finds a row's segment")
        proof.given(tile[0].z == segment.z)
        claim = z3.And(tile[2].z <= row.z, row.z < (tile[2] + BM).z, row.z < tile[3].z)
        proof.prove(claim, "segment_of_tile finds each row")

    def two_tiles(jitted: Any) -> None:
        ends, sizes = setup()
        relations = []
        for _ in range(2):
            number, tile = called(jitted, ends, sizes)
            results = [each.z for each in tile]
            relations.append(_disjoint([number.z], results, sizes[3].z, ends))
        one, other = relations
        (law,) = one.laws(one, other)
        proof.prove(law, "segment_of_tile gives no row twice")

    for body in (any_tile, each_row, two_tiles)[: 3 if is_sorted else 1]:
        _alone(proof, segments.segment_of_tile, body, edit)
    return proof


def _counted(proof: Proof, tally: Tally, count: Int, step: Int, is_sorted: bool) -> Int:
    """The number of the last segment whose condition holds.

    The loop visits each number from 0 to ``count`` once.  The condition holds for 0, for no
    number above ``count``, and with sorted ends for each number before one for which it holds.  So
    the sum says for which numbers it holds.
    """
    lane = next(fact.of for fact in reversed(proof.tallied_facts) if fact.of.startswith("lane!"))
    (k,) = next(iter(proof.tallied_step.poly))
    inner = proof.local - proof.entered
    facts = [
        fact.claim for fact in proof.tallied_facts
        if fact.kind != CONDITION or not proof.is_local(fact.claim)
    ]  # fmt: skip
    relations = proof.tallied_relations
    in_all = [*facts, tally.counted, *[n for r in relations for n in (*r.arguments, *r.results)]]
    names = frozenset().union(*map(names_of, in_all))

    def at(number: z3.ArithRef, suffix: str) -> tuple[z3.BoolRef, z3.BoolRef, z3.ArithRef]:
        """The facts of a number's step and lane, its condition, and the step's first number."""
        pairs = renaming(names, inner, suffix)
        first = times({(k + suffix,): 1}, step.poly)
        its_lane = variable((lane + suffix,))
        known = [z3.substitute(fact, *pairs) for fact in facts]
        known += [expression(first) + its_lane == number, its_lane >= 0, its_lane < step.z]
        proof.relations += [relation.renamed(pairs) for relation in relations]
        return z3.And(known), z3.substitute(tally.counted, *pairs), expression(first)

    before, old = len(proof.facts), len(proof.relations)
    any_number = proof.unknown("any segment").z
    proof.given(any_number >= 0)
    known, holds, first = at(any_number, ":any")
    proof.given(known)
    visited = z3.And(first >= 0, first < (count + 1).z)
    proof.prove(z3.Implies(any_number <= count.z, visited), "each segment is counted")
    proof.prove(z3.Implies(any_number > count.z, z3.Not(holds)), "no other number is counted")
    proof.prove(z3.Implies(any_number == 0, holds), "segment 0 is counted")
    if is_sorted:
        known, next_holds, _ = at(any_number + 1, ":next")
        proof.given(known)
        proof.prove(holds, "a segment before a counted one is counted", next_holds)
    del proof.facts[before:], proof.relations[old:]
    last = proof.unknown("last segment")
    proof.given(last.z >= 0, last.z <= count.z)
    if is_sorted:
        suffix = str(proof.counts["last segment"])
        known, holds, _ = at(last.z, f":last{suffix}")
        proof.given(known, holds)
        known, holds, _ = at(last.z + 1, f":behind{suffix}")
        proof.given(z3.Implies(last.z < count.z, z3.And(known, z3.Not(holds))))
    return last


CONTRACTS: dict[str, Callable] = {"tile_of": tile_of, "segment_of_tile": segment_of_tile}
