"""The ops: registered with ``torch.library``, differentiable, and the functional API on top."""

from .dora import dora_linear
from .functional import is_plain, lora_linear, lora_linears
from .library import dora_norm

__all__ = ["dora_linear", "dora_norm", "is_plain", "lora_linear", "lora_linears"]
