"""The ops: registered with ``torch.library``, differentiable, and the functional API on top."""

from .dora import dora_linear, dora_norm
from .functional import lora_linear, lora_linears

__all__ = ["dora_linear", "dora_norm", "lora_linear", "lora_linears"]
