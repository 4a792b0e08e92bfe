"""The report on PEFT's LoRA layers."""

from peft.tuners.lora.layer import LoraLayer

from ...backends import planned_backend
from ...coverage import LayerCoverage
from .eligibility import runs_base_alone, why_not_layer
from .linear import projections_of
from .swap import is_swapped, why_not_swapped


def cover(name: str, layer: LoraLayer, unreached: str) -> LayerCoverage:
    """How a call of the layer would run now.

    ``unreached`` is what is said of a layer that isn't optimised; if it is empty, the answer is how
    the layer would run if it were.
    """
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.r]
    plan, reason = "eager", why_not_swapped(layer) or ("" if is_swapped(layer) else unreached)
    if not reason and runs_base_alone(layer):
        plan = "merged" if layer.merged and not layer.disable_adapters else "disabled"
    elif not reason:
        reason = why_not_layer(layer)
    fast = not reason
    if fast and plan == "eager":
        plan, reason = planned_backend(projections_of(layer)[0])
    return LayerCoverage(
        name,
        shape=(layer.out_features, layer.in_features),
        r=sum(layer.r[adapter] for adapter in adapters),
        fast=fast,
        plan=plan,
        reason=reason,
        adapter=", ".join(adapters),
    )
