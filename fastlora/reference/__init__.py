"""The truth: LoRA's and DoRA's formulas under plain autograd.  It shares no code with any backend.

Run it in float64 to judge an implementation.  It is not fast, keeps every intermediate, and checks
little.
"""

from .dora import dora_linear
from .gated import gated_mlp
from .grouped import lora_grouped
from .lora import lora_linear, lora_linears
from .multi import multi_lora_linear

__all__ = [
    "dora_linear",
    "gated_mlp",
    "lora_grouped",
    "lora_linear",
    "lora_linears",
    "multi_lora_linear",
]
