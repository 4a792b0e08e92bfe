"""Reads a PEFT LoRA layer: the tensors for the fast path, or the reason why it can't be used.

The fast path reads the tensors of ``base_layer``, ``lora_A`` and ``lora_B`` and doesn't call these
modules.  So anything that acts on their calls (a hook, another class, a replaced forward) is a
reason to run PEFT's forward, which does call them.

There are two kinds of conditions.  :func:`why_not_now` checks conditions outside of the layer in
every call.  :func:`read` checks the layer itself.  Its result is cached, and valid until the layer
or one of its :func:`parts_of` changes (:mod:`fastlora.layers.guards`).
"""

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..call.projection import Adapter, Base, Output, is_plain
from ..common.other_packages import is_dtensor
from ..common.values import LARGEST_SCALE, is_number
from ..layers.frozen import read_base
from ..layers.guards import LinearRecord, Variant
from ..layers.module_parts import is_hooked, plain_class_of, tensor_of, why_not_part, why_patched
from ..ops.dispatch import why_not_here
from . import why_never
from .baseline import DROPOUTS
from .dora import Dora
from .tensor_parallel import Part, part_of

_never = why_never()  # computed once, because it takes as long as a small op


def why_not_now() -> str:
    """Why no layer's call can be fast at this moment; "" if calls can be."""
    if _never or nn_module._has_any_global_hook():
        return _never or "a hook on all modules is registered"
    return why_not_here()


def adapters_now(layer: Any) -> list[str]:
    """The names of the adapters that a call of this layer uses; none if only the base runs."""
    if layer.disable_adapters or layer.merged:
        return []
    adapters = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in adapters]


def parts_of(layer: LoraLayer) -> list[nn.Module]:
    """The other modules that :func:`read` reads: the base layer, and every adapter's modules."""
    modules = layer._modules
    modules_read = [modules["base_layer"]]
    for name in ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector"):
        modules_read += modules[name]._modules.values()
    return modules_read


def read(layer: LoraLayer, names: list[str], mixed: bool = False) -> LinearRecord:
    """Read the layer for a call with these adapters, at least one.

    ``mixed``: each sample uses one of the adapters, or none.  Otherwise every row uses all of them.
    """
    if not layer.cast_input_dtype_enabled:
        return LinearRecord(
            "PEFT's casting of inputs is switched off (disable_input_dtype_casting)"
        )
    if patched := why_patched(plain_class_of(layer)):
        return LinearRecord(patched)
    base, reason, part = layer._modules["base_layer"], "", None
    if is_hooked(base):
        # transformers' tensor parallelism replaces the base's forward, which counts as a hook here.
        reason, part = part_of(layer, names, mixed)
        base = base if part is None else part.local(base)
        # Checked before reading a weight, because ZeRO-3 gathers it when it is read.
        if reason or is_hooked(base):
            return LinearRecord(reason or _why_hooked(base, "its base layer"))
    reason, weight, bias, packed = read_base(base, adapted=True)
    if reason:
        return LinearRecord(reason)
    adapters, dropouts = [], []
    variant: Variant | None = part
    for name in names:
        reason, adapter, shift, drop = _read_adapter(layer, name, weight, part)
        if adapter is None:
            return LinearRecord(reason)
        if mixed and (name in layer.lora_variant or shift is not None):
            what = "is no plain LoRA (DoRA, …)" if shift is None else "has a bias (lora_bias)"
            return LinearRecord(f"its adapter {name} {what}")
        if shift is not None:
            # The base's bias of the call: bias + Σ scale · lora_B's bias.
            bias = shift if bias is None else bias + shift
        adapters.append(adapter)
        dropouts.append(_rate(drop))
    # A call has one probability for all adapters, a mixed batch has one for each segment.
    if not mixed and len(set(dropouts)) > 1:
        return LinearRecord("its active adapters have different dropouts, and are training")
    if layer.lora_variant and not mixed:
        reason, magnitude = _read_variant(layer, names, weight)
        if reason:
            return LinearRecord(reason)
        if magnitude is not None:
            # ``drop`` is of the only adapter, because _read_variant refuses several.
            variant = Dora(magnitude, drop, names[0])
            if not layer.training:
                dropouts = [0.0]  # in PEFT's DoRA the layer's mode counts, not its dropout's
    output = Output(Base(weight, bias), tuple(adapters))
    return LinearRecord("", (output,), (packed,), tuple(dropouts), variant)


def _read_adapter(
    layer: LoraLayer, name: str, weight: Tensor, part: Part | None
) -> tuple[str, Adapter[Tensor] | None, Tensor | None, Any]:
    """Read one adapter: (reason, adapter, lora_B's bias times the scale, dropout module).

    With a reason, the others are None.  ``weight``: the base's.  ``part``: this rank's, of a
    tensor parallel layer.
    """
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    drop, scale = modules["lora_dropout"]._modules[name], layer.scaling[name]
    if part is not None:
        lora_a, lora_b = part.local(lora_a), part.local(lora_b)
    reason = why_not_pair(lora_a, lora_b, weight, weight.shape)
    if not reason:
        down, up = tensor_of(lora_a, "weight"), tensor_of(lora_b, "weight")
        shift = tensor_of(lora_b, "bias")
        if shift is not None:
            reason = why_not_part("its lora_B's bias", shift, weight.shape[:1])
    reason = reason or _why_not_dropout(drop) or why_not_scale(scale)
    if reason:
        return reason, None, None, None
    shift = None if shift is None else shift * scale
    # PEFT's hotswapping makes the scale a tensor.  It stays on its device, in the factor lora_B.
    if isinstance(scale, Tensor):
        up, scale = up * scale, 1.0
    return "", Adapter(down, up, scale), shift, drop


def _read_variant(
    layer: LoraLayer, names: list[str], weight: Tensor
) -> tuple[str, DoraLinearLayer | None]:
    """Read the adapters' variant of LoRA: (reason against it, DoRA's magnitude or None)."""
    name = next((name for name in names if name in layer.lora_variant), None)
    if name is None:
        return "", None
    variant = layer.lora_variant[name]
    if patched := why_patched(DoraLinearVariant):
        return patched, None
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
    return why_not_part("its DoRA magnitude", magnitude.weight, weight.shape[:1]), magnitude


def _rate(dropout: nn.Module) -> float:
    """The probability with which this module drops now: 0 in evaluation."""
    return float(dropout.p) if dropout.training and isinstance(dropout, nn.Dropout) else 0.0


def why_not_pair(lora_a: nn.Module, lora_b: nn.Module, base: Tensor, shape: tuple[int, ...]) -> str:
    """Why the fast path can't read the weights of lora_A and lora_B; "" if it can.

    ``base``: the weight that they adapt.  ``shape``: their product's shape, [out, in].
    """
    r = -1
    for name, linear in (("its lora_A", lora_a), ("its lora_B", lora_b)):
        if type(linear) is not nn.Linear:
            return f"{name} is a {type(linear).__name__}, no torch.nn.Linear"
        weight = tensor_of(linear, "weight")
        dtype, narrower = weight.dtype, weight.itemsize < base.dtype.itemsize
        if weight.device != base.device:
            return f"{name} is on {weight.device}, its base on {base.device}"
        if is_hooked(linear):
            return _why_hooked(linear, name)
        # float32 beside 16 bits is the usual case.  A narrower adapter is computed in the base's
        # dtype, where PEFT casts x to the adapter's: the result is closer to the formula.
        if dtype not in (base.dtype, torch.float32) and not narrower:
            return f"{name} is {dtype}, its base {base.dtype}"
        if linear is lora_a:
            r = len(weight)
        reason = why_not_part(name, weight, (r, shape[1]) if linear is lora_a else (shape[0], r))
        if reason:
            return reason
    if not r * shape[0] * shape[1]:
        return f"its base has shape {tuple(shape)}, and its rank is {r}"
    return "" if tensor_of(lora_a, "bias") is None else "its lora_A has a bias"


def _why_hooked(module: nn.Module, name: str) -> str:
    if hasattr(module, "ds_id"):
        return f"DeepSpeed ZeRO-3 gathers {name} when it is called"
    weight = module._parameters.get("weight")
    if weight is not None and is_dtensor(weight):
        return f"{name} is sharded, and gathers or splits what it is called with (DTensor)"
    if patched := why_patched(type(module)):
        return f"{name} is a {type(module).__name__} ({patched})"
    return f"a hook watches, or something replaces, the calls of {name}"


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
    """Why the fast path doesn't support an adapter's scaling; "" if it does."""
    if isinstance(scale, Tensor):
        return "" if scale.dim() == 0 else f"its scaling is a tensor of shape {tuple(scale.shape)}"
    finite = is_number(scale) and abs(scale) <= LARGEST_SCALE
    return "" if finite else f"its scaling is {scale!r}, no finite float32"
