"""Merges PEFT's layers for a while: restoring them puts every weight back bit for bit.

PEFT's own merge does the merging, into new Parameters over a copy.  A dense weight in 16 bits keeps
only corrections (:mod:`fastlora.layers.corrections`): the merged weight lies in the original's
memory, and the base is rebuilt from it and the adapters of the merge.  A packed base is dense while
it is merged.  Other weights are kept beside a merged copy.

Blocks on the same layers, nested or in several threads, share one merge.  Inside, PEFT's
``disable_adapter()`` and ``unmerge_adapter()`` give the exact base, and enabled layers are merged
again.  This file imports nothing of PEFT.
"""

import copy
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..call.projection import DTYPES
from ..common.other_packages import derived_from
from ..formats import vendor_of
from ..layers import merging
from ..layers.classes import change_class, twin
from ..layers.corrections import Corrections, corrections, has_corrections
from ..layers.experts_module import packed_names
from ..layers.module_parts import plain_class_of
from ..layers.modules import called, is_sharded, owners_of, plain_name
from ..ops.dispatch import autocast_off
from .dense import is_packed, make_dense, use_packed

# Classes of PEFT whose layers can be merged.
_KINDS = (
    "Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ParamWrapper", "Linear4bit",
    "Linear8bitLt", "TorchaoLoraLinear", "HqqLoraLinear", "GPTQLoraLinear",
)  # fmt: skip
_HELD = "_fastlora_held"  # an attribute of layers that are merged here
_LEAVE = "leave the fastlora.merged block before you use other adapters"
_UNTRAINED = (
    "the model is merged (fastlora.merged), so its adapters get no gradient: leave the block "
    "before the forward pass of a training step"
)
Layers = list[tuple[str, Any]]
lock = threading.RLock()  # held while layers are merged or restored


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
        held, packed = _held(layer), is_packed(layer)
        if held is not None and layer.merged:
            # A block inside of another one shares the merge, if it wants the same adapters.
            if set(layer.merged_adapters) == {a for a in layer.active_adapters if a in layer.r}:
                continue
            reason = f"is merged with {layer.merged_adapters}: {_LEAVE}"
        elif layer.merged:
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
        elif packed:
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


def bytes_of(model: nn.Module, layers: Layers, keep: str) -> int:
    """The bytes that a merge takes in addition; for corrections, those of a trained adapter."""
    size, around = 0, _dtype_around(model)
    for _, layer in active(layers):
        weight = layer.get_base_layer()._parameters.get(_weight_name(layer))
        if is_packed(layer):
            # Only PEFT's ParamWrapper has num_experts.
            numbers = getattr(layer, "num_experts", 1) * layer.in_features * layer.out_features
            size += numbers * (around or torch.float32).itemsize
        elif weight is not None:
            small = keep == "corrections" and has_corrections(weight)
            size += int(0.35 * weight.numel()) if small else weight.nbytes
    return size


def _weight_name(layer: Any) -> str:
    """The name of the base's parameter that a merge changes."""
    return getattr(layer, "parameter_name", None) or "weight"


def _dtype_around(model: nn.Module) -> torch.dtype | None:
    """The dtype of the first parameter outside adapters and packed layers, or None."""
    parameters = (
        parameter
        for name, module in model.named_modules()
        if not ("lora_" in name or vendor_of(module) or packed_names(module))
        for parameter in module._parameters.values()
    )
    return next((p.dtype for p in parameters if p is not None and p.dtype in DTYPES), None)


def merge_layers(
    model: nn.Module, layers: Layers, keep: str, safe_merge: bool = True, adapter_names: Any = None
) -> ExitStack:
    """Merge one layer after another.  Closing the returned stack restores every weight.

    ``keep``: as for :class:`fastlora.merged`.  An error restores all layers.
    """
    how = _dtype_around(model), keep, merging.memory_names(model), safe_merge
    with lock, ExitStack() as undo:
        for name, layer in layers:
            held = _held(layer)
            if held is None:
                held = _Held(
                    partial(_merge, called(name), layer, *how, adapter_names=adapter_names)
                )
                if not layer.merged:  # it has none of these adapters
                    continue
                methods = {each.__name__: MethodType(each, layer) for each in _METHODS}
                layer.__dict__.update({_HELD: held, **methods})
            elif not layer.merged:  # PEFT's set_adapter unmerges
                held.undo = held.merge()
            held.blocks += 1
            undo.callback(_release, layer, held)
        return undo.pop_all()


class _Held:
    """How a layer is merged and restored, and the number of blocks that hold it merged.

    A copy of a layer gets None in its place: it is merged as PEFT's layers are.
    """

    def __init__(self, merge: Callable[..., ExitStack]) -> None:
        self.merge, self.undo, self.blocks = merge, merge(), 0

    def __reduce__(self) -> tuple:
        return type(None), ()


def _held(layer: Any) -> _Held | None:
    """How fastlora has merged the layer; None if it hasn't."""
    return vars(layer).get(_HELD)


def _release(layer: Any, held: _Held) -> None:
    """Leave one block; the last one restores the layer."""
    with lock:
        held.blocks -= 1
        if held.blocks == 0:
            for name in (_HELD, *[each.__name__ for each in _METHODS]):
                vars(layer).pop(name, None)
            held.undo.close()


def _merge(
    name: str,
    layer: Any,
    dtype: torch.dtype | None,
    keep: str,
    memory: Counter[int],
    safe_merge: bool,
    adapter_names: Any,
) -> ExitStack:
    """Merge by PEFT's ``merge``.  Closing the returned stack restores the layer."""
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        # The last callback runs first: a layer counts as merged until its weights are back.
        undo.callback(layer.merged_adapters.clear)
        undo.callback(layer._caches.clear)
        packed = is_packed(layer)
        try:
            if packed:
                undo.callback(use_packed, layer)
                make_dense(layer, dtype)
            if packed and not hasattr(layer, "parameter_name"):  # PEFT's layer for dense bases
                plain = sys.modules["peft.tuners.lora.layer"].Linear
                undo.callback(change_class, layer, change_class(layer, plain))
                vars(layer).setdefault("fan_in_fan_out", False)  # GPTQLoraLinear has none
            base, place = layer.get_base_layer(), _weight_name(layer)
            original = base._parameters[place]
            if not packed:
                _use_copies(base, (place, "bias"), undo)
            # After the first merge, it is this file's ``merge``, which would call this again.
            own = vars(layer).get("merge")  # ms-swift's, for example, skips some layers
            is_theirs = own is not None and getattr(own, "__func__", None) is not merge
            run = own if is_theirs else partial(type(layer).merge, layer)
            run(safe_merge=safe_merge, adapter_names=adapter_names)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{name} can't be merged: {error}") from error
        # Leaving the block closes ``undo``, so a layer that PEFT didn't merge is restored at once.
        if not layer.merged:
            return ExitStack()
        undo.callback(layer.register_forward_hook(_refuse_training).remove)
        if not packed and memory[merging.memory_of(original)] == 1:  # neither tied nor viewed
            if keep == "cpu":
                merging.send_to_cpu(original, undo)
            elif keep == "corrections" and has_corrections(original):
                _keep_corrections(layer, base, place, original, undo)
        return undo.pop_all()


def _use_copies(base: nn.Module, names: Iterable[str], undo: ExitStack) -> None:
    """Replace these parameters of a base by copies, until ``undo`` closes."""
    for name in names:
        parameter = base._parameters.get(name)
        if parameter is not None:
            undo.callback(_use, base, name, parameter)
            copied = parameter.detach().clone()
            base._parameters[name] = nn.Parameter(copied, requires_grad=False)


def _use(base: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in place of another one, with that one's device and dtype."""
    other = base._parameters[name]
    if other is not None and other is not parameter:
        # The model may have been moved or cast while it was merged.
        merging.move(parameter, other.device, other.dtype)
        base._parameters[name] = parameter


def merge(layer: Any, safe_merge: bool = False, adapter_names: Any = None) -> None:
    """PEFT's ``merge`` of a layer that fastlora holds merged."""
    held, names = _held(layer), layer.active_adapters if adapter_names is None else adapter_names
    others = {name for name in names if name in layer.r} - {*layer.merged_adapters}
    if held is None or not others:
        type(layer).merge(layer, safe_merge=safe_merge, adapter_names=adapter_names)
    elif layer.merged:
        raise ValueError(f"the layer is merged with {layer.merged_adapters}: {_LEAVE}")
    else:
        held.undo = held.merge(adapter_names=adapter_names)


def unmerge(layer: Any) -> None:
    """PEFT's ``unmerge``, with the exact base."""
    held = _held(layer)
    if held is None or not layer.merged:
        type(layer).unmerge(layer)
    else:
        held.undo.close()


def enable_adapters(layer: Any, enabled: bool) -> None:
    """PEFT's ``enable_adapters``: a disabled layer has the exact base, an enabled one is merged."""
    held = _held(layer)
    with lock:
        if held is not None and not enabled:
            held.undo.close()
        type(layer).enable_adapters(layer, enabled)
        if held is not None and enabled and not layer.merged:
            held.undo = held.merge()


_METHODS: tuple[Callable, ...] = (merge, unmerge, enable_adapters)  # replaced on merged layers


def _refuse_training(layer: Any, inputs: tuple, output: Any) -> None:
    """A forward hook: the backward of a call in training raises an error that says why."""
    follows = layer.merged and layer.training and torch.is_grad_enabled()
    if follows and isinstance(output, Tensor):
        output.requires_grad_().register_hook(_refuse_gradient)


def _refuse_gradient(gradient: Tensor) -> None:
    raise RuntimeError(_UNTRAINED)


def _keep_corrections(
    layer: Any, base: nn.Module, name: str, original: nn.Parameter, undo: ExitStack
) -> None:
    """Move the merged weight to the original's memory, if corrections can rebuild the original."""
    merged: Any = base._parameters[name]
    predict = _predictor(layer, base, name)
    # A variant of LoRA that PEFT can't unmerge keeps the copy.
    with suppress(AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        made = corrections(original.detach().flatten(), predict(merged))
        if made is not None:
            # autograd refuses a backward inside that needs the original, and accepts it afterwards
            undo.enter_context(torch.autograd._unsafe_preserve_version_counter(original))
            # It runs before _use_copies' callback, which then finds the original in its place.
            undo.callback(_rebuild, original, made, predict)
            original.copy_(merged)
            base._parameters[name] = original


def _rebuild(original: nn.Parameter, made: Corrections, predict: Callable) -> None:
    with torch.inference_mode(False), torch.no_grad():
        # The model may have been cast while it was merged: predict from values of the first dtype.
        weight = made.rebuild(predict(original.to(made.values.dtype)))
        original.copy_(weight.view(original.shape))


def _predictor(layer: Any, base: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """A function that maps the merged weight to float32 values near the original, flat.

    It is PEFT's ``unmerge`` in float32, of a small copy of the layer with the adapters of now.
    """
    small, place = twin(layer, plain_class_of(layer)), nn.Module()
    for key in [key for key in vars(small) if key.startswith("_fastlora")]:
        del small.__dict__[key]
    adapters = {key: each for key, each in layer._modules.items() if each is not layer.base_layer}
    copied = {key: copy.deepcopy(each).float() for key, each in adapters.items()}
    small.__dict__["_modules"] = copied | {"base_layer": place}
    merged, caches = [*layer.merged_adapters], {**layer._caches}
    bias = getattr(base, "bias", None)

    def predict(weight: Tensor) -> Tensor:
        small.to(weight.device)
        place._parameters[name] = nn.Parameter(weight.detach().float(), requires_grad=False)
        place._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().float())
        # PEFT's unmerge empties both (DoRA's norms are in _caches), so each call gets copies.
        small.__dict__.update(merged_adapters=[*merged], _caches={**caches})
        with autocast_off(weight.device.type):
            type(small).unmerge(small)
        predicted: Any = place._parameters.pop(name)
        return predicted.detach().flatten()

    return predict


def merge_adapter(
    model: Any, keep: str, adapter_names: Any = None, safe_merge: bool = False
) -> ExitStack:
    """Merge as PEFT's ``merge_adapter`` does: the same layers, adapters, values and errors.

    Closing the returned stack restores every weight.  ``model`` is PEFT's LoraModel.  Raises
    ValueError, and changes nothing, if a layer can't be merged for a while.
    """
    model._check_merge_allowed()
    layers = _tuner_layers(model.model)
    with lock:
        if reason := why_not_merged(layers):
            raise ValueError(reason)
        return merge_layers(model, layers, keep, safe_merge, adapter_names)


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
