"""A weight that is packed: its format, and its tensors.

A format is a frozen record of numbers, a subclass each.  It says which tensors it needs, checks
them, makes rows of the weight from them, and states what kernels read of them.
"""

from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # Python 3.10's own can't be generic

from ..blocks import rows_at_a_time

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what scales may be
Expected = Sequence[tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
_KNOWN: dict[str, type["Format"]] = {}


class Coding(NamedTuple):
    """How kernels read a weight that they make themselves: the fields of ``kernels.Packed`` that
    are numbers and words (kernels/packed.py says what they mean).

    ``outer_block`` 0: if there are outer scales, a weight has one.
    """

    kind: str  # "four-bit", "int8" or "float8"
    block_rows: int  # 1 for "four-bit"
    block_columns: int
    table: tuple[float, ...] = ()
    outer_block: int = 0
    factor: float = 1.0
    low_first: bool = False


@dataclass(frozen=True)
class Format:
    """What packed tensors stand for: a weight [``rows``, ``columns``].

    Fields of a subclass are whole numbers, numbers, words and switches, so that a text can carry
    them; one called ``compute`` names the dtype in which the vendor dequantizes.
    """

    rows: int
    columns: int
    # Dimensions of the first tensor; a stack's has more.
    dims: ClassVar[int] = 2

    def __init_subclass__(cls) -> None:
        if not cls.__name__.startswith("_"):  # what formats have in common
            _KNOWN[cls.__name__] = cls
        cls.__hash__ = Format.__hash__  # type: ignore[method-assign]  # and no dataclass's

    def __hash__(self) -> int:
        return hash((self.rows, self.columns))

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

    def expected(self) -> Expected:
        """Shape and possible dtypes of each tensor.  Raises ValueError for wrong numbers."""
        raise NotImplementedError

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise ValueError unless the tensors are this format's: what came, and what fits."""
        expected, names = self.expected(), self.names
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

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        """``len(out)`` rows from ``first`` on, written to ``out`` [rows, columns], and it.

        Bit for bit what the vendor's own dequantization gives in out's dtype, which is floating;
        out's rows may lie apart, their elements don't.
        """
        raise NotImplementedError

    def make(
        self, tensors: Sequence[Tensor], first: int, count: int, dtype: torch.dtype
    ) -> Tensor | None:
        """The same rows as a new tensor, where that is faster than to fill one; else None."""
        return None

    @property
    def coding(self) -> Coding | None:
        """What :meth:`coded` gives; None: no kernel reads it, and torch's operations make it dense.

        The backend knows what its kernels can't do: blocks that are no power of two, for one.
        """
        return None

    def coded(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of a weight or a stack what kernels read: codes, scales, and if they are codes, outer."""
        return tensors

    @property
    def text(self) -> str:
        """The record as words, for :func:`from_text`."""
        values = [str(getattr(self, name)) for name in self.__match_args__]  # of the dataclass
        return " ".join([type(self).__name__, *values])


def from_text(text: str) -> Format:
    """The format that :attr:`Format.text` tells of.  Raises ValueError for any other text."""
    name, *words = text.split(" ")
    kind = _KNOWN.get(name)
    if kind is None or len(words) != len(kind.__match_args__):
        raise ValueError(f"{text!r} tells of no format; there are {', '.join(sorted(_KNOWN))}")
    return kind(*map(_value_of, words))


def _value_of(word: str) -> Any:
    """A number or a switch, as Python writes it; any other word is itself."""
    try:
        return literal_eval(word)
    except (ValueError, SyntaxError):
        return word


class Quantized(NamedTuple):
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

    def one(self, expert: int) -> "Quantized":
        """The weight of one of a stack, as views."""
        return Quantized(self.format, tuple([tensor[expert] for tensor in self.tensors]))

    def unbind(self) -> list["Quantized"]:
        """The weight of each of a stack, as views."""
        tensors = zip(*[tensor.unbind() for tensor in self.tensors], strict=True)
        return [Quantized(self.format, of_one) for of_one in tensors]

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


def name_of(dtype: torch.dtype) -> str:
    """As a text and a record hold it: float16."""
    return str(dtype).removeprefix("torch.")


def of_rows(values: Tensor, first: int, count: int, block_rows: int) -> Tensor:
    """Those of ``count`` rows from ``first`` on: [count, n], or [1, n] if they are in one block.

    ``values``: [blocks of rows, n], or without columns.
    """
    some = values[first // block_rows : (first + count - 1) // block_rows + 1]
    if block_rows == 1 or len(some) == 1:
        return some
    ahead = first % block_rows
    return some.repeat_interleave(block_rows, 0)[ahead : ahead + count]
