"""A fast forward for PEFT's LoRA on the experts of a mixture.

PEFT has a ParamWrapper for each adapted parameter of an experts module.  These wrappers are nested.
In every call, each one adds scale · lora_B lora_A of every expert to its weight.  Here the ordinary
call of the outermost wrapper is one node (``ops.experts``) that never computes this product.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import Tensor, nn

from ..call.projection import Adapter, Base, Output
from ..layers.classes import Fast, change_class, class_over
from ..layers.experts_module import (
    OTHER,
    Experts,
    dense_weight,
    lies_transposed,
    needs_class,
    packed_names,
    read_module,
    run_experts,
    runs_in_a_node,
    stack_in,
    stacked,
)
from ..layers.frozen import is_router
from ..layers.guards import Record
from ..layers.module_parts import is_hooked, why_not_tensor, why_patched
from ..layers.packed_experts import run_dense, set_experts_class
from . import newer
from .dense import MergesDense
from .read import adapters_now, why_not_now, why_not_pair, why_not_scale

_UNTESTED = bool(newer())  # computed once, because it takes as long as a small op

# PEFT's class that adds an adapter to a weight.  Its name depends on PEFT's version.
_PROXIES = [
    getattr(peft_layer, name)
    for name in ("_LoraFactorsProxy", "_LoraParameterProxy")
    if hasattr(peft_layer, name)
]


@dataclass(frozen=True)
class ExpertsRecord(Record):
    """The record of an experts module; its outputs are the first and the second product."""

    experts: Any = None  # an ``Experts`` if there is no reason


class PackedWrapper(MergesDense, nn.Module):
    """A mixin for PEFT's wrapper of an experts module's parameter, which may be packed.

    PEFT would add the adapters to the packed numbers, before these are scaled.
    """

    dense_class = PeftParamWrapper

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        base = layer.get_base_layer()
        if _dropout_of(layer):
            raise RuntimeError(f"this call of experts can't have lora_dropout: {_why(layer)}")
        for wrapper in wrappers_in(layer):
            if wrapper.disable_adapters and wrapper.merged:  # PEFT's forward unmerges, too
                wrapper.unmerge()
        if needs_class(base) or packed_names(base):
            return _run_dense(self, (x, *args), kwargs)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """PEFT's.  Experts that are dense now get a class that runs dense weights."""
        base: nn.Module = super().unload_and_optionally_merge_module(*args, **kwargs)  # type: ignore[misc]
        set_experts_class(base)
        return base


class FastExperts(Fast, PackedWrapper):
    """A mixin for PEFT's wrappers of experts; the outermost one's call is one node.

    Without the node, the call is :class:`PackedWrapper`'s.  This is so if :func:`read_experts`
    gives a reason, and in calls of an inner wrapper.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not kwargs and not why_not_now():
            record = read_experts(self)
            if record.outputs:
                up, down = record.outputs
                if runs_in_a_node((x, *args), (up, down)):
                    return run_experts((x, *args), record.experts, up, down, _dropout_of(self))
        return super().forward(x, *args, **kwargs)


class PackedParamWrapper(PackedWrapper, PeftParamWrapper):
    """The class of a packed weight's wrapper in a model that isn't optimized."""


PackedParamWrapper.__name__ = PeftParamWrapper.__name__  # PEFT compares names
# The classes of wrappers -> their classes in an optimized model.
KINDS = {kind: class_over(FastExperts, kind, "") for kind in (PeftParamWrapper, PackedParamWrapper)}


def run_packed(model: nn.Module) -> None:
    """Give PEFT's wrappers of packed experts the class that can run them."""
    modules: Any = model.modules()
    for module in modules:
        if type(module) is PeftParamWrapper and packed_names(module.get_base_layer()):
            change_class(module, PackedParamWrapper)


def _dropout_of(layer: Any) -> float:
    """The dropout of the layer's active adapter, 0 in evaluation."""
    names = adapters_now(layer)
    drop = layer.lora_dropout[names[0]] if names else None
    return float(drop.p) if isinstance(drop, nn.Dropout) and drop.training else 0.0


def _why(layer: Any) -> str:
    """Why a call of these experts isn't one node."""
    other = "its arguments are others" if isinstance(layer, Fast) else "it isn't optimized"
    return read_experts(layer).reason or why_not_now() or other


def _run_dense(outermost: Any, args: tuple, kwargs: dict) -> Tensor:
    """The call of packed experts with dense weights, made for this call, with adapters added."""
    base, x = outermost.get_base_layer(), args[0]
    weights: dict[str, Any] = {n: dense_weight(base, n, x.dtype) for n in packed_names(base)}
    for layer in wrappers_in(outermost):
        name: Any = layer.parameter_name
        for adapter in adapters_now(layer):
            lora_a, lora_b, scale = _stacked(layer, adapter, lies_transposed(base))
            factors = (lora_a.mT, lora_b.mT) if lies_transposed(base) else (lora_b, lora_a)
            left, right = (factor.to(x.dtype) for factor in factors)
            weight = weights.get(name, getattr(base, name))
            # weight + scale · lora_B lora_A; of a weight [E, in, out], the transposed product.
            weights[name] = torch.baddbmm(weight, left, right, alpha=scale)
    return run_dense(base, weights, args, kwargs, _why(outermost))


def wrappers_in(layer: nn.Module) -> Iterator[PeftParamWrapper]:
    """This wrapper and all wrappers inside of it, from the outermost one on."""
    while isinstance(layer, PeftParamWrapper):
        yield layer
        layer = layer._modules["base_layer"]


def read_experts(outermost: PeftParamWrapper) -> ExpertsRecord:
    """The record of an experts module inside of PEFT's wrappers."""
    wrappers = {layer.parameter_name: layer for layer in wrappers_in(outermost)}
    # wrappers_in goes from the outermost wrapper to the innermost.
    *_, innermost = wrappers.values()
    base: Any = innermost._modules["base_layer"]
    # The weights of experts have three dimensions, a router's has two.
    if len(getattr(base, innermost.parameter_name).shape) == 2:
        what = "router" if is_router(base) else f"matrix of a {type(base).__name__}"
        return ExpertsRecord(f"it is on a {what}, to whose weight PEFT adds lora_B lora_A")
    return _read_experts(wrappers, outermost, base)


def _read_experts(
    wrappers: dict[str, PeftParamWrapper], outermost: PeftParamWrapper, base: Any
) -> ExpertsRecord:
    experts = read_module(base)
    # A node runs the activation again in the backward.
    reason = experts.reason or ("" if experts.repeats else OTHER)
    reason = reason or why_patched(PeftParamWrapper) or _why_not_base(base)
    if reason:
        return ExpertsRecord(reason)
    if not wrappers.keys() <= set(experts.names):
        wrapped, expected = ", ".join(wrappers), " and ".join(experts.names)
        return ExpertsRecord(f"its adapters are on {wrapped}, and not on {expected}")
    outputs, packed = list[Output[Tensor]](), packed_names(base)
    for name in experts.names:
        layer = wrappers.get(name)
        reason = "" if layer is None else _why_not_wrapper(layer, layer is outermost)
        output = reason or _read_output(name, layer, base, experts, name in packed)
        if isinstance(output, str):
            return ExpertsRecord(f"its {name}: {output}")
        outputs.append(output)
    return ExpertsRecord("", tuple(outputs), experts=experts)


def _why_not_base(base: Any) -> str:
    """Why the call of the experts module itself can't be skipped; "" if it can."""
    if is_hooked(base):
        return "a hook watches, or something replaces, the calls of its experts"
    if "parametrizations" in base._modules:
        return "its experts are parametrized"
    if any(map(why_patched, _PROXIES)):
        return "something watches, or replaces, how PEFT adds an adapter to experts' weights"
    if _UNTESTED:
        return "experts are PEFT's where this version of PEFT isn't a tested one"
    return ""


def _why_not_wrapper(layer: PeftParamWrapper, is_outermost: bool) -> str:
    if not is_outermost and is_hooked(layer):
        return "a hook watches, or something replaces, its calls"
    if layer.disable_adapters or layer.merged:
        return "its adapter is merged or disabled"
    if len(adapters_now(layer)) != 1:
        return "it has no active adapter, or several"
    if layer.lora_variant:
        return "its adapter is no plain LoRA"
    # PEFT's num_experts is also 1 for a parameter of two dimensions, which is no stack of experts.
    return "it has only one expert" if layer.num_experts < 2 else ""


def _read_output(
    name: str, layer: PeftParamWrapper | None, base: Any, experts: Experts, is_packed: bool
) -> Output[Tensor] | str:
    """A weight with its bias and adapter, if any, stacked by expert; or a reason against them."""
    weight: Any = stack_in(base, name) if is_packed else base._parameters.get(name)
    bias = base._parameters.get(f"{name}_bias") if experts.has_bias else None
    if weight is None or (experts.has_bias and bias is None):
        return "its weight or bias is no parameter"
    if reason := why_not_tensor(None if is_packed else weight, 3) or why_not_tensor(bias, 2):
        return f"one of its tensors {reason}"
    if experts.transposed and not is_packed:
        # A view of the stored [E, in, out] as [E, out, in].
        weight = weight.mT
    if bias is not None and bias.shape != weight.shape[:2]:
        return f"its bias has shape {tuple(bias.shape)}"
    adapter = None if layer is None else _read_adapter(layer, weight, experts)
    if isinstance(adapter, str):
        return adapter
    return Output(Base(weight, bias), () if adapter is None else (adapter,))


def _read_adapter(
    layer: PeftParamWrapper, weight: Tensor, experts: Experts
) -> Adapter[Tensor] | str:
    """The wrapper's adapter for weight [E, out, in], stacked by expert; or a reason against it."""
    (name,) = adapters_now(layer)
    lora_a, lora_b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    count, columns, rows = layer.num_experts, layer.in_features, layer.out_features
    reason = why_not_pair(lora_a, lora_b, weight, (rows, columns)) or why_not_scale(scale)
    if reason or lora_b.bias is not None or isinstance(scale, Tensor):
        return reason or "its lora_B has a bias, or its scaling is a tensor"
    reverse = _is_reverse(layer, experts.transposed)
    # PEFT's in_features are lora_A's, also where lora_A is on the side of the outputs (reverse).
    if weight.shape != (count, *((columns, rows) if reverse else (rows, columns))):
        return f"its weight has shape {tuple(weight.shape)}"
    if len(lora_a.weight) % count:  # lora_A holds r rows for each expert
        return f"its adapter has rank {len(lora_a.weight)}, for {count} experts"
    return stacked(lora_a.weight, lora_b.weight, count, scale, reverse)


def _stacked(layer: PeftParamWrapper, name: str, transposed: bool) -> Adapter[Tensor]:
    lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    reverse = _is_reverse(layer, transposed)
    return stacked(lora_a, lora_b, layer.num_experts, layer.scaling[name], reverse)


def _is_reverse(layer: PeftParamWrapper, transposed: bool) -> bool:
    """Whether PEFT's lora_A is on the side of the outputs.

    PEFT takes the weight for [E, out, in] if _did_swap_in_out_features, else for [E, in, out].  Its
    rule depends on its version; PEFT 0.18 never swaps.
    """
    return transposed == getattr(layer, "_did_swap_in_out_features", False)
