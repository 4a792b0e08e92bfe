"""Which weights of experts a LoRAConfig means (``target_parameters``), and their adapters."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers.base import is_conv1d
from ..layers.expert_layer import LoRAExperts, adapted_experts_class, why_not_experts
from ..layers.expert_weight import Adaptation, Features, features_of, new_experts_adapter
from ..layers.modules import called
from .config import LoRAConfig, is_inside, names_any


class ExpertsTarget(NamedTuple):
    """A weight of an experts module."""

    module: nn.Module
    parameter: str

    @property
    def weight(self) -> Tensor:
        return self.module.get_parameter(self.parameter)

    @property
    def features(self) -> Features:
        return features_of(self.module, self.parameter)


def find_experts(
    model: nn.Module,
    config: LoRAConfig,
    layers: Mapping[str, nn.Module],
    saved: Collection[str],
    *,
    every_name: bool,
) -> dict[str, ExpertsTarget]:
    """The experts' weights that ``target_parameters`` names, by name, in the model's order.

    ``layers``: the linear layers that ``config`` targets, whose weights it may name, too.
    ``saved``: modules that train in full.  Raises ValueError for a parameter that is the weight of
    neither, for experts that can't have adapters, and, with ``every_name``, for a name that matches
    nothing.
    """
    wanted = config.target_parameters or ()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)] if wanted else []
    for one in wanted if every_name else ():
        if not any(names_any((one,), name) for name in names):
            raise ValueError(f"target_parameters has {one!r}, which matches no parameter")
    by_module: dict[str, list[str]] = {}
    for owner, module in model.named_modules() if wanted else ():
        for parameter in module._parameters:
            name = f"{owner}.{parameter}" if owner else parameter
            if not names_any(wanted, name) or any(is_inside(name, outer) for outer in saved):
                continue
            layer = layers.get(owner) if parameter == "weight" else None
            if layer is None:
                by_module.setdefault(owner, []).append(parameter)
            elif is_conv1d(type(layer)):
                raise ValueError(
                    f"target_parameters names {name}, a Conv1D's weight [in, out], which PEFT "
                    "takes for [out, in]: name the layer in target_modules"
                )
    found = {}
    for owner, parameters in by_module.items():
        module = model.get_submodule(owner)
        reason = why_not_experts(module, parameters)
        if reason:
            raise ValueError(
                f"target_parameters names {parameters[0]} of {called(owner)}, which can't take an "
                f"adapter: it is no linear layer's weight, and as experts {reason}"
            )
        for parameter in parameters:
            found[f"{owner}.{parameter}" if owner else parameter] = ExpertsTarget(module, parameter)
    return found


_Adapters = dict[str, tuple[nn.Parameter, nn.Parameter, Adaptation]]


def new_adapters(
    targets: Mapping[str, ExpertsTarget], config: LoRAConfig, wide: bool
) -> list[tuple[nn.Module, type[LoRAExperts], _Adapters]]:
    """Of each module its class with adapters, and the adapters of its weights."""
    made: dict[nn.Module, _Adapters] = {}
    for name, (module, parameter) in targets.items():
        dtype, r = targets[name].weight.dtype, config.rank_of(name)
        if wide and dtype.itemsize < 4:
            dtype = torch.float32
        adapter = new_experts_adapter(module, parameter, r, config.init_lora_weights, dtype)
        numbers = targets[name].features, r, config.alpha_of(name), config.use_rslora
        made.setdefault(module, {})[parameter] = (*adapter, Adaptation(*numbers))
    return [(m, adapted_experts_class(type(m)), adapters) for m, adapters in made.items()]
