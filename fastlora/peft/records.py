"""The report on PEFT's LoRA layers."""

import math
from collections.abc import Sequence

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..backends import planned_backend
from ..layers.members import is_hooked
from ..layers.modules import has_sharded, some
from ..report import IN_THE_CALL, SHARDED, LayerCoverage, format_of
from .experts import read_experts, wrappers_in
from .moment import why_not_now
from .reading import active_adapters, read
from .swap import is_swapped, why_not_swapped

_UNCALLED = (
    "nothing calls it: torch.nn.MultiheadAttention reads its weight, with the adapter only where "
    "PEFT adapts all of it"
)


def records(
    model: nn.Module, layers: list[tuple[str, LoraLayer]], unreached: str
) -> tuple[LayerCoverage, ...]:
    """How a call of each layer would run now, with an input like its weight.

    ``unreached`` is what is said of a layer that isn't optimised; if it is empty, the answer is how
    the layer would run if it were.
    """
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    uncalled = {attention.out_proj for attention in attentions}
    outermost: dict[nn.Module, ParamWrapper] = {}  # of experts' layers
    for _, layer in layers:  # an inner one comes behind its outer one
        if isinstance(layer, ParamWrapper):
            for each in wrappers_in(layer):
                outermost.setdefault(each, layer)
    found = []
    for name, layer in layers:
        reason = _UNCALLED if layer in uncalled else why_not_swapped(layer)
        reason = reason or ("" if is_swapped(layer) else unreached)
        found.append(_cover(name, layer, outermost.get(layer, layer), reason))
    return tuple(found)


def _cover(name: str, layer: LoraLayer, called: LoraLayer, reason: str) -> LayerCoverage:
    """``reason``: why its fast forward isn't called.  ``called``: the layer itself, or the one
    around it whose call is its own, too.
    """
    # By r, which every kind of LoRA layer has; an embedding's lora_A is empty.
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.r]
    plan, reason, packed = "eager", reason or why_not_now(), ""
    fast = not reason
    if fast:
        names = active_adapters(layer)
        if layer.disable_adapters or not names:
            plan = "disabled"
        elif layer.merged:
            plan = "merged"
        elif has_sharded(called) and not is_hooked(layer.get_base_layer()):
            fast, plan, reason = False, SHARDED, IN_THE_CALL
        elif isinstance(called, ParamWrapper):
            experts = read_experts(called)
            fast, reason = not experts.reason, experts.reason
            if fast:
                number = experts.experts.names.index(layer.parameter_name)
                plan, reason = planned_backend([experts.outputs[number]])
        else:
            reading = read(layer, names)
            fast, reason = reading.output is not None, reading.reason
            if reading.output is not None:
                plan, reason = planned_backend([reading.output])
                packed = format_of(reading.output)
    return LayerCoverage(
        name,
        shape=(layer.out_features, layer.in_features),
        r=sum(layer.r[adapter] for adapter in adapters),
        fast=fast,
        plan=plan,
        reason=reason,
        adapter=", ".join(adapters),
        parameters=_adapted_parameters(layer),
        packed=packed,
    )


def wrapping_notes(layers: Sequence[tuple[str, LoraLayer]]) -> tuple[str, ...]:
    """On layers whose adapters FSDP1 wraps one by one, as PEFT's policy for it does."""
    names = [
        name
        for name, layer in layers
        if any(isinstance(part, FullyShardedDataParallel) for part in layer.lora_A.values())
    ]
    if not names:
        return ()
    return (
        f"{some(names)}: FSDP wraps lora_A and lora_B by themselves: PEFT's fsdp_auto_wrap_policy "
        "does, and transformers' Trainer takes it for every PEFT model.  FSDP2 (in fsdp_config "
        '"version": 2) doesn\'t, nor does a policy of whole blocks with use_orig_params=True',
    )


def _adapted_parameters(layer: LoraLayer) -> int:
    """How many parameters the base has that the layer adapts, sharded and quantised ones too."""
    kernel = getattr(layer.get_base_layer(), "kernel_size", ())  # a convolution's
    size = math.prod(kernel) if isinstance(kernel, tuple) else int(kernel)
    # A custom layer may have neither: PEFT then has None for both.
    shape = (layer.out_features or 0) * (layer.in_features or 0)
    return shape * size * getattr(layer, "num_experts", 1)
