"""Linear layers that ``pack`` had packed, from the tensors that save_pretrained wrote of them."""

import json
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

_FOUR_BIT, _FLOAT8 = ".weight.quant_state.bitsandbytes__nf4", "._weight_qdata"


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
    if name + _FOUR_BIT in tensors:
        theirs: Any = import_module("bitsandbytes.nn")
        made = theirs.Linear4bit(linear.in_features, linear.out_features, False, device="meta")
        stats = {key.removeprefix(f"{name}.weight."): each for key, each in tensors.items()}
        made.weight = theirs.Params4bit.from_prequantized(
            stats.pop(f"{name}.weight"), stats, device=device, module=made
        )
        made.quant_state = made.weight.quant_state
    else:
        theirs = import_module("torchao.prototype.safetensors.safetensors_support")
        key = f"{name}.weight"
        header = {"tensor_names": json.dumps([key]), key: about()[key]}
        weight = theirs.unflatten_tensor_state_dict(tensors, header)[0][key]
        how: Any = {"device": "meta", "dtype": weight.dtype}
        made = nn.Linear(linear.in_features, linear.out_features, False, **how)
        made.weight = nn.Parameter(weight.to(device), requires_grad=False)
    return made.train(linear.training)
