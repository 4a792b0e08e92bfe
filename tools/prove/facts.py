"""The launches of each kernel: sizes, strides, grid, and the program that stores each element.

A launch is stated as its launcher makes it, in unknown numbers.  launches.py compares real launches
with these statements.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import z3

from fastlora.kernels.config import LONGEST
from fastlora.kernels.packed import Packing

from .contracts import tile_of_row
from .engine import Proof
from .once import Choice, Chooser
from .values import Bool, Data, Descriptor, Int, Operand, Pointer, as_int

ANY = (-(2**31), 2**31, 32)  # values of 32 bits


@dataclass
class Launched:
    """A kernel's arguments, and by name of each output the program and step that store it."""

    arguments: dict[str, Any]
    outputs: dict[str, Chooser]


def size(proof: Proof, name: str, least: int = 1, most: int = LONGEST) -> Int:
    if name in proof.counts:
        return Int({(name,): 1})
    made = proof.unknown(name, local=False)
    proof.given(made.z >= least, made.z <= most)
    return made


def blocks(proof: Proof, axes: Any, most: int = 512) -> list[Int]:
    """Tile sizes: multiples of 16."""
    made = []
    for axis in axes:
        number, sixteenth = (
            size(proof, f"BLOCK_{axis}", 16, most),
            size(proof, f"BLOCK_{axis} / 16"),
        )
        proof.given(number.z == 16 * sixteenth.z)
        proof.solver.least |= {f"BLOCK_{axis}": 16, f"BLOCK_{axis} / 16": 1}
        made.append(number)
    return made


def ranks_of(proof: Proof, count: int, block: Int | None = None) -> tuple[tuple[Int, ...], Int]:
    """The ranks of a group, and the largest; at most ``block``, if it is given."""
    ranks, most = tuple(size(proof, f"R{i}") for i in range(count)), size(proof, "R")
    if ranks:
        proof.given(*[r.z <= most.z for r in ranks], z3.Or([r.z == most.z for r in ranks]))
    if block is not None:
        proof.given(most.z <= block.z)
    return ranks, most


def up(a: Any, b: Any) -> Int:
    return (as_int(a) + b - 1) // b


def factors(number: Any) -> tuple[str, ...]:
    """A stride as a product of unknowns."""
    ((monomial, times),) = as_int(number).poly.items()
    assert times == 1
    return monomial


def tensor(name: str, *axes: tuple[Any, Any], **options: Any) -> Pointer:
    """``axes``: (size, stride)."""
    return Pointer(Operand(name, *[(n, factors(stride)) for n, stride in axes], **options))


def dense(name: str, *sizes: Any, **options: Any) -> Pointer:
    strides = [1]
    for length in sizes[:0:-1]:
        strides.insert(0, as_int(length) * strides[0])
    return tensor(name, *zip(sizes, strides, strict=True), **options)


def strided(proof: Proof, name: str, *sizes: Any, **options: Any) -> tuple[Pointer, tuple]:
    """A tensor with any strides, and its strides."""
    strides = tuple(size(proof, f"{name}.stride{i}", 0, 2**31 - 1) for i in range(len(sizes)))
    return tensor(name, *zip(sizes, strides, strict=True), **options), strides


def banks(proof: Proof, name: str, E: Int | None, *sizes: Any) -> tuple[Pointer, tuple]:
    """A tensor, or with segments one for each; the strides as ``strides_of`` gives them."""
    if E is not None:
        return strided(proof, name, E, *sizes)
    pointer, strides = strided(proof, name, *sizes)
    return pointer, (None, *strides)


@dataclass
class Rows:
    """The rows of a launch: all alike, or cut into segments, in sorted order or not."""

    M: Int
    E: Int | None
    ends: Pointer | None
    order: Pointer | None
    in_memory: Int  # rows of the tensor that ``order`` visits

    @property
    def arguments(self) -> dict[str, Any]:
        step = None if self.E is None else Int({("SEGMENT_BLOCK",): 1})
        return {"M": self.M, "ends": self.ends, "segments": self.E, "SEGMENT_BLOCK": step}

    def tiles(self, BM: Int) -> Int:
        return up(self.M, BM) if self.E is None else self.M // BM + self.E + 1

    def tile_of(self, proof: Proof, row: Int, BM: Int) -> Int:
        if self.ends is None:
            return row // BM
        return tile_of_row(proof, self.ends.operand, row, self.E, self.M, BM)


def rows_of(proof: Proof, segments: str = "", order: bool = False) -> Rows:
    """``segments``: "", "sorted", or "any" for ends that aren't sorted or in range."""
    M = size(proof, "M")
    in_memory = size(proof, "rows of x") if order else M
    numbers = None
    if order:
        numbers = dense("order", M, values=(0, in_memory, 32), distinct=True)
    if not segments:
        return Rows(M, None, None, numbers, in_memory)
    E = size(proof, "segments", 1, 2**27)
    size(proof, "SEGMENT_BLOCK", 1, 1024)
    is_sorted = segments == "sorted"
    ends = dense("ends", E, ordered=is_sorted, values=(0, M + 1, 32) if is_sorted else ANY)
    return Rows(M, E, ends, numbers, in_memory)


def limit_of_segments(proof: Proof, rows: Rows, BM: Int) -> None:
    """The assertion of ``row_tiles``."""
    if rows.E is not None:
        proof.given((rows.M + (rows.E + 4) * BM).z < 2**31)


def grid(proof: Proof, *counts: Any) -> None:
    """The assertion of ``Launch``."""
    proof.given(as_int(counts[0]).z < 2**31)
    proof.program(*counts)


def splits_of(proof: Proof, length: Int, block: Int, splits: bool) -> tuple[Int, Int]:
    """(count, steps) of ``config.splits``, and its assertion."""
    steps = up(up(length, size(proof, "wanted splits")), block)
    count = up(length, steps * block)
    proof.given(count.z >= 2 if splits else count.z == 1)
    proof.given((count * steps * block).z < 2**31)
    return count, steps


def numbers_of(rows: Rows, own: bool, masked: bool, count: int) -> dict[str, Any]:
    return {
        "seeds": dense("seeds", rows.E if own else count) if masked else None,
        "own_thresholds": dense("own_thresholds", rows.E) if own and masked else None,
        "threshold": Data(),
    }  # fmt: skip


def project(
    proof: Proof, count: int = 1, masked: bool = False, split: bool = False, segments: str = "",
    order: bool = False, own: bool = False,
) -> Launched:  # fmt: skip
    rows, K = rows_of(proof, segments, order), size(proof, "K")
    BM, BK, BR = blocks(proof, "MKR")
    ranks, most = ranks_of(proof, count)
    limit_of_segments(proof, rows, BM)
    r_tiles = up(most, BR)
    splits, steps = splits_of(proof, K, BK, split)
    grid(proof, rows.tiles(BM) * r_tiles, splits if split else 1)
    x, x_strides = strided(proof, "x", rows.in_memory, K)
    vs = [banks(proof, f"v{i}", rows.E, K, r) for i, r in enumerate(ranks)]

    def chosen(proof: Proof, element: list[Int]) -> Choice:
        *plane, row, column = element
        i_tile = rows.tile_of(proof, row, BM)
        return Choice({"program0": i_tile * r_tiles + column // BR, "program1": [*plane, 0][0]})

    return Launched({
        "x": x, "v": tuple(v for v, _ in vs),
        "u": tuple(dense(f"u{i}", rows.M, r) for i, r in enumerate(ranks)),
        "planes": tuple(dense(f"planes{i}", splits, rows.M, r) for i, r in enumerate(ranks)),
        **rows.arguments, "order": rows.order, **numbers_of(rows, own, masked, count),
        "own_factors": dense("own_factors", rows.E) if own else None,
        "K": K, "factors": (Data(),) * count, "steps": steps, "x_strides": x_strides,
        "v_strides": tuple(strides for _, strides in vs), "R": ranks,
        "BLOCK_M": BM, "BLOCK_K": BK, "BLOCK_R": BR, "R_TILES": r_tiles, "V_ROWS_OF_8": False,
        "PRECISION": "ieee",
    }, {f"{'planes' if split else 'u'}{i}": chosen for i in range(count)})  # fmt: skip


def quantize_rows(proof: Proof, scaled: bool = False) -> Launched:
    M, K = size(proof, "M"), size(proof, "K")
    grid(proof, up(M, 32))
    x, x_strides = strided(proof, "x", M, K)
    return Launched({
        "x": x, "codes": dense("codes", M, K), "row_scales": dense("row_scales", M),
        "column_factors": dense("column_factors", K) if scaled else None, "M": M, "K": K,
        "x_strides": x_strides, "BLOCK_M": 32, "BLOCK_K": 64, "PRECISION": "ieee",
    }, {
        "codes": lambda _, e: Choice({"program0": e[0] // 32, "step of i_k": e[1] // 64}),
        "row_scales": lambda _, e: Choice({"program0": e[0] // 32}),
    })  # fmt: skip


def packed(
    proof: Proof, i: int, *, kind: str, rows: Int, columns: Int, E: Int | None = None,
    whole_rows: bool = False, outer: bool = False, in_blocks: bool = True,
) -> tuple[Pointer, tuple, Packing, Int]:  # fmt: skip
    """Codes of a packed weight, its other operands, its constants and the bytes of a row.

    ``whole_rows``: a block of scales has whole rows.  ``outer``: scales are nested.  ``in_blocks``:
    a block has several rows.
    """
    width = up(columns, 2) if kind == "four-bit" else columns
    all_rows = rows if E is None else E * rows
    block_rows = size(proof, "block_rows") if in_blocks else 0
    block_columns = 0 if whole_rows else size(proof, "block_columns")
    proof.given((columns + block_columns).z < 2**31)  # what ``Packed.packing`` asserts
    outer_block = Int(size(proof, "outer_block", 1, 2**62).poly, 64) if outer else 0
    proof.solver.least |= {"block_rows": 4, "block_columns": 8, "outer_block": 2}
    row_blocks = up(all_rows, block_rows) if in_blocks else as_int(1)
    groups = as_int(1) if whole_rows else up(columns, block_columns)
    sizes = (row_blocks,) if whole_rows else (row_blocks, groups)
    values = (0, 256, 8) if outer else None
    scales = dense(f"scales{i}", *sizes, values=values)
    operands: tuple = (scales, None, None, None)
    if outer:
        count = up(Int((row_blocks * groups).poly, 64), outer_block)
        operands = (scales, dense(f"outer{i}", count), dense(f"table{i}", 256),
                    dense(f"offset{i}", 1))  # fmt: skip
    constants = Packing(kind, block_rows, block_columns, outer_block, 1.0, (0.0,) * 16, 4)
    return dense(f"q{i}", all_rows, width), operands, constants, width


def dequant(proof: Proof, kind: str = "four-bit", **options: Any) -> Launched:
    rows, columns = size(proof, "rows"), size(proof, "columns")
    block_rows = size(proof, "BLOCK_ROWS", 1, 4096)
    (block_columns,) = blocks(proof, ["COLUMNS"], 4096)
    proof.solver.least["BLOCK_ROWS"] = 4
    column_tiles = up(columns, block_columns)
    grid(proof, up(rows, block_rows) * column_tiles)
    codes, operands, packing, width = packed(
        proof, 0, kind=kind, rows=rows, columns=columns, **options
    )
    return Launched({
        "codes": codes, "operands": operands, "out": dense("out", rows, columns), "rows": rows,
        "columns": columns, "width": width, "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns, "PACKING": packing,
    }, {
        "out": lambda _, e: Choice(
            {"program0": e[0] // block_rows * column_tiles + e[1] // block_columns}
        ),
    })  # fmt: skip


def _of_tiles(
    proof: Proof, rows: Rows, m_tiles: Int, n_tiles: Int, BM: Int, BN: Int, persistent: bool
) -> Chooser:
    """The grid of a kernel that orders its tiles by ``tile_of``; the program of an element."""
    count = m_tiles * n_tiles
    programs = count
    if persistent:
        proof.given(count.z <= LONGEST)
        programs = size(proof, "programs", 1, 2**16)
        proof.given(programs.z <= count.z)
    grid(proof, programs)

    def chosen(proof: Proof, element: list[Int]) -> Choice:
        row, column = element
        values: dict[str, Any] = {"m_tile": rows.tile_of(proof, row, BM), "n_tile": column // BN}
        number = proof.unknown("number of the tile")  # tile_of reaches every tile
        proof.given(number.z >= 0, number.z < count.z)
        step = number // programs if persistent else as_int(0)
        values |= {"program0": number - step * programs, "step of i_tile": step}
        return Choice(values)

    return chosen


def _low_rank(
    proof: Proof, rows: Rows, N: Int, ranks: tuple, masked: bool, bias: bool
) -> tuple[dict[str, Any], tuple, tuple | None]:
    """u, v, bias and seeds; the strides of v and of the bias."""
    vs = [banks(proof, f"v{i}", rows.E, r, N) for i, r in enumerate(ranks)]
    its_bias, bias_strides = banks(proof, "bias", rows.E, N) if bias else (None, None)
    return {
        "u": tuple(dense(f"u{i}", rows.M, r) for i, r in enumerate(ranks)),
        "v": tuple(v for v, _ in vs), "bias": its_bias, "threshold": Data(),
        "seeds": dense("seeds", len(ranks)) if masked else None,
    }, tuple(strides for _, strides in vs), bias_strides  # fmt: skip


def lowrank(
    proof: Proof, count: int = 1, masked: bool = False, at_once: bool = False, bias: bool = False,
    add: bool = False, segments: str = "", order: bool = False, own: bool = False,
) -> Launched:  # fmt: skip
    rows, N = rows_of(proof, segments, order), size(proof, "N")
    BM, BN, BR = blocks(proof, "MNR")
    ranks, _ = ranks_of(proof, count, BR if at_once else None)
    limit_of_segments(proof, rows, BM)
    in_tile = _of_tiles(proof, rows, rows.tiles(BM), up(N, BN), BM, BN, False)
    operands, v_strides, bias_strides = _low_rank(proof, rows, N, ranks, masked, bias)
    row_stride = size(proof, "out.stride0", 0, 2**31 - 1)

    def chosen(proof: Proof, element: list[Int]) -> Choice:
        row, column = element
        if rows.order is not None:  # a row that the order has
            its = rows.order.operand
            place = proof.unknown("place in order")
            proof.given(place.z >= 0, place.z < rows.M.z)
            proof.given(proof.loaded(its, [place], None, None).z == row.z)
            choice = in_tile(proof, [place, column])
            choice.place = place
            return choice
        return in_tile(proof, element)

    return Launched({
        **operands, **rows.arguments, "order": rows.order, **numbers_of(rows, own, masked, count),
        "out": tensor("out", (rows.in_memory, row_stride), (N, 1)), "N": N, "R": ranks,
        "v_strides": v_strides, "bias_strides": bias_strides, "out_row_stride": row_stride,
        "BLOCK_M": BM, "BLOCK_N": BN, "BLOCK_R": BR, "GROUP": size(proof, "GROUP", 1, 16),
        "MULTIPLES_OF_8": (False, False), "AT_ONCE": at_once, "ADD": add, "PRECISION": "ieee",
    }, {"out": chosen})  # fmt: skip


def _base(
    proof: Proof, rows: Rows, count: int, depths: int, low_rank: str = "after",
    transposed: bool = False, descriptors: bool = False, persistent: bool = False,
    bias: bool = False, masked: bool = False, packing: dict | None = None,
) -> tuple[dict[str, Any], list, Chooser]:  # fmt: skip
    """The arguments of all kernels with a base product, and lists of P and Q."""
    M, N = rows.M, size(proof, "N")
    BM, BN, BK, BR = blocks(proof, "MNKR")
    limit_of_segments(proof, rows, BM)
    ranks, _ = ranks_of(proof, count, BR if low_rank == "prefetched" else None)
    K = tuple(size(proof, f"K{i}") for i in range(depths))
    ps = [strided(proof, f"p{i}", M, k) for i, k in enumerate(K)]
    constants, q_operands, qs = None, [], []
    for i, k in enumerate(K):
        if packing is None:
            qs.append(banks(proof, f"q{i}", rows.E, k, N))
            continue
        shape = (N, k) if transposed else (k, N)
        codes, operands, constants, width = packed(
            proof, i, rows=shape[0], columns=shape[1], E=rows.E, **packing
        )
        of_matrix = None if rows.E is None else width * shape[0]
        qs.append((codes, (of_matrix, 1, width) if transposed else (of_matrix, width, 1)))
        q_operands.append(operands)
        if rows.E is not None:
            proof.given((rows.E * shape[0]).z <= LONGEST)
    in_tile = _of_tiles(proof, rows, rows.tiles(BM), up(N, BN), BM, BN, persistent)
    operands, v_strides, bias_strides = _low_rank(proof, rows, N, ranks, masked, bias)
    row_stride = size(proof, "out.stride0", 0, 2**31 - 1)
    out: Any = tensor("out", (M, row_stride), (N, 1))
    p_list, q_list = [p for p, _ in ps], [q for q, _ in qs]
    if descriptors:
        p_list = [Descriptor(p.operand, BM, BK) for p in p_list]
        box = (BN, BK) if transposed else (BK, BN)
        q_list = [
            Descriptor(_turned(q.operand) if transposed else q.operand,
                       *([] if rows.E is None else [1]), *box)
            for q in q_list
        ]  # fmt: skip
        if rows.E is None:
            half = BN // 2
            out = Descriptor(out.operand, BM, half)

    def chosen(proof: Proof, element: list[Int]) -> Choice:
        choice = in_tile(proof, element)
        if isinstance(out, Descriptor):
            within, half = element[1] % BN, BN // 2
            choice.cases = [within.z < half.z, within.z >= half.z]
        return choice

    return {
        **operands, "out": out, "M": M, "N": N, "K": K, "R": ranks,
        "strides": (tuple(s for _, s in ps), tuple(s for _, s in qs), v_strides, bias_strides,
                    row_stride),
        "BLOCK_M": BM, "BLOCK_N": BN, "BLOCK_K": BK, "BLOCK_R": BR,
        "GROUP": size(proof, "GROUP", 1, 16), "DESCRIPTORS": descriptors,
        "Q_TRANSPOSED": transposed, "MULTIPLES_OF_8": (False, False), "PRECISION": "ieee",
        "PERSISTENT": persistent, "LOW_RANK": low_rank, "PACKING": constants,
        "q_operands": tuple(q_operands), "ps": p_list, "qs": q_list,
    }, [BM, BN, BR], chosen  # fmt: skip


def _turned(operand: Operand) -> Operand:
    """A tensor with its last two axes exchanged."""
    *outer, a, b = operand.axes
    return Operand(operand.name, *outer, b, a)


def _listed(arguments: dict[str, Any]) -> dict[str, Any]:
    """p0 … p3 and q0 … q3 of lists."""
    for name in "pq":
        listed = arguments.pop(f"{name}s")
        listed = [*listed, *[None] * (4 - len(listed))]
        arguments |= {f"{name}{i}": each for i, each in enumerate(listed)}
    return arguments


def gemm_lowrank(
    proof: Proof, count: int = 1, depths: int = 1, add: bool = False, segments: str = "",
    **options: Any,
) -> Launched:  # fmt: skip
    rows = rows_of(proof, segments)
    arguments, _, chosen = _base(proof, rows, count, depths, **options)
    return Launched(_listed(arguments) | rows.arguments | {"ADD": add}, {"out": chosen})


def gemm_int8_lowrank(
    proof: Proof, count: int = 1, depths: int = 1, add: bool = False, rotated: bool = False,
    **options: Any,
) -> Launched:  # fmt: skip
    rows = rows_of(proof)
    arguments, _, chosen = _base(proof, rows, count, depths, **options)
    scales = tuple(dense(f"row_scales{i}", rows.M) for i in range(depths))
    columns = None if rotated else dense("column_scales", arguments["N"])
    for name in ("q_operands", "PACKING", "LOW_RANK"):
        del arguments[name]
    arguments |= {"row_scales": scales, "column_scales": columns, "ADD": add}
    return Launched(_listed(arguments), {"out": chosen})


def gemm_lowrank_few_rows(proof: Proof, **options: Any) -> Launched:
    rows = rows_of(proof)
    arguments, (_BM, BN, _BR), chosen = _base(proof, rows, 1, 1, "prefetched", **options)
    a, a_strides = strided(proof, "a", arguments["K"][0], arguments["R"][0])
    for name in ("LOW_RANK", "PERSISTENT", "seeds", "threshold"):
        del arguments[name]
    single = {"p": "ps", "q": "qs", "u": "u", "v": "v"}
    arguments |= {name: arguments[plural][0] for name, plural in single.items()}
    del arguments["ps"], arguments["qs"]
    if arguments["PACKING"] is None:
        arguments["q_operands"] = None
    arguments |= {"a": a, "a_strides": a_strides, "factor": Data()}

    def chosen_out(proof: Proof, element: list[Int]) -> Choice:
        choice, column = chosen(proof, element), element[1].z
        sides = (column < BN.z, column >= BN.z)  # the first tile of columns also stores U
        choice.cases = [z3.And(case, side) for case in choice.cases for side in sides]
        return choice

    def chosen_u(proof: Proof, element: list[Int]) -> Choice:
        return Choice(chosen(proof, [element[0], as_int(0)]).values)

    return Launched(arguments, {"out": chosen_out, "u0": chosen_u})


def weight_grad(
    proof: Proof, count: int = 1, masked: bool = False, split: bool = False, segments: str = "",
    order: bool = False, own: bool = False, xv: bool = False, low_rank: bool = False,
    add: bool = False, transposed: bool = False,
) -> Launched:  # fmt: skip
    rows, N = rows_of(proof, segments, order), size(proof, "N")
    BM, BN, BR = blocks(proof, "MNR")
    ranks, most = ranks_of(proof, count, BR if xv or low_rank else None)
    r_tiles, n_tiles = up(most, BR), up(N, BN)
    splits, steps = splits_of(proof, rows.M, BM, split)
    second = (splits if split else as_int(1)) if rows.E is None else rows.E + int(xv)
    grid(proof, n_tiles * r_tiles, second)
    x, x_strides = strided(proof, "x", rows.in_memory, N)
    kinds = [(r, 1) if not transposed else (1, N) for r in ranks]  # strides of OUT: contiguous
    planes = [
        tensor(f"planes{i}", (splits, N * r), (r, its[1]), (N, its[0]))
        for i, (r, its) in enumerate(zip(ranks, kinds, strict=True))
    ]
    if rows.E is None:
        outs = [
            (tensor(f"out{i}", (r, its[1]), (N, its[0])), (None, *its))
            for i, (r, its) in enumerate(zip(ranks, kinds, strict=True))
        ]
    else:
        outs = []
        for i, r in enumerate(ranks):
            strides = [size(proof, f"out{i}.stride{axis}", 0, 2**31 - 1) for axis in range(3)]
            e, n, c = strides
            outs.append((tensor(f"out{i}", (rows.E, e), (r, c), (N, n)), tuple(strides)))
    vs = [
        banks(proof, f"v{i}", rows.E, N, r)
        for i, r in enumerate(ranks[:1] if xv else ranks if low_rank else ())
    ]

    def of_out(proof: Proof, element: list[Int]) -> Choice:
        *plane, r, n = element
        return Choice({"program0": n // BN * r_tiles + r // BR, "program1": [*plane, 0][0]})

    def of_row(proof: Proof, row: Int, i_tile: Int) -> Choice:
        """The split or segment that has a row, and its step."""
        if rows.ends is None:
            split_of = row // (steps * BM)
            start = split_of * steps * BM
        else:
            split_of, bounds = proof.unknown("segment of the row"), []
            proof.given(split_of.z >= 0, split_of.z <= rows.E.z)
            for at, outside in ((split_of - 1, 0), (split_of, rows.M)):
                inside = z3.And(at.z >= 0, at.z < rows.E.z)
                bounds.append(proof.loaded(rows.ends.operand, [at], Bool(inside), outside))
            start = bounds[0]
            proof.given(start.z <= row.z, row.z < bounds[1].z)
        step = (row - start) // BM
        return Choice({"program0": i_tile, "program1": split_of, "step of i_m": step})

    outputs: dict[str, Chooser] = {}
    for i in range(count):
        outputs[f"{'planes' if split else 'out'}{i}"] = of_out
    if xv:
        outputs["xv"] = lambda proof, e: of_row(proof, e[1], e[0])
    if low_rank:
        outputs["low_rank"] = lambda proof, e: of_row(proof, e[0], e[1] // BN)
    return Launched({
        "x": x, "u": tuple(dense(f"u{i}", rows.M, r) for i, r in enumerate(ranks)),
        "out": tuple(out for out, _ in outs), "planes": tuple(planes),
        "v": tuple(v for v, _ in vs), "xv": dense("xv", n_tiles, rows.M, ranks[0]) if xv else None,
        "low_rank": dense("low_rank", rows.M, N) if low_rank else None,
        **rows.arguments, "order": rows.order, **numbers_of(rows, own, masked, count),
        "own_factors": dense("own_factors", rows.E) if own and xv else None,
        "N": N, "factor": Data(), "steps": steps if rows.E is None else 0, "x_strides": x_strides,
        "out_strides": tuple(strides for _, strides in outs),
        "v_strides": tuple(strides for _, strides in vs), "R": ranks,
        "BLOCK_M": BM, "BLOCK_N": BN, "BLOCK_R": BR, "R_TILES": r_tiles, "ADD": add,
        "PRECISION": "ieee",
    }, outputs)  # fmt: skip


def sum_planes(proof: Proof, count: int = 1, long: bool = False) -> Launched:
    """``long``: sizes that don't fit 32 bits; Triton takes these in 64."""
    sizes = [size(proof, f"size{i}", 0, 2**62 if long else 2**31 - 1) for i in range(count)]
    for length in sizes if long else ():
        length.bits = 64
    counts = [size(proof, f"count{i}", 0, LONGEST) for i in range(count)]
    each = [up(n, 1024) for n in sizes]
    for length, planes in zip(sizes, counts, strict=True):
        proof.given(z3.Or(planes.z >= 1, length.z == 0))
    total = as_int(0)
    firsts = []
    for number in each:
        firsts.append(total)
        total += number
    grid(proof, total)
    absent = dict.fromkeys(range(count, 4))

    def chooser(first: Int) -> Chooser:
        return lambda _, e: Choice({"program0": first + e[0] // 1024})

    return Launched({
        "planes": tuple(dense(f"planes{i}", c, n) for i, (c, n) in enumerate(
            zip(counts, sizes, strict=True))),
        "out": tuple(dense(f"out{i}", n) for i, n in enumerate(sizes)),
        **{f"size{i}": n for i, n in (dict(enumerate(sizes)) | absent).items()},
        **{f"count{i}": n for i, n in (dict(enumerate(counts)) | absent).items()},
        "SIZES_OF_8": False, "BLOCK": 1024,
    }, {f"out{i}": chooser(first) for i, first in enumerate(firsts)})  # fmt: skip


def elementwise(inputs: str, outputs: str) -> Callable[[Proof], Launched]:
    def launched(proof: Proof) -> Launched:
        M, N = size(proof, "M"), size(proof, "N")
        tiles = up(N, 1024)
        grid(proof, M * tiles)
        arguments: dict[str, Any] = {"N": N, "ACTIVATION": "silu", "BLOCK": 1024}
        for name in [*inputs.split(), *outputs.split()]:
            row_stride = size(proof, f"{name}.stride0", 0, 2**31 - 1)
            arguments[name] = tensor(name, (M, row_stride), (N, 1))
            arguments[f"{name}_row_stride"] = row_stride
        choice = lambda _, e: Choice({"program0": e[0] * tiles + e[1] // 1024})  # noqa: E731
        return Launched(arguments, dict.fromkeys(outputs.split(), choice))

    return launched


def row_loss(proof: Proof, gradient: bool = False, upstream: bool = False) -> Launched:
    M, V = size(proof, "M"), size(proof, "V")
    row_stride = size(proof, "z.stride0", 0, 2**31 - 1)
    grid(proof, M)
    outputs: dict[str, Chooser] = {"losses": lambda _, e: Choice({"program0": e[0]})}
    if gradient:
        outputs["z"] = lambda _, e: Choice({"program0": e[0], "step of i_column": e[1] // 4096})
    return Launched({
        "z": tensor("z", (M, row_stride), (V, 1)),
        "target": dense("target", M, values=(None, None, 64)),
        "upstream": dense("upstream", M) if upstream else None, "losses": dense("losses", M),
        "V": V, "row_stride": row_stride, "logit_scale": Data(), "softcap": Data(),
        "smoothing": Data(), "z_loss": Data(), "GRADIENT": gradient, "BLOCK": 4096,
    }, outputs)  # fmt: skip
