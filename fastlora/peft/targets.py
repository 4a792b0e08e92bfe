"""The layers and experts' weights that a ``peft.LoraConfig`` targets, without a change of a model.

Importing this file doesn't import PEFT; its functions do.
"""

import math
import re
import sys
from collections.abc import Set
from copy import copy, deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..formats import PackedLayer, quantized_weight
from ..layers.experts_module import read_module, stack_in
from ..layers.frozen import is_conv1d, is_router, matrix_of
from ..layers.module_parts import plain_class_of
from ..layers.modules import embeddings_of, full_name, plain_name

# Classes that choose experts.  Some are linear layers, others hold one.
_ROUTER = re.compile(r"(Router|Gating|MoE\w*Gate)$")


def peft_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Every LoRA layer of PEFT in the model, with its name; none if PEFT isn't imported."""
    lora = sys.modules.get("peft.tuners.lora")
    kind = getattr(lora, "LoraLayer", ())
    return [(plain_name(name), m) for name, m in model.named_modules() if isinstance(m, kind)]


class Target(NamedTuple):
    """A linear layer, or a weight of an experts module, and the numbers of its adapter."""

    module: nn.Module
    parameter: str  # the weight's name in an experts module; "" for a linear layer
    r: int
    lora_alpha: float

    @property
    def weight(self) -> Any:
        """The weight [out, in], or the stack [E, out, in]; it may be packed."""
        if self.parameter:
            return stack_in(self.module, self.parameter)
        return matrix_of(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its adapter in training: of at least 32 bits."""
        weight = self.weight
        is_wide = isinstance(weight, Tensor) and weight.itemsize > 4
        return weight.dtype if is_wide else torch.float32

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of lora_A and lora_B.

        Experts' are stacked: lora_A [E · r, in] with the expert as the slowest index, lora_B
        [out, r · E] with the expert as the fastest.
        """
        *experts, N, K = self.weight.shape
        E = math.prod(experts)
        return (E * self.r, K), (N, self.r * E)


def find_targets(model: nn.Module, config: Any) -> dict[str, Target]:
    """The targets of the config in a model without adapters, by name; linear layers first.

    Raises ValueError if nothing matches.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
    from peft.utils.other import get_pattern_key

    config = deepcopy(config)
    resolve_targets(model, config, linear_layers(model))
    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", "")
        config.target_modules = DEFAULTS.get(kind)
    names = dict.fromkeys(n for n, _ in model.named_modules() if n in matched(model, config))
    found: dict[str, tuple[nn.Module, str]] = {n: (model.get_submodule(n), "") for n in names}
    ends = tuple(f".{name}" for name in config.target_parameters or ())
    for owner, module in model.named_modules() if ends else ():
        for parameter in () if read_module(module).reason else read_module(module).names:
            if f".{full_name(owner, parameter)}".endswith(ends):
                found[full_name(owner, parameter)] = module, parameter
    if not found:
        given = {n: getattr(config, n) for n in ("target_modules", "target_parameters")}
        raise ValueError(f"{given} match nothing in the {type(model).__name__}")

    def number(field: str, name: str) -> Any:
        patterns = getattr(config, f"{field}_pattern") or {}
        default = config.r if field == "rank" else config.lora_alpha
        return patterns.get(get_pattern_key(patterns.keys(), name), default)

    return {n: Target(*at, number("rank", n), number("alpha", n)) for n, at in found.items()}


def matched(model: nn.Module, config: Any) -> set[str]:
    """The names of the linear layers that ``target_modules`` names."""
    from peft.tuners.tuners_utils import check_target_module_exists as matches

    linear = linear_layers(model)
    if is_all_linear(config):
        config = copy(config)
        config.target_modules = linear
    return {name for name in linear if config.target_modules and matches(config, name)}


def is_all_linear(config: Any) -> bool:
    targets = config.target_modules
    return isinstance(targets, str) and targets.lower() == "all-linear"


def linear_layers(model: nn.Module) -> set[str]:
    """The names of all linear layers, dense and packed, except the output head and routers."""
    layers = {layer: layer.get_base_layer() for _, layer in peft_layers(model)}
    out = {each for layer in layers for each in layer.modules() if each is not layer}
    routers = (m for m in model.modules() if _ROUTER.search(plain_class_of(m).__name__))
    out |= {each for router in routers for each in router.modules()}
    out |= {embeddings_of(model, "output")} - {None}
    named = {n: layers.get(m, m) for n, m in model.named_modules() if n and m not in out}
    return {name for name, module in named.items() if is_linear(module)}


def is_linear(module: nn.Module) -> bool:
    is_dense = isinstance(module, nn.Linear) or is_conv1d(type(module))
    return is_dense or isinstance(quantized_weight(module), PackedLayer)


def resolve_targets(model: nn.Module, config: Any, linear: Set[str]) -> None:
    """Replace targets in the config that aren't names of the model, as PEFT's injection does.

    PEFT renames experts' layers of transformers 4, in some mixtures.  "all-linear" means the names
    ``linear``; in these mixtures, also the experts' weights.
    """
    from peft.import_utils import is_transformers_ge_v5

    was_all = is_all_linear(config)
    if is_transformers_ge_v5 and hasattr(getattr(model, "config", None), "model_type"):
        from peft.utils import transformers_weight_conversion as conversion

        conversion.convert_peft_config_for_transformers(config, model, None)
    if is_all_linear(config):
        config.target_modules = {*linear}
    elif was_all:
        routers = {name for name, module in model.named_modules() if is_router(module)}
        ends = tuple(f".{name.rpartition('.')[2]}.weight" for name in routers)
        weights = config.target_parameters
        config.target_parameters = {name for name in weights if not f".{name}".endswith(ends)}
        # PEFT renames layers with names of experts again when it injects.
        known = {old for table in conversion._MOE_TARGET_MODULE_MAPPING.values() for old in table}
        config.target_modules |= {n for n in linear if n.rpartition(".")[2] not in known}
