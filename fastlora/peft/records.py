"""The report on PEFT's LoRA layers."""

import math
from collections.abc import Sequence

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..backends import planned_backend
from ..layers.members import is_hooked
from ..layers.modules import has_sharded, some
from ..projection import Output
from ..report import IN_THE_CALL, SHARDED, LayerCoverage, format_of
from .experts import read_experts, wrappers_in
from .moment import adapters_now, why_not_now
from .reading import read
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
        reason = reason or ("" if is_swapped(layer) else unreached) or why_not_now()
        called = outermost.get(layer, layer)  # whose call is its own, too
        fast, plan, reason, output = _plan(layer, called, reason)
        # By r, which every kind of LoRA layer has; an embedding's lora_A is empty.
        adapters = [adapter for adapter in layer.active_adapters if adapter in layer.r]
        found.append(
            LayerCoverage(
                name,
                shape=(layer.out_features, layer.in_features),
                r=sum(layer.r[adapter] for adapter in adapters),
                fast=fast,
                plan=plan,
                reason=reason,
                adapter=", ".join(adapters),
                parameters=_adapted_parameters(layer),
                packed="" if output is None else format_of(output),
            )
        )
    return tuple(found)


def _plan(
    layer: LoraLayer, called: LoraLayer, reason: str
) -> tuple[bool, str, str, Output[Tensor] | None]:
    """Whether it is fast, its plan, a reason, and what it computes with.

    ``reason``: why its fast forward isn't called.
    """
    if reason:
        return False, "eager", reason, None
    names = adapters_now(layer)
    if not names:
        return (
            True,
            "merged" if layer.merged and not layer.disable_adapters else "disabled",
            "",
            None,
        )
    if has_sharded(called) and not is_hooked(layer.get_base_layer()):
        return False, SHARDED, IN_THE_CALL, None
    if isinstance(called, ParamWrapper):
        experts = read_experts(called)
        reason = experts.reason
        output = (
            None if reason else experts.outputs[experts.experts.names.index(layer.parameter_name)]
        )
    else:
        reading = read(layer, names)
        reason, output = reading.reason, reading.output
    if output is None:
        return False, "eager", reason, None
    return True, *planned_backend([output]), output


def wrapping_notes(layers: Sequence[tuple[str, LoraLayer]]) -> tuple[str, ...]:
    """On layers whose adapters FSDP1 wraps one by one, as PEFT's policy for it does."""
    kind = FullyShardedDataParallel
    names = [n for n, layer in layers if any(isinstance(a, kind) for a in layer.lora_A.values())]
    note = (
        f"{some(names)}: FSDP wraps lora_A and lora_B by themselves: PEFT's fsdp_auto_wrap_policy "
        "does, and transformers' Trainer takes it for every PEFT model.  FSDP2 (in fsdp_config "
        '"version": 2) doesn\'t, nor does a policy of whole blocks with use_orig_params=True'
    )
    return (note,) if names else ()


def _adapted_parameters(layer: LoraLayer) -> int:
    """How many parameters the base has that the layer adapts, sharded and quantised ones too."""
    kernel = getattr(layer.get_base_layer(), "kernel_size", ())  # a convolution's
    size = math.prod(kernel) if isinstance(kernel, tuple) else int(kernel)
    # A custom layer may have neither: PEFT then has None for both.
    shape = (layer.out_features or 0) * (layer.in_features or 0)
    return shape * size * getattr(layer, "num_experts", 1)
