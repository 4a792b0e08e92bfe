"""The report on PEFT's LoRA layers: a ``LayerCoverage`` for each."""

import math
from collections.abc import Iterator, Sequence

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..backends import planned_backend
from ..call.projection import Output
from ..layers.classes import Fast
from ..layers.module_parts import is_hooked
from ..layers.modules import has_sharded, some
from ..layers.report import IN_THE_CALL, PEFT_FORWARD, SHARDED, LayerCoverage, format_of, is_fast
from .experts import ExpertsRecord, read_experts, wrappers_in
from .layer import why_not_swapped
from .read import adapters_now, read, why_not_now

_UNCALLED = (
    "nothing calls it: torch.nn.MultiheadAttention reads its weight, with the adapter only where "
    "PEFT adapts all of it"
)


def records(
    model: nn.Module, layers: list[tuple[str, LoraLayer]], unreached: str
) -> tuple[LayerCoverage, ...]:
    """How a call of each layer would run now, with an input of its weight's dtype and device.

    ``unreached``: the reason for layers that aren't optimized.  If it is empty, they are reported
    as if they were.
    """
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    uncalled = {attention.out_proj for attention in attentions}
    reports, calls = [], _called(layers)
    for name, layer in layers:
        reason = _UNCALLED if layer in uncalled else why_not_swapped(layer)
        reason = reason or ("" if isinstance(layer, Fast) else unreached) or why_not_now()
        plan, reason, output = _plan(layer, calls[layer], reason)
        # ``r`` has an entry for each adapter in every kind of LoRA layer; lora_A is empty in an
        # embedding's.
        adapters = [adapter for adapter in layer.active_adapters if adapter in layer.r]
        # The number of the base's elements, computed from sizes, because a sharded or quantized
        # weight has another one.  A convolution also has a kernel; a custom layer may have None as
        # its sizes.
        kernel = getattr(layer.get_base_layer(), "kernel_size", ())
        size = math.prod(kernel) if isinstance(kernel, tuple) else int(kernel)
        size *= (layer.out_features or 0) * (layer.in_features or 0)
        reports.append(
            LayerCoverage(
                name,
                (layer.out_features, layer.in_features),
                sum(layer.r[adapter] for adapter in adapters),
                is_fast(plan),
                plan,
                reason,
                ", ".join(adapters),
                size * getattr(layer, "num_experts", 1),
                "" if output is None else format_of(output),
            )
        )
    return tuple(reports)


def outputs_of(
    layers: list[tuple[str, LoraLayer]],
) -> Iterator[tuple[nn.Module, Output | str, float]]:
    """For each layer: its module, its output or the reason why it can't be fast, and its dropout.

    The dropout is the largest probability among its adapters in training.
    """
    calls = _called(layers)
    for _, layer in layers:
        plan, reason, output = _plan(layer, calls[layer], why_not_swapped(layer))
        base, names = layer.get_base_layer(), adapters_now(layer)
        drops = [layer.lora_dropout._modules.get(name) for name in names]
        p = max([getattr(drop, "p", 0.0) for drop in drops], default=0.0)  # in training
        yield base if isinstance(layer, ParamWrapper) else layer, output or reason or plan, p


def _called(layers: list[tuple[str, LoraLayer]]) -> dict[LoraLayer, LoraLayer]:
    """For each layer, the layer whose call runs it: experts' outermost wrapper, or itself."""
    calls = {layer: layer for _, layer in layers}
    for _, layer in layers:  # outer wrappers come before inner ones
        if isinstance(layer, ParamWrapper) and calls[layer] is layer:
            calls |= dict.fromkeys(wrappers_in(layer), layer)
    return calls


def _plan(layer: LoraLayer, called: LoraLayer, reason: str) -> tuple[str, str, Output | None]:
    """A layer's plan, the reason for it, and its output if it would run fast.

    ``called``: the layer whose call runs it.  ``reason``: why its forward would be PEFT's, if that
    is already known.
    """
    if reason:
        return PEFT_FORWARD, reason, None
    names = adapters_now(layer)
    if not names:
        plan = "merged" if layer.merged and not layer.disable_adapters else "disabled"
        return plan, "", None
    if has_sharded(called) and not is_hooked(layer.get_base_layer()):
        return SHARDED, IN_THE_CALL, None
    is_wrapper, place = isinstance(called, ParamWrapper), 0
    record = read_experts(called) if is_wrapper else read(layer, names)
    if not record.outputs:
        return PEFT_FORWARD, record.reason, None
    if isinstance(record, ExpertsRecord):
        place = record.experts.names.index(layer.parameter_name)
    return *planned_backend([record.outputs[place]]), record.outputs[place]


def wrapping_notes(layers: Sequence[tuple[str, LoraLayer]]) -> tuple[str, ...]:
    """A note on layers whose lora_A and lora_B are wrapped by FSDP1 separately."""
    kind = FullyShardedDataParallel
    names = [n for n, layer in layers if any(isinstance(a, kind) for a in layer.lora_A.values())]
    note = (
        f"{some(names)}: FSDP wraps lora_A and lora_B by themselves: PEFT's fsdp_auto_wrap_policy "
        "does, and transformers' Trainer uses it for every PEFT model.  FSDP2 (in fsdp_config "
        '"version": 2) doesn\'t, nor does a policy of whole blocks with use_orig_params=True'
    )
    return (note,) if names else ()
