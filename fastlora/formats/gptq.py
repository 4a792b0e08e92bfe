"""GPTQ: columns of a weight in groups, and the numbers of a column packed across int32 words.

And GPTQ-Model's ``TorchLinear`` and ``TritonV2Linear``: GPTQ's checkpoints, as they are trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..foreign import derived_from
from .arithmetic import place_for
from .format import FLOATS, Expected, Format, Quantized, name_of
from .vendor import Once, PackedLayer, checked


@dataclass(frozen=True)
class Gptq(Format):
    """(numbers - zeros) · scales in the dtype ``compute``; input k belongs to group g_idx[k].

    Numbers of 2, 3, 4 or 8 bits lie end to end in int32 words, from the lowest bit on: those of a
    row of the weight down a column of qweight [columns · bits / 32, rows], and zeros along a row of
    qzeros [groups, rows · bits / 32], as they are and not one less (version 2 of the format).
    scales is [groups, rows].  ``ordered``: that every group is ``columns / groups`` inputs in their
    order, so that g_idx needn't be looked at.
    """

    bits: int
    groups: int
    compute: str
    ordered: bool

    names: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    @property
    def label(self) -> str:
        return f"GPTQ {self.bits} bit"

    def expected(self) -> Expected:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"{self.bits} bits came, but GPTQ has 2, 3, 4 or 8")
        if self.groups < 1 or (self.ordered and self.columns % self.groups):
            raise ValueError(f"{self.groups} groups don't divide {self.columns} columns")
        ints = (torch.int32,)
        return [
            ((self._words(self.columns), self.rows), ints),
            ((self.groups, self._words(self.rows)), ints),
            ((self.groups, self.rows), (self.dtype,) if self.dtype in FLOATS else ()),
            ((self.columns,), (torch.int32, torch.int64)),
        ]

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        qweight, qzeros, scales, g_idx = tensors
        rows = slice(first, first + len(out))
        values = place_for(out, self.dtype)
        values.copy_(self._numbers(qweight[:, rows], 0, self.columns).t())
        zeros = self._numbers(qzeros.t(), first, len(out)).to(self.dtype)  # [rows, groups]
        scale = scales[:, rows].t()
        if self.ordered:
            of_groups = values.unflatten(1, (self.groups, -1))
            of_groups.sub_(zeros[..., None]).mul_(scale[..., None])
        else:
            values.sub_(zeros[:, g_idx]).mul_(scale[:, g_idx])
        return out if values is out else out.copy_(values)

    def _words(self, count: int) -> int:
        return -(-count * self.bits // 32)

    def _numbers(self, words: Tensor, first: int, count: int) -> Tensor:
        """Some of the numbers that lie down the columns of words [words, n]: int32 [count, n]."""
        numbers = torch.arange(first, first + count, dtype=torch.int64, device=words.device)
        start = numbers * self.bits
        word, shift = start // 32, (start % 32).to(torch.int32)[:, None]
        numbers = words[word] >> shift
        if 32 % self.bits:  # some begin in one word and end in the next
            begun = (32 - shift).clamp(max=self.bits)  # bits
            numbers &= (1 << begun) - 1  # what is above is the word's sign
            rest = words[(word + 1).clamp(max=len(words) - 1)] << begun
            numbers |= torch.where(begun < self.bits, rest, 0)
        return numbers.bitwise_and_(2**self.bits - 1)


# GPTQ-Model's layers of it.

_PACKAGE = "gptqmodel.nn_modules.qlinear"
# The others lay the numbers out for one kernel, or have other numbers.
_READ = ("TorchLinear", "TritonV2Linear")
_ORDERED = Once()

PARTS: tuple[str, ...] = ("qweight",)


def owns(layer: Any, kind: type[nn.Module]) -> bool:
    theirs = _theirs(kind)
    return theirs is not None and kind.forward is theirs.forward


@checked("its quantization state is")
def read(layer: Any) -> PackedLayer | str:
    kind = _theirs(type(layer))
    if kind is None or kind.__name__ not in _READ:
        return "its numbers lie as its kernel reads them: GPTQConfig(backend='auto_trainable')"
    if layer.planar or layer.pack_dtype != torch.int32:
        return "its numbers lie in planes, or in other words than int32"
    if layer.adapter is not None:
        return "it has an adapter of GPTQ-Model's"
    if layer.online_full_had or layer.online_partial_had:
        return "its input is rotated (Hadamard) before its weight is used"
    rows, columns, scales = layer.out_features, layer.in_features, layer.scales
    groups = len(scales)
    ordered = _ORDERED.ask(layer.g_idx, lambda g_idx: _is_ordered(g_idx, groups))
    format = Gptq(rows, columns, layer.bits, groups, name_of(scales.dtype), ordered)
    tensors = tuple([getattr(layer, name).detach() for name in format.names])
    return PackedLayer(Quantized(format, tensors))


def pack(layer: Any, weight: Tensor) -> None:
    raise ValueError("GPTQ's numbers are read, and not made: its rounding needs data")


def _theirs(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of GPTQ-Model's that this one is, or derives from."""
    if derived_from(kind, _PACKAGE, "GPTQQuantLinear") is None:
        return None
    return next(base for base in kind.__mro__ if base.__module__.startswith(_PACKAGE))


def _is_ordered(g_idx: Tensor, groups: int) -> bool:
    """Whether the columns are groups of one size, one after another."""
    if len(g_idx) % groups:
        return False
    columns = torch.arange(len(g_idx), dtype=g_idx.dtype, device=g_idx.device)
    return torch.equal(g_idx, columns // (len(g_idx) // groups))
