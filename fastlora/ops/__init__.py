"""The ops: registered with ``torch.library``, differentiable, and the functional API on top."""

from .dora import dora_linear, dora_norm
from .functional import is_plain, lora_linear, lora_linears

__all__ = ["dora_linear", "dora_norm", "is_plain", "lora_linear", "lora_linears"]
