"""The norm of every row of a weight with its adapter added: DoRA's n."""

import torch
from torch import Tensor

from ..blocks import buffer_for, source_of, widened
from ..formats.format import Format, Quantized
from .dispatch import autocast_off


def norm_of_rows(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """‖weight + scale · lora_b lora_a‖ for each row, [N], in :func:`wide_dtype`, no gradient.

    By n² = ‖w‖² + δ with δ = 2 scale ⟨w, ba⟩ + scale² ‖ba‖² for each row, from one reading of the
    weight: ba, lora_b lora_a, is never made.  As n = ‖w‖ + δ / (‖w‖ + n), it is ‖w‖ to the last bit
    where lora_b is zero, and an adapter that starts there changes nothing.
    """
    with torch.no_grad(), autocast_off(weight.device.type):
        wide = wide_dtype(weight)
        down, up = lora_a.to(wide), lora_b.to(wide)
        norms, products = [], []
        for _, rows in widened(source_of(weight), buffer_for(weight, wide)):
            norms.append(torch.linalg.vector_norm(rows, dim=1))
            products.append(rows @ down.T)
        cross, square = torch.cat(products), up @ (down @ down.T)
        change = (up * square).sum(1).mul_(scale**2).add_((up * cross).sum(1), alpha=2 * scale)
        before = torch.cat(norms)
        after = before.square().add_(change).clamp_min_(0.0).sqrt_()
        smallest = torch.finfo(wide).tiny
        return before.add_(change.div_(after.add_(before).clamp_min_(smallest))).clamp_min_(0.0)


def wide_dtype(tensor: Tensor | Quantized | Format) -> torch.dtype:
    """float32, or float64 for float64: where sums over rows and columns are made."""
    return torch.promote_types(tensor.dtype, torch.float32)
