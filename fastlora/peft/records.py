"""The report on PEFT's LoRA layers."""

import math

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from ..backends import planned_backend
from ..report import LayerCoverage, format_of
from .experts import read_experts, wrappers_in
from .moment import why_not_now
from .reading import active_adapters, read
from .sharding import Units
from .swap import is_swapped, why_not_swapped
from .uncalled import why_uncalled


def records(
    model: nn.Module, layers: list[tuple[str, LoraLayer]], unreached: str
) -> tuple[LayerCoverage, ...]:
    """How a call of each layer would run now, with an input like its weight.

    ``unreached`` is what is said of a layer that isn't optimised; if it is empty, the answer is how
    the layer would run if it were.
    """
    units, uncalled = Units(model), why_uncalled(model)
    outermost: dict[nn.Module, ParamWrapper] = {}  # of experts' layers
    for _, layer in layers:  # an inner one comes behind its outer one
        if isinstance(layer, ParamWrapper):
            for each in wrappers_in(layer):
                outermost.setdefault(each, layer)
    found = []
    for name, layer in layers:
        reason = uncalled.get(layer) or why_not_swapped(layer)
        reason = reason or ("" if is_swapped(layer) else unreached)
        called = outermost.get(layer, layer)
        found.append(_cover(name, layer, called, reason, units.gather(name, layer)))
    return tuple(found)


def _cover(
    name: str, layer: LoraLayer, called: LoraLayer, reason: str, gathers: bool
) -> LayerCoverage:
    """``reason``: why its fast forward isn't called.  ``gathers``: whether FSDP gathers the
    layer's parameters before a call.  ``called``: the layer itself, or the one around it whose call
    is its own, too.
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
        elif isinstance(called, ParamWrapper):
            experts = read_experts(called, gathers)
            fast, reason = not experts.reason, experts.reason
            if fast:
                number = experts.experts.names.index(layer.parameter_name)
                plan, reason = planned_backend([experts.outputs[number]])
        else:
            reading = read(layer, names, gathers)
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


def _adapted_parameters(layer: LoraLayer) -> int:
    """How many parameters the base has that the layer adapts, sharded and quantised ones too."""
    kernel = getattr(layer.get_base_layer(), "kernel_size", ())  # a convolution's
    size = math.prod(kernel) if isinstance(kernel, tuple) else int(kernel)
    # A custom layer may have neither: PEFT then has None for both.
    shape = (layer.out_features or 0) * (layer.in_features or 0)
    return shape * size * getattr(layer, "num_experts", 1)
