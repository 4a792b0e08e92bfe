"""Compares real launches with the proved ones: a pytest plugin, for tests in the interpreter.

    pytest -p tools.prove.launches tests/kernels

A launch fits if there are numbers for which all facts of its mode hold, its arguments and its grid
equal the proof's, and its tensors have the elements that the proof assumes.
"""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import prod
from typing import Any

import torch

from fastlora.kernels.launch import Launch

from .engine import Proof
from .modes import facts_of
from .numbers import Solver
from .values import Descriptor, Int, Pointer, as_int

_TESTS = "test_project test_gemm_lowrank test_weight_grad test_packed test_segments test_int8"
_TESTS += " test_gated test_row_loss test_sum_planes"
_MOST = 3  # of each kernel, mode and tile sizes: so many launches are compared
# Arguments that no address depends on.
_LEFT_OUT = {"PRECISION", "ACTIVATION", "threshold", "softcap"}
_LEFT_OUT |= {"MULTIPLES_OF_8", "V_ROWS_OF_8", "SIZES_OF_8"}
_seen: Counter = Counter()


def mode_of(launch: Launch) -> dict[str, Any]:
    """The options of a launch, as those of launched.Launcher."""
    a = launch.arguments
    given = {name for name, value in a.items() if value is not None}
    outs = a.get("out_strides")
    mode = {name: name in given for name in ("order", "bias", "xv", "low_rank", "upstream")}
    flags = {
        "masked": "seeds" in given, "own": bool({"own_factors", "own_thresholds"} & given),
        "scaled": "column_factors" in given, "gradient": a.get("GRADIENT"), "add": a.get("ADD"),
        "descriptors": a.get("DESCRIPTORS"), "rotated": "column_scales" in a.keys() - given,
        "at_once": a.get("AT_ONCE") or a.get("LOW_RANK") == "prefetched",
        "transposed": a.get("Q_TRANSPOSED") or (outs and outs[0] == (None, 1, a["N"])),
        "split": "u" in given and any(plane.numel() for plane in a.get("planes", ())),
        "long": any(a[name] >= 2**31 for name in given if name.startswith("size")),
    }  # fmt: skip
    mode |= {name: bool(value) for name, value in flags.items()}
    for name, listed in (("count", a.get("u", a.get("planes"))), ("depths", a.get("K"))):
        mode[name] = len(listed) if isinstance(listed, tuple) else 1
    if "ends" in given:
        bounds = [0, *a["ends"].tolist(), a["M"]]
        mode["segments"] = "sorted" if bounds == sorted(bounds) else "any"
    if "PACKING" in given:
        kind, block_rows, block_columns, outer_block, *_ = a["PACKING"]
        mode["packing"] = {
            "kind": kind, "in_blocks": block_rows > 0, "whole_rows": block_columns == 0,
            "outer": outer_block > 0,
        }  # fmt: skip
    return mode


def why_not(launch: Launch) -> str:
    """Why a launch isn't one of the proved ones; "" if it is."""
    reason, mode, proof = "", mode_of(launch), Proof()
    for _ in proof.paths():
        with suppress(AssertionError):
            arguments, _ = facts_of(proof, launch.name, mode)
            reason = _difference(proof, arguments, launch)
            if not reason:
                return ""
    return f"{reason} in mode {mode}"


def _difference(proof: Proof, arguments: dict[str, Any], launch: Launch) -> str:
    equal, tensors = [], []
    for name in launch.arguments.keys() - _LEFT_OUT:
        for leaf, stated, real in _leaves(name, arguments[name], launch.arguments[name]):
            if isinstance(stated, Descriptor):
                tensors.append((leaf, stated.operand, real.base))
                box = zip(stated.box, real.block_shape, strict=True)
                equal += [as_int(n).z == length for n, length in box]
            elif isinstance(stated, Pointer) and isinstance(real, torch.Tensor):
                tensors.append((leaf, stated.operand, real))
            elif isinstance(stated, Int) and isinstance(real, int):
                equal.append(stated.z == real)
            elif stated != real and not isinstance(real, float):
                return f"{leaf} is {real}, stated {stated}"
    counts = [as_int(count).z for _, count in proof.programs]
    equal += [count == n for count, n in zip(counts, launch.grid, strict=True)]
    numbers = Solver().example([*proof.claims(), *equal])
    if not isinstance(numbers, dict):
        return f"no numbers for it ({numbers})"
    for name, operand, real in tensors:
        its = [[_value(as_int(n), numbers) for n in s] for s in (operand.shape, operand.strides)]
        if 0 not in its[0] and _merged(*its) != _merged(real.shape, real.stride()):
            return f"{name} has axes {tuple(real.shape)} {real.stride()}, stated {its}"
    return ""


def _leaves(name: str, stated: Any, real: Any) -> Iterator[tuple[str, Any, Any]]:
    if name == "PACKING" and real is not None:
        stated, real = stated[:4], real[:4]  # the kind, and the sizes of blocks
    if isinstance(stated, tuple) and isinstance(real, tuple) and len(stated) == len(real):
        for i, pair in enumerate(zip(stated, real, strict=True)):
            yield from _leaves(f"{name}{i}", *pair)
    else:
        yield name, stated, real


def _value(number: Int, numbers: dict[str, int]) -> int:
    return sum(times * prod(numbers[name] for name in m) for m, times in number.poly.items())


def _merged(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """The axes of a tensor, sorted; axes that follow each other in memory are one axis."""
    axes: list[tuple[int, int]] = []
    pairs = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size > 1]
    for size, stride in sorted(pairs, key=lambda axis: (-axis[1], -axis[0])):
        if axes and axes[-1][1] == size * stride:
            size *= axes.pop()[0]
        axes.append((size, stride))
    return axes


def pytest_configure(config: Any) -> None:
    unchecked = Launch.run

    def run(launch: Launch) -> None:
        sizes = [n for name, n in launch.arguments.items() if name.startswith("BLOCK_")]
        key = (launch.name, str(mode_of(launch)), *sizes)
        _seen[key] += 1
        if _seen[key] <= _MOST:
            reason = why_not(launch)
            assert not reason, f"{launch.name} isn't launched as stated: {reason}"
        unchecked(launch)

    Launch.run = run  # type: ignore[method-assign]


def lines_of() -> tuple[bool, str]:
    files = [f"tests/kernels/{name}.py" for name in _TESTS.split()]
    options = ["-q", "-n", "0", "-p", "tools.prove.launches"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode != 0, f"launches of the tests: {done.stdout[-3000:]}"
