"""Runs a launcher with unknown sizes, for the arguments of its first launch.

The launcher's source runs unchanged.  Its assertions become facts, because a size that fails one
has no launch.  The config is replaced by any tiles, and its choices by options.
"""

import builtins
import importlib
import pkgutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import fields, replace
from typing import Any
from unittest.mock import patch

import z3

from fastlora import kernels
from fastlora.kernels.config import chosen_config
from fastlora.kernels.launch import Launch, recording
from fastlora.kernels.target import TARGETS

from . import values
from .engine import Proof
from .language import cdiv as up
from .values import Descriptor, Int, Operand, Pointer, largest, smallest

_MODULES = [
    importlib.import_module(f"{kernels.__name__}.{each.name}")
    for each in pkgutil.iter_modules(kernels.__path__)
]


# ``segments``: "sorted", or "any" for ends that aren't sorted or in range.  ``own``: each segment
# has its own numbers.  ``at_once``, ``descriptors``, ``split``: choices of the config and of the
# cost model.  ``transposed``: the answer to conditions on all strides; only Q_TRANSPOSED and hints
# for the compiler depend on these.  ``long``: sizes that don't fit 32 bits.
_FLAGS = "masked order own bias split at_once descriptors transposed add xv low_rank scaled"
_FLAGS += " rotated gradient upstream long"
# ``count``: of projections or of sums.  ``depths``: the number of products with a base.
_OTHERS = {"count": 1, "depths": 1, "segments": "", "packing": None}


class Launcher:
    """A launcher in a mode, which gives the options that differ from these defaults."""

    def __init__(self, proof: Proof, **mode: Any) -> None:
        vars(self).update(dict.fromkeys(_FLAGS.split(), False) | _OTHERS)
        assert mode.keys() <= vars(self).keys(), f"no such options: {mode}"
        vars(self).update(mode)
        self.proof = proof

    def launched(
        self, launcher: Callable, *operands: Any, config: type | None = None, **options: Any
    ) -> dict[str, Any]:
        proof, by_bits = self.proof, self.packing and self.packing["kind"] == "float8 by bits"
        target = TARGETS["sm_80" if by_bits else "sm_90"]  # whether it converts float8
        target = replace(target, processors=proof.size("processors", 1, 2**16))
        replaced = {
            "len": _length, "max": largest, "min": smallest, "cdiv": up,
            "power_of_two": _power_of_two, "target_of": lambda _: target,
            "chosen_config": chosen_config.__wrapped__,  # without its cache
            "splits": self._splits, "loads_at_once": lambda *_: self.at_once,
            "_has_descriptor": lambda *_: True, "all": lambda _: self.transposed,
            "lies_in_rows": lambda *_: True,
            "TensorDescriptor": type("", (), {"from_tensor": lambda of, box: Descriptor(of, *box)}),
        }  # fmt: skip
        if config is not None:
            options["config"] = self._any_config(config)
        launches: list[Launch] = []

        def caught(launch: Launch) -> None:
            launches.append(launch)
            raise StopIteration

        with ExitStack() as stack:
            for module in _MODULES:
                for name, new in replaced.items():
                    if name in vars(module) or hasattr(builtins, name):
                        stack.enter_context(patch.object(module, name, new, create=True))
            stack.enter_context(recording(caught))
            stack.enter_context(suppress(StopIteration))
            launcher(*operands, **options)
        proof.program(*launches[0].grid)
        return {name: _argument(name, each) for name, each in launches[0].arguments.items()}

    def _any_config(self, config: type) -> Any:
        names = [each.name for each in fields(config)]
        numbers = {name: self.proof.block(name.upper()) for name in names if name[:6] == "block_"}
        if "group" in names:
            numbers["group"] = self.proof.size("GROUP", 1, 16)
        chosen = {
            "why_not": "", "capacity": 0, "uses_descriptors": self.descriptors,
            "block_r": self.proof.block("BLOCK_R"),
        }  # fmt: skip
        methods = {name: lambda *_, result=result: result for name, result in chosen.items()}
        return type(config.__name__, (config,), methods)(**numbers, warps=4, stages=1)

    def _splits(self, _capacity: Any, _programs: Any, length: Int, step: Int, _: Any) -> tuple:
        """``config.splits`` and its assertion; any number of splits is wanted."""
        proof = self.proof
        steps = up(up(length, proof.size("wanted splits")), step)
        count = up(length, steps * step)
        proof.given(count.z >= 2 if self.split else count.z == 1)
        proof.given((count * steps * step).z < 2**31)
        return count if self.split else 1, steps


def _argument(name: str, value: Any) -> Any:
    """A kernel's argument, and inside of it the names of all operands."""
    if isinstance(value, Operand):
        value.name = name
        return Pointer(value)
    if isinstance(value, Descriptor):
        value.operand.name = name
    if type(value) is tuple:
        return tuple(_argument(f"{name}{i}", each) for i, each in enumerate(value))
    return value


def _length(of: Any) -> Any:
    return of.shape[0] if isinstance(of, Operand) else len(of)


def _power_of_two(_: Any) -> Int:
    number, sixteenth = (values.proof.unknown("power of two", False) for _ in range(2))
    values.proof.given(number.z >= 1)
    values.proof.given(z3.Or(number.z < 16, number.z == 16 * sixteenth.z))
    return number
