"""transformers' ``FP8Linear``: float8 with a scale for a block, a row or all (DeepSeek's, …).

And its ``FP8Experts``.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import is_class
from ..formats.float8 import Float8
from ..formats.format import Quantised, name_of
from ..formats.microscaled import MXFP4
from .vendor import PackedLayer

_MODULE = "transformers.integrations.finegrained_fp8"

PARTS: tuple[str, ...] = ("weight", "weight_scale_inv")
SCALE = "_scale_inv"  # behind a weight's name


def owns(layer: nn.Module, kind: type[nn.Module]) -> bool:
    return is_class(kind, _MODULE, "FP8Linear")


def read(layer: nn.Module) -> PackedLayer | str:
    theirs: Any = layer
    weight, scale = theirs.weight.detach(), theirs.weight_scale_inv.detach()
    if weight.element_size() > 1:
        return f"its weight is dense {weight.dtype}, in a class for float8"
    if weight.dtype == torch.int8:
        return "its weight has 4 bits (float4), which no format reads"
    try:
        (n, k), (rows, columns) = weight.shape, _block(layer)
        blocks = -(-n // rows), -(-k // columns)
        if scale.numel() == blocks[0] * blocks[1]:
            scale = scale.view(blocks)
        format = Float8(n, k, name_of(weight.dtype), rows, columns)
        format.check((weight, scale))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"its float8 weight is broken: {error}"
    return PackedLayer(Quantised(format, (weight, scale)), rounds_input=True)


def experts_weight(experts: nn.Module, name: str) -> Quantised | str:
    """A weight of ``FP8Experts`` as a stack [E, N, K], of its own memory; or why it can't be read.

    With blocks each scale is that of one, as their own dequantisation has it.  Without, there is a
    scale for all of an expert, for each half of its rows (gate and up), or for each row.
    """
    theirs: Any = experts
    codes, scale = getattr(theirs, name).detach(), getattr(theirs, f"{name}{SCALE}").detach()
    try:
        _, n, k = codes.shape
        if codes.dtype == torch.int8:
            weight = Quantised(MXFP4(n, 2 * k), (codes, scale))
        else:
            count = scale.shape[1]
            rows, columns = theirs.block_size or (n // count if count in (1, 2, n) else 0, k)
            weight = Quantised(Float8(n, k, name_of(codes.dtype), rows, columns), (codes, scale))
        weight.check()
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"its {name} is broken: {error}"
    return weight


def _block(layer: Any) -> tuple[int, int]:
    """How many rows and columns share a scale."""
    rows, columns = layer.weight.shape
    scale = layer.weight_scale_inv
    if scale.numel() == 1:
        return rows, columns
    if layer.block_size is None or scale.shape in ((rows,), (rows, 1)):
        return 1, columns
    block_rows, block_columns = layer.block_size
    return int(block_rows), int(block_columns)


def pack(layer: nn.Module, weight: Tensor) -> None:
    linear, theirs = layer, sys.modules[_MODULE]  # type: Any, Any
    codes, scale = linear.weight, linear.weight_scale_inv
    rounds = "ue8m0" if scale.dtype == torch.float8_e8m0fnu else "float"
    config = SimpleNamespace(weight_block_size=_block(layer), scale_fmt=rounds)
    quantise = theirs.Fp8Quantize(SimpleNamespace(quantization_config=config)).convert
    made = quantise({"weight": weight})
    if made["weight"].dtype != codes.dtype:
        raise ValueError(
            f"transformers makes no {codes.dtype} of a weight {tuple(weight.shape)} in blocks of "
            f"{_block(layer)}: leave the merged weight dense"
        )
    linear.weight = nn.Parameter(made["weight"], requires_grad=False)
    new_scale = made["weight_scale_inv"].view(scale.shape).to(scale.dtype)
    linear.weight_scale_inv = nn.Parameter(new_scale, requires_grad=False)
