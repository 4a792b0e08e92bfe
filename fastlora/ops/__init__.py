"""The ops: registered with ``torch.library``, differentiable, and the functional API on top."""

from .functional import lora_linear, lora_linears

__all__ = ["lora_linear", "lora_linears"]
