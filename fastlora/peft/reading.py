"""A PEFT LoRA layer as its next call finds it: what the fast path computes with, or why it can't.

The fast path reads the tensors of ``base_layer``, ``lora_A`` and ``lora_B`` and doesn't call these
modules.  So whatever acts on such a call (a hook, another class, a replaced forward) sends the
layer to PEFT's forward, which does call them.

All of this is looked at anew in every call: adapters come and go, and so do hooks.  :func:`read`
judges it, :func:`glance` only collects it, so that what was judged once is known again
(:mod:`fastlora.ops.kinds`).  A glance is to take a few microseconds, so it looks submodules up
where ``nn.Module`` keeps them.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..backends import asked_backend
from ..layers.frozen import is_conv1d, why_not_class
from ..layers.members import is_hooked, tensor_of, why_not_tensor
from ..ops.autocast import autocast_dtype
from ..projection import (
    LARGEST_SCALE,
    Adapter,
    Base,
    Output,
    is_number,
    is_plain,
)
from ..quant import SHARDED, PackedLayer, quantised_weight
from .dropout import DROPOUTS


class Reading(NamedTuple):
    """The layer with its active adapters as one output; or ``reason``, why its call is PEFT's."""

    reason: str
    output: Output[Tensor] | None = None
    p: float = 0.0  # the probability with which the call drops
    dropout: nn.Module | None = None
    magnitude: DoraLinearLayer | None = None  # of a DoRA adapter, which is alone
    packed: PackedLayer | None = None  # of a quantised base


class OneAdapter(NamedTuple):
    """One adapter of a layer; or ``reason``, why calls with it are PEFT's."""

    reason: str
    adapter: Adapter[Tensor] | None = None
    shift: Tensor | None = None  # its lora_B's bias, scaled
    p: float = 0.0
    dropout: nn.Module | None = None


class Glance(NamedTuple):
    """A key with all that :func:`read` looks at but the tensors; and these, x first, laid flat."""

    key: Hashable
    inputs: list[Tensor]


def active_adapters(layer: LoraLayer) -> list[str]:
    """The active adapters that this layer has, in PEFT's order."""
    own = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in own]


def glance(layer: LoraLayer, names: list[str], x: Tensor) -> Glance | None:
    """The layer with one adapter, as a call with x finds it; None where that has to be read."""
    modules, (name, *others) = layer._modules, names
    if others or layer.lora_variant or not layer.cast_input_dtype_enabled:
        return None
    base = modules["base_layer"]
    lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    if is_hooked(base) or is_hooked(lora_a) or is_hooked(lora_b) or is_hooked(dropout):
        return None
    own, down, up = base._parameters, lora_a._parameters, lora_b._parameters
    try:
        weight, bias, thin, wide = own["weight"], own["bias"], down["weight"], up["weight"]
        shape = wide.shape
        if base._modules or down["bias"] is not None or up["bias"] is not None:
            return None
    except (KeyError, AttributeError):  # FSDP's, or parametrised, or None
        return None
    inputs = [x, weight, thin, wide] if bias is None else [x, weight, bias, thin, wide]
    kind, scale = type(base), layer.scaling[name]
    key = (
        (kind, kind.forward, kind.__call__, type(lora_a), type(lora_b), type(dropout)),
        (_rate(dropout), dropout.__dict__.get("inplace"), scale, type(scale), bias is None),
        (asked_backend(), torch.is_grad_enabled(), autocast_dtype(x), x.shape, shape),
    )
    return Glance(key, inputs)


def read(layer: LoraLayer, names: list[str]) -> Reading:
    """Read the layer for a call with these adapters, of which there is one at least."""
    if not layer.cast_input_dtype_enabled:
        return Reading("PEFT's casting of inputs is switched off (disable_input_dtype_casting)")
    modules = layer._modules
    reason, weight, bias, packed = read_base(modules["base_layer"])
    if reason:
        return Reading(reason)
    adapters: list[Adapter[Tensor]] = []
    p, dropout = None, None
    for name in names:
        one = read_adapter(layer, name, weight)
        if one.adapter is None:
            return Reading(one.reason)
        if p not in (None, one.p):
            return Reading("its active adapters have different dropouts, and are training")
        p, dropout, shift = one.p, one.dropout, one.shift
        if shift is not None:
            bias = shift if bias is None else bias + shift
        adapters.append(one.adapter)
    magnitude = None
    if layer.lora_variant:
        reason, magnitude = _read_variant(layer, names, weight)
        if magnitude is not None and not layer.training:
            p = 0.0  # PEFT's DoRA asks the layer, not its dropout, whether it trains
    if reason:
        return Reading(reason)
    output = Output(Base(weight, bias), tuple(adapters))
    return Reading("", output, p or 0.0, dropout, magnitude, packed)


def read_adapter(layer: LoraLayer, name: str, weight: Tensor) -> OneAdapter:
    """Read one adapter that the layer has; ``weight`` [out, in] is that of its base."""
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        part, other = ("lora_B", lora_b) if type(lora_a) is nn.Linear else ("lora_A", lora_a)
        return OneAdapter(f"its {part} is a {type(other).__name__}, no torch.nn.Linear")
    down, up = tensor_of(lora_a, "weight"), tensor_of(lora_b, "weight")
    shift, scale = tensor_of(lora_b, "bias"), layer.scaling[name]
    dropout = modules["lora_dropout"]._modules[name]
    reason = (
        why_not_adapter(lora_a, "its lora_A", down, weight)
        or why_not_adapter(lora_b, "its lora_B", up, weight)
        or ("" if tensor_of(lora_a, "bias") is None else "its lora_A has a bias")
        or _why_not_bias("its lora_B's", shift)
        or _why_not_fitting(weight, down, up, shift)
        or _why_not_dropout(dropout)
        or why_not_scale(scale)
    )
    if reason:
        return OneAdapter(reason)
    shift = None if shift is None else shift * scale
    if isinstance(scale, Tensor):  # as PEFT's hotswapping makes it; never read back to the host
        up, scale = up * scale, 1.0
    return OneAdapter("", Adapter(down, up, scale), shift, _rate(dropout), dropout)


def read_base(base: nn.Module) -> tuple[str, Any, Any, PackedLayer | None]:
    """Why the base layer isn't covered, "" if it is; its weight as [out, in], and its bias.

    Last, what else there is to know of a quantised one.
    """
    if is_hooked(base):  # before anything is read: with ZeRO-3, to read a weight is to gather it
        return _why_hooked(base, "its base layer"), None, None, None
    kind, found = type(base), quantised_weight(base)
    reason = why_not_class(kind) if found is None else ""
    if reason:
        return f"its base is {reason}", None, None, None
    if "parametrizations" in base._modules:  # to read such a weight is to compute it
        return "its base is parametrised", None, None, None
    bias = tensor_of(base, "bias")
    packed = found if isinstance(found, PackedLayer) else None
    if packed is not None:
        weight: Any = packed.weight
        if not packed.is_whole:
            reason = f"its base is a {kind.__name__}: {SHARDED}"
        elif weight.device.type == "meta":
            reason = "its quantised base is on the meta device"
    elif found is not None:
        return f"its base is a {kind.__name__}: {found}", None, None, None
    else:
        weight = tensor_of(base, "weight")
        reason = _why_not_weight("its base layer", weight)
        if is_conv1d(kind) and not reason:
            weight = weight.T
    reason = reason or _why_not_bias("its base's", bias)
    if not reason and bias is not None and bias.shape != weight.shape[:1]:
        reason = _why_not_shape("its base's bias", bias, weight.shape[:1])
    return reason, weight, bias, packed


def _read_variant(
    layer: LoraLayer, names: list[str], weight: Tensor
) -> tuple[str, DoraLinearLayer | None]:
    """Why the active adapters' variant of LoRA isn't covered; or a DoRA adapter's magnitude."""
    variants = {name: layer.lora_variant[name] for name in names if name in layer.lora_variant}
    if not variants:
        return "", None
    name, variant = next(iter(variants.items()))
    if type(variant) is not DoraLinearVariant:
        kind = variant if isinstance(variant, type) else type(variant)
        return f"its adapter {name} is {kind.__name__.removesuffix('LinearVariant')}", None
    magnitude = layer.lora_magnitude_vector[name]
    if len(names) > 1:
        return "DoRA beside another active adapter", None
    if layer.lora_B[name].bias is not None:
        return "DoRA with lora_bias", None
    if type(magnitude) is not DoraLinearLayer or is_hooked(magnitude):
        return "a hook watches, or something replaces, its DoRA magnitude", None
    if not is_plain(magnitude.weight) or magnitude.weight.device != weight.device:
        return "its DoRA magnitude is sharded or on another device", None
    reason = _why_not_shape("its DoRA magnitude", magnitude.weight, weight.shape[:1])
    return reason, None if reason else magnitude


def _rate(dropout: nn.Module) -> float:
    """The probability with which this module drops now: 0 in evaluation."""
    return float(dropout.p) if dropout.training and isinstance(dropout, nn.Dropout) else 0.0


def why_not_adapter(linear: nn.Module, name: str, weight: Tensor, base: Tensor) -> str:
    if weight.device != base.device:
        return f"{name} is on {weight.device}, its base on {base.device}"
    if is_hooked(linear):
        return _why_hooked(linear, name)
    # PEFT casts x to the adapter's dtype.  float32 beside 16 bits is the usual case, and covered.
    if weight.dtype not in (base.dtype, torch.float32) and weight.itemsize >= base.dtype.itemsize:
        return f"{name} is {weight.dtype}, its base {base.dtype}"
    return _why_not_weight(name, weight)


def _why_not_weight(name: str, weight: Tensor) -> str:
    reason = why_not_tensor(weight, 2)
    if reason:
        return f"the weight of {name} {reason}"
    if weight.is_meta:
        return f"{name} is on the meta device, without data"
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and weight.is_inference():
        return f"{name} was made in inference mode"  # no backward can keep it
    return ""


def _why_not_fitting(weight: Tensor, down: Tensor, up: Tensor, shift: Tensor | None) -> str:
    """Why these aren't an adapter of a base with weight [out, in]."""
    rows, columns = weight.shape
    r = down.shape[0]
    if (
        down.shape == (r, columns)
        and up.shape == (rows, r)
        and (shift is None or shift.shape == (rows,))
        and rows * columns * r
    ):
        return ""
    return (
        _why_not_shape("its lora_A", down, (r, columns))
        or _why_not_shape("its lora_B", up, (rows, r))
        or ("" if shift is None else _why_not_shape("its lora_B's bias", shift, (rows,)))
        or f"its base has shape {(rows, columns)}, and its rank is {r}"
    )


def _why_not_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> str:
    """PEFT may broadcast what doesn't fit, and where it can't, the error is its own."""
    if tensor.shape == expected:
        return ""
    return f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected)}"


def _why_hooked(module: nn.Module, name: str) -> str:
    if hasattr(module, "ds_id"):
        return f"DeepSpeed ZeRO-3 gathers {name} when it is called"
    if isinstance(module._parameters.get("weight"), DTensor):
        return f"{name} is sharded, and gathers or splits what it is called with (DTensor)"
    return f"a hook watches, or something replaces, the calls of {name}"


def _why_not_bias(whose: str, bias: Tensor | None) -> str:
    reason = "" if bias is None else why_not_tensor(bias, 1)
    return f"{whose} bias {reason}" if reason else ""


def _why_not_dropout(dropout: nn.Module) -> str:
    if type(dropout) not in DROPOUTS or is_hooked(dropout):
        return "a hook watches, or something replaces, its dropout"
    p = _rate(dropout)
    if p >= 1.0:
        return "its dropout drops everything"
    if p > 0.0 and dropout.inplace:
        return "its dropout changes the input in place"
    return ""


def why_not_scale(scale: Any) -> str:
    if isinstance(scale, Tensor):
        return "" if scale.dim() == 0 else f"its scaling is a tensor of shape {tuple(scale.shape)}"
    finite = is_number(scale) and abs(scale) <= LARGEST_SCALE
    return "" if finite else f"its scaling is {scale!r}, no finite float32"
