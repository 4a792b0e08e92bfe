"""The gated MLP of Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202), with LoRA.

y = down(act(gate(x)) ∘ up(x)), of which each is a LoRA layer, or a frozen one
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .lora import lora_linears


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) ∘ up, of one shape, by formulas of exponentials, tanh and erf."""
    if activation == "silu":
        act = gate / (1.0 + torch.exp(-gate))
    elif activation == "gelu":
        act = 0.5 * gate * (1.0 + torch.erf(gate / math.sqrt(2.0)))
    elif activation == "gelu_tanh":
        inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)
        act = 0.5 * gate * (1.0 + torch.tanh(inner))
    elif activation in ("relu", "relu2"):
        act = torch.where(gate > 0, gate, 0.0)
        act = act if activation == "relu" else act * act
    else:
        raise ValueError(f"there is no activation {activation!r} here")
    return act * up


def gated_mlp(
    x: Tensor,
    gate: Sequence,
    up: Sequence,
    down: Sequence,
    activation: str,
    *,
    dropout: float = 0.0,
    masks: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """down(act(gate(x)) ∘ up(x)), differentiable in every argument, all in one dtype.

    x [..., K]; gate and up to [..., I], down back to [..., K]: each as :func:`lora_linears` takes
    them.  ``masks``: one for each adapter, in the order gate, up, down; those of down have the
    shape of act(gate(x)).
    """
    count = len(_adapters(gate)) + len(_adapters(up))
    first = None if masks is None else masks[:count]
    last = None if masks is None else masks[count:]
    its_gate, its_up = lora_linears(x, [gate, up], dropout=dropout, masks=first)
    product = gated(its_gate, its_up, activation)
    return lora_linears(product, [down], dropout=dropout, masks=last)[0]


def _adapters(projection: Sequence) -> Sequence:
    return projection[1] if len(projection) == 2 else (projection,)
