"""Linear layers that vendors pack: of dense ones, or of what save_pretrained wrote of them."""

import json
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import quantized_weight, vendor_of
from ..layers.members import is_hooked, twin
from ..layers.modules import called, some
from .declare import other_vendor

_FOUR_BIT, _FLOAT8 = ".weight.quant_state.bitsandbytes__nf4", "._weight_qdata"


def pack_linear(model: nn.Module, name: str, linear: Any, kind: str) -> nn.Module:
    """A layer in the place of this one of the model, packed by its vendor."""
    package = {"nf4": "bitsandbytes", "fp8": "torchao"}.get(kind)
    if package is None:
        raise ValueError(
            f"{name} can't be packed as {kind}: torchao's linear layers of {kind} round their "
            "input, or aren't read: linear layers may be nf4 (bitsandbytes) or fp8 (torchao)"
        )
    try:
        theirs: Any = import_module("bitsandbytes.nn" if kind == "nf4" else "torchao.quantization")
    except ImportError as error:
        raise ImportError(
            f"{name} can't be packed as {kind} without {package}: "
            "pip install 'fastlora-kernels[quantized]'"
        ) from error
    if linear.weight.is_meta or is_hooked(linear):
        raise ValueError(f"{name} can't be packed: it is on meta, or something acts on its calls")
    if kind == "fp8":
        around: Any = nn.Sequential(twin(linear, nn.Linear))
        theirs.quantize_(around, theirs.Float8WeightOnlyConfig())
        made = around[0]
    else:
        how: Any = {"quant_type": "nf4", "compress_statistics": False}
        sizes = linear.in_features, linear.out_features, False, linear.weight.dtype
        made = theirs.Linear4bit(*sizes, **how, device="meta")
        dense, device = linear.weight.detach().cpu(), linear.weight.device
        made.weight = theirs.Params4bit(dense, requires_grad=False, module=made, **how).to(device)
    if other_vendor(model, vendor_of(made)):
        raise ValueError(
            f"{name} can't be packed as {kind}: the model has another vendor's layers, and its "
            "quantization_config can't name both"
        )
    return _readable(name, made.train(linear.training), kind)


def _readable(name: str, layer: nn.Module, kind: str) -> nn.Module:
    """The same; ValueError if fastlora doesn't know what it holds."""
    quantized = quantized_weight(layer)
    if isinstance(quantized, str):
        raise ValueError(f"{name} can't be packed as {kind}: {quantized}")
    return layer


def packed_linears(model: nn.Module, keys: Iterable[str]) -> dict[str, list[str]]:
    """The model's linear layers that a checkpoint with these keys has packed: which are theirs.

    A bias is none of them, and is read as all others are.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    keys = list(keys)
    marked = {key.removesuffix(end) for key in keys for end in (_FOUR_BIT, _FLOAT8) if end in key}
    inside = {name: (f"{name}.weight", f"{name}._weight_") for name in marked & layers}
    return {
        name: [key for key in keys if key.startswith(starts)] for name, starts in inside.items()
    }


def read_linear(
    name: str,
    linear: Any,
    tensors: dict[str, Tensor],
    about: Callable[[], dict[str, str]],
    device: torch.device,
) -> nn.Module:
    """A layer in the place of this nn.Linear, on this device, but for its bias.

    ``tensors``: its own of the file, by key; ``about``: what the file's header says.
    """
    sizes, kind = (linear.in_features, linear.out_features), "fp8"
    if name + _FOUR_BIT in tensors:
        kind = "nf4"
        theirs: Any = import_module("bitsandbytes.nn")
        made = theirs.Linear4bit(*sizes, False, device="meta")
        stats = {key.removeprefix(f"{name}.weight."): each for key, each in tensors.items()}
        made.weight = theirs.Params4bit.from_prequantized(
            stats.pop(f"{name}.weight"), stats, device=device, module=made
        )
        made.quant_state = made.weight.quant_state
    else:
        theirs = import_module("torchao.prototype.safetensors.safetensors_support")
        key = f"{name}.weight"
        header = {"tensor_names": json.dumps([key]), key: about()[key]}
        weight = theirs.unflatten_tensor_state_dict(tensors, header)[0].get(key)
        if weight is None:  # it waits for more
            raise ValueError(f"the file has {some(sorted(tensors))} alone of {called(name)}")
        made = nn.Linear(*sizes, False, device="meta", dtype=weight.dtype)
        made.weight = nn.Parameter(weight.to(device), requires_grad=False)
    return _readable(name, made.train(linear.training), kind)
