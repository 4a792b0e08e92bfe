"""Packed linear layers, vendors' and int8: packed from a dense layer, or read from a file."""

import json
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.other_packages import optional
from ..formats import quantized_weight, vendor_of
from ..formats.format import Quantized, name_of
from ..formats.rotated_int8 import RotatedInt8
from ..layers.classes import twin
from ..layers.frozen import matrix_of
from ..layers.int8 import Int8Linear, int8_linear
from ..layers.module_parts import is_hooked
from ..layers.modules import called, some
from .declarations import other_vendor
from .files import read_metadata

_FOUR_BIT, _FLOAT8 = ".weight.quant_state.bitsandbytes__nf4", "._weight_qdata"
PARTS = (".weight", ".codes", ".scale")  # of a linear layer, dense or packed
_INT8 = PARTS[1:]


def pack_linear(model: nn.Module, name: str, linear: Any, kind: str) -> nn.Module:
    """The layer that replaces this linear layer: the format's vendor's, or an ``Int8Linear``.

    Raises ValueError with the reason if it can't be packed.
    """
    package = {"nf4": "bitsandbytes", "fp8": "torchao", "int8": ""}.get(kind)
    if package is None:
        raise ValueError(
            f"torchao's {kind} linear layers round their input, or fastlora can't read them: give "
            "nf4 (bitsandbytes), fp8 (torchao) or int8"
        )
    module = "bitsandbytes.nn" if kind == "nf4" else "torchao.quantization"
    need = f"{name} can't be packed as {kind} without {package}"
    theirs: Any = optional(module, need, "quantized") if package else None
    if linear.weight.is_meta or is_hooked(linear):
        raise ValueError("it is on meta, or its calls have hooks")
    if kind == "int8":
        return int8_linear(linear)
    if kind == "fp8":  # torchao's quantize_ works on children, so the layer needs a parent
        around: Any = nn.Sequential(twin(linear, nn.Linear))
        theirs.quantize_(around, theirs.Float8WeightOnlyConfig())
        packed = around[0]
    else:
        how: Any = {"quant_type": "nf4", "compress_statistics": False}
        # The third argument of Linear4bit is ``bias``, the fourth ``compute_dtype``.
        sizes = linear.in_features, linear.out_features, False, linear.weight.dtype
        packed = theirs.Linear4bit(*sizes, **how, device="meta")
        dense, device = linear.weight.detach().cpu(), linear.weight.device
        weight = theirs.Params4bit(dense, requires_grad=False, module=packed, **how)
        packed.weight = weight.to(device)  # the move quantizes it
    # A transformers model's quantization_config names one quantizer only.
    if other_vendor(model, vendor_of(packed)):
        raise ValueError(
            "the model has another vendor's packed layers, and its quantization_config can name "
            "only one vendor"
        )
    if isinstance(reason := quantized_weight(packed), str):
        raise ValueError(reason)
    return packed.train(linear.training)


def packed_linears(model: nn.Module, keys: Iterable[str]) -> dict[str, list[str]]:
    """The keys of each linear layer that a checkpoint with these keys holds packed, by its name.

    A bias isn't among them, because it is dense and loads like all other tensors.
    """
    linear = nn.Linear | Int8Linear
    layers = {name for name, module in model.named_modules() if isinstance(module, linear)}
    keys = list(keys)
    ends = _FOUR_BIT, _FLOAT8, _INT8[0]
    marked = {key.removesuffix(end) for key in keys for end in ends if key.endswith(end)}
    found = {}
    for name in marked & layers:
        starts = f"{name}.weight", f"{name}._weight_", *[name + end for end in _INT8]
        found[name] = [key for key in keys if key.startswith(starts)]
    return found


def read_linear(
    name: str,
    linear: Any,
    tensors: dict[str, Tensor],
    path: Path,
    device: torch.device,
) -> nn.Module:
    """The packed layer that replaces this nn.Linear, on this device and without a bias.

    ``tensors``: the layer's tensors in the file at ``path``, by key.
    """
    sizes = linear.in_features, linear.out_features
    if name + _INT8[0] in tensors:
        if len(tensors) != len(_INT8):
            raise ValueError(f"the file has only {some(sorted(tensors))} of {called(name)}")
        # A format has (rows, columns), which are (out, in).
        format = RotatedInt8(*sizes[::-1], name_of(matrix_of(linear).dtype))
        bits = tuple([tensors[name + end].to(device) for end in _INT8])
        packed: Any = Int8Linear(Quantized(format, bits))
    elif name + _FOUR_BIT in tensors:
        theirs: Any = import_module("bitsandbytes.nn")
        packed = theirs.Linear4bit(*sizes, False, device="meta")
        stats = {key.removeprefix(f"{name}.weight."): each for key, each in tensors.items()}
        packed.weight = theirs.Params4bit.from_prequantized(
            stats.pop(f"{name}.weight"), stats, device=device, module=packed
        )
        packed.quant_state = packed.weight.quant_state
    else:
        theirs = import_module("torchao.prototype.safetensors.safetensors_support")
        key = f"{name}.weight"
        header = {"tensor_names": json.dumps([key]), key: read_metadata(path)[key]}
        weight = theirs.unflatten_tensor_state_dict(tensors, header)[0].get(key)
        if weight is None:  # torchao waits for further tensors of this weight
            raise ValueError(f"the file has only {some(sorted(tensors))} of {called(name)}")
        packed = nn.Linear(*sizes, False, device="meta", dtype=weight.dtype)
        packed.weight = nn.Parameter(weight.to(device), requires_grad=False)
    if isinstance(reason := quantized_weight(packed), str):
        raise ValueError(f"{called(name)} can't be loaded: {reason}")
    return packed.train(linear.training)
