"""Each kernel's launch in unknown sizes: the launcher's operands, and who stores each element."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import z3

from fastlora.kernels import launchers
from fastlora.kernels.config import LONGEST
from fastlora.kernels.gemm_config import GemmConfig
from fastlora.kernels.lowrank import LowRankConfig
from fastlora.kernels.project import ProjectConfig
from fastlora.kernels.sum_planes import sum_planes
from fastlora.kernels.weight_grad import WeightGradConfig

from .contracts import segment_of_row, tile_of_row
from .engine import Proof
from .launched import Launcher, up
from .once import Choice, Chooser
from .values import Descriptor, Int, Operand, as_int

EXACT = {"precision": "ieee"}
# A kernel's arguments, and by name of each output the program and step that store an element.
Facts = tuple[dict[str, Any], dict[str, Chooser]]


class Call(Launcher):
    """A launcher's call in a mode, with a method for each kernel."""

    def __init__(self, proof: Proof, **mode: Any) -> None:
        super().__init__(proof, **mode)
        size = self.proof.size
        self.M, self.N, self.K, self.options = size("M"), size("N"), size("K"), dict(EXACT)
        self.R = [size(f"R{i}") for i in range(self.count)]
        self.E = size("segments", 1, 2**27) if self.segments else None
        # The first axis of a tensor that has a matrix for each segment.
        self.banks = (self.E,) if self.segments else ()
        if self.segments:
            any_number, rows = (-(2**31), 2**31, 32), (0, self.M + 1, 32)
            is_sorted = self.segments == "sorted"
            self.ends = Operand(self.E, ordered=is_sorted, values=rows if is_sorted else any_number)
            self.options["ends"] = self.ends
        self.rows = size("rows of x") if self.order else self.M  # in memory
        if self.order:
            self.options["order"] = Operand(self.M, values=(0, self.rows, 32), distinct=True)
        if self.masked:
            seeds = Operand(self.E if self.own else self.count)
            self.options |= {"seeds": seeds, "dropout": 0.5}
        if self.own:
            self.options["numbers"] = launchers.SegmentNumbers(Operand(self.E), Operand(self.E))

    def strided(self, name: str, *sizes: Any, last: int | None = None) -> Operand:
        """A tensor with any strides; ``last`` is the last one, if it is given."""
        sized = range(len(sizes))
        strides: list = [self.proof.size(f"{name}.stride{i}", 0, 2**31 - 1) for i in sized]
        return Operand(*sizes, strides=strides if last is None else [*strides[:-1], last])

    def group(self, name: str, *sizes: Any) -> list[Operand]:
        """A tensor with any strides for each rank, which replaces "R" in ``sizes``."""
        shapes = [[r if size is self.R else size for size in sizes] for r in self.R]
        return [self.strided(f"{name}{i}", *self.banks, *s) for i, s in enumerate(shapes)]

    def thin(self) -> list[Operand]:
        return [Operand(self.M, r) for r in self.R]

    def its_bias(self) -> Operand | None:
        return self.strided("bias", *self.banks, self.N) if self.bias else None

    def rank_fits(self) -> None:
        """The rank is at most BLOCK_R, as ``why_not`` and ``loads_at_once`` demand."""
        self.proof.given(*[r.z <= self.proof.block("BLOCK_R").z for r in self.R])

    def row_tile(self, row: Int) -> Int:
        BM = self.proof.block("BLOCK_M")
        if self.E is None:
            return row // BM
        return tile_of_row(self.proof, self.ends, row, self.E, self.M, BM)

    def project(self) -> Facts:
        arguments = self.launched(
            launchers.project, self.strided("x", self.rows, self.K),
            self.group("v", self.K, self.R), [0.5] * self.count, config=ProjectConfig,
            **self.options,
        )  # fmt: skip

        def chosen(element: list[Int]) -> Choice:
            *plane, row, column = element
            i_column = column // arguments["BLOCK_R"]
            program = self.row_tile(row) * arguments["R_TILES"] + i_column
            return Choice({"program0": program, "program1": [*plane, 0][0]})

        return arguments, self.for_each("planes" if self.split else "u", chosen)

    def for_each(self, name: str, chosen: Chooser) -> dict[str, Chooser]:
        return {f"{name}{i}": chosen for i in range(self.count)}

    def quantize_rows(self) -> Facts:
        x, codes = self.strided("x", self.M, self.K), Operand(self.M, self.K)
        factors = Operand(self.K) if self.scaled else None
        launcher = launchers.quantize_rows
        return self.launched(launcher, x, codes, Operand(self.M), factors, **EXACT), {
            "codes": lambda e: Choice({"program0": e[0] // 32, "step of i_k": e[1] // 64}),
            "row_scales": lambda e: Choice({"program0": e[0] // 32}),
        }

    def packed(
        self, rows: Int, columns: Int, *, kind: str, whole_rows: bool = False, outer: bool = False,
        in_blocks: bool = True,
    ) -> Any:  # fmt: skip
        """``whole_rows``: a block of scales has whole rows.  ``in_blocks``: it has several rows.

        ``outer``: scales are nested.
        """
        size, nested = self.proof.size, None
        width = up(columns, 2) if kind == "four-bit" else columns
        all_rows = self.E * rows if self.segments else rows
        block_rows = size("block_rows") if in_blocks else 0
        block_columns = 0 if whole_rows else size("block_columns")
        outer_block = Int(size("outer_block", 1, 2**62).poly, 64) if outer else 0
        self.proof.solver.least |= {"block_rows": 4, "block_columns": 8, "outer_block": 2}
        row_blocks = up(all_rows, block_rows) if in_blocks else as_int(1)
        groups = as_int(1) if whole_rows else up(columns, block_columns)
        scales = Operand(row_blocks, groups, values=(0, 256, 8) if outer else None)
        if outer:
            count = up(Int((row_blocks * groups).poly, 64), outer_block)
            nested = Operand(count), Operand(256), Operand(1)
        return launchers.Packed(
            kind.removesuffix(" by bits"), Operand(all_rows, width), scales, rows, columns,
            block_rows, block_columns, (0.0,) * 16, nested, outer_block, experts=self.E or 0,
        )  # fmt: skip

    def dequant(self) -> Facts:
        rows, columns = self.proof.size("rows"), self.proof.size("columns")
        weight, out = self.packed(rows, columns, **self.packing), Operand(rows, columns)
        arguments = self.launched(launchers.dequant, weight, out)
        block_rows, block_columns = arguments["BLOCK_ROWS"], arguments["BLOCK_COLUMNS"]

        def chosen(element: list[Int]) -> Choice:
            first = element[0] // block_rows * up(columns, block_columns)
            return Choice({"program0": first + element[1] // block_columns})

        return arguments, {"out": chosen}

    def by_tile(self, arguments: dict[str, Any]) -> Chooser:
        """The chooser of OUT in a kernel that orders its tiles by ``tile_of``."""
        proof, BM, BN = self.proof, arguments["BLOCK_M"], arguments["BLOCK_N"]

        def chosen(element: list[Int]) -> Choice:
            place, (row, column) = None, element
            if self.order:  # the row's place in the order
                place = proof.unknown("place in order")
                proof.given(place.z >= 0, place.z < self.M.z)
                proof.given(proof.loaded(self.options["order"], [place], None, 0).z == row.z)
            m_tiles = self.M // BM + self.E + 1 if self.segments else up(self.M, BM)
            tile = self.row_tile(place or row)
            number = proof.unknown("number of the tile")  # tile_of reaches every tile
            proof.given(number.z >= 0, number.z < (m_tiles * up(self.N, BN)).z)
            programs = proof.programs[0][1]
            step = number // programs if arguments.get("PERSISTENT") else as_int(0)
            values = {"m_tile": tile, "n_tile": column // BN, "step of i_tile": step}
            choice = Choice(values | {"program0": number - step * programs}, place=place)
            if isinstance(arguments["out"], Descriptor):  # it stores two halves of a tile
                in_first = (column % BN < BN // 2).claim
                choice.cases = [in_first, z3.Not(in_first)]
            return choice

        return chosen

    def lowrank(self) -> Facts:
        if self.at_once:
            self.rank_fits()
        arguments = self.launched(
            launchers.lowrank, self.strided("out", self.rows, self.N, last=1), self.thin(),
            self.group("v", self.R, self.N), bias=self.its_bias(), add=self.add,
            config=LowRankConfig, **self.options,
        )  # fmt: skip
        return arguments, {"out": self.by_tile(arguments)}

    def base_operands(self) -> tuple[list, dict[str, Any]]:
        """out, the lists P, Q, U and V, and the options of a launch with a base product."""
        if self.at_once:
            self.rank_fits()
        ps, qs = [], []
        for i in range(self.depths):
            k = self.proof.size(f"K{i}")
            ps.append(self.strided(f"p{i}", self.M, k))
            if self.packing is None:
                qs.append(self.strided(f"q{i}", *self.banks, k, self.N))
            else:
                shape = (self.N, k) if self.transposed else (k, self.N)
                weight = self.packed(*shape, **self.packing)
                qs.append(replace(weight, transposed=self.transposed))
        out, options = self.strided("out", self.M, self.N, last=1), {"config": GemmConfig}
        options |= {**self.options, "bias": self.its_bias()}
        return [out, ps, qs, self.thin(), self.group("v", self.R, self.N)], options

    def gemm_lowrank(self) -> Facts:
        operands, options = self.base_operands()
        arguments = self.launched(launchers.gemm_lowrank, *operands, **options, add=self.add)
        return arguments, {"out": self.by_tile(arguments)}

    def gemm_int8_lowrank(self) -> Facts:
        operands, options = self.base_operands()
        rows, columns = [Operand(self.M) for _ in operands[1]], Operand(self.N)
        operands += [rows, None if self.rotated else columns]
        arguments = self.launched(launchers.gemm_int8_lowrank, *operands, **options)
        arguments["ADD"] = self.add  # as in the second launch of more than four products
        return arguments, {"out": self.by_tile(arguments)}

    def gemm_lowrank_few_rows(self) -> Facts:
        self.at_once = True
        (out, (p,), (q,), (u,), (v,)), options = self.base_operands()
        operands = out, p, q, self.strided("a", *p.shape[1:], *u.shape[1:]), u, v, 0.5
        arguments = self.launched(launchers.gemm_lowrank_few_rows, *operands, **options)
        of_out = self.by_tile(arguments)

        def chosen(element: list[Int]) -> Choice:
            choice = of_out(element)
            in_first = (element[1] < arguments["BLOCK_N"]).claim  # these programs also store U
            sides = (in_first, z3.Not(in_first))
            choice.cases = [z3.And(case, side) for case in choice.cases for side in sides]
            return choice

        def of_u(element: list[Int]) -> Choice:
            return Choice(of_out([element[0], as_int(0)]).values)

        return arguments, {"out": chosen, "u": of_u}

    def weight_grad(self) -> Facts:
        M, N, options = self.M, self.N, dict(self.options)
        if self.segments:
            outs = self.group("out", N, self.R)
        else:
            outs = [Operand(r, N).mT if self.transposed else Operand(N, r) for r in self.R]
        if self.xv or self.low_rank:
            self.rank_fits()
            vs = self.group("v", N, self.R)
            options |= {"b": vs[0]} if self.xv else {"vs": vs, "low_rank": Operand(M, N)}
        arguments = self.launched(
            launchers.weight_grad, self.strided("x", self.rows, N), self.thin(), outs,
            config=WeightGradConfig, **options,
        )  # fmt: skip
        arguments["ADD"] = self.add  # as in the second launch of more than four products
        BM, BN, BR = (arguments[f"BLOCK_{axis}"] for axis in "MNR")

        def of_out(element: list[Int]) -> Choice:
            *plane, n, r = element
            if self.split and self.transposed:  # a plane has the layout of its tensor
                n, r = r, n
            program = n // BN * arguments["R_TILES"] + r // BR
            return Choice({"program0": program, "program1": [*plane, 0][0]})

        def of_row(row: Int, i_tile: Int) -> Choice:
            """The split or segment that has a row, and its step."""
            if self.segments:
                part, start = segment_of_row(self.proof, self.ends, row, M)
            else:
                part = row // (arguments["steps"] * BM)
                start = part * arguments["steps"] * BM
            step = (row - start) // BM
            return Choice({"program0": i_tile, "program1": part, "step of i_m": step})

        outputs = self.for_each("planes" if self.split else "out", of_out)
        if self.xv:  # without planes, there is one tile of columns
            outputs["xv"] = lambda e: of_row(e[-2], e[0] if len(e) > 2 else as_int(0))
        if self.low_rank:
            outputs["low_rank"] = lambda e: of_row(e[0], e[1] // BN)
        return arguments, outputs

    def sum_planes(self) -> Facts:
        most, planes, outs, firsts = 2**62 if self.long else 2**31 - 1, [], [], [as_int(0)]
        for i in range(self.count):
            length = self.proof.size(f"size{i}", 0, most)
            length.bits = 64 if self.long else 32  # Triton takes large sizes in 64 bits
            count = self.proof.size(f"count{i}", 0, LONGEST)
            # The launcher passes the size 0 for a sum without planes.
            self.proof.given(z3.Or(count.z >= 1, length.z == 0))
            planes.append(Operand(count, length))
            outs.append(Operand(length))
            firsts.append(firsts[-1] + up(length, 1024))

        def chooser(first: Int) -> Chooser:
            return lambda e: Choice({"program0": first + e[0] // 1024})

        outputs = {f"out{i}": chooser(firsts[i]) for i in range(self.count)}
        return self.launched(sum_planes, planes, outs), outputs

    def elementwise(self, launcher: Callable, inputs: list[str], outputs: list[str]) -> Facts:
        of = [self.strided(name, self.M, self.N, last=1) for name in inputs + outputs]
        operands = *of[: len(inputs)], "silu", *of[len(inputs) :]

        def chosen(element: list[Int]) -> Choice:
            return Choice({"program0": element[0] * up(self.N, 1024) + element[1] // 1024})

        return self.launched(launcher, *operands), dict.fromkeys(outputs, chosen)

    def gated(self) -> Facts:
        return self.elementwise(launchers.gated, ["gate", "up"], ["out"])

    def gated_backward(self) -> Facts:
        inputs, outputs = ["dy", "gate", "up"], ["d_gate", "d_up"]
        return self.elementwise(launchers.gated_backward, inputs, outputs)

    def row_loss(self) -> Facts:
        settings, upstream = (0.1, 30.0, 1.0, 0.1), Operand(self.M) if self.upstream else None
        z, classes = self.strided("z", self.M, self.N, last=1), (None, None, 64)
        target, losses = Operand(self.M, values=classes), Operand(self.M)
        operands = z, target, losses, settings, upstream, self.gradient
        outputs: dict[str, Chooser] = {"losses": lambda e: Choice({"program0": e[0]})}
        if self.gradient:
            outputs["z"] = lambda e: Choice({"program0": e[0], "step of i_column": e[1] // 4096})
        return self.launched(launchers.row_loss, *operands), outputs
