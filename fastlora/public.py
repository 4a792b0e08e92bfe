"""All public names of ``fastlora``.  Importing this file imports torch."""

from . import reference
from .adapters.combine import combine_adapters
from .adapters.llama_cpp import export_gguf
from .adapters.resize import resize_adapter
from .adapters.serving import check_adapter
from .backends import use_backend
from .call.projection import Projection
from .call.rows import AdapterMapping
from .doctor.model_check import check
from .estimates import estimate
from .integrations.patches import auto
from .layers.linear import LoRALinear, lora_state_dict, replace_linears
from .layers.report import Coverage
from .ops.functional import grouped_lora_linear, lora_linear, lora_linears, multi_lora_linear
from .ops.loss import linear_cross_entropy, token_logprobs
from .packing.checkpoints import load_packed
from .packing.pack_weights import pack
from .peft.inject import get_peft_model, load_adapter
from .peft.optimized import coverage, optimize, restore
from .peft.sampling import merged
from .sweeps import sweep
from .tuning import tune
from .version import __version__

__all__ = [
    "AdapterMapping", "Coverage", "LoRALinear", "Projection", "__version__", "auto", "check",
    "check_adapter", "combine_adapters", "coverage", "estimate", "export_gguf", "get_peft_model",
    "grouped_lora_linear", "linear_cross_entropy", "load_adapter", "load_packed", "lora_linear",
    "lora_linears", "lora_state_dict", "merged", "multi_lora_linear", "optimize", "pack",
    "reference", "replace_linears", "resize_adapter", "restore", "sweep", "token_logprobs", "tune",
    "use_backend",
]  # fmt: skip
