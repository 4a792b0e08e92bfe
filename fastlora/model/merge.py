"""Merge adapters into the base weights for inference without extra cost, and unmerge them."""

import warnings
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import rows_at_a_time
from ..foreign import FSDP, FULLY_SHARDED
from ..formats import vendor_of
from ..layers.adapted_weight import AdaptedWeight
from ..layers.guards import forget
from ..layers.merging import merge_each
from ..layers.modules import called, inside_of, lora_layers, owners_of, unwrap
from ..layers.quantized import LoRAQuantized
from ..projection import DTYPES
from ..settings import check_switches
from ..text import bar
from .declare import declared
from .inject import check_model

_BAR_FROM = 16  # layers; with fewer, a progress bar would only flicker


def merge_lora(model: nn.Module, *, keep_base: bool = True, requantize: bool = True) -> nn.Module:
    """Add scaling · lora_B lora_A to every adapted layer's weight, and return the same model.

    The sum is computed in float32 (float64 for float64) and rounded once to the weight's dtype.
    The original weights are kept beside the merged ones, so that :func:`unmerge_lora` restores
    their exact bits.  ``keep_base=False`` frees each original once its layer is merged; then the
    merge can't be undone, and ``remove_lora`` leaves a plain model.  All layers are tried first,
    one at a time, so the peak needs memory for one more layer.

    A quantized layer's weight is dequantized, merged in float32 and quantized again, and a warning
    gives the relative error of that.  ``requantize=False`` leaves a dense weight.  Its dtype is the
    most common one among the model's parameters outside quantized layers, or the layer's dtype if
    there are none; ``remove_lora`` then makes the layer a ``torch.nn.Linear``.  Packed weights of
    experts always become dense, in that dtype; after ``remove_lora``, ``fastlora.pack`` packs them
    again and reports the error.

    Raises ValueError, and changes nothing, if the model has no adapters, a layer is already merged
    or its weight parametrized, its lora_A or lora_B is missing, of another shape or on another
    device, or a merged weight would hold NaN or infinity.  Warns if a merged weight was tied to
    another module's weight; they are separate afterwards.
    """
    check_switches(keep_base=keep_base, requantize=requantize)
    merge_in_turn(model, keep_base, requantize)
    return model


def merge_in_turn(
    model: nn.Module, keep_base: bool, requantize: bool, to_cpu: bool = False
) -> ExitStack:
    """Implements :func:`merge_lora`; the result and ``to_cpu`` are :func:`.merge_each`'s."""
    layers = _layers(model)
    for name, layer in layers:
        layer.check_weight(called(name))
        if layer.merged:
            raise ValueError(
                f"{called(name)} is merged already: call fastlora.unmerge_lora(model) first"
            )
        layer.check_adapter(called(name))
    dense = _dtype_around(unwrap(model))
    packed = {layer for _, layer in layers if requantize and isinstance(layer, LoRAQuantized)}
    # Dry run: compute every merged weight, and drop it, so that an error changes nothing.
    for name, layer in bar(layers, "checking", least=_BAR_FROM):
        merged = layer.merged_weight(torch.float32 if layer in packed else dense)
        _check_finite(name, merged)
        if layer in packed and not keep_base:
            # Quantizing may fail, so try it while it can be undone.
            layer.use_merged(merged)
            layer.unmerge()
        del merged
    _warn_of_ties(unwrap(model), layers)
    for module in unwrap(model).modules():
        forget(module)  # cached records may hold the original weights
    errors = {}

    def merge(name: str, layer: AdaptedWeight, undo: ExitStack) -> Any:
        undo.callback(_unmerge, layer)
        merged = layer.merged_weight(torch.float32 if layer in packed else dense)
        error = layer.use_merged(merged, keep_base, requantize)
        if layer in packed:
            errors[name] = error
        return layer.adapted_module._bases[layer.adapted_name]

    with declared(model):
        undo = merge_each(model, bar(layers, "merging", least=_BAR_FROM), merge, to_cpu)
    if errors:
        worst = max(errors, key=errors.__getitem__)
        warnings.warn(
            f"{len(errors)} merged weights were quantized again, which changed them by up to "
            f"{errors[worst]:.2g} of their norm ({called(worst)}): requantize=False leaves them "
            "dense",
            stacklevel=3,
        )
    return undo


def _unmerge(layer: AdaptedWeight) -> None:
    if layer.can_unmerge:
        layer.unmerge()


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Put the original weights back, bit for bit, and return the same model.

    Raises ValueError, and changes nothing, if a layer isn't merged or was merged with
    ``keep_base=False``.
    """
    layers = _layers(model)
    for name, layer in layers:
        layer.check_weight(called(name))
        if not layer.merged:
            raise ValueError(f"{called(name)} is not merged: call fastlora.merge_lora(model) first")
        if not layer.can_unmerge:
            raise ValueError(
                f"{called(name)} was merged with keep_base=False, so its original weight is gone: "
                "load the base model again"
            )
    with declared(model):
        for _, layer in layers:
            layer.unmerge()
    return model


def _layers(model: nn.Module) -> list:
    check_model(model)
    layers = list(lora_layers(unwrap(model)))
    if not layers:
        raise ValueError(
            "the model has no LoRA layers: call fastlora.apply_lora or load_adapter first"
        )
    held = inside_of(model, FULLY_SHARDED, FSDP)
    for name, layer in layers:
        if layer.adapted_module in held:
            raise ValueError(
                f"{called(name)} is under FSDP, which would ignore the merged weight: save the "
                "adapter, load it into a model that isn't, and merge there"
            )
    return layers


def _dtype_around(model: nn.Module) -> torch.dtype | None:
    """The most common dtype of parameters outside adapters and quantized layers, or None."""
    count: Counter[torch.dtype] = Counter()
    for module in model.modules():
        if not isinstance(module, LoRAQuantized) and vendor_of(module) is None:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype in DTYPES and "lora_" not in name:
                    count[parameter.dtype] += parameter.numel()
    return max(count, key=count.__getitem__, default=None)


def _check_finite(name: str, merged: Tensor) -> None:
    """Raise ValueError if the merged weight has NaN or infinity."""
    # Block by block, because isfinite makes several temporary tensors of its input's size.
    if not all(bool(rows.isfinite().all()) for rows in merged.split(rows_at_a_time(merged))):
        raise ValueError(
            f"merging {called(name)} gives NaN or infinity in {merged.dtype}, and nothing was "
            "merged: look for non-finite values in its weight, lora_A and lora_B"
        )


def _warn_of_ties(model: nn.Module, layers: list) -> None:
    owners = owners_of(model)
    tied = [name for name, layer in layers if owners[id(getattr(layer, layer.weight_name))] > 1]
    if tied:
        warnings.warn(
            f"the weights of {', '.join(tied)} were tied to other modules' weights, which don't "
            "change: the merged weights are separate now. Before saving the merged model, set "
            "config.tie_word_embeddings = False.",
            stacklevel=4,
        )
