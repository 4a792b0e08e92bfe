"""A weight that is packed: its format, and its tensors.

A format is a frozen record of numbers, a subclass each.  It says which tensors it needs, checks
them, and makes rows of the weight from them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # Python 3.10's own can't be generic

from ..blocks import rows_at_a_time

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what scales may be
_KNOWN: dict[str, type["Format"]] = {}
# Elements of 16 bits that are made at once.
_AT_ONCE = 2**18


@dataclass(frozen=True)
class Format:
    """What packed tensors stand for: a weight [``rows``, ``columns``].

    Fields of a subclass are whole numbers, numbers, words and switches, so that a text can carry
    them; one called ``compute`` names the dtype in which the vendor dequantises.
    """

    rows: int
    columns: int
    # Dimensions of the first tensor; a stack's has more.
    dims: ClassVar[int] = 2

    def __init_subclass__(cls) -> None:
        _KNOWN[cls.__name__] = cls

    @property
    def label(self) -> str:
        """What people call it, for a report: "NF4"."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """What the tensors are called, in their order."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight that was packed, as far as the format knows it."""
        return getattr(torch, getattr(self, "compute", "float32"))

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise ValueError unless the tensors are this format's: what came, and what fits."""
        raise NotImplementedError

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        """``len(out)`` rows from ``first`` on, written to ``out`` [rows, columns], and it.

        Bit for bit what the vendor's own dequantisation gives in out's dtype, which is floating;
        out's rows may lie apart, their elements don't.
        """
        raise NotImplementedError

    def make(
        self, tensors: Sequence[Tensor], first: int, count: int, dtype: torch.dtype
    ) -> Tensor | None:
        """The same rows as a new tensor, where that is faster than to fill one; else None."""
        return None

    @property
    def text(self) -> str:
        """The record as words, for :func:`from_text`."""
        values = [str(getattr(self, name)) for name in self.__match_args__]  # of the dataclass
        return " ".join([type(self).__name__, *values])


def from_text(text: str) -> Format:
    """The format that :attr:`Format.text` tells of.  Raises ValueError for any other text."""
    name, *words = text.split(" ")
    kind = _KNOWN.get(name)
    places = () if kind is None else fields(kind)
    if kind is None or len(words) != len(places):
        raise ValueError(f"{text!r} tells of no format; there are {', '.join(sorted(_KNOWN))}")
    return kind(
        *[_VALUES[str(place.type)](word) for place, word in zip(places, words, strict=True)]
    )


# By the annotation of a field, which is its type or that type's name.
_VALUES: dict[str, Callable[[str], Any]] = {
    "int": int, "<class 'int'>": int,
    "float": float, "<class 'float'>": float,
    "str": str, "<class 'str'>": str,
    "bool": "True".__eq__, "<class 'bool'>": "True".__eq__,
}  # fmt: skip


class Quantised(NamedTuple):
    """A weight [N, K] that is packed, a :class:`fastlora.blocks.Source`: none of it ever trains.

    It stands where a :class:`fastlora.projection.Base` has a plain weight.  A stack [E, N, K], of
    experts, has the format of one of them, and each tensor E of them.
    """

    format: Format
    tensors: tuple[Tensor, ...]

    def size(self) -> torch.Size:
        """Its shape, for what torch.compile traces: before 2.13 it reads no property of a tuple."""
        codes = self.tensors[0].shape
        lead = codes[: len(codes) - self.format.dims]
        return torch.Size((*lead, self.format.rows, self.format.columns))

    @property
    def shape(self) -> torch.Size:
        return self.size()

    @property
    def dtype(self) -> torch.dtype:
        """The format's, not that of a call."""
        return self.format.dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def read(self, first: int, out: Tensor) -> Tensor:
        made = self.format.make(self.tensors, first, len(out), out.dtype)
        return self.format.read(self.tensors, first, out) if made is None else made

    def dim(self) -> int:
        return len(self.size())

    def check(self) -> None:
        """Raise ValueError unless the tensors are the format's: what came, and what fits."""
        if self.dim() != 3:
            self.format.check(self.tensors)
            return
        experts = {len(tensor) if tensor.dim() else 0 for tensor in self.tensors}
        if len(experts) > 1 or 0 in experts:
            raise ValueError(f"its tensors are of {experts} experts, but must be of the same")
        for tensor in self.tensors:
            if not tensor.is_contiguous():
                raise ValueError(f"a tensor has strides {tensor.stride()}: call .contiguous()")
        self.format.check(self.one(0).tensors)

    def one(self, expert: int) -> "Quantised":
        """The weight of one of a stack, as views."""
        return Quantised(self.format, tuple([tensor[expert] for tensor in self.tensors]))

    def unbind(self) -> list["Quantised"]:
        """The weight of each of a stack, as views."""
        tensors = zip(*[tensor.unbind() for tensor in self.tensors], strict=True)
        return [Quantised(self.format, of_one) for of_one in tensors]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole weight in this dtype, new."""
        with torch.no_grad():
            if self.dim() == 3:
                out = torch.empty(self.shape, dtype=dtype, device=self.device)
                for i, place in enumerate(out):
                    place.copy_(self.one(i).dense(dtype))
                return out
            made = self.format.make(self.tensors, 0, self.format.rows, dtype)
            if made is not None:
                return made
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
            step = rows_at_a_time(out)
            for first in range(0, len(out), step):
                self.format.read(self.tensors, first, out[first : first + step])
        return out


def check_shapes(
    names: Iterable[str],
    tensors: Sequence[Tensor],
    expected: Sequence[tuple[tuple[int, ...], tuple[torch.dtype, ...]]],
) -> None:
    """Raise ValueError unless every tensor has its shape and one of its dtypes, and lies dense."""
    names = tuple(names)
    if len(tensors) != len(names):
        raise ValueError(f"{len(tensors)} tensors came, but there must be {', '.join(names)}")
    for name, tensor, (shape, dtypes) in zip(names, tensors, expected, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"its {name} has shape {tuple(tensor.shape)}, but must be {shape}")
        if tensor.dtype not in dtypes:
            fits = " or ".join(map(str, dtypes))
            raise ValueError(f"its {name} has dtype {tensor.dtype}, but must be {fits}")
        if not tensor.is_contiguous():
            raise ValueError(f"its {name} has strides {tensor.stride()}: call .contiguous()")


def name_of(dtype: torch.dtype) -> str:
    """As a text and a record hold it: float16."""
    return str(dtype).removeprefix("torch.")


def place_for(out: Tensor, dtype: torch.dtype, dense: bool = False) -> Tensor:
    """``out``, if it has this dtype, and if asked lies ``dense``; else a new tensor like it."""
    fits = out.dtype == dtype and (out.is_contiguous() or not dense)
    return out if fits else torch.empty(out.shape, dtype=dtype, device=out.device)


def write_scaled(out: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """out = codes · scale, rounded once, and it.  All have as many dimensions; scale's may be 1.

    The codes are whole numbers that out's dtype holds.
    """
    as_it_is = out.dtype == scale.dtype == torch.bfloat16 or out.element_size() != 2
    if as_it_is or out.device.type != "cpu" or not out.numel():
        return out.copy_(codes).mul_(scale)
    # By way of float32: torch's product takes 2 times as long in float16, 4 to 8 between dtypes.
    step = max(1, _AT_ONCE // out[0].numel())
    wide = torch.empty_like(out[:step], dtype=torch.float32, memory_format=torch.contiguous_format)
    for first in range(0, len(out), step):
        rows = slice(first, first + step)
        some = wide[: len(out) - first].copy_(codes[rows])
        out[rows].copy_(some.mul_(scale if len(scale) == 1 else scale[rows]))
    return out


def of_rows(values: Tensor, first: int, count: int, block_rows: int) -> Tensor:
    """Those of ``count`` rows from ``first`` on: [count, n], or [1, n] if they are in one block.

    ``values``: [blocks of rows, n], or without columns.
    """
    some = values[first // block_rows : (first + count - 1) // block_rows + 1]
    if block_rows == 1 or len(some) == 1:
        return some
    ahead = first % block_rows
    return some.repeat_interleave(block_rows, 0)[ahead : ahead + count]
