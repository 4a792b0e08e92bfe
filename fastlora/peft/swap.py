"""A PEFT layer becomes a fast one, and PEFT's again, by its class."""

import sys
from collections.abc import Iterable
from importlib import import_module

from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.lora.model import LoraModel as PeftModel
from torch import nn

from ..layers.classes import change_class, is_over
from .experts import ParamWrapper
from .layer import Linear
from .mixed_model import LoraModel

_FAST: dict[type[nn.Module], type[nn.Module]] = {
    PeftLinear: Linear,
    PeftParamWrapper: ParamWrapper,
    PeftModel: LoraModel,  # around the layers
}
# Of quantised bases: where a module is imported, PEFT has the layer that a file of ours is over.
_OVER = {
    "peft.tuners.lora.bnb": ".bitsandbytes",
    "peft.tuners.lora.torchao": ".torchao",
    "hqq.core.quantize": ".hqq",
    "peft.tuners.lora.gptq": ".gptq",
}


def _fast() -> dict[type[nn.Module], type[nn.Module]]:
    """The fast class for each of PEFT's that is here."""
    for module in [module for module in _OVER if module in sys.modules]:
        _FAST.update(import_module(_OVER.pop(module), __package__).FAST)
    return _FAST


def is_swapped(layer: nn.Module) -> bool:
    return isinstance(layer, tuple(_fast().values()))


def why_not_swapped(layer: nn.Module) -> str:
    """Why this layer can't become fast, or isn't called when it has; "" if it can."""
    kinds = [pair for pair in _fast().items() if any(is_over(type(layer), kind) for kind in pair)]
    if not kinds:
        return f"only PEFT's lora.Linear is sped up, not {type(layer).__name__}"
    own = layer.__dict__.get("forward")
    if own is None or _is_ours(own):
        return ""
    if "_hf_hook" in layer.__dict__ and _is_ours(layer.__dict__.get("_old_forward")):
        return ""
    return "its forward was replaced on the instance"


def swap_all(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Make every layer fast that can be, and return those that weren't before."""
    layers = [layer for layer in layers if not is_swapped(layer) and not why_not_swapped(layer)]
    for layer in layers:
        for kind, fast in _fast().items():
            if is_over(type(layer), kind):
                change_class(layer, kind, fast)
    return layers


def unswap_all(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Make every layer PEFT's again, and return those that were fast."""
    layers = [layer for layer in layers if is_swapped(layer)]
    for layer in layers:
        for kind, fast in _fast().items():
            if isinstance(layer, fast):
                change_class(layer, fast, kind)
    return layers


def _is_ours(forward: object) -> bool:
    known = [kind.forward for pair in _fast().items() for kind in pair]
    return getattr(forward, "__func__", None) in known
