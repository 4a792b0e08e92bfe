"""PEFT's layers become fast ones, and PEFT's again, by their class; so do gated MLPs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.lora.model import LoraModel as PeftModel
from torch import nn

from ..layers import mlp
from ..layers.classes import change_class, is_over
from ..layers.frozen import give_back_frozen, take_frozen
from ..layers.members import is_hooked
from .experts import ParamWrapper
from .layer import Linear, packed_classes
from .mixed import LoraModel
from .moment import adapters_now, is_peft_s_few, why_not_now
from .reading import read

_FAST: dict[type[nn.Module], type[nn.Module]] = {
    PeftLinear: Linear,
    PeftParamWrapper: ParamWrapper,
    PeftModel: LoraModel,  # around the layers
}


def _fast() -> dict[type[nn.Module], type[nn.Module]]:
    """The fast class for each of PEFT's that is here."""
    return _FAST | packed_classes()


def is_swapped(layer: nn.Module) -> bool:
    return isinstance(layer, tuple(_fast().values()))


def why_not_swapped(layer: nn.Module) -> str:
    """Why this layer can't become fast, or isn't called when it has; "" if it can."""
    kinds = [pair for pair in _fast().items() if any(is_over(type(layer), kind) for kind in pair)]
    if not kinds:
        return f"only PEFT's lora.Linear is sped up, not {type(layer).__name__}"
    own = layer.__dict__.get("_old_forward" if "_hf_hook" in layer.__dict__ else "forward")
    if own is None or _is_ours(own):
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


@contextmanager
def swapped_back(model: nn.Module) -> Iterator[None]:
    """Inside, all of an optimised model runs PEFT's and torch's own forwards."""
    modules = list(model.modules())
    blocks, layers, frozen = mlp.give_back(modules), unswap_all(modules), give_back_frozen(modules)
    try:
        yield
    finally:
        swap_all(layers)
        take_frozen(frozen)
        mlp.take(blocks, Block)


def _is_ours(forward: object) -> bool:
    known = [kind.forward for pair in _fast().items() for kind in pair]
    return getattr(forward, "__func__", None) in known


class Block(mlp.GatedMLP):
    """What an optimised gated MLP becomes, whose layers are PEFT's, or have no adapter."""

    def forward(self, *args, **named):
        if args and any(
            isinstance(m, LoraLayer) and is_peft_s_few(m, args[0]) for m in self.children()
        ):
            return super(mlp.GatedMLP, self).forward(*args, **named)
        return super().forward(*args, **named)

    def why_not_now(self) -> str:
        return why_not_now()

    def read_part(self, linear: nn.Module) -> mlp.Part:
        """gate, up or down, where the layer's own call would be fast."""
        if not isinstance(linear, LoraLayer):
            return mlp.read_frozen(linear)
        reason = why_not_swapped(linear) or ("" if is_swapped(linear) else "it isn't optimised")
        if not reason and is_hooked(linear):
            reason = "a hook watches, or something replaces, its calls"
        if reason:
            return mlp.Part(reason)
        names = adapters_now(linear)
        if not names:
            return mlp.Part("its adapter is merged, disabled or not active")
        reading = read(linear, names)
        if reading.output is None or reading.magnitude is not None:
            return mlp.Part(reading.reason or "it is DoRA")
        return mlp.Part("", reading.output, max(reading.dropouts), reading.packed)
