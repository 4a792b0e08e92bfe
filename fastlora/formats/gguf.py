"""GGUF: every row is a sequence of blocks of bytes, of 32 or 256 weights each, in ggml's layouts.

Also transformers' ``GgufLinear`` and ``GgufExperts``, which keep the blocks of such a file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.other_packages import is_class
from .arithmetic import write_scaled
from .format import Expected, Format, Quantized
from .vendor import PackedLayer, checked

# transformers.integrations.gguf.dequant computes the same bits, but takes longer.  With it a step
# with 512 rows and a 2048² weight takes 1.10 × (Q8_0), 1.19 × (Q6_K) and 1.35 × (Q4_K) the time in
# float32, and 1.01 to 1.58 × in bfloat16 (process time, one thread, transformers 5.24).

# The 16 values that codes of IQ4_NL and IQ4_XS name.
_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Block(NamedTuple):
    """One of ggml's layouts: its number there, weights and bytes of a block, and its decoder.

    ``decode`` takes blocks uint8 [n, b, size] and a dtype.  It returns codes [n, b, weights], a
    factor for each group of consecutive weights [n, b, groups], and a minimum for each group if the
    layout has them: weight = factor · code - minimum.  transformers computes in the same dtype, and
    for float32 ggml does.
    """

    number: int
    weights: int
    size: int
    decode: Callable[[Tensor, torch.dtype], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Gguf(Format):
    """Blocks uint8 [rows, bytes of a row], in the layout ``KINDS[kind]``.

    ``permuted``: column j of the blocks is the weight's column permutation[j], int64 [columns].
    """

    kind: str
    permuted: bool = False

    @property
    def label(self) -> str:
        return f"GGUF {self.kind}"

    def expected(self) -> Expected:
        if self.kind not in KINDS:
            raise ValueError(f"no GGUF type {self.kind}: there are {', '.join(KINDS)}")
        _, weights, size, _ = KINDS[self.kind]
        if self.columns % weights:
            raise ValueError(
                f"in_features is {self.columns}, but a {self.kind} block has {weights} weights"
            )
        blocks = (self.rows, self.columns // weights * size), (torch.uint8,)
        permutation = (self.columns,), (torch.int64,)
        return {"blocks": blocks} | ({"permutation": permutation} if self.permuted else {})

    def check(self, tensors: Sequence[Tensor]) -> None:
        super().check(tensors)
        # Bytes are viewed as float16 and int32.
        if not torch.compiler.is_compiling() and tensors[0].storage_offset() % 4:
            raise ValueError("its blocks don't begin at a multiple of 4 bytes: clone them")

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        _, _, size, decode = KINDS[self.kind]
        blocks = tensors[0][first : first + len(out)].unflatten(1, (-1, size))
        codes, factor, *minimum = decode(blocks, out.dtype)
        made = out.new_empty(out.shape) if self.permuted else out
        groups = made.unflatten(1, (*factor.shape[1:], -1))  # [n, b, groups, weights of a group]
        write_scaled(groups, codes.unflatten(2, (factor.shape[2], -1)), factor[..., None])
        for each in minimum:
            groups.sub_(each[..., None])
        return out.index_copy_(1, tensors[1], made) if self.permuted else out


def _half(blocks: Tensor, at: int, dtype: torch.dtype) -> Tensor:
    """The float16 number at byte ``at`` of each block, [n, b, 1]."""
    return blocks[:, :, at : at + 2].view(torch.float16).to(dtype)


def _fields(packed: Tensor, bits: int, width: int) -> Tensor:
    """Unpack codes: each ``width`` bytes hold ``width`` codes in their lowest bits, then the next.

    packed [n, b, bytes] -> [n, b, bytes · 8 / bits]
    """
    packed, mask, last = packed.unflatten(-1, (-1, width)), 2**bits - 1, 8 - bits
    between = [(packed >> shift) & mask for shift in range(bits, last, bits)]
    # Writing each field to its place directly takes four times as long as this stack.
    return torch.stack([packed & mask, *between, packed >> last], -2).flatten(-3)


def _q4_0(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # Bytes 0 and 1: d; 2 to 17: codes of 4 bits.  weight = d · (code - 8)
    codes = _fields(blocks[:, :, 2:], 4, 16).view(torch.int8).sub_(8)
    return codes, _half(blocks, 0, dtype)


def _q4_1(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # Q4_1 adds its minimum: weight = d · code + m.  The minimum that it returns is -m.
    return _fields(blocks[:, :, 4:], 4, 16), _half(blocks, 0, dtype), -_half(blocks, 2, dtype)


def _q8_0(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # Bytes 0 and 1: d; 2 to 33: codes int8.
    return blocks[:, :, 2:].view(torch.int8), _half(blocks, 0, dtype)


def _q2_k(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # 16 groups; a byte of each has its factor in the low 4 bits, its minimum in the high ones.
    factors, minima = blocks[:, :, :16] & 15, blocks[:, :, :16] >> 4
    d, least = _half(blocks, 80, dtype), _half(blocks, 82, dtype)
    return _fields(blocks[:, :, 16:80], 2, 32), d * factors, least * minima


def _q3_k(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # 16 factors of 6 bits: 8 bytes hold the low 4 bits, 4 bytes the high 2.
    low, high = blocks[:, :, 96:104], blocks[:, :, 104:108]
    factors = (_fields(low, 4, 8) | _fields(high, 2, 4) << 4).view(torch.int8).sub_(32)
    codes = _fields(blocks[:, :, 32:96], 2, 32) | _fields(blocks[:, :, :32], 1, 32) << 2
    return codes.view(torch.int8).sub_(4), _half(blocks, 108, dtype) * factors


def _q4_k(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # Bytes 0 to 3: the scales of factors and minima; 4 to 15: both; 16 to 143: codes of 4 bits.
    return _fields(blocks[:, :, 16:], 4, 32), *_six_bits(blocks, dtype)


def _q5_k(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # As Q4_K, with the fifth bits of the codes in bytes 16 to 47.
    codes = _fields(blocks[:, :, 48:], 4, 32) | _fields(blocks[:, :, 16:48], 1, 32) << 4
    return codes, *_six_bits(blocks, dtype)


def _six_bits(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The 8 factors and the 8 minima of a block of Q4_K or Q5_K, packed in its bytes 4 to 15.

    Bytes 4 to 7 hold the first four factors in their low 6 bits, bytes 8 to 11 the first four
    minima.  Bytes 12 to 15 hold the low 4 bits of the other factors, and in their high halves the
    low 4 bits of the other minima, whose last 2 bits are the high bits of bytes 4 to 11.  One
    operation on int32 handles four bytes.
    """
    first, second, rest = blocks[:, :, 4:16].view(torch.int32).unbind(-1)
    factors = first & 0x3F3F3F3F, (rest & 0x0F0F0F0F) | (first >> 2 & 0x30303030)
    minima = second & 0x3F3F3F3F, (rest >> 4 & 0x0F0F0F0F) | (second >> 2 & 0x30303030)
    codes = [torch.stack(each, -1).view(torch.uint8) for each in (factors, minima)]
    d, least = _half(blocks, 0, torch.float32), _half(blocks, 2, torch.float32)
    return (d * codes[0]).to(dtype), (least * codes[1]).to(dtype)


def _q6_k(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # Bytes 0 to 127: low 4 bits of the codes; 128 to 191: high 2; 192 to 207: factors; then d.
    codes = _fields(blocks[:, :, :128], 4, 64) | _fields(blocks[:, :, 128:192], 2, 32) << 4
    factors = _half(blocks, 208, torch.float32) * blocks[:, :, 192:208].view(torch.int8)
    return codes.view(torch.int8).sub_(32), factors.to(dtype)


def _levels(codes: Tensor) -> Tensor:
    levels = torch.tensor(_LEVELS, dtype=torch.int8, device=codes.device)
    return levels.index_select(0, codes.flatten().int()).view(codes.shape)


def _iq4_nl(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _levels(_fields(blocks[:, :, 2:], 4, 16)), _half(blocks, 0, dtype)


def _iq4_xs(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # 8 factors of 6 bits: 4 bytes hold the low 4 bits, 2 bytes the high 2.
    factors = _fields(blocks[:, :, 4:8], 4, 1) | _fields(blocks[:, :, 2:4], 2, 1) << 4
    factors = factors.view(torch.int8).sub_(32)
    return _levels(_fields(blocks[:, :, 8:], 4, 16)), _half(blocks, 0, dtype) * factors


KINDS = {
    "Q4_0": Block(2, 32, 18, _q4_0),
    "Q4_1": Block(3, 32, 20, _q4_1),
    "Q8_0": Block(8, 32, 34, _q8_0),
    "Q2_K": Block(10, 256, 84, _q2_k),
    "Q3_K": Block(11, 256, 110, _q3_k),
    "Q4_K": Block(12, 256, 144, _q4_k),
    "Q5_K": Block(13, 256, 176, _q5_k),
    "Q6_K": Block(14, 256, 210, _q6_k),
    "IQ4_NL": Block(20, 32, 18, _iq4_nl),
    "IQ4_XS": Block(23, 256, 136, _iq4_xs),
}


# transformers' layers with GGUF weights.

_MODULE = "transformers.integrations.gguf.utils"
_NAMES = {block.number: kind for kind, block in KINDS.items()}


def owns(layer: Any, kind: type[nn.Module]) -> bool:
    return is_class(kind, _MODULE, "GgufLinear")


@checked("its blocks are")
def read(layer: Any) -> PackedLayer | str:
    kind, order = _NAMES.get(layer.ggml_type), layer.input_permutation
    if kind is None:
        return f"its GGUF type has number {layer.ggml_type}, which no format reads"
    format = Gguf(layer.out_features, layer.in_features, kind, order is not None)
    blocks = layer.weight.detach()
    return PackedLayer(Quantized(format, (blocks,) if order is None else (blocks, order)))


def is_experts(kind: type[nn.Module]) -> bool:
    return is_class(kind, _MODULE, "GgufExperts")


@checked("its {1} is")
def experts_weight(experts: Any, name: str) -> Quantized | str:
    """A weight of ``GgufExperts`` as a stack [E, N, K] without a copy, or why it can't be read."""
    is_down, blocks = name == "down_proj", getattr(experts, name).detach()
    number = experts.down_type if is_down else experts.gate_up_type
    if number not in _NAMES:
        return f"the GGUF type of its {name} has number {number}, which no format reads"
    columns = experts.intermediate_dim if is_down else experts.hidden_dim
    return Quantized(Gguf(blocks.shape[1], columns, _NAMES[number]), (blocks,))
