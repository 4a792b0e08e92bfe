"""DoRA's op with a layer's tensors in place of records."""

from collections.abc import Callable

from torch import Tensor

from fastlora.call.projection import Adapter, Base, Output
from fastlora.ops import dora


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    drop: Callable[[Tensor], Tensor] | None = None,
    p: float = 0.0,
    norm: Tensor | None = None,
) -> Tensor:
    """y of a DoRA layer; ``norm`` [N] replaces the norm of the merged weight's rows."""
    norm = dora.dora_norm(weight, lora_a, lora_b, scale) if norm is None else norm
    output = Output(Base(weight, bias), (Adapter(lora_a, lora_b, scale),))
    return dora.dora_linear(x, output, magnitude / norm, drop, p)[0]
