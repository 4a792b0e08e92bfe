"""fastlora: LoRA linear layers that cost almost nothing over the frozen layer they wrap."""

from . import reference
from .backends import use_backend
from .ops import lora_linear, lora_linears
from .projection import Projection
