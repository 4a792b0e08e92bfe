"""The launches of each kernel: sizes, strides, grid, and the program that stores each element."""

from typing import Any

import z3

from fastlora.kernels.project import project_kernel

from .engine import Proof
from .once import Choice
from .values import Data, Int, Operand, Pointer, as_int

LONGEST = 2**31 - 2**17


def size(proof: Proof, name: str, least: int = 1, most: int = LONGEST) -> Int:
    made = proof.unknown(name, local=False)
    proof.given(made.z >= least, made.z <= most)
    return made


def block(proof: Proof, name: str, least: int = 16, most: int = 512) -> Int:
    made, sixteenth = proof.unknown(name, False), proof.unknown(f"{name} / 16", False)
    proof.given(made.z >= least, made.z <= most, made.z == 16 * sixteenth.z)
    proof.solver.least |= {name: least, f"{name} / 16": least // 16}
    return made


def up(a: Any, b: Any) -> Int:
    return (as_int(a) + b - 1) // b


def stride(proof: Proof, name: str) -> Int:
    return size(proof, name, 0, 2**31 - 1)


def one(integer: Int) -> tuple[str, ...]:
    (monomial,) = integer.poly
    return monomial


def matrix(proof: Proof, name: str, rows: Int, columns: Int, **options: Any) -> tuple:
    """A pointer to a matrix with any strides, and its strides."""
    strides = [stride(proof, f"{name}.stride{i}") for i in range(2)]
    axes = zip((rows, columns), map(one, strides), strict=True)
    return Pointer(Operand(name, *axes, **options)), tuple(strides)


def dense(name: str, *sizes: Any, **options: Any) -> Pointer:
    """A pointer to a contiguous tensor, whose sizes but the first are unknowns."""
    axes = []
    for i, length in enumerate(sizes):
        axes.append((length, tuple(sorted(f for n in sizes[i + 1 :] for f in one(n)))))
    return Pointer(Operand(name, *axes, **options))


def project(proof: Proof, count: int = 2, masked: bool = False, split: bool = False) -> dict:
    M, K = size(proof, "M"), size(proof, "K")
    BM, BK, BR = (block(proof, f"BLOCK_{axis}") for axis in "MKR")
    ranks = [size(proof, f"R{i}") for i in range(count)]
    most = size(proof, "R")
    proof.given(*[r.z <= most.z for r in ranks], z3.Or([r.z == most.z for r in ranks]))
    r_tiles, m_tiles = up(most, BR), up(M, BM)
    wanted = size(proof, "wanted splits")
    steps = up(up(K, wanted), BK)
    splits = up(K, steps * BK)
    proof.given(splits.z >= 2 if split else splits.z == 1)
    proof.given((splits * steps * BK).z < 2**31, (m_tiles * r_tiles).z < 2**31)
    proof.program(m_tiles * r_tiles, splits if split else 1)
    x, x_strides = matrix(proof, "x", M, K)
    vs = [matrix(proof, f"v{i}", K, r) for i, r in enumerate(ranks)]
    return {
        "x": x, "v": tuple(v for v, _ in vs),
        "u": tuple(dense(f"u{i}", M, r) for i, r in enumerate(ranks)),
        "planes": tuple(dense(f"planes{i}", splits, M, r) for i, r in enumerate(ranks)),
        "seeds": dense("seeds", count) if masked else None, "ends": None, "order": None,
        "own_factors": None, "own_thresholds": None,
        "M": M, "K": K, "factors": (Data(),) * count, "threshold": Data(), "steps": steps,
        "segments": None, "x_strides": x_strides,
        "v_strides": tuple((None, *strides) for _, strides in vs), "R": tuple(ranks),
        "BLOCK_M": BM, "BLOCK_K": BK, "BLOCK_R": BR, "R_TILES": r_tiles, "V_ROWS_OF_8": False,
        "SEGMENT_BLOCK": None, "PRECISION": "ieee",
    }  # fmt: skip


def _project_once(args: dict, split: bool):
    def u(proof, element):
        *plane, row, column = element
        BM, BR = args["BLOCK_M"], args["BLOCK_R"]
        return Choice({"program0": row // BM * args["R_TILES"] + column // BR, "program1": plane[0] if plane else 0})
    return {f"{'planes' if split else 'u'}{i}": u for i in range(len(args["u"]))}
