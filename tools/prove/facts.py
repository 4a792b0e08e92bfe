"""Each kernel's launch in unknown sizes: the launcher's operands, and who stores each element."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import z3

from fastlora.kernels import launchers
from fastlora.kernels.config import LONGEST
from fastlora.kernels.gemm_config import GemmConfig
from fastlora.kernels.lowrank import LowRankConfig
from fastlora.kernels.project import ProjectConfig
from fastlora.kernels.sum_planes import sum_planes as sum_planes_launcher
from fastlora.kernels.weight_grad import WeightGradConfig

from .contracts import segment_of_row, tile_of_row
from .engine import Proof
from .launched import launched, up
from .once import Choice, Chooser
from .values import Descriptor, Int, Operand, as_int

ANY = (-(2**31), 2**31, 32)  # values of 32 bits
EXACT = {"precision": "ieee"}

# A kernel's arguments, and by name of each output the program and step that store an element.
Facts = tuple[dict[str, Any], dict[str, Chooser]]


def strided(proof: Proof, name: str, *sizes: Any, last: int | None = None) -> Operand:
    """A tensor with any strides; ``last`` is the last one, if it is given."""
    strides: list = [proof.size(f"{name}.stride{i}", 0, 2**31 - 1) for i in range(len(sizes))]
    return Operand(*sizes, strides=strides if last is None else [*strides[:-1], last])


def ranks_of(proof: Proof, count: int, one_step: bool = False) -> list[Int]:
    """The ranks of a group; in ``one_step`` they are at most BLOCK_R, as ``why_not`` asks."""
    ranks = [proof.size(f"R{i}") for i in range(count)]
    if one_step:
        proof.given(*[r.z <= proof.block("BLOCK_R").z for r in ranks])
    return ranks


@dataclass
class Rows:
    """The rows of a launch: all alike, or cut into segments, in sorted order or not."""

    M: Int
    E: Int | None
    ends: Operand | None
    order: Operand | None
    in_memory: Int  # rows of the tensor that ``order`` visits

    @property
    def banks(self) -> tuple:
        """The first axis of a tensor that has a matrix for each segment."""
        return () if self.E is None else (self.E,)

    def options(self, count: int, masked: bool, own: bool = False) -> dict[str, Any]:
        options: dict[str, Any] = {} if self.ends is None else {"ends": self.ends}
        options |= {} if self.order is None else {"order": self.order}
        if masked:
            options |= {"seeds": Operand(self.E if own else count), "dropout": 0.5}
        if own:
            numbers = launchers.SegmentNumbers(Operand(self.E), Operand(self.E))
            options["numbers"] = numbers
        return EXACT | options

    def tile_of(self, proof: Proof, row: Int) -> Int:
        BM = proof.block("BLOCK_M")
        if self.ends is None:
            return row // BM
        return tile_of_row(proof, self.ends, row, self.E, self.M, BM)


def rows_of(proof: Proof, segments: str = "", order: bool = False) -> Rows:
    """``segments``: "", "sorted", or "any" for ends that aren't sorted or in range."""
    M = proof.size("M")
    in_memory, numbers = M, None
    if order:
        in_memory = proof.size("rows of x")
        numbers = Operand(M, values=(0, in_memory, 32), distinct=True)
    if not segments:
        return Rows(M, None, None, numbers, in_memory)
    E, is_sorted = proof.size("segments", 1, 2**27), segments == "sorted"
    ends = Operand(E, ordered=is_sorted, values=(0, M + 1, 32) if is_sorted else ANY)
    return Rows(M, E, ends, numbers, in_memory)


def project(
    proof: Proof, count: int = 1, masked: bool = False, split: bool = False, segments: str = "",
    order: bool = False, own: bool = False,
) -> Facts:  # fmt: skip
    rows, K, ranks = rows_of(proof, segments, order), proof.size("K"), ranks_of(proof, count)
    arguments = launched(
        proof, launchers.project, strided(proof, "x", rows.in_memory, K),
        [strided(proof, f"v{i}", *rows.banks, K, r) for i, r in enumerate(ranks)], [0.5] * count,
        config=ProjectConfig, split=split, **rows.options(count, masked, own),
    )  # fmt: skip

    def chosen(proof: Proof, element: list[Int]) -> Choice:
        *plane, row, column = element
        i_column = column // arguments["BLOCK_R"]
        program = rows.tile_of(proof, row) * arguments["R_TILES"] + i_column
        return Choice({"program0": program, "program1": [*plane, 0][0]})

    return arguments, {f"{'planes' if split else 'u'}{i}": chosen for i in range(count)}


def quantize_rows(proof: Proof, scaled: bool = False) -> Facts:
    M, K = proof.size("M"), proof.size("K")
    factors = Operand(K) if scaled else None
    arguments = launched(
        proof, launchers.quantize_rows, strided(proof, "x", M, K), Operand(M, K), Operand(M),
        factors, **EXACT,
    )  # fmt: skip
    return arguments, {
        "codes": lambda _, e: Choice({"program0": e[0] // 32, "step of i_k": e[1] // 64}),
        "row_scales": lambda _, e: Choice({"program0": e[0] // 32}),
    }


def packed(
    proof: Proof, *, kind: str, rows: Int, columns: Int, E: Int | None = None,
    whole_rows: bool = False, outer: bool = False, in_blocks: bool = True,
) -> Any:  # fmt: skip
    """``whole_rows``: a block of scales has whole rows.  ``in_blocks``: it has several rows.

    ``outer``: scales are nested.
    """
    width = up(columns, 2) if kind == "four-bit" else columns
    all_rows = rows if E is None else E * rows
    block_rows = proof.size("block_rows") if in_blocks else 0
    block_columns = 0 if whole_rows else proof.size("block_columns")
    outer_block = Int(proof.size("outer_block", 1, 2**62).poly, 64) if outer else 0
    proof.solver.least |= {"block_rows": 4, "block_columns": 8, "outer_block": 2}
    row_blocks = up(all_rows, block_rows) if in_blocks else as_int(1)
    groups = as_int(1) if whole_rows else up(columns, block_columns)
    scales = Operand(row_blocks, groups, values=(0, 256, 8) if outer else None)
    nested = None
    if outer:
        count = up(Int((row_blocks * groups).poly, 64), outer_block)
        nested = Operand(count), Operand(256), Operand(1)
    return launchers.Packed(
        kind.removesuffix(" by bits"), Operand(all_rows, width), scales, rows, columns, block_rows,
        block_columns, (0.0,) * 16, nested, outer_block, experts=E or 0,
    )  # fmt: skip


def dequant(proof: Proof, packing: dict[str, Any]) -> Facts:
    rows, columns = proof.size("rows"), proof.size("columns")
    weight = packed(proof, rows=rows, columns=columns, **packing)
    arguments = launched(
        proof,
        launchers.dequant,
        weight,
        Operand(rows, columns),
        float8=packing["kind"] != "float8 by bits",
    )
    block_rows, block_columns = arguments["BLOCK_ROWS"], arguments["BLOCK_COLUMNS"]

    def chosen(proof: Proof, element: list[Int]) -> Choice:
        row, column = element
        program = row // block_rows * up(columns, block_columns) + column // block_columns
        return Choice({"program0": program})

    return arguments, {"out": chosen}


def tile_by_number(
    proof: Proof,
    rows: Rows,
    arguments: dict[str, Any],
    element: list[Int],
    place: Int | None = None,
) -> Choice:
    """The program of an element in a kernel that orders its tiles by ``tile_of``."""
    row, column = element
    BM, BN = arguments["BLOCK_M"], arguments["BLOCK_N"]
    m_tiles = up(rows.M, BM) if rows.E is None else rows.M // BM + rows.E + 1
    tile = rows.tile_of(proof, row if place is None else place)
    number = proof.unknown("number of the tile")  # tile_of reaches every tile
    proof.given(number.z >= 0, number.z < (m_tiles * up(arguments["N"], BN)).z)
    step, programs = as_int(0), proof.programs[0][1]
    if arguments.get("PERSISTENT"):
        step = number // programs
    values = {
        "m_tile": tile, "n_tile": column // BN, "program0": number - step * programs,
        "step of i_tile": step,
    }  # fmt: skip
    return Choice(values, place=place)


def lowrank(
    proof: Proof, count: int = 1, masked: bool = False, at_once: bool = False, bias: bool = False,
    add: bool = False, segments: str = "", order: bool = False, own: bool = False,
) -> Facts:  # fmt: skip
    rows, N, ranks = (
        rows_of(proof, segments, order),
        proof.size("N"),
        ranks_of(proof, count, at_once),
    )
    arguments = launched(
        proof, launchers.lowrank, strided(proof, "out", rows.in_memory, N, last=1),
        [Operand(rows.M, r) for r in ranks],
        [strided(proof, f"v{i}", *rows.banks, r, N) for i, r in enumerate(ranks)],
        bias=strided(proof, "bias", *rows.banks, N) if bias else None, add=add,
        config=LowRankConfig, at_once=at_once, **rows.options(count, masked, own),
    )  # fmt: skip

    def chosen(proof: Proof, element: list[Int]) -> Choice:
        place = None
        if rows.order is not None:  # a row that the order has
            place = proof.unknown("place in order")
            proof.given(place.z >= 0, place.z < rows.M.z)
            proof.given(proof.loaded(rows.order, [place], None, None).z == element[0].z)
        return tile_by_number(proof, rows, arguments, element, place)

    return arguments, {"out": chosen}


def base_product(
    proof: Proof, rows: Rows, count: int, depths: int = 1, bias: bool = False,
    transposed: bool = False, at_once: bool = False, packing: dict[str, Any] | None = None,
    **options: bool,
) -> tuple[list, dict[str, Any]]:  # fmt: skip
    """out, the lists P, Q, U and V, and the options of a launch with a base product."""
    N, ranks = proof.size("N"), ranks_of(proof, count, at_once)
    ps, qs = [], []
    for i in range(depths):
        k = proof.size(f"K{i}")
        ps.append(strided(proof, f"p{i}", rows.M, k))
        if packing is None:
            qs.append(strided(proof, f"q{i}", *rows.banks, k, N))
        else:
            height, width = (N, k) if transposed else (k, N)
            qs.append(packed(proof, rows=height, columns=width, E=rows.E, **packing))
            qs[i] = replace(qs[i], transposed=transposed)
    us = [Operand(rows.M, r) for r in ranks]
    vs = [strided(proof, f"v{i}", *rows.banks, r, N) for i, r in enumerate(ranks)]
    options |= {
        "bias": strided(proof, "bias", *rows.banks, N) if bias else None, "config": GemmConfig,
        "transposed": transposed, "at_once": at_once,
        "float8": packing is None or packing["kind"] != "float8 by bits",
    }  # fmt: skip
    return [strided(proof, "out", rows.M, N, last=1), ps, qs, us, vs], options


def by_tile(rows: Rows, arguments: dict[str, Any]) -> Chooser:
    """The choice for an element of OUT, which a descriptor stores in two halves."""

    def chosen(proof: Proof, element: list[Int]) -> Choice:
        choice = tile_by_number(proof, rows, arguments, element)
        if isinstance(arguments["out"], Descriptor):
            BN = arguments["BLOCK_N"]
            in_first = (element[1] % BN < BN // 2).claim
            choice.cases = [in_first, z3.Not(in_first)]
        return choice

    return chosen


def gemm_lowrank(
    proof: Proof, count: int = 1, segments: str = "", masked: bool = False, **options: Any
) -> Facts:
    rows = rows_of(proof, segments)
    operands, options = base_product(proof, rows, count, **options)
    options |= rows.options(count, masked)
    arguments = launched(proof, launchers.gemm_lowrank, *operands, **options)
    return arguments, {"out": by_tile(rows, arguments)}


def gemm_int8_lowrank(
    proof: Proof, count: int = 1, masked: bool = False, rotated: bool = False, add: bool = False,
    **options: Any,
) -> Facts:  # fmt: skip
    rows = rows_of(proof)
    operands, options = base_product(proof, rows, count, **options)
    options |= rows.options(count, masked)
    out, ps = operands[:2]
    scales = [Operand(rows.M) for _ in ps], None if rotated else Operand(out.shape[1])
    arguments = launched(proof, launchers.gemm_int8_lowrank, *operands, *scales, **options)
    arguments["ADD"] = add  # as in the second launch of more than four products
    return arguments, {"out": by_tile(rows, arguments)}


def gemm_lowrank_few_rows(proof: Proof, **options: Any) -> Facts:
    rows = rows_of(proof)
    operands, options = base_product(proof, rows, 1, at_once=True, **options)
    out, (p,), (q,), (u,), (v,) = operands
    a = strided(proof, "a", p.shape[1], u.shape[1])
    launcher = launchers.gemm_lowrank_few_rows
    arguments = launched(proof, launcher, out, p, q, a, u, v, 0.5, **options, **EXACT)
    of_out = by_tile(rows, arguments)

    def chosen(proof: Proof, element: list[Int]) -> Choice:
        choice = of_out(proof, element)
        in_first = (element[1] < arguments["BLOCK_N"]).claim  # these programs also store U
        sides = (in_first, z3.Not(in_first))
        choice.cases = [z3.And(case, side) for case in choice.cases for side in sides]
        return choice

    def of_u(proof: Proof, element: list[Int]) -> Choice:
        return Choice(of_out(proof, [element[0], as_int(0)]).values)

    return arguments, {"out": chosen, "u": of_u}


def weight_grad(
    proof: Proof, count: int = 1, masked: bool = False, split: bool = False, segments: str = "",
    order: bool = False, own: bool = False, xv: bool = False, low_rank: bool = False,
    add: bool = False, transposed: bool = False,
) -> Facts:  # fmt: skip
    rows, N = rows_of(proof, segments, order), proof.size("N")
    ranks = ranks_of(proof, count, xv or low_rank)
    vs = [strided(proof, f"v{i}", *rows.banks, N, r) for i, r in enumerate(ranks)]
    if rows.E is not None:
        outs = [strided(proof, f"out{i}", rows.E, N, r) for i, r in enumerate(ranks)]
    else:
        outs = [Operand(r, N).mT if transposed else Operand(N, r) for r in ranks]
    options = rows.options(count, masked, own)
    options |= {"b": vs[0]} if xv else {}
    options |= {"vs": vs, "low_rank": Operand(rows.M, N)} if low_rank else {}
    arguments = launched(
        proof, launchers.weight_grad, strided(proof, "x", rows.in_memory, N),
        [Operand(rows.M, r) for r in ranks], outs, config=WeightGradConfig, split=split, **options,
    )  # fmt: skip
    arguments["ADD"] = add  # as in the second launch of more than four products
    BM, BN, BR = (arguments[f"BLOCK_{axis}"] for axis in "MNR")

    def of_out(proof: Proof, element: list[Int]) -> Choice:
        *plane, n, r = element
        if split and transposed:  # a plane has the layout of its tensor
            n, r = r, n
        program = n // BN * arguments["R_TILES"] + r // BR
        return Choice({"program0": program, "program1": [*plane, 0][0]})

    def of_row(proof: Proof, row: Int, i_tile: Int) -> Choice:
        """The split or segment that has a row, and its step."""
        if rows.ends is None:
            part = row // (arguments["steps"] * BM)
            start = part * arguments["steps"] * BM
        else:
            part, start, _ = segment_of_row(proof, rows.ends, row, rows.M)
        step = (row - start) // BM
        return Choice({"program0": i_tile, "program1": part, "step of i_m": step})

    def of_xv(proof: Proof, element: list[Int]) -> Choice:
        *plane, row, _ = element
        return of_row(proof, row, [*plane, as_int(0)][0])

    outputs: dict[str, Chooser] = {
        f"{'planes' if split else 'out'}{i}": of_out for i in range(count)
    }
    outputs |= {"xv": of_xv} if xv else {}
    outputs |= {"low_rank": lambda proof, e: of_row(proof, e[0], e[1] // BN)} if low_rank else {}
    return arguments, outputs


def sum_planes(proof: Proof, count: int = 1, long: bool = False) -> Facts:
    """``long``: sizes that don't fit 32 bits; Triton takes these in 64."""
    sizes = [proof.size(f"size{i}", 0, 2**62 if long else 2**31 - 1) for i in range(count)]
    counts = [proof.size(f"count{i}", 0, LONGEST) for i in range(count)]
    for length, planes in zip(sizes, counts, strict=True):
        length.bits = 64 if long else 32
        proof.given(z3.Or(planes.z >= 1, length.z == 0))
    planes = [Operand(c, n) for c, n in zip(counts, sizes, strict=True)]
    arguments = launched(proof, sum_planes_launcher, planes, [Operand(n) for n in sizes])
    firsts = [sum((up(n, 1024) for n in sizes[:i]), as_int(0)) for i in range(count)]

    def chooser(first: Int) -> Chooser:
        return lambda _, e: Choice({"program0": first + e[0] // 1024})

    return arguments, {f"out{i}": chooser(first) for i, first in enumerate(firsts)}


def elementwise(launcher: Callable, inputs: str, outputs: str) -> Callable[[Proof], Facts]:
    def facts(proof: Proof) -> Facts:
        M, N = proof.size("M"), proof.size("N")
        of = {name: strided(proof, name, M, N, last=1) for name in f"{inputs} {outputs}".split()}
        operands = [of[name] for name in inputs.split()], [of[name] for name in outputs.split()]
        arguments = launched(proof, launcher, *operands[0], "silu", *operands[1])

        def chosen(proof: Proof, element: list[Int]) -> Choice:
            return Choice({"program0": element[0] * up(N, 1024) + element[1] // 1024})

        return arguments, dict.fromkeys(outputs.split(), chosen)

    return facts


def row_loss(proof: Proof, gradient: bool = False, upstream: bool = False) -> Facts:
    M, V = proof.size("M"), proof.size("V")
    arguments = launched(
        proof, launchers.row_loss, strided(proof, "z", M, V, last=1),
        Operand(M, values=(None, None, 64)), Operand(M), (0.1, 30.0, 1.0, 0.1),
        Operand(M) if upstream else None, gradient,
    )  # fmt: skip
    outputs: dict[str, Chooser] = {"losses": lambda _, e: Choice({"program0": e[0]})}
    if gradient:
        outputs["z"] = lambda _, e: Choice({"program0": e[0], "step of i_column": e[1] // 4096})
    return arguments, outputs
