"""What an optimised gated MLP becomes: the same module with another forward."""

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..layers.members import is_hooked
from ..layers.mlp import GatedMLP, Part, read_frozen
from .moment import why_not_now
from .reading import active_adapters, read
from .swap import is_swapped, why_not_swapped


class Block(GatedMLP):
    """A gated MLP whose layers are PEFT's, or have no adapter."""

    def why_not_now(self) -> str:
        return why_not_now()

    def read_part(self, linear: nn.Module) -> Part:
        """gate, up or down, where the layer's own call would be fast."""
        if not isinstance(linear, LoraLayer):
            return read_frozen(linear)
        reason = why_not_swapped(linear) or ("" if is_swapped(linear) else "it isn't optimised")
        if not reason and is_hooked(linear):
            reason = "a hook watches, or something replaces, its calls"
        if reason:
            return Part(reason)
        names = active_adapters(linear)
        if linear.disable_adapters or linear.merged or not names:
            return Part("its adapter is merged, disabled or not active")
        reading = read(linear, names)
        if reading.magnitude is not None:
            return Part("it is DoRA")
        return Part(reading.reason, reading.output, reading.p, reading.packed)
