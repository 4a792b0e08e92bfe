"""A packed weight: its format and its tensors.

Each format is a frozen dataclass of numbers.  It lists the tensors that it needs, checks them,
dequantizes rows of the weight, and describes the tensors to the kernels that read them.
"""

from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # Python 3.10's own can't be generic

from ..common.row_blocks import rows_at_a_time, slices

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of scales
Expected = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]  # name: shape and dtypes
_KNOWN: dict[str, type["Format"]] = {}


class Coding(NamedTuple):
    """How kernels dequantize a weight: the fields of ``kernels.Packed`` that aren't tensors.

    kernels/packed.py explains each field.  ``outer_block`` 0: a weight has one outer scale, if any.
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
    """How packed tensors represent a weight [``rows``, ``columns``].

    A subclass has only fields of type int, float, str and bool, so that :attr:`text` can hold them.
    A field ``compute`` names the dtype of the vendor's own dequantization.
    """

    rows: int
    columns: int
    # Dimensions of the first tensor of one weight; a stack adds one.
    dims: ClassVar[int] = 2
    # Whether rows can be dequantized without the others.
    by_rows: ClassVar[bool] = True
    # How products with x run: "dense", with the dequantized weight, or "int8", with its codes.
    product: ClassVar[str] = "dense"

    def __init_subclass__(cls) -> None:
        if not cls.__name__.startswith("_"):  # a base class has one
            _KNOWN[cls.__name__] = cls
        # A dataclass would generate its own, without source lines.
        cls.__hash__ = Format.__hash__  # type: ignore[method-assign]

    def __hash__(self) -> int:
        return hash((self.rows, self.columns))

    @property
    def label(self) -> str:
        """The format's usual name, for reports: "NF4"."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, in order."""
        return tuple(self.expected())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the original weight, where the format records it; float32 otherwise."""
        return getattr(torch, getattr(self, "compute", "float32"))

    def expected(self) -> Expected:
        """Name, shape and allowed dtypes of each tensor.  Raises ValueError for invalid fields."""
        raise NotImplementedError

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise ValueError unless the tensors fit the format: it says what came, and what fits."""
        expected = self.expected()
        if len(tensors) != len(expected):
            names = ", ".join(expected)
            raise ValueError(f"{len(tensors)} tensors came, but there must be {names}")
        for tensor, (name, (shape, dtypes)) in zip(tensors, expected.items(), strict=True):
            if tensor.shape != shape:
                raise ValueError(f"its {name} has shape {tuple(tensor.shape)}, but must be {shape}")
            if tensor.dtype not in dtypes:
                fits = " or ".join(map(str, dtypes))
                raise ValueError(f"its {name} has dtype {tensor.dtype}, but must be {fits}")
            if not tensor.is_contiguous():
                raise ValueError(f"its {name} has strides {tensor.stride()}: call .contiguous()")

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        """Write ``len(out)`` rows from ``first`` on to ``out`` [rows, columns]; return ``out``.

        The bits equal the vendor's own dequantization in out's dtype, which is floating.  The last
        stride of out is 1; its rows may have gaps between them.
        """
        raise NotImplementedError

    def make(
        self, tensors: Sequence[Tensor], first: int, count: int, dtype: torch.dtype
    ) -> Tensor | None:
        """The same rows as a new tensor of any strides, where this is faster; otherwise None."""
        return None

    @property
    def coding(self) -> Coding | None:
        """How kernels read the tensors of :meth:`coded`; None: no kernel reads the format.

        The Triton backend rejects codings that its kernels can't handle, for example blocks whose
        size is no power of two.
        """
        return None

    def coded(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors that kernels read, of a weight or a stack: codes, scales, outer scales."""
        return tensors

    @property
    def text(self) -> str:
        """The record as words, for :func:`from_text`: "Affine 8 16 8 1 16 False 1.0"."""
        values = [str(getattr(self, name)) for name in self.__match_args__]  # the fields, in order
        return " ".join([type(self).__name__, *values])


def from_text(text: str) -> Format:
    """The format that :attr:`Format.text` describes.  Raises ValueError for any other text."""
    name, *words = text.split(" ")
    kind = _KNOWN.get(name)
    if kind is None or len(words) != len(kind.__match_args__):
        raise ValueError(f"{text!r} tells of no format; there are {', '.join(sorted(_KNOWN))}")
    return kind(*map(_value_of, words))


def _value_of(word: str) -> Any:
    """The value of a Python literal (number or bool); any other word unchanged."""
    try:
        return literal_eval(word)
    except (ValueError, SyntaxError):
        return word


class Quantized(NamedTuple):
    """A packed weight [N, K]; it never trains.

    It replaces the plain weight of a :class:`.projection.Base`.  For a stack [E, N, K] of experts
    ``format`` describes one expert, and each tensor has a leading dimension E.
    """

    format: Format
    tensors: tuple[Tensor, ...]

    def size(self) -> torch.Size:
        """The shape, as a method: torch.compile before 2.13 can't read a property of a tuple."""
        codes = self.tensors[0].shape
        lead = codes[: len(codes) - self.format.dims]
        return torch.Size((*lead, self.format.rows, self.format.columns))

    @property
    def shape(self) -> torch.Size:
        return self.size()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the format; a call may use another one."""
        return self.format.dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def read(self, first: int, out: Tensor) -> Tensor:
        """Rows of the weight, as :func:`.row_blocks.read_rows` returns them."""
        made = self.format.make(self.tensors, first, len(out), out.dtype)
        return self.format.read(self.tensors, first, out) if made is None else made

    def source(self) -> "Quantized | Tensor":
        """Itself if its rows can be dequantized block by block, else the whole dense weight."""
        return self if self.format.by_rows else self.dense(torch.float32)

    def dim(self) -> int:
        return len(self.size())

    def check(self) -> None:
        """Raise ValueError unless the tensors fit the format: it says what came, and what fits."""
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
        """The weight of one expert of a stack, as views."""
        return Quantized(self.format, tuple([tensor[expert] for tensor in self.tensors]))

    def unbind(self) -> list["Quantized"]:
        """The weights of all experts of a stack, as views."""
        tensors = zip(*[tensor.unbind() for tensor in self.tensors], strict=True)
        return [Quantized(self.format, of_one) for of_one in tensors]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole weight in this dtype, as a new tensor."""
        with torch.no_grad():
            if self.dim() == 3:
                out = torch.empty(self.shape, dtype=dtype, device=self.device)
                for i, place in enumerate(out):
                    place.copy_(self.one(i).dense(dtype))
                return out
            made = self.format.make(self.tensors, 0, self.format.rows, dtype)
            if made is not None:
                return made.contiguous()
            out = torch.empty(self.shape, dtype=dtype, device=self.device)
            for rows in slices(len(out), rows_at_a_time(out)):
                self.format.read(self.tensors, rows.start, out[rows])
        return out


def product_of(weight: Tensor | Quantized) -> str:
    """How products of x with this weight run (:attr:`Format.product`)."""
    return weight.format.product if isinstance(weight, Quantized) else "dense"


def name_of(dtype: torch.dtype) -> str:
    """The dtype's name as records hold it: "float16"."""
    return str(dtype).removeprefix("torch.")


def of_rows(values: Tensor, first: int, count: int, block_rows: int) -> Tensor:
    """Expand a value per block of rows to a value per row, for ``count`` rows from ``first`` on.

    values [blocks, n] -> [count, n], or [1, n] where one block contains all these rows.  ``values``
    may also be [blocks].
    """
    some = values[first // block_rows : (first + count - 1) // block_rows + 1]
    if block_rows == 1 or len(some) == 1:
        return some
    ahead = first % block_rows
    return some.repeat_interleave(block_rows, 0)[ahead : ahead + count]
