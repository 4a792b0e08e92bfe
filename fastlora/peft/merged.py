"""Merges PEFT's layers for a while: restoring them puts every weight back bit for bit.

PEFT's own merge does the merging, into new Parameters over a copy.  A dense weight in 16 bits keeps
only corrections (:mod:`fastlora.layers.corrections`): the merged weight lies in the original's
memory, and the base is rebuilt from it and the adapters of the merge.  A packed base is dense while
it is merged.  Any other weight is kept as it is.

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

from ..foreign import derived_from
from ..formats import vendor_of, weight_of
from ..layers import merging
from ..layers.classes import change_class, twin
from ..layers.corrections import Corrections, corrections, has_corrections
from ..layers.experts import packed_names
from ..layers.members import plain_class_of
from ..layers.modules import called, is_sharded, owners_of, plain_name
from ..ops.dispatch import autocast_off
from ..projection import DTYPES, is_plain
from .dense import is_packed, make_dense, use_packed

# Classes of PEFT whose layers can be merged.
_KINDS = (
    "Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ParamWrapper", "Linear4bit",
    "Linear8bitLt", "TorchaoLoraLinear", "HqqLoraLinear", "GPTQLoraLinear",
)  # fmt: skip
_HELD = "_fastlora_held"  # an attribute of layers that are merged here
_METHODS = ("merge", "unmerge", "enable_adapters")  # replaced on merged layers
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
        unread = weight_of(base) if packed and not hasattr(layer, "parameter_name") else None
        if held is not None and layer.merged:
            if set(layer.merged_adapters) == {a for a in layer.active_adapters if a in layer.r}:
                continue
            reason = (
                f"is merged with the adapters {layer.merged_adapters}, and other adapters are "
                "active now: leave the first fastlora.merged block before you change them"
            )
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
        elif isinstance(unread, str):
            reason = f"has a packed base that can't be read: {unread}"
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
    """The bytes that a merge takes in addition; for corrections, what a trained adapter needs."""
    costs: dict[tuple[int, str], int] = {}
    around = _dtype_around(model)
    for _, layer in active(layers):
        base, name = layer.get_base_layer(), _weight_name(layer)
        if is_packed(layer):
            experts = getattr(layer, "num_experts", 1)
            size = experts * layer.in_features * layer.out_features
            costs[id(base), name] = size * (around or torch.float32).itemsize
        elif (weight := base._parameters.get(name)) is not None:
            small = keep == "corrections" and has_corrections(weight)
            costs[id(base), name] = int(0.35 * weight.numel()) if small else weight.nbytes
    return sum(costs.values())


def _weight_name(layer: Any) -> str:
    """The name of the base's parameter that a merge changes."""
    return getattr(layer, "parameter_name", None) or "weight"


def _dtype_around(model: nn.Module) -> torch.dtype | None:
    """The most common dtype of parameters outside adapters and packed layers, or None."""
    count: Counter[torch.dtype] = Counter()
    for name, module in model.named_modules():
        if "lora_" in name or vendor_of(module) is not None or packed_names(module):
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dtype in DTYPES:
                count[parameter.dtype] += parameter.numel()
    return max(count, key=count.__getitem__, default=None)


def merge_layers(
    model: nn.Module,
    layers: Layers,
    keep: str,
    safe_merge: bool = True,
    adapter_names: Any = None,
) -> ExitStack:
    """Merge one layer after another.  Closing the returned stack restores every weight.

    ``keep``: as for :class:`fastlora.merged`.  An error restores all layers.
    """
    names = merging.memory_names(model)
    how = _dtype_around(model), keep, names, safe_merge, adapter_names
    with lock, ExitStack() as undo:
        for name, layer in layers:
            held = _held(layer)
            if held is None:
                held = _Held(name, *how)
                held.merge(layer)
                if not layer.merged:  # it has none of these adapters
                    continue
                vars(layer)[_HELD] = held
                ours: Any = {"merge": merge, "unmerge": unmerge, "enable_adapters": enable_adapters}
                for method, function in ours.items():
                    vars(layer)[method] = MethodType(function, layer)
            held.blocks += 1
            undo.callback(_release, layer, held)
        return undo.pop_all()


def _release(layer: Any, held: "_Held") -> None:
    """Leave one block; the last one restores the layer."""
    with lock:
        held.blocks -= 1
        if held.blocks == 0:
            for name in (_HELD, *_METHODS):
                vars(layer).pop(name, None)
            held.undo.close()


def _held(layer: Any) -> "_Held | None":
    """How the layer is merged by fastlora; None if it isn't, or is a copy of such a layer."""
    return vars(layer).get(_HELD)


class _Held:
    """How a layer is merged and restored, and the number of blocks that hold it merged.

    A copy of a layer gets None in its place: it is merged as PEFT's layers are.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype | None,
        keep: str,
        names: Counter[int],
        safe_merge: bool,
        adapter_names: Any,
    ) -> None:
        self.name, self.dtype, self.keep, self.names = name, dtype, keep, names
        self.settings = {"safe_merge": safe_merge, "adapter_names": adapter_names}
        self.blocks, self.undo = 0, ExitStack()

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()

    def merge(self, layer: Any) -> None:
        """Merge by PEFT's ``merge``, and note in ``undo`` how to restore.

        The layer is as before if it has none of these adapters.
        """
        with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
            packed = is_packed(layer)
            try:
                if packed:
                    undo.callback(_keep_merged_adapters(layer))
                    make_dense(layer, self.dtype)
                    undo.callback(use_packed, layer)
                    _use_plain_class(layer, undo)
                base, name = layer.get_base_layer(), _weight_name(layer)
                original = base._parameters[name]
                undo.callback(_noted(base, layer))
                if not packed:
                    copied = () if self.settings["safe_merge"] else (name, "bias")
                    _use_other_parameters(base, copied)
                type(layer).merge(layer, **self.settings)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise ValueError(f"{called(self.name)} can't be merged: {error}") from error
            if not layer.merged:
                return  # closes ``undo``, which frees the copy
            undo.callback(layer.register_forward_hook(_refuse_training).remove)
            is_alone = self.names[merging.memory_of(original)] == 1  # neither tied nor viewed
            if not packed and is_alone and self.keep == "cpu":
                merging.send_to_cpu(original, undo)
            elif not packed and is_alone and self.keep == "corrections":
                _keep_corrections(layer, base, name, original, undo)
            self.undo = undo.pop_all()


def merge(layer: Any, safe_merge: bool = False, adapter_names: Any = None) -> None:
    """PEFT's ``merge`` of a layer that is merged by fastlora."""
    held, names = _held(layer), layer.active_adapters if adapter_names is None else adapter_names
    if held is None or {name for name in names if name in layer.r} <= {*layer.merged_adapters}:
        type(layer).merge(layer, safe_merge=safe_merge, adapter_names=adapter_names)
    elif layer.merged:
        raise ValueError(f"{called(held.name)} is merged: leave the fastlora.merged block first")
    else:
        with lock:
            held.merge(layer)


def unmerge(layer: Any) -> None:
    """PEFT's ``unmerge``, with the exact base."""
    held = _held(layer)
    if held is None or not layer.merged:
        type(layer).unmerge(layer)
    else:
        with lock:
            held.undo.close()


def enable_adapters(layer: Any, enabled: bool) -> None:
    """PEFT's ``enable_adapters``: a disabled layer has the exact base, an enabled one is merged."""
    held = _held(layer)
    if held is not None and not enabled:
        with lock:
            held.undo.close()
    type(layer).enable_adapters(layer, enabled)
    if held is not None and enabled and not layer.merged:
        with lock:
            held.merge(layer)


def _refuse_training(layer: Any, inputs: tuple, output: Any) -> Any:
    """A forward hook: the backward of a call in training raises an error that says why."""
    follows = layer.merged and layer.training and torch.is_grad_enabled()
    if not (follows and isinstance(output, Tensor)):
        return output
    return _Untrained.apply(output, torch.empty(0, requires_grad=True))


class _Untrained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(_UNTRAINED)


def _use_plain_class(layer: Any, undo: ExitStack) -> None:
    """Make a layer of PEFT's for a packed base one for a dense base, until ``undo`` closes."""
    if not hasattr(layer, "parameter_name"):
        vars(layer).setdefault("fan_in_fan_out", False)  # GPTQLoraLinear has none
        undo.callback(change_class, layer, change_class(layer, _peft_linear()))


def _peft_linear() -> Any:
    return sys.modules["peft.tuners.lora.layer"].Linear


def _keep_corrections(
    layer: Any, base: nn.Module, name: str, original: nn.Parameter, undo: ExitStack
) -> None:
    """Move the merged weight to the original's memory, if corrections can rebuild the original."""
    merged: Any = base._parameters[name]
    if not (is_plain(original) and has_corrections(original)):
        return
    predict = _predictor(layer, base, name)
    # A variant of LoRA that PEFT can't unmerge keeps the copy.
    with suppress(AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        made = corrections(original.detach().flatten(), predict(merged))
        if made is not None:
            # Tensors of before are valid again afterwards, and not inside: autograd sees it.
            undo.enter_context(torch.autograd._unsafe_preserve_version_counter(original))
            undo.callback(_rebuild, original, made, predict)
            original.copy_(merged)
            base._parameters[name] = original


def _rebuild(original: nn.Parameter, made: Corrections, predict: Callable) -> None:
    with torch.inference_mode(False), torch.no_grad():
        try:
            weight = made.rebuild(predict(original.to(made.values.dtype)))
        except RuntimeError as error:
            raise RuntimeError(
                f"the weights before fastlora.merged can't be rebuilt: {error} inside of the "
                "block.  Load the model again, and use keep='device' for such changes"
            ) from error
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
        place._parameters[name] = nn.Parameter(weight.detach().float(), requires_grad=False)
        place._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().float())
        small.to(weight.device)
        small.__dict__.update(merged_adapters=[*merged], _caches={**caches})
        with autocast_off(weight.device.type):
            type(small).unmerge(small)
        return place._parameters.pop(name).detach().flatten()

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


def _keep_merged_adapters(layer: Any) -> Callable[[], None]:
    """A function that restores the layer's list of merged adapters."""
    return partial(layer.merged_adapters.__setitem__, slice(None), [*layer.merged_adapters])


def _noted(base: nn.Module, layer: Any) -> Callable[[], None]:
    """Save everything that PEFT's merge of a layer changes; returns a function that restores it."""
    objects = [base._parameters, layer._caches]
    before = [entries.copy() for entries in objects]
    use_adapters = _keep_merged_adapters(layer)

    def put_back() -> None:
        parameters = base._parameters.copy()
        for entries, content in zip(objects, before, strict=True):
            entries.clear()
            entries.update(content)
        for name, parameter in base._parameters.items():  # follow a move by .to() inside
            other = parameters.get(name)
            if parameter is not None and other is not None and is_plain(parameter):
                merging.move(parameter, other.device, other.dtype)
        use_adapters()

    return put_back


def _use_other_parameters(base: nn.Module, copied: Iterable[str]) -> None:
    """Replace the parameters of a base by new ones, over a copy for these names.

    The others are over the same memory.
    """
    for name, parameter in base._parameters.items():
        if parameter is not None and is_plain(parameter):
            data = parameter.detach().clone() if name in copied else parameter.detach()
            base._parameters[name] = nn.Parameter(data, requires_grad=False)
