"""GPTQ: groups of columns share a scale, and codes lie end to end in int32 words.

Also GPTQ-Model's ``TorchLinear`` and ``TritonV2Linear``, the classes that train GPTQ checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import derived_from
from .format import FLOATS, Expected, Format, Quantized, name_of
from .vendor import PackedLayer, checked

# GPTQ-Model's dequantize_weight makes the whole weight.  With it a step with 512 rows and a 2048²
# weight of 8 bits takes 1.32 × the time and 1.11 × the peak memory in float32, 1.49 × and 1.40 × in
# bfloat16; 4 bits take 1.06 × and 0.89 ×, 1.19 × and 1.13 × (process time, one thread, the
# operations of gptqmodel 7.7).


@dataclass(frozen=True)
class Gptq(Format):
    """weight = (code - zero) · scale in the dtype ``compute``; column k is in group g_idx[k].

    Codes and zeros have 2, 3, 4 or 8 bits.  They lie end to end in int32 words, from the lowest bit
    on, so that 3 bits may span two words:

    * qweight [columns · bits / 32, rows]: a column of words holds the codes of a row of the weight;
    * qzeros [groups, rows · bits / 32]: a row of words holds the zeros of a group, and not the
      zeros less one (that is version 2 of the format);
    * scales [groups, rows], and g_idx [columns].
    """

    bits: int
    groups: int
    compute: str

    @property
    def label(self) -> str:
        return f"GPTQ {self.bits} bit"

    def expected(self) -> Expected:
        if self.bits not in (2, 3, 4, 8) or self.groups < 1:
            raise ValueError(
                f"{self.bits} bits came in {self.groups} groups: 2, 3, 4 or 8 bits fit"
            )
        ints = (torch.int32,)
        return {
            "qweight": ((self._words(self.columns), self.rows), ints),
            "qzeros": ((self.groups, self._words(self.rows)), ints),
            "scales": ((self.groups, self.rows), (self.dtype,) if self.dtype in FLOATS else ()),
            "g_idx": ((self.columns,), (torch.int32, torch.int64)),
        }

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        return out.copy_(self.make(tensors, first, len(out), out.dtype))

    def make(self, tensors: Sequence[Tensor], first: int, count: int, dtype: torch.dtype) -> Tensor:
        """The rows as the transpose of a new tensor, because a transposing copy is slow."""
        qweight, qzeros, scales, g_idx = tensors
        rows = slice(first, first + count)
        codes = self._unpack(qweight[:, rows], 0, self.columns)  # [columns, count]
        zeros = self._unpack(qzeros.t(), first, count).t()  # [groups, count]
        codes.sub_(zeros[g_idx])
        return scales[:, rows][g_idx].mul_(codes).to(dtype).t()

    def _words(self, count: int) -> int:
        return -(-count * self.bits // 32)

    def _unpack(self, words: Tensor, first: int, count: int) -> Tensor:
        """Codes ``first`` to ``first + count`` of each column: [words, n] -> int32 [count, n]."""
        codes = torch.arange(first, first + count, dtype=torch.int64, device=words.device)
        start = codes * self.bits
        word, shift = start // 32, (start % 32).to(torch.int32)[:, None]
        codes = words[word].bitwise_right_shift_(shift)
        if 32 % self.bits:  # a code may begin in one word and end in the next
            begun = (32 - shift).clamp(max=self.bits)  # bits in the first word
            codes &= (1 << begun) - 1  # the shift copied the word's sign into the bits above
            rest = words[(word + 1).clamp(max=len(words) - 1)] << begun
            codes |= torch.where(begun < self.bits, rest, 0)
        return codes.bitwise_and_(2**self.bits - 1)


# GPTQ-Model's layers.

_PACKAGE = "gptqmodel.nn_modules.qlinear"
# Other classes arrange codes for one kernel, or hold other kinds of codes.
_READ = ("TorchLinear", "TritonV2Linear")

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
    format = Gptq(rows, columns, layer.bits, len(scales), name_of(scales.dtype))
    tensors = tuple([getattr(layer, name).detach() for name in format.names])
    return PackedLayer(Quantized(format, tensors))


def pack(layer: Any, weight: Tensor) -> None:
    raise ValueError("GPTQ's numbers are read, and not made: its rounding needs data")


def _theirs(kind: type[nn.Module]) -> type[nn.Module] | None:
    """GPTQ-Model's class that ``kind`` is or derives from; None: ``kind`` has no such base."""
    if derived_from(kind, _PACKAGE, "GPTQQuantLinear") is None:
        return None
    return next(base for base in kind.__mro__ if base.__module__.startswith(_PACKAGE))
