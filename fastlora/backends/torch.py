"""The torch backend: any device and floating dtype, by torch's own products and in-place adds.

With x [M, K], weight [N, K], lora_a [r, K], lora_b [N, r] and the keep mask of dropout p:

    factor = scale / (1 - p)
    h  = factor · (mask ∘ x) lora_aᵀ            y  = x weightᵀ + h lora_bᵀ + bias
    dh = factor · dy lora_b                     dx = dy weight + mask ∘ (dh lora_a)
    d lora_a = dhᵀ (mask ∘ x)                   d lora_b = dyᵀ h

h and dh [M, r] carry the whole factor, multiplied in while the product is still in the accumulator,
so that nothing of size M·K or M·N is ever scaled.  Dropout runs over blocks of rows: no dropped
copy of x exists.

Where 16-bit products are slow (:mod:`.products`) the same formulas run in float32 over blocks of
rows, and h stays float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats.format import Quantised
from ..projection import HALF_DTYPES, Output, flatten, per_adapter, unflatten
from .dropout import dropout_mask
from .gated import gated, gated_backward
from .grouped import backward_grouped, forward_grouped, takes_experts_in_turn
from .multi import backward_multi, forward_multi
from .products import h_dtype, is_slow
from .protocol import Settings
from .rows import backward_rows, base_gradients, forward_rows, masks_of, no_gradients

__all__ = [
    "backward",
    "backward_grouped",
    "backward_multi",
    "base_gradients",
    "dropout_mask",
    "forward",
    "forward_grouped",
    "forward_multi",
    "gated",
    "gated_backward",
    "h_dtype",
    "is_small",
    "no_gradients",
    "takes_experts_in_turn",
    "why_not",
]

# Up to so many rows a node costs more than it saves (docs/performance.md).
MOST_ROWS = 32


def why_not(dtype: torch.dtype, device: torch.device, outputs: Sequence[Output[Tensor]]) -> str:
    """Why a call with x of this dtype and device isn't covered; it always is."""
    return ""


def is_small(x: Tensor, outputs: Sequence[Output[Tensor]]) -> bool:
    """Whether x has few rows on a CPU, and one output, and torch's own products are fast."""
    if not 0 < x.numel() <= MOST_ROWS * x.shape[-1] or x.device.type != "cpu" or len(outputs) > 1:
        return False
    ((weight, bias), adapters) = outputs[0]
    dtype = x.dtype
    if isinstance(weight, Quantised) or (bias is not None and bias.dtype != dtype):
        return False
    if dtype in HALF_DTYPES and is_slow(dtype):
        return False
    # 16-bit adapters aren't: torch would round h before it is scaled.
    adapter_dtype = torch.promote_types(dtype, torch.float32)
    return all([a.dtype == b.dtype == adapter_dtype for a, b, _ in adapters])


def forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, settings: Settings
) -> tuple[list[Tensor], list[Tensor]]:
    """y [M, N] of every output, and h [M, r] of every adapter, laid end to end."""
    x, *tensors = inputs
    outputs = unflatten(tensors, settings.layouts)
    return forward_rows(x, outputs, masks_of(x, outputs, seeds, settings))


def backward(
    dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    hs: Sequence[Tensor],
    needs: Sequence[bool],
    seeds: Tensor | None,
    settings: Settings,
) -> list[Tensor | None]:
    """The gradient of each input that needs one, else None."""
    x, *tensors = inputs
    needs_x, *needs_flat = needs
    outputs = unflatten(tensors, settings.layouts)
    wanted = unflatten(needs_flat, settings.layouts)
    masks = masks_of(x, outputs, seeds, settings)
    thin = list(per_adapter(hs, outputs))
    dx, gradients = backward_rows(dys, x, outputs, thin, wanted, masks, needs_x)
    return [dx, *flatten(gradients, settings.layouts)]
