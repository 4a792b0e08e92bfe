"""transformers' ``FP8Linear``: float8 with a scale for a block, a row or all (DeepSeek's, …)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import is_class
from ..formats.float8 import Float8
from ..formats.format import Quantised
from .vendor import PackedLayer

_MODULE = "transformers.integrations.finegrained_fp8"

OWN = "weight"


def owns(layer: nn.Module, kind: type[nn.Module]) -> bool:
    return is_class(kind, _MODULE, "FP8Linear")


def read(layer: nn.Module) -> PackedLayer | str:
    theirs: Any = layer
    own, scale = theirs.weight.detach(), theirs.weight_scale_inv.detach()
    if own.element_size() > 1:
        return f"its weight is dense {own.dtype}, in a class for float8"
    if own.dtype == torch.int8:
        return "its weight has 4 bits (float4), which no format reads"
    try:
        (n, k), (rows, columns) = own.shape, _block(layer)
        blocks = -(-n // rows), -(-k // columns)
        if scale.numel() == blocks[0] * blocks[1]:
            scale = scale.view(blocks)
        format = Float8(n, k, str(own.dtype).removeprefix("torch."), rows, columns)
        format.check((own, scale))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"its float8 weight is broken: {error}"
    return PackedLayer(Quantised(format, (own, scale)), rounds_input=True)


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


def pack(layer: nn.Module, weight: Tensor) -> nn.Parameter:
    own: Any = layer.weight
    (n, k), (rows, columns) = weight.shape, _block(layer)
    blocks = -(-n // rows), -(-k // columns)
    padded = weight.new_zeros(blocks[0] * rows, blocks[1] * columns, dtype=torch.float32)
    padded[:n, :k] = weight
    tiles = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    scale = tiles.abs().amax((1, 3)).div_(torch.finfo(own.dtype).max)
    scale = torch.where(scale > 0, scale, 1.0)
    kept: Any = layer.weight_scale_inv
    if kept.dtype == torch.float8_e8m0fnu:  # powers of two, none too small
        scale = torch.exp2(scale.log2().ceil())
    codes = (tiles / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:n, :k]
    made: Any = nn.Parameter(codes.to(own.dtype).contiguous(), requires_grad=False)
    made.scale = nn.Parameter(scale.view(kept.shape).to(kept.dtype), requires_grad=False)
    return made


def take(layer: nn.Module) -> nn.Parameter:
    own: Any = layer.weight
    own.scale = layer.weight_scale_inv
    return own


def put(layer: nn.Module, parameter: nn.Parameter) -> None:
    made: Any = parameter
    layer.weight, layer.weight_scale_inv = made, made.scale
