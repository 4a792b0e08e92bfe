"""Packed weights with random contents, and their values computed element by element."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fastlora.formats.bitsandbytes import CODES, FourBit
from fastlora.formats.float8 import Float8
from fastlora.formats.format import Quantized
from fastlora.formats.gguf import KINDS, Gguf
from fastlora.formats.microscaled import E2M1, MXFP4, NVFP4
from fastlora.formats.stored import Stored
from fastlora.formats.torchao import Affine, Int4

NEEDS_5 = "needs transformers 5"


def stack(weights: list[Quantized]) -> Quantized:
    """Stack the weights of experts: every tensor gets one more axis in front."""
    tensors = zip(*[weight.tensors for weight in weights], strict=True)
    return Quantized(weights[0].format, tuple(map(torch.stack, tensors)))


def random_four_bit(n: int, k: int, kind: str = "nf4", block: int = 64, nested: int = 0):
    count = n * k
    blocks = -(-count // block)
    packed = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8)
    if not nested:
        return Quantized(FourBit(n, k, kind, block), (packed, torch.rand(blocks) + 0.5))
    tensors = (
        packed,
        torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        torch.rand(-(-blocks // nested)) + 0.5,
        torch.linspace(-1, 1, 256),
        torch.tensor(1.75),
    )
    return Quantized(FourBit(n, k, kind, block, nested), tensors)


def random_int8(n: int, k: int):
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    format = Affine(n, k, 8, 1, k, factor=1.0 / 127.0)
    return Quantized(format, (codes, torch.rand(n, 1) + 0.5))


def random_rotated_int8(n: int, k: int):
    """The scales are powers of 2, so that the sums of the rotation are exact."""
    from fastlora.formats.rotated_int8 import RotatedInt8  # late: benchmarks use an older fastlora

    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scale = torch.randint(-9, -3, (n,)).float().exp2()
    return Quantized(RotatedInt8(n, k, "bfloat16"), (codes, scale))


def random_affine(n: int, k: int, rows: int, columns: int, shifted=True, scale=torch.float32):
    """A weight with one scale for each block of ``rows`` × ``columns`` elements."""
    blocks = n // rows, k // columns
    tensors = (
        torch.randint(-128, 128, (n, k), dtype=torch.int8),
        (torch.rand(blocks) + 0.5).to(scale),
        torch.randint(-128, 128, blocks, dtype=torch.int8),
    )
    format = Affine(n, k, 8, rows, columns, shifted)
    return Quantized(format, tensors if shifted else tensors[:2])


def random_float8(n: int, k: int, rows: int, columns: int, code="float8_e4m3fn", scale=None):
    """``scale`` None: powers of two stored as float8_e8m0fnu."""
    blocks = -(-n // rows), -(-k // columns)
    codes = torch.randn(n, k).to(getattr(torch, code))
    scales = torch.rand(blocks) + 0.5 if scale else torch.randint(100, 140, blocks).to(torch.uint8)
    scales = scales.to(scale) if scale else scales.view(torch.float8_e8m0fnu)
    return Quantized(Float8(n, k, code, rows, columns), (codes, scales))


def random_mxfp4(n: int, k: int, scale=torch.uint8):
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    powers = torch.randint(115, 135, (n, k // 32)).to(torch.uint8)
    scales = powers.view(torch.float8_e8m0fnu).float() if scale == torch.float32 else powers
    return Quantized(MXFP4(n, k), (packed, scales.view(scale)))


def random_nvfp4(n: int, k: int, tensor_scale: float = 0.0173):
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales = torch.rand(n, k // 16).mul(400).to(torch.float8_e4m3fn)
    return Quantized(NVFP4(n, k), (packed, scales, torch.tensor(tensor_scale)))


def random_int4(n: int, k: int, group: int, dtype=torch.float32):
    each = k // group, n
    tensors = (
        torch.randint(-128, 128, (n, k // 2), dtype=torch.int8),
        (torch.rand(each) + 0.5).to(dtype),
        torch.randn(each).to(dtype),
    )
    return Quantized(Int4(n, k, 4, group, str(dtype).removeprefix("torch.")), tensors)


def random_gguf(n: int, k: int, kind: str, permuted: bool = False):
    _, weights, size, _ = KINDS[kind]
    blocks = torch.randint(0, 256, (n, k // weights, size), dtype=torch.uint8)
    # Byte offsets of a block's float16 numbers, which are overwritten so that none is infinite.
    places = {"Q4_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
    places |= dict.fromkeys(["Q4_K", "Q5_K"], (0, 2))
    for at in places.get(kind, (0,)):
        factors = torch.randn(n, k // weights, 1).mul(1e-2).half()
        blocks[:, :, at : at + 2] = factors.view(torch.uint8)
    order = (torch.randperm(k),) if permuted else ()
    return Quantized(Gguf(n, k, kind, permuted), (blocks.flatten(1), *order))


def by_elements(weight: Quantized, dtype=torch.float32) -> Tensor:
    """The weight's values by the definition of its format, before rounding to ``dtype``.

    ``dtype`` matters only where the format itself computes in it.
    """
    import int8  # late, as in random_rotated_int8

    from fastlora.formats.rotated_int8 import RotatedInt8

    format, tensors = weight
    wide = torch.promote_types(dtype, torch.float32)
    # Each branch returns [rows, columns].  Formats differ in how a tensor stores several codes.
    if isinstance(format, Affine | Float8):
        wide = torch.float32 if isinstance(format, Float8) else wide
        codes, scale, *zero = tensors
        scale = scale * format.factor if isinstance(format, Affine) else scale
        codes, scale, *zero = (tensor.to(wide) for tensor in (codes, scale, *zero))
        # scale [rows / block_rows, columns / block_columns]
        row = (torch.arange(format.rows) // format.block_rows)[:, None]
        column = torch.arange(format.columns) // format.block_columns
        return (codes - zero[0][row, column] if zero else codes) * scale[row, column]
    if isinstance(format, MXFP4 | NVFP4):
        packed, scale, *of_tensor = tensors
        # two codes in a byte, the first in its low half
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).int()
        if scale.dtype == torch.uint8:
            scale = torch.pow(2.0, scale.int() - 127)
        scale = scale.float() * of_tensor[0] if of_tensor else scale.float()
        return torch.tensor(E2M1)[codes] * scale.repeat_interleave(format.block, 1)
    if isinstance(format, RotatedInt8):
        codes, scale = tensors
        return torch.from_numpy(int8.rotated((codes * scale[:, None]).numpy())).float()
    if isinstance(format, Int4):
        packed, scale, zero = tensors
        # two signed codes in a byte; scale and zero [columns / group, rows]
        halves = torch.stack([packed.int() & 15, (packed.int() >> 4) & 15], -1).flatten(1)
        numbers = torch.where(halves > 7, halves - 16, halves).float()
        groups = torch.arange(format.columns) // format.group
        return numbers * scale.T[:, groups].float() + zero.T[:, groups].float()
    if isinstance(format, Stored):
        return tensors[0]
    if isinstance(format, Gguf):  # transformers computes it, in this dtype
        dequant = pytest.importorskip("transformers.integrations.gguf.dequant", reason=NEEDS_5)
        number = {name: number for number, name in dequant.GGML_NAME.items()}[format.kind]
        values = dequant.dequantize(tensors[0], number, dtype).view(format.rows, format.columns)
        return values[:, tensors[1].argsort()] if format.permuted else values
    # Two codes in a byte, the first in its high half; blocks of elements in row order.
    assert isinstance(format, FourBit)
    packed, absmax, *rest = tensors
    count = format.rows * format.columns
    element = torch.arange(count)
    code = (packed[element // 2].int() >> (4 - 4 * (element % 2))) & 15
    # the scales are quantized themselves
    if rest:
        absmax2, code2, offset = rest
        absmax = code2[absmax.int()] * absmax2[torch.arange(len(absmax)) // format.nested] + offset
    values = torch.tensor(CODES[format.kind])[code] * absmax[element // format.block]
    return values.view(format.rows, format.columns)


MAKERS: dict[str, Callable[[], Quantized]] = {
    "nf4": lambda: random_four_bit(48, 64),
    "fp4-nested": lambda: random_four_bit(48, 64, "fp4", 32, nested=16),
    "nf4-blocks-over-rows": lambda: random_four_bit(9, 22, block=64, nested=2),
    "nf4-odd": lambda: random_four_bit(11, 13, block=32, nested=3),
    "nf4-many-parts": lambda: random_four_bit(300, 1024, nested=256),
    "int8": lambda: random_int8(13, 21),
    "rotated-int8": lambda: random_rotated_int8(9, 192),
    "rotated-int8-odd": lambda: random_rotated_int8(7, 100),
    "affine-groups": lambda: random_affine(12, 32, 1, 8),
    "affine-blocks-bf16": lambda: random_affine(12, 32, 4, 16, scale=torch.bfloat16),
    "affine-one-scale": lambda: random_affine(12, 32, 12, 32, shifted=False),
    "float8-blocks": lambda: random_float8(50, 44, 16, 32, scale=torch.float32),
    "float8-rows-odd": lambda: random_float8(9, 13, 1, 13, scale=torch.float16),
    "float8-e5m2-powers": lambda: random_float8(9, 16, 4, 8, "float8_e5m2"),
    "mxfp4": lambda: random_mxfp4(9, 96),
    "mxfp4-many-parts": lambda: random_mxfp4(1100, 1024, torch.float8_e8m0fnu),
    "mxfp4-float32": lambda: random_mxfp4(8, 64, torch.float32),
    "nvfp4": lambda: random_nvfp4(9, 48),
    "stored": lambda: Quantized(Stored(9, 13), (torch.randn(9, 13).bfloat16(),)),
    **{f"gguf-{kind}": partial(random_gguf, 7, 512, kind) for kind in KINDS},
    "gguf-permuted": lambda: random_gguf(7, 512, "Q4_0", permuted=True),
}
