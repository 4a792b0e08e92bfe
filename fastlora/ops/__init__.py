"""The ops: registered with ``torch.library``, differentiable, and the functional API on top."""

from .dora import dora_linear, dora_norm
from .functional import lora_grouped, lora_linear, lora_linears, multi_lora_linear
from .gated import gated_mlp

__all__ = [
    "dora_linear",
    "dora_norm",
    "gated_mlp",
    "lora_grouped",
    "lora_linear",
    "lora_linears",
    "multi_lora_linear",
]
