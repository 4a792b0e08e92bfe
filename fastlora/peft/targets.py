"""The layers and experts' weights that a ``peft.LoraConfig`` targets, without a change of a model.

Importing this file doesn't import PEFT; its functions do.
"""

import math
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..formats import PackedLayer, quantized_weight
from ..layers.experts import read_module, stack_in
from ..layers.frozen import is_conv1d, is_router, matrix_of
from ..layers.modules import embeddings_of, full_name
from .optimize import peft_layers


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
    from peft.utils.other import get_pattern_key

    config = copy(config)
    name_all_linear(model, config)
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
    if not config.target_modules or is_all_linear(config):
        return linear if config.target_modules else set()
    return {name for name in linear if matches(config, name)}


def is_all_linear(config: Any) -> bool:
    targets = config.target_modules
    return isinstance(targets, str) and targets.lower() == "all-linear"


def linear_layers(model: nn.Module) -> set[str]:
    """The names of all linear layers, dense and packed, except the output head."""
    head = embeddings_of(model, "output")
    layers = {layer: layer.get_base_layer() for _, layer in peft_layers(model)}
    inside = {each for layer in layers for each in layer.modules() if each is not layer}
    named = {n: layers.get(m, m) for n, m in model.named_modules() if n and m not in inside}
    return {name for name, module in named.items() if module is not head and _is_linear(module)}


def _is_linear(module: nn.Module) -> bool:
    is_dense = isinstance(module, nn.Linear) or is_conv1d(type(module))
    return is_dense or isinstance(quantized_weight(module), PackedLayer)


def name_all_linear(model: nn.Module, config: Any) -> None:
    """Replace "all-linear" in the config by names: packed layers too, and no routers."""
    if not is_all_linear(config):
        return
    from peft.utils import transformers_weight_conversion as conversion

    linear = linear_layers(model)
    if hasattr(getattr(model, "config", None), "model_type"):
        # In some mixtures PEFT also adapts experts' parameters, under names of its own.
        conversion.convert_peft_config_for_transformers(config, model, None)
    if isinstance(config.target_modules, str):
        config.target_modules = linear
        return
    names = {name for name, module in model.named_modules() if is_router(module)}
    ends = tuple(f".{name}.weight" for name in {name.rpartition(".")[2] for name in names})
    weights = config.target_parameters
    config.target_parameters = {name for name in weights if not f".{name}".endswith(ends)}
    # PEFT renames layers with names of experts again when it injects.
    known = {old for table in conversion._MOE_TARGET_MODULE_MAPPING.values() for old in table}
    config.target_modules |= {n for n in linear if n.rpartition(".")[2] not in known}
