"""All public names of ``fastlora``.  Importing this file imports torch."""

from . import reference
from .adapters.combine import combine_adapters
from .adapters.llama_cpp import export_gguf
from .adapters.resize import resize_adapter
from .adapters.serving import check_adapter
from .automatic import auto
from .backends import use_backend
from .estimates import estimate
from .layers.linear import LoRALinear
from .model.checkpoint import load_adapter, save_adapter
from .model.config import LoRAConfig
from .model.inject import apply_lora, print_trainable_parameters, remove_lora
from .model.merge import merge_lora, unmerge_lora
from .model.packed_files import load_packed
from .model.packing import pack
from .ops.functional import grouped_lora_linear, lora_linear, lora_linears, multi_lora_linear
from .ops.loss import linear_cross_entropy, token_logprobs
from .peft.check import check
from .peft.inject import get_peft_model
from .peft.optimize import coverage, optimize, restore
from .projection import Projection
from .report import Coverage
from .rows import AdapterMapping
from .sampling import merged
from .sweeps import sweep
from .tuning import tune
from .version import __version__

__all__ = [
    "AdapterMapping", "Coverage", "LoRAConfig", "LoRALinear", "Projection", "__version__",
    "apply_lora", "auto", "check", "check_adapter", "combine_adapters", "coverage", "estimate",
    "export_gguf", "get_peft_model", "grouped_lora_linear", "linear_cross_entropy",
    "load_adapter", "load_packed", "lora_linear", "lora_linears", "merge_lora", "merged",
    "multi_lora_linear", "optimize", "pack", "print_trainable_parameters", "reference",
    "remove_lora", "resize_adapter", "restore", "save_adapter", "sweep", "token_logprobs", "tune",
    "unmerge_lora", "use_backend",
]  # fmt: skip
