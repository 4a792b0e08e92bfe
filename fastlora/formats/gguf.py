"""GGUF: every row is blocks of bytes, of 32 or 256 weights each, in one of ggml's layouts.

And transformers' ``GgufLinear`` and ``GgufExperts``, whose weights are the blocks of such a file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..foreign import is_class
from .arithmetic import write_scaled
from .format import Expected, Format, Quantized
from .vendor import PackedLayer, checked

# The 16 values of IQ4_NL and IQ4_XS.
_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Block(NamedTuple):
    """A layout: ggml's number of it, how many weights and bytes a block has, and what writes them.

    ``write`` takes blocks [n, b, size] and out [n, b, weights].  Codes are multiplied in out's
    dtype by factors of that dtype, as transformers does it; in float32 that is what ggml does.
    """

    number: int
    weights: int
    size: int
    write: Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Gguf(Format):
    """Blocks uint8 [rows, bytes of a row], of a ``kind`` in :data:`KINDS`.

    ``permuted``: column j of what they hold is the weight's column permutation[j], int64 [columns].
    """

    kind: str
    permuted: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return ("blocks", "permutation") if self.permuted else ("blocks",)

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
        return [blocks, ((self.columns,), (torch.int64,))] if self.permuted else [blocks]

    def check(self, tensors: Sequence[Tensor]) -> None:
        super().check(tensors)
        # float16 and int32 are read from them.
        if not torch.compiler.is_compiling() and tensors[0].storage_offset() % 4:
            raise ValueError("its blocks don't begin at a multiple of 4 bytes: clone them")

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        _, weights, size, write = KINDS[self.kind]
        rows = tensors[0][first : first + len(out)].unflatten(1, (-1, size))
        made = out.new_empty(out.shape) if self.permuted else out
        write(rows, made.unflatten(1, (-1, weights)))
        return out.index_copy_(1, tensors[1], made) if self.permuted else out


def _half(blocks: Tensor, at: int, dtype: torch.dtype) -> Tensor:
    """The float16 that each block has there, [n, b, 1]."""
    return blocks[:, :, at : at + 2].view(torch.float16).to(dtype)


def _fields(packed: Tensor, bits: int, width: int) -> Tensor:
    """Numbers of so few bits: from each ``width`` bytes their lowest ones, the next ones, …"""
    packed, mask, last = packed.unflatten(-1, (-1, width)), 2**bits - 1, 8 - bits
    between = [(packed >> shift) & mask for shift in range(bits, last, bits)]
    # Each by itself and then together: to write it to its place at once takes four times as long.
    return torch.stack([packed & mask, *between, packed >> last], -2).flatten(-3)


def _scale(out: Tensor, codes: Tensor, factor: Tensor, less: Tensor | None = None) -> None:
    """out = factor · codes - less, of which each has one for as many weights after each other."""
    groups, codes = (each.unflatten(2, (factor.shape[2], -1)) for each in (out, codes))
    write_scaled(groups, codes, factor[..., None])
    if less is not None:
        groups.sub_(less[..., None])


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 factors and 8 minima of 6 bits in 12 bytes, of which four are worked on at once.

    Four factors, four minima, and for the other eight 4 bits each; their last 2 are the spare ones.
    """
    first, second, rest = packed.view(torch.int32).unbind(-1)
    factors = first & 0x3F3F3F3F, (rest & 0x0F0F0F0F) | (first >> 2 & 0x30303030)
    minima = second & 0x3F3F3F3F, (rest >> 4 & 0x0F0F0F0F) | (second >> 2 & 0x30303030)
    return torch.stack(factors, -1).view(torch.uint8), torch.stack(minima, -1).view(torch.uint8)


def _write_scaled_minima(blocks: Tensor, out: Tensor, codes: Tensor) -> None:
    """Of Q4_K and Q5_K, which differ in their codes alone."""
    factors, minima = _six_bits(blocks[:, :, 4:16])
    d, less = _half(blocks, 0, torch.float32), _half(blocks, 2, torch.float32)
    _scale(out, codes, (d * factors).to(out.dtype), (less * minima).to(out.dtype))


def _write_q4_0(blocks: Tensor, out: Tensor) -> None:
    codes = _fields(blocks[:, :, 2:], 4, 16).view(torch.int8).sub_(8)
    _scale(out, codes, _half(blocks, 0, out.dtype))


def _write_q4_1(blocks: Tensor, out: Tensor) -> None:
    less = -_half(blocks, 2, out.dtype)
    _scale(out, _fields(blocks[:, :, 4:], 4, 16), _half(blocks, 0, out.dtype), less)


def _write_q8_0(blocks: Tensor, out: Tensor) -> None:
    _scale(out, blocks[:, :, 2:].view(torch.int8), _half(blocks, 0, out.dtype))


def _write_q2_k(blocks: Tensor, out: Tensor) -> None:
    factors, minima = blocks[:, :, :16] & 15, blocks[:, :, :16] >> 4
    d, less = _half(blocks, 80, out.dtype), _half(blocks, 82, out.dtype)
    _scale(out, _fields(blocks[:, :, 16:80], 2, 32), d * factors, less * minima)


def _write_q3_k(blocks: Tensor, out: Tensor) -> None:
    packed = blocks[:, :, 96:108]
    factors = _fields(packed[..., :8], 4, 8) | _fields(packed[..., 8:], 2, 4) << 4
    codes = _fields(blocks[:, :, 32:96], 2, 32) | _fields(blocks[:, :, :32], 1, 32) << 2
    d = _half(blocks, 108, out.dtype)
    _scale(out, codes.view(torch.int8).sub_(4), d * factors.view(torch.int8).sub_(32))


def _write_q4_k(blocks: Tensor, out: Tensor) -> None:
    _write_scaled_minima(blocks, out, _fields(blocks[:, :, 16:], 4, 32))


def _write_q5_k(blocks: Tensor, out: Tensor) -> None:
    codes = _fields(blocks[:, :, 48:], 4, 32) | _fields(blocks[:, :, 16:48], 1, 32) << 4
    _write_scaled_minima(blocks, out, codes)


def _write_q6_k(blocks: Tensor, out: Tensor) -> None:
    codes = _fields(blocks[:, :, :128], 4, 64) | _fields(blocks[:, :, 128:192], 2, 32) << 4
    factors = blocks[:, :, 192:208].view(torch.int8)
    d = _half(blocks, 208, torch.float32)
    _scale(out, codes.view(torch.int8).sub_(32), (d * factors).to(out.dtype))


def _levels(codes: Tensor) -> Tensor:
    levels = torch.tensor(_LEVELS, dtype=torch.int8, device=codes.device)
    return levels.index_select(0, codes.flatten().int()).view(codes.shape)


def _write_iq4_nl(blocks: Tensor, out: Tensor) -> None:
    _scale(out, _levels(_fields(blocks[:, :, 2:], 4, 16)), _half(blocks, 0, out.dtype))


def _write_iq4_xs(blocks: Tensor, out: Tensor) -> None:
    factors = _fields(blocks[:, :, 4:8], 4, 1) | _fields(blocks[:, :, 2:4], 2, 1) << 4
    factors = factors.view(torch.int8).sub_(32)
    codes = _levels(_fields(blocks[:, :, 8:], 4, 16))
    _scale(out, codes, _half(blocks, 0, out.dtype) * factors)


KINDS = {
    "Q4_0": Block(2, 32, 18, _write_q4_0),
    "Q4_1": Block(3, 32, 20, _write_q4_1),
    "Q8_0": Block(8, 32, 34, _write_q8_0),
    "Q2_K": Block(10, 256, 84, _write_q2_k),
    "Q3_K": Block(11, 256, 110, _write_q3_k),
    "Q4_K": Block(12, 256, 144, _write_q4_k),
    "Q5_K": Block(13, 256, 176, _write_q5_k),
    "Q6_K": Block(14, 256, 210, _write_q6_k),
    "IQ4_NL": Block(20, 32, 18, _write_iq4_nl),
    "IQ4_XS": Block(23, 256, 136, _write_iq4_xs),
}


# transformers' layers of it.

_MODULE = "transformers.integrations.gguf.utils"
_NAMES = {block.number: kind for kind, block in KINDS.items()}

PARTS: tuple[str, ...] = ("weight",)


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
    """A weight of ``GgufExperts`` as a stack [E, N, K], of its own memory; or why it can't be."""
    is_down, blocks = name == "down_proj", getattr(experts, name).detach()
    number = experts.down_type if is_down else experts.gate_up_type
    if number not in _NAMES:
        return f"the GGUF type of its {name} has number {number}, which no format reads"
    columns = experts.intermediate_dim if is_down else experts.hidden_dim
    return Quantized(Gguf(blocks.shape[1], columns, _NAMES[number]), (blocks,))


def pack(layer: Any, weight: Tensor) -> None:
    raise ValueError("GGUF's blocks are read, and not made: leave the merged weight dense")
