"""``nn.Module`` layers over the functional API."""

from .linear import LoRALinear

__all__ = ["LoRALinear"]
