"""The truth: LoRA's formula under plain autograd.  It shares no code with any backend.

Run it in float64 to judge an implementation.  It is not fast, keeps every intermediate, and checks
little.
"""

from .lora_linear import lora_linear, lora_linears

__all__ = ["lora_linear", "lora_linears"]
