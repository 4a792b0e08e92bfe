"""The substitute for ``triton.language``.  Each lane of a vector is one unknown."""

from collections.abc import Generator
from typing import Any

import z3

from . import values
from .engine import Fact
from .values import Bool, Data, Int, Pointer, Tally, as_int

int32, int64, uint32, int16, int8 = "int32", "int64", "uint32", "int16", "int8"
float32, float16, bfloat16, float8e4nv = "float32", "float16", "bfloat16", "float8e4nv"
constexpr = object
static_range = range
PropagateNan = type("PropagateNan", (), {"ALL": None})


def program_id(axis: int) -> Int:
    return Int(values.proof.programs[axis][0].poly)


def num_programs(axis: int) -> Int:
    return Int(as_int(values.proof.programs[axis][1]).poly)


def arange(_: int, end: Any) -> Int:
    return values.proof.lane(end)


def cdiv(a: Any, b: Any) -> Int:
    return (as_int(a) + b - 1) // b


zeros = full = Data


def load(pointer: Pointer, mask: Bool | None = None, other: Any = None) -> Any:
    values.proof.access("load", pointer, mask)
    operand = pointer.operand
    if operand.values is None:
        return Data()
    return values.proof.loaded(operand, operand.indices(pointer.address), mask, other)


def store(pointer: Pointer, value: Any, mask: Bool | None = None) -> None:
    values.proof.access("store", pointer, mask)


def where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Bool) and all(type(each) in (Int, int) for each in (a, b)):
        return values.proof.chosen(condition.claim, a, b)
    return elementwise(a, b)


def sum(tile: Any, _: int) -> Any:
    return tile if isinstance(tile, Bool) else Data()


def elementwise(*tiles: Any, **_: Any) -> Data:
    return next((tile for tile in tiles if isinstance(tile, Data)), Data())


max = exp = log = abs = maximum = minimum = div_rn = elementwise


def join(one: Data, _: Data) -> Data:
    return Data((*one.shape, 2))


def loop(name: str, *bounds: Any) -> Generator[Int, None, None]:
    """``range`` and ``tl.range``: one step, for any number of steps before it."""
    proof = values.proof
    start, end, step = [0, *bounds, 1] if len(bounds) == 1 else [*bounds, 1][:3]
    start, end, step = map(as_int, (start, end, step))
    proof.prove(step.z > 0, f"step of a loop: {proof.where()}")
    proof.counted = None

    def begin() -> Int:
        k = proof.unknown(f"step of {name}")
        k.bits = 64
        proof.given(k.z >= 0)
        proof.steps.append(k)
        return Int(start.poly, 64) + k * step

    def holds(number: z3.ArithRef) -> Generator[Int, None, z3.BoolRef]:
        """Whether a number is counted; the body runs once more, for the number's step and lane."""
        memo, proof.memo, proof.counted, proof.inside = proof.memo, dict(proof.memo), None, False
        index = begin()
        yield index
        proof.steps.pop()
        proof.given((index + proof.lane(step)).z == number)
        proof.memo, proof.inside = memo, True
        return proof.counted

    with proof.scope():
        index = begin()
        proof.facts.append(Fact(index.z < end.z, True))
        narrow = Int(index.poly, start.bits if start.bits == end.bits == step.bits else 64)
        proof.fits(narrow)
        proof.fits(Int((index + step).poly, narrow.bits))
        yield narrow
        proof.steps.pop()
    if proof.counted is not None:
        proof.last = yield from proof.last_counted(start, end, holds)


def at_begin(name: str, variables: dict[str, Any]) -> Any:
    """A variable that a loop's body assigns, at the body's begin; its number is unknown there."""
    value = variables.get(name)
    if type(value) is int:
        return Tally(value)
    return Data() if isinstance(value, Int | Bool | Pointer) else value


def at_end(name: str, variables: dict[str, Any]) -> Any:
    """The variable after the loop."""
    value = variables[name]
    if isinstance(value, Tally):
        return values.proof.last + (1 + value.start)
    return Data() if isinstance(value, Int | Bool | Pointer) else value


def step_number() -> Int:
    return values.proof.steps[-1]
