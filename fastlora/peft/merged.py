"""Merges PEFT's layers for a while: restoring them puts every weight back bit for bit.

PEFT's own merge does the merging.  For a dense weight, a safe merge assigns a merged copy to the
parameter, and any other one adds in place.  For a vendor's layer it makes a new parameter and also
writes to attributes of the old one.  So each base first gets new Parameters, over a copy if PEFT
adds in place, and the merge changes these instead of the originals.  Everything else that PEFT
writes to is saved before and restored at the end.

This file imports nothing of PEFT.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import derived_from
from ..layers.int8 import Int8Linear
from ..layers.merging import merge_each, move
from ..layers.modules import called, is_sharded, owners_of, plain_name
from ..projection import is_plain

# Classes of PEFT whose merge doesn't write to the memory of the old parameter.
_KINDS = (
    "Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ParamWrapper", "Linear4bit",
    "Linear8bitLt",
)  # fmt: skip
Layers = list[tuple[str, Any]]


def active(layers: Layers) -> Layers:
    """The layers whose calls compute with an adapter."""
    return [
        (name, layer)
        for name, layer in layers
        if not layer.disable_adapters and any(each in layer.r for each in layer.active_adapters)
    ]


def why_not_merged(layers: Layers) -> str:
    """Why PEFT's layers can't be merged for a while, with the name of one; "" if they can."""
    for name, layer in layers:
        base, kind = layer.get_base_layer(), type(layer)
        tensors = [*layer.parameters(), *base.parameters()]
        if layer.merged:
            reason = "is merged already: call PEFT's unmerge_adapter() first"
        elif not any(derived_from(kind, "peft.tuners.lora", each) for each in _KINDS):
            reason = f"is PEFT's {kind.__name__}, which isn't merged and given back here"
        elif any(is_sharded(tensor) or hasattr(tensor, "ds_id") for tensor in tensors):
            reason = (
                "is sharded over ranks (FSDP, ZeRO-3), and can't be merged for a while: sample "
                "without fastlora.merged and MergedSampling"
            )
        elif any(tensor.is_meta for tensor in tensors):
            reason = "is on the meta device (accelerate's offload?), without numbers"
        elif getattr(_state_of(base), "packing_format_for_cpu", False):
            reason = (
                "has a weight that a call in evaluation has repacked for bitsandbytes' CPU kernel, "
                "and PEFT's merge misreads that: load the model again, and optimize it before "
                "the first call"
            )
        elif isinstance(base, Int8Linear):
            continue
        elif "parametrizations" in base._modules or _weight_name(layer) not in base._parameters:
            reason = (
                f"has a base whose {_weight_name(layer)} is no parameter: make a computed one "
                "(pruning, weight_norm, parametrization) permanent first, and a buffer a parameter"
            )
        else:
            continue
        return f"{called(name)} {reason}"
    return ""


def _state_of(base: nn.Module) -> Any:
    """bitsandbytes' quant_state of a 4-bit weight; None for any other."""
    return getattr(base._parameters.get("weight"), "quant_state", None)


def adapted_weights(layers: Layers) -> list[Tensor]:
    """The weights that a merge replaces, without duplicates; on meta in place of 8-bit ones."""
    weights: dict[tuple[int, str], Tensor] = {}
    for _, layer in active(layers):
        base, name = layer.get_base_layer(), _weight_name(layer)
        weight = base._parameters.get(name)
        if isinstance(base, Int8Linear):  # the merged weight is dense
            sizes = base.out_features, base.in_features
            weight = torch.empty(sizes, dtype=base.format.dtype, device="meta")
        if weight is not None:
            weights[id(base), name] = weight
    return [*weights.values()]


def _weight_name(layer: Any) -> str:
    """The name of the base's parameter that a merge changes."""
    return getattr(layer, "parameter_name", None) or "weight"


def merge_layer(
    name: str, layer: Any, undo: ExitStack, safe_merge: bool = True, adapter_names: Any = None
) -> Any:
    """Merge a layer by PEFT's ``merge``; returns the original weight (:func:`.merge_each`).

    Returns None if the layer has none of these adapters; then it is as before.
    """
    base = layer.get_base_layer()
    original = base._parameters[_weight_name(layer)]
    is_int8 = isinstance(base, Int8Linear)  # a merged layer keeps it, and unmerging puts it back
    put_back = partial(_unmerge, layer) if is_int8 else _noted(base, layer)
    undo.callback(put_back)
    if not is_int8:
        _use_other_parameters(base, () if safe_merge else (_weight_name(layer), "bias"))
    try:
        with torch.no_grad():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{called(name)} can't be merged: {error}") from error
    if layer.merged:
        return original
    put_back()  # now, because this frees the copy
    return None


def _unmerge(layer: Any) -> None:
    if layer.merged:
        layer.unmerge()


def merge_adapter(
    model: Any, to_cpu: bool, adapter_names: Any = None, safe_merge: bool = False
) -> ExitStack:
    """Merge as PEFT's ``merge_adapter`` does: the same layers, adapters, values and errors.

    Closing the returned stack restores every weight.  ``model`` is PEFT's LoraModel.  Raises
    ValueError, and changes nothing, if a layer can't be merged for a while.
    """
    model._check_merge_allowed()
    layers = _tuner_layers(model.model)
    if reason := why_not_merged(layers):
        raise ValueError(reason)
    merge = partial(merge_layer, safe_merge=safe_merge, adapter_names=adapter_names)
    return merge_each(model, layers, merge, to_cpu)


def why_not_sent(model: Any) -> str:
    """Why a trainer can't send the model's merged weights to vLLM; "" if it can."""
    if not hasattr(model, "merge_adapter"):
        return (
            f"{type(model).__name__} is not a PeftModel: with vLLM, a trainer merges only a "
            "PeftModel, so make one with peft.get_peft_model"
        )
    owners = owners_of(model)
    for name, layer in _tuner_layers(model):
        if owners[id(layer.get_base_layer()._parameters.get(_weight_name(layer)))] > 1:
            return (
                f"the weight of {name} is tied to another module's, and vLLM has one weight for "
                "both: load the model with tie_word_embeddings=False, or don't adapt this layer"
            )
    return ""


def _tuner_layers(model: nn.Module) -> Layers:
    """The layers that PEFT's ``merge_adapter`` merges."""
    named = ((plain_name(name), module) for name, module in model.named_modules())
    return [each for each in named if derived_from(type(each[1]), "peft.tuners", "BaseTunerLayer")]


def _noted(base: nn.Module, layer: Any) -> Callable[[], None]:
    """Save everything that PEFT's merge of a layer changes; returns a function that restores it."""
    objects = [vars(base), *[vars(p) for p in base._parameters.values() if p is not None]]
    objects += [base._parameters, base._buffers, layer._caches]
    if hasattr(base, "state"):  # bitsandbytes' state of an int8 layer
        objects.append(vars(base.state))
    before = [entries.copy() for entries in objects]
    merged = [*layer.merged_adapters]

    def put_back() -> None:
        # Changes that the user made inside are kept: the mode, and a move by .to().
        training, parameters = base.training, base._parameters.copy()
        for entries, content in zip(objects, before, strict=True):
            entries.clear()
            entries.update(content)
        base.training = training
        for name, parameter in base._parameters.items():
            other = parameters.get(name)
            if parameter is not None and other is not None and is_plain(parameter):
                move(parameter, other.device, other.dtype)
        layer.merged_adapters[:] = merged

    return put_back


def _use_other_parameters(base: nn.Module, copied: tuple[str, ...]) -> None:
    """Replace the plain parameters of a base by new ones, over a copy for these names.

    The others are over the same memory.  A vendor's parameter stays, because PEFT's merge replaces
    it anyway.
    """
    for name, parameter in base._parameters.items():
        if parameter is not None and is_plain(parameter):
            data = parameter.detach().clone() if name in copied else parameter.detach()
            base._parameters[name] = nn.Parameter(data, requires_grad=False)
