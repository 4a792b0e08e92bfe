"""Which activation a module or a function is, by the name that the ops have for it."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..foreign import is_class
from .hooks import is_hooked

_FUNCTIONS = {functional.silu: "silu", functional.relu: "relu", torch.relu: "relu"}
_TRANSFORMERS = "transformers.activations"


def activation_of(act: Any) -> str:
    """silu, gelu, gelu_tanh, relu or relu2; "" for any other, or if something acts on its calls."""
    if not isinstance(act, nn.Module):
        return _name_of_function(act)
    if is_hooked(act) or type(act).__call__ is not nn.Module.__call__:
        return ""
    kind = type(act)
    if kind in (nn.SiLU, nn.ReLU):
        name = "silu" if kind is nn.SiLU else "relu"
        return "" if act.inplace else name
    if kind is nn.GELU:
        return _gelu(str(act.approximate))
    if is_class(kind, _TRANSFORMERS, "SiLUActivation"):
        return "silu"
    if is_class(kind, _TRANSFORMERS, "ReLUSquaredActivation"):
        return "relu2"
    if any(is_class(kind, _TRANSFORMERS, n) for n in ("GELUActivation", "GELUTanh")):
        return _name_of_function(act.__dict__.get("act"))  # their other forms are Python's
    return ""


def _name_of_function(function: Any) -> str:
    if function is functional.gelu:
        return "gelu"
    if type(function) is partial:
        known = function.func is functional.gelu and not function.args
        given = function.keywords
        return _gelu(given.get("approximate", "")) if known and len(given) == 1 else ""
    try:
        return _FUNCTIONS.get(function, "")
    except TypeError:  # it isn't hashable
        return ""


def _gelu(approximate: str) -> str:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate, "")
