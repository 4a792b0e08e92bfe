"""The report on PEFT's LoRA layers."""

from peft.tuners.lora.layer import LoraLayer

from ...backends import planned_backend
from ...coverage import LayerCoverage
from .reading import active_adapters, read
from .swap import is_swapped, why_not_swapped


def cover(name: str, layer: LoraLayer, unreached: str) -> LayerCoverage:
    """How a call of the layer would run now, with an input like its weight.

    ``unreached`` is what is said of a layer that isn't optimised; if it is empty, the answer is how
    the layer would run if it were.
    """
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.r]
    plan, reason = "eager", why_not_swapped(layer) or ("" if is_swapped(layer) else unreached)
    fast = not reason
    if fast:
        names = active_adapters(layer)
        if layer.disable_adapters or not names:
            plan = "disabled"
        elif layer.merged:
            plan = "merged"
        else:
            reading = read(layer, names)
            fast, reason = not reading.reason, reading.reason
            if fast:
                plan, reason = planned_backend(reading.projections[0])
    return LayerCoverage(
        name,
        shape=(layer.out_features, layer.in_features),
        r=sum(layer.r[adapter] for adapter in adapters),
        fast=fast,
        plan=plan,
        reason=reason,
        adapter=", ".join(adapters),
    )
