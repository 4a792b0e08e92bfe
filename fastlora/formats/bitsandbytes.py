"""NF4 and FP4: codes of 4 bits index a table of 16 values, and each block has a scale.

Dettmers et al., "QLoRA" (arXiv 2305.14314), as bitsandbytes stores them.  Also its layers
``Linear4bit`` and ``Linear8bitLt`` (LLM.int8).
"""

import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common.other_packages import derived_from, is_dtensor
from ..common.row_blocks import slices
from .format import FLOATS, Coding, Expected, Format, Quantized, of_rows
from .torchao import Affine
from .vendor import PackedLayer, checked

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# The low 3 bits of a code are the magnitude, the fourth is the sign.
_FP4 = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5,
    0.1666666716337204, 0.25,
)  # fmt: skip
CODES = {"nf4": _NF4, "fp4": (*_FP4, *[-value for value in _FP4])}

# bitsandbytes' CPU kernel writes the dtypes FLOATS, and is slow for blocks of this size and above.
_TOO_LARGE = 2048

# Elements that are dequantized at once, so that temporaries stay in a core's cache.
_AT_ONCE = 2**17


@dataclass(frozen=True)
class FourBit(Format):
    """weight = table[code] · absmax of its block, over the flattened weight [N · K].

    packed uint8 [⌈NK / 2⌉] holds the first of two codes in the high bits.  ``block`` elements share
    an absmax, and a block may end inside a row.  absmax is float32 [⌈NK / block⌉].

    With ``nested`` > 0 the scales are quantized themselves, and ``nested`` of them share a scale:
    absmax is uint8 codes of

    code2[absmax] · absmax2 + offset

    with absmax2 float32 [⌈number of blocks / nested⌉], code2 float32 [256] and offset float32 [].
    """

    kind: str  # "nf4" or "fp4"
    block: int
    nested: int = 0
    dims: ClassVar[int] = 1

    @property
    def label(self) -> str:
        return self.kind.upper()

    @property
    def coding(self) -> Coding | None:
        table = CODES[self.kind]
        return Coding("four-bit", 1, self.block, table, self.nested) if self.block > 1 else None

    def expected(self) -> Expected:
        if self.kind not in CODES:
            raise ValueError(f"its kind is {self.kind!r}, but must be one of {', '.join(CODES)}")
        if self.block < 1 or self.nested < 0:
            raise ValueError(f"its blocks are of {self.block} and {self.nested}, but must be of 1")
        count = self.rows * self.columns
        blocks = -(-count // self.block)
        wide, narrow = (torch.float32,), (torch.uint8,)
        absmax = (blocks,), narrow if self.nested else wide
        expected: Expected = {"packed": (((count + 1) // 2,), narrow), "absmax": absmax}
        if self.nested:
            absmax2 = (-(-blocks // self.nested),), wide
            expected |= {"absmax2": absmax2, "code2": ((256,), wide), "offset": ((), wide)}
        return expected

    def make(
        self, tensors: Sequence[Tensor], first: int, count: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Dequantize by bitsandbytes' own CPU kernel, where its package is imported and has the op.

        Blocks that end inside a row are left to :meth:`read`: on CPUs with AVX-512, version 0.50
        uses the absmax of another block for them.
        """
        packed, block, columns = tensors[0], self.block, self.columns
        # In an odd block, a byte may hold codes of two blocks.
        if packed.device.type != "cpu" or columns % block or block % 2 or dtype not in FLOATS:
            return None
        op = getattr(torch.ops.bitsandbytes, "dequantize_4bit", None)
        if op is None or block >= _TOO_LARGE:
            return None
        begin, end = first * columns, (first + count) * columns
        absmax = self._absmax(tensors, begin // block, end // block)
        some = packed[begin // 2 : end // 2]
        return op(some, absmax, block, self.kind, (count, columns), dtype)

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        for rows in slices(len(out), _AT_ONCE // self.columns):
            begin, end = (first + rows.start) * self.columns, (first + rows.stop) * self.columns
            self._make(tensors, begin, end, out[rows])
        return out

    def _make(self, tensors: Sequence[Tensor], begin: int, end: int, out: Tensor) -> None:
        """Write the elements from ``begin`` to ``end`` of the flattened weight."""
        # The first and the last byte may hold an element of other rows.
        block, head, tail = self.block, begin % 2, end % 2
        # float32 pairs are written as float64: into a temporary if out can't be viewed so.
        odd = head or tail or out.storage_offset() % 2
        apart = odd or out.dtype != torch.float32 or not out.is_contiguous()
        count = end - begin + head + tail
        made = torch.empty(count, dtype=torch.float32, device=out.device) if apart else out.view(-1)
        packed = tensors[0][begin // 2 : (end + 1) // 2]
        table, pairs = _pairs(self.kind, out.device), made.view(torch.float64)
        torch.index_select(table, 0, packed.int(), out=pairs)
        made = made[head : head + end - begin]
        first, last = begin // block, -(-end // block)
        absmax = self._absmax(tensors, first, last)
        if begin % block == 0 and end % block == 0:
            made.view(-1, block).mul_(absmax.unsqueeze(1))
        else:
            made.mul_(of_rows(absmax, begin - first * block, end - begin, block))
        if apart:
            out.copy_(made.view(out.shape))

    def _absmax(self, tensors: Sequence[Tensor], first: int, last: int) -> Tensor:
        """The float32 absmax of the blocks from ``first`` to ``last``."""
        some = tensors[1][first:last]
        if not self.nested:
            return some
        _, _, absmax2, code2, offset = tensors
        each = of_rows(absmax2, first, last - first, self.nested)
        return code2.index_select(0, some.int()).mul_(each).add_(offset)


@cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """For each byte the two float32 values that it encodes, viewed as one float64 [256]."""
    with torch.inference_mode(False):  # an inference tensor couldn't be used outside that mode
        code = torch.tensor(CODES[kind], dtype=torch.float32, device=device)
        byte = torch.arange(256, dtype=torch.int64, device=device)
        pairs = torch.stack([code[byte >> 4], code[byte & 15]], 1)
        return pairs.view(torch.float64).squeeze(1)


# The library's layers.

_MODULES = "bitsandbytes.nn.modules"
_REPACKS = "support_avx512bf16_for_cpu"
# The library multiplies SCB by 1 / 127 in float32.
_FACTOR = 1.0 / 127.0


def owns(layer: Any, kind: type[nn.Module]) -> bool:
    """Also subclasses that keep the forward: LinearNF4, LinearFP4."""
    four_bit, int8 = (derived_from(kind, _MODULES, n) for n in ("Linear4bit", "Linear8bitLt"))
    theirs: Any = four_bit or int8
    if theirs is None or kind.forward is not theirs.forward:
        return False
    return kind.__call__ is nn.Module.__call__


@checked("its quantization state is")
def read(layer: Any) -> PackedLayer | str:
    if not hasattr(layer, "state"):
        return _read_four_bit(layer)
    if layer.state.threshold:
        return (
            f"its outlier threshold is {layer.state.threshold}: which columns of x it rounds to 8 "
            "bits depends on their values; 0 is read"
        )
    return _read_int8(layer)


@checked("its quantization state is")
def read_weight(layer: Any) -> PackedLayer | str:
    """The weight, whatever the outlier threshold, also if a call in evaluation repacked it."""
    with torch.enable_grad():
        return _read_int8(layer) if hasattr(layer, "state") else _read_four_bit(layer)


def keep_gradients(layer: Any) -> None:
    """Keep x's gradient available after a call of a frozen Linear4bit in evaluation mode.

    On a CPU with AVX512-BF16 such a call repacks the weight for a kernel without gradients, and
    rounds its absmax to bfloat16.  This turns repacking off, and undoes an earlier one.
    """
    if hasattr(layer, _REPACKS) and derived_from(type(layer), _MODULES, "Linear4bit"):
        setattr(layer, _REPACKS, False)
        if getattr(_state_of(layer), "packing_format_for_cpu", False):
            back = sys.modules[_MODULES]._convert_weight_packed_for_cpu_inverse
            weight = layer.weight
            weight.data, weight.quant_state = back(weight.data, _state_of(layer))
            layer.quant_state = weight.quant_state


def repack_again(layer: Any) -> None:
    """Undo :func:`keep_gradients`: the next call in evaluation mode may repack the weight."""
    if hasattr(layer, _REPACKS) and derived_from(type(layer), _MODULES, "Linear4bit"):
        setattr(layer, _REPACKS, sys.modules[_MODULES].has_avx512bf16())


def cast_bias(layer: Any, x: Tensor) -> None:
    """Cast the bias in place, as the first call of a ``Linear4bit``'s own forward does.

    Otherwise that call, for example of a reference model, may come between a call of fastlora's and
    its recomputation under activation checkpointing, which must save tensors of the same dtypes.
    """
    # The first condition is quick, and false for most layers.
    is_known = "compute_dtype" in vars(layer) and derived_from(type(layer), _MODULES, "Linear4bit")
    if is_known and layer.bias is not None:
        dtype = layer.compute_dtype or x.dtype
        if layer.bias.dtype != dtype:
            layer.bias.data = layer.bias.data.to(dtype)


def _state_of(layer: Any) -> Any:
    """The quantization state; where FSDP has replaced the weight, only the layer still has it."""
    state = getattr(layer.weight, "quant_state", None)
    return state if state is not None else layer.quant_state


def _read_four_bit(layer: Any) -> PackedLayer | str:
    state, weight = _state_of(layer), layer.weight
    if state is None:
        return "its weight isn't quantized as yet: .to(device) does that"
    if getattr(state, "packing_format_for_cpu", False):
        # bitsandbytes' kernel for it has no gradient.
        if torch.is_grad_enabled():
            return _read_repacked(layer, state)
        return "its weight is repacked for bitsandbytes' own CPU kernel, by a call in evaluation"
    # A weight that FSDP has replaced lacks quant_storage, and FSDP doesn't cast bytes.
    storage = getattr(weight, "quant_storage", None) or getattr(layer, "quant_storage", None)
    storage = storage or weight.dtype
    if storage.is_floating_point and weight.dtype != storage:
        return (
            f"its packed numbers, stored as {storage}, were cast to {weight.dtype}: make "
            "bnb_4bit_quant_storage the dtype that FSDP's mixed precision casts to"
        )
    rows, columns = state.shape
    if (rows, columns) != (layer.out_features, layer.in_features):
        return f"its quantization state is of a weight of shape {tuple(state.shape)}"
    packed = weight.detach()
    if not is_dtensor(weight):  # nothing reads the shards that FSDP keeps between calls
        packed = packed.view(torch.uint8).view(-1)
    outer = state.state2 if state.nested else None
    nested = () if outer is None else (outer.absmax, outer.code, state.offset)
    of_each = 0 if outer is None else outer.blocksize
    format = FourBit(rows, columns, state.quant_type, state.blocksize, of_each)
    weight = Quantized(format, (packed, state.absmax, *nested))
    return PackedLayer(weight, layer.compute_dtype, restores=True)


def _read_repacked(layer: Any, state: Any) -> PackedLayer:
    """A weight that a call in evaluation mode repacked for bitsandbytes' CPU kernel; copied."""
    plain = copy(state)
    plain.original_nested = False  # otherwise absmax is quantized again
    unpack = sys.modules[_MODULES]._convert_weight_packed_for_cpu_inverse
    packed, _ = unpack(layer.weight.detach(), plain)
    absmax = state.absmax.t().reshape(-1).float()  # bfloat16 [blocks of a row, rows]
    rows, columns = state.shape
    format = FourBit(rows, columns, state.quant_type, state.blocksize)
    weight = Quantized(format, (packed.view(torch.uint8).view(-1), absmax))
    return PackedLayer(weight, layer.compute_dtype, restores=True)


def _read_int8(layer: Any) -> PackedLayer | str:
    state, weight = layer.state, layer.weight
    if state.has_fp16_weights:
        return "its weight has 16 bits, and is quantized in every call (has_fp16_weights)"
    if state.SCB is None and not hasattr(weight, "SCB"):
        return "its weight was made anew without its scales (FSDP2 does that)"
    # The first call moves both to the state, and moving the model to a device skips the state.
    codes = weight.CB if weight.CB is not None else state.CB
    scale = weight.SCB if weight.SCB is not None else state.SCB
    codes = (weight if codes is None else codes).detach().to(weight.device)
    if scale is None or codes.dtype != torch.int8:
        return "its weight isn't quantized as yet: .to(device) does that"
    rows, columns = codes.shape
    format = Affine(rows, columns, 8, 1, columns, factor=_FACTOR)
    scale = scale.to(weight.device)[:, None]
    return PackedLayer(Quantized(format, (codes, scale)), rounds_input=True)
