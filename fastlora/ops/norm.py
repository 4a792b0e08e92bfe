"""The norm of each row of a weight plus its adapter: n in DoRA (:mod:`.dora`)."""

import torch
from torch import Tensor

from ..common.row_blocks import buffer_for, source_of, widened
from ..formats.format import Format, Quantized
from .dispatch import autocast_off


def norm_of_rows(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """‖weight + scale · lora_b lora_a‖ for each row: [N], in :func:`wide_dtype`, detached.

    weight is [N, K], dense or packed.  It is read once, and lora_b lora_a [N, K] is never formed.
    With w and ba a row of weight and of lora_b lora_a:

        n² = ‖w‖² + δ,  δ = 2 scale ⟨w, ba⟩ + scale² ‖ba‖²
        n  = ‖w‖ + δ / (‖w‖ + n)

    The second form equals ‖w‖ bit by bit if lora_b is zero, so a new adapter changes nothing.
    """
    with torch.no_grad(), autocast_off(weight.device.type):
        wide = wide_dtype(weight)
        down, up = lora_a.to(wide), lora_b.to(wide)
        norms, products = [], []
        for _, rows in widened(source_of(weight), buffer_for(weight, wide)):
            # rows: a block of the weight in the wide dtype, [rows, K]
            norms.append(torch.linalg.vector_norm(rows, dim=1))
            products.append(rows @ down.T)  # [rows, K] @ [K, r]
        cross, square = torch.cat(products), up @ (down @ down.T)  # both [N, r]
        change = (up * square).sum(1).mul_(scale**2).add_((up * cross).sum(1), alpha=2 * scale)
        before = torch.cat(norms)
        after = before.square().add_(change).clamp_min_(0.0).sqrt_()
        smallest = torch.finfo(wide).tiny
        return before.add_(change.div_(after.add_(before).clamp_min_(smallest))).clamp_min_(0.0)


def wide_dtype(tensor: Tensor | Quantized | Format) -> torch.dtype:
    """The dtype of sums over rows and columns: float64 for float64, otherwise float32."""
    return torch.promote_types(tensor.dtype, torch.float32)
