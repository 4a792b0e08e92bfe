"""The ops: registered with ``torch.library``, differentiable, and the functional API on top."""

from .dora import dora_linear, dora_norm
from .functional import lora_linear, lora_linears
from .gated import gated_mlp
from .grouped import lora_grouped
from .multi import multi_lora_linear

__all__ = [
    "dora_linear",
    "dora_norm",
    "gated_mlp",
    "lora_grouped",
    "lora_linear",
    "lora_linears",
    "multi_lora_linear",
]
