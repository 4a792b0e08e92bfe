"""Compares real launches with the stated ones: a pytest plugin, for tests in the interpreter.

    pytest -p tools.prove.launches tests/kernels

A launch fits if there are numbers for which all stated facts hold, its arguments and its grid are
those stated, and its tensors have the stated elements.
"""

import subprocess
import sys
from collections import Counter
from typing import Any

import torch
import z3
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels.launch import Launch

from . import values
from .engine import Proof
from .modes import MODES, parameters
from .values import Data, Descriptor, Int, Pointer, as_int

_TESTS = "test_project test_gemm_lowrank test_weight_grad test_packed test_segments test_int8"
_TESTS += " test_gated test_row_loss test_sum_planes"
_MOST = 3  # of each kernel, mode and tile sizes: so many launches are compared
_HINTS = ("PRECISION", "ACTIVATION", "MULTIPLES_OF_8", "V_ROWS_OF_8", "SIZES_OF_8")
_seen: Counter = Counter()


def _packing(packing: Any) -> dict[str, Any]:
    return {
        "kind": packing.kind, "whole_rows": packing.block_columns == 0,
        "outer": packing.outer_block > 0, "in_blocks": packing.block_rows > 0,
    }  # fmt: skip


def mode_of(launch: Launch) -> dict[str, Any]:
    """The options of facts.py for a launch."""
    a, kernel = launch.arguments, launch.name
    split = (*launch.grid, 1)[1] > 1
    is_sorted = {"segments": _ends_of(a)} if a.get("ends") is not None else {}
    masked = {"masked": True} if a.get("seeds") is not None else {}
    own = any(a.get(name) is not None for name in ("own_factors", "own_thresholds"))
    rows = {**is_sorted, **masked, "order": a.get("order") is not None, "own": own}
    if kernel == "project":
        return {**rows, "count": len(a["v"]), "split": split}
    if kernel == "quantize_rows":
        return {"scaled": a["column_factors"] is not None}
    if kernel == "sum_planes":
        return {
            "count": len(a["planes"]),
            "long": any((a[f"size{i}"] or 0) >= 2**31 for i in range(4)),
        }
    if kernel == "row_loss":
        return {"gradient": a["GRADIENT"], "upstream": a["upstream"] is not None}
    if kernel == "dequant":
        return _packing(a["PACKING"])
    if kernel == "weight_grad":
        return {
            **rows, "count": len(a["u"]), "split": split and not is_sorted, "add": a["ADD"],
            "xv": a["xv"] is not None, "low_rank": a["low_rank"] is not None,
            "transposed": not is_sorted and a["out_strides"][0][1:] != (a["R"][0], 1),
        }  # fmt: skip
    if kernel in ("gated", "gated_backward"):
        return {}
    bias = {"bias": a["bias"] is not None}
    if kernel == "lowrank":
        return {**rows, **bias, "count": len(a["u"]), "at_once": a["AT_ONCE"], "add": a["ADD"]}
    base = {"transposed": a["Q_TRANSPOSED"], "descriptors": a["DESCRIPTORS"], **bias}
    if a.get("PACKING") is not None:
        base["packing"] = _packing(a["PACKING"])
    if kernel == "gemm_lowrank_few_rows":
        return base
    base |= {**masked, "count": len(a["u"]), "depths": len(a["K"]), "add": a["ADD"]}
    base["persistent"] = a["PERSISTENT"]
    if kernel == "gemm_int8_lowrank":
        return {**base, "rotated": a["column_scales"] is None}
    return {**base, **is_sorted, "low_rank": a["LOW_RANK"]}


def _ends_of(arguments: dict[str, Any]) -> str:
    ends, M = arguments["ends"], arguments["M"]
    bounds = [0, *ends.tolist(), M]
    return "sorted" if bounds == sorted(bounds) else "any"


def why_not(launch: Launch) -> str:
    """Why a launch isn't one that is stated; "" if it is."""
    mode = mode_of(launch)
    values.proof = proof = Proof()
    proof.begin([])
    stated = MODES[launch.name][0](proof, **mode).arguments
    equal: list[z3.BoolRef] = []
    tensors: list[tuple[str, Any, Any]] = []
    for name in parameters(launch.name):
        if name in _HINTS or (name == "planes" and not mode.get("split") and "u" in stated):
            continue
        real = launch.arguments.get(name)
        reason = _compared(name, stated[name], real, equal, tensors)
        if reason:
            return reason
    counts = [as_int(count) for _, count in proof.programs]
    if len(launch.grid) > len(counts) and launch.grid[1] > 1:
        return "the grid has another axis"
    equal += [count.z == n for count, n in zip(counts, (*launch.grid, 1), strict=False)]
    proof.solver.least = {}
    numbers = proof.solver.example([*proof.claims(), *equal])
    if not isinstance(numbers, dict):
        return f"no numbers for it ({numbers}) in mode {mode}"
    for name, operand, real in tensors:
        its = _canonical(
            [(_value(n.poly, numbers), _value({s: 1}, numbers)) for n, s in operand.axes]
        )
        if its and its != _canonical(list(zip(real.shape, real.stride(), strict=True))):
            return f"{name} has axes {tuple(real.shape)} {real.stride()}, stated {its}"
    return ""


def _value(poly: dict, numbers: dict[str, int]) -> int:
    total = 0
    for monomial, factor in poly.items():
        for name in monomial:
            factor *= numbers[name]
        total += factor
    return total


def _canonical(axes: list[tuple[int, int]]) -> Any:
    """The addresses of a tensor's elements; False if it has none."""
    if any(size == 0 for size, _ in axes):
        return False
    merged: list[tuple[int, int]] = []
    for size, stride in sorted(
        (axis for axis in axes if axis[0] > 1), key=lambda a: (-a[1], -a[0])
    ):
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged or [(1, 1)]


def _compared(name: str, stated: Any, real: Any, equal: list, tensors: list) -> str:
    if isinstance(stated, Data):
        return ""
    if isinstance(stated, tuple) and hasattr(stated, "block_rows"):  # a Packing
        names = ("block_rows", "block_columns", "outer_block")
        pairs = [(f"{name}.{n}", getattr(stated, n), getattr(real, n)) for n in names]
    elif isinstance(stated, tuple):
        if real is None or len(stated) != len(real):
            return f"{name} has another length"
        pairs = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(stated, real, strict=True))]
    elif isinstance(stated, Descriptor):
        if not isinstance(real, TensorDescriptor):
            return f"{name} is no descriptor"
        box = zip(stated.box, real.block_shape, strict=True)
        equal += [as_int(n).z == size for n, size in box]
        tensors.append((name, stated.operand, real.base))
        return ""
    elif isinstance(stated, Pointer):
        if not isinstance(real, torch.Tensor):
            return f"{name} is {type(real).__name__}"
        tensors.append((name, stated.operand, real))
        return ""
    elif isinstance(stated, Int) and isinstance(real, int):
        equal.append(stated.z == real)
        return ""
    else:
        return "" if stated == real else f"{name} is {real}, stated {stated}"
    return next(filter(None, (_compared(*pair, equal, tensors) for pair in pairs)), "")


def pytest_configure(config: Any) -> None:
    unchecked = Launch.run

    def run(launch: Launch) -> None:
        sizes = [n for name, n in launch.arguments.items() if name.startswith("BLOCK_")]
        key = (launch.name, str(sorted(mode_of(launch).items(), key=str)), *sizes)
        _seen[key] += 1
        if _seen[key] <= _MOST:
            reason = why_not(launch)
            assert not reason, f"{launch.name} isn't launched as stated: {reason}"
        unchecked(launch)

    Launch.run = run  # type: ignore[method-assign]


def lines_of() -> tuple[bool, str]:
    files = [f"tests/kernels/{name}.py" for name in _TESTS.split()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "tools.prove.launches",
        *files,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode != 0, f"launches of the tests: {done.stdout[-3000:]}"
