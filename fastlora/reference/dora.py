"""DoRA, written as it is read.

The formula is that of Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353),
with the norm outside of the gradient (its section 4.3), and with dropout as in PEFT.
"""

from torch import Tensor


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropped: Tensor | None = None,
) -> Tensor:
    """x weightᵀ + bias, and what the adapter adds to it; differentiable in every argument.

    x [..., K], weight [N, K], lora_a [r, K], lora_b [N, r], magnitude and bias [N] -> [..., N], all
    in one dtype.  ``dropped`` is x after dropout; None without.  What the adapter adds, it adds of
    that: merged_i is row i of weight + scale lora_b lora_a.

        (magnitude_i / ‖merged_i‖) · merged_i - weight_i
    """
    dropped = x if dropped is None else dropped
    merged = weight + scale * (lora_b @ lora_a)
    gain = magnitude / merged.norm(dim=1).detach()
    change = gain * (dropped @ weight.T + scale * ((dropped @ lora_a.T) @ lora_b.T))
    y = x @ weight.T + change - dropped @ weight.T
    return y if bias is None else y + bias
