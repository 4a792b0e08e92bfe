"""The values that a kernel's source computes with: integers, conditions, pointers, opaque numbers.

An operation asks ``proof``, the current :class:`~.engine.Proof`, for new unknowns, and tells it
which claims it needs.
"""

import operator
from math import prod
from typing import Any

import z3

from .numbers import Monomial, Poly, expression, plus, times, without

proof: Any = None  # engine.py sets it
_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv floordiv mod and rand or xor rshift lshift "
    "lt le gt ge eq ne neg invert"
)


class FailedError(Exception):
    """A claim isn't proved, or the source does what this tool can't follow."""


class Int:
    """An integer, or one element of a vector of integers, of 32 bits or 64.

    Launchers take it for true: a size that they ask, such as a number of segments, isn't 0.
    """

    def __init__(self, poly: Poly, bits: int = 32) -> None:
        self.poly, self.bits = poly, bits

    @property
    def z(self) -> z3.ArithRef:
        return expression(self.poly)

    def _made(self, poly: Poly, other: "Int | None" = None) -> "Int":
        made = Int(poly, max(self.bits, other.bits if other else 0))
        proof.fits(made)
        return made

    def __add__(self, other: Any) -> Any:
        other = as_int(other)
        return self._made(plus(self.poly, other.poly), other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        other = as_int(other)
        return self._made(plus(self.poly, other.poly, -1), other)

    def __mul__(self, other: Any) -> Any:
        other = as_int(other)
        return self._made(times(self.poly, other.poly), other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> "Int":
        return proof.divided(self, as_int(other))[0]

    def __rfloordiv__(self, other: Any) -> "Int":
        return as_int(other) // self

    def __mod__(self, other: Any) -> "Int":
        return proof.divided(self, as_int(other))[1]

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, _: Any) -> "Int":
        return self

    def to(self, dtype: str, **_: Any) -> Any:
        if dtype in ("int32", "int64"):
            made = Int(self.poly, int(dtype[3:]))
            proof.fits(made)
            return made
        return Data()

    def __truediv__(self, other: Any) -> "Data":
        return Data()

    __rtruediv__ = __truediv__


def _comparison(compare: Any) -> Any:
    return lambda self, other: Bool(compare(self.z, as_int(other).z))


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Int, f"__{_name}__", _comparison(getattr(operator, _name)))


def as_int(value: Any) -> Int:
    if isinstance(value, Int):
        return value
    if isinstance(value, int):
        return Int({(): int(value)} if value else {})
    raise FailedError(f"{type(value).__name__} as an integer at {proof.where()}")


def _extreme(of_ints: Any, is_better: Any) -> Any:
    """``max`` or ``min``, also of unknown numbers."""

    def function(*listed: Any, default: Any = None) -> Any:
        first, *others = [*(listed if len(listed) > 1 else listed[0])] or [default]
        if all(isinstance(number, int) for number in (first, *others)):
            return of_ints(first, *others, first)
        for number in others:
            first = proof.chosen(is_better(as_int(first).z, as_int(number).z), first, number)
        return first

    return function


largest, smallest = _extreme(max, operator.ge), _extreme(min, operator.le)


class Bool:
    """A condition.  An ``if`` on it runs the kernel once for each outcome."""

    def __init__(self, claim: z3.BoolRef) -> None:
        self.claim = claim

    def __and__(self, other: "Bool") -> "Bool":
        return Bool(z3.And(self.claim, other.claim))

    def __getitem__(self, _: Any) -> "Bool":
        return self

    def __bool__(self) -> bool:
        return proof.branch(self.claim)

    def to(self, _: str) -> "Bool":
        return self


class Tally:
    """The number of lanes that fulfil a condition, summed over a loop."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __add__(self, other: Any) -> "Tally":
        if not isinstance(other, Bool) or proof.counted is not None:
            raise FailedError(f"a sum in a loop at {proof.where()}")
        proof.counted = other.claim
        return self


class Data:
    """Numbers that no address depends on."""

    dtype = "bfloat16"

    def __init__(self, shape: tuple = (), *_: Any) -> None:
        self.shape = shape

    def _result(self, other: Any = None, *_: Any) -> "Data":
        shapes = self.shape, other.shape if isinstance(other, Data) else ()
        return Data(max(shapes, key=len))

    for _name in _OPERATORS.split():
        locals()[f"__{_name}__"] = _result
    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, _: Any) -> "Data":
        return self

    def __bool__(self) -> bool:
        raise FailedError(f"a branch on data at {proof.where()}")

    def to(self, *_: Any, **__: Any) -> "Data":
        return self

    def reshape(self, *shape: Any) -> "Data":
        return Data(shape)

    def permute(self, *order: int) -> "Data":
        return Data(tuple(self.shape[i] for i in order))

    def split(self) -> tuple["Data", "Data"]:
        return (Data(self.shape[:-1]),) * 2

    @property
    def T(self) -> "Data":  # noqa: N802
        return Data(self.shape[::-1])


class Operand:
    """A tensor, with the methods that launchers call.  Without ``strides`` it is contiguous.

    Each stride is a product of unknowns, or 1.  ``values``: of integers that addresses depend on,
    (least, end, bits), where None is any.  ``ordered`` and ``distinct``: the values grow with the
    index; no two are equal.
    """

    dtype, device = "bfloat16", None

    def __init__(
        self, *shape: Any, name: str = "", strides: Any = None, values: tuple | None = None,
        ordered: bool = False, distinct: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.shape, self.values = name, shape, values
        self.strides = tuple(strides or _contiguous(shape))
        self.ordered, self.distinct = ordered, distinct

    def stride(self, axis: int | None = None) -> Any:
        return self.strides if axis is None else self.strides[axis]

    def laws(self, one: Any, other: Any) -> list[z3.BoolRef]:
        """Laws of two loaded values, which are relations (engine.py)."""
        i, j, a, b = one.arguments[0], other.arguments[0], one.results[0], other.results[0]
        found = [z3.Implies(i <= j, a <= b)] if self.ordered else []
        return found + ([z3.Implies(a == b, i == j)] if self.distinct else [])

    def is_contiguous(self) -> bool:
        pairs = zip(self.strides, _contiguous(self.shape), strict=True)
        return all(as_int(a).poly == as_int(b).poly for a, b in pairs)

    def new_empty(self, *shape: Any, dtype: Any = None) -> "Operand":
        return Operand(*shape)

    def numel(self) -> Any:
        return prod(self.shape)

    def element_size(self) -> int:
        return 2

    @property
    def mT(self) -> "Operand":  # noqa: N802
        """A view with the last two axes exchanged."""
        (*outer, a, b), (*outer_strides, c, d) = self.shape, self.strides
        return Operand(*outer, b, a, strides=(*outer_strides, d, c))

    @property
    def axes(self) -> list[tuple[Int, Monomial]]:
        """Each axis's size, and its stride as a product of unknowns; the stride () is 1."""
        strides = [next(iter(as_int(stride).poly)) for stride in self.strides]
        return list(zip(map(as_int, self.shape), strides, strict=True))

    def indices(self, address: Poly) -> list[Int]:
        """The index on each axis, from the address: a term belongs to the longest stride in it."""
        found: list[Poly] = [{} for _ in self.axes]
        order = sorted(range(len(self.axes)), key=lambda axis: -len(self.axes[axis][1]))
        for monomial, number in address.items():
            for axis in order:
                stride = self.axes[axis][1]
                if not without(stride, monomial):
                    rest = without(monomial, stride)
                    found[axis] = plus(found[axis], {rest: number})
                    break
            else:
                raise FailedError(f"{self.name} has no stride in {monomial} at {proof.where()}")
        return [Int(poly, 64) for poly in found]


def _contiguous(shape: tuple) -> list:
    return [prod(shape[axis + 1 :]) for axis in range(len(shape))]


class Pointer:
    def __init__(self, operand: Operand, address: Poly | None = None) -> None:
        self.operand, self.address = operand, address or {}
        self.dtype = type("Type", (), {"element_ty": operand.dtype})

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.operand, plus(self.address, as_int(other).poly))

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Pointer":
        return Pointer(self.operand, plus(self.address, as_int(other).poly, -1))


class Descriptor:
    """A tensor descriptor: its operand's shape, and the box that a load or store has.

    The hardware leaves out a box's elements outside of the shape, as a mask does.
    """

    def __init__(self, operand: Operand, *box: Any) -> None:
        self.operand, self.box, self.dtype = operand, box, operand.dtype

    def _access(self, kind: str, start: list) -> None:
        proof.descriptor_access(kind, self, [as_int(each) for each in start])

    def load(self, start: list) -> Data:
        self._access("load", start)
        return Data(self.box)

    def store(self, start: list, value: Data) -> None:
        if [as_int(n).poly for n in value.shape] != [as_int(n).poly for n in self.box]:
            proof.failed(f"store {self.operand.name} {proof.where()}", "the box isn't the tile")
        self._access("store", start)
