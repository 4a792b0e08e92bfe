"""Packed weights of random tensors, and what they stand for, element by element."""

import torch
from torch import Tensor

from fastlora.formats.format import Quantised
from fastlora.formats.four_bit import FourBit
from fastlora.formats.int8 import Int8Rows


def random_four_bit(n: int, k: int, kind: str = "nf4", block: int = 64, nested: int = 0):
    count = n * k
    blocks = -(-count // block)
    packed = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8)
    if not nested:
        return Quantised(FourBit(n, k, kind, block), (packed, torch.rand(blocks) + 0.5))
    tensors = (
        packed,
        torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        torch.rand(-(-blocks // nested)) + 0.5,
        torch.linspace(-1, 1, 256),
        torch.tensor(1.75),
    )
    return Quantised(FourBit(n, k, kind, block, nested), tensors)


def random_int8(n: int, k: int):
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return Quantised(Int8Rows(n, k, 1.0 / 127.0), (codes, torch.rand(n) + 0.5))


def by_elements(weight: Quantised, dtype=torch.float32) -> Tensor:
    """The weight by the definition of its format, not rounded to this dtype as yet."""
    format, tensors = weight
    if isinstance(format, Int8Rows):
        return (
            tensors[0].to(torch.promote_types(dtype, torch.float32))
            * (tensors[1] * format.factor)[:, None]
        )
    assert isinstance(format, FourBit)
    packed, absmax, *rest = tensors
    count = format.rows * format.columns
    element = torch.arange(count)
    code = (packed[element // 2].int() >> (4 - 4 * (element % 2))) & 15
    if rest:
        absmax2, code2, offset = rest
        absmax = code2[absmax.int()] * absmax2[torch.arange(len(absmax)) // format.nested] + offset
    values = torch.tensor(format.code)[code] * absmax[element // format.block]
    return values.view(format.rows, format.columns)
