"""Which layers run fast, and why the others don't."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..backends import planned_backend
from ..call.projection import Output
from ..formats.format import Quantized
from .frozen import Linear, slow_weight
from .linear import LoRALinear
from .modules import has_sharded, left_out, plain_name, some

NO_LAYERS = "no LoRA layers: fastlora.get_peft_model makes them"
_BASE_ALONE = ("merged", "disabled")
# The plan of a layer that isn't fast: of a PEFT layer, and of one of fastlora's own layers.
PEFT_FORWARD, NOT_FAST = "PEFT's forward", "not fast"
SHARDED, IN_THE_CALL = "sharded", "decided in the call"  # a plan, and its reason


@dataclass(frozen=True)
class LayerCoverage:
    """One adapted layer, and how its next call will run.

    * ``plan``: the name of a backend; ``merged`` or ``disabled`` if only the base layer runs;
      ``PEFT's forward``; ``not fast`` for a layer of fastlora's own; or ``sharded`` if FSDP holds a
      shard of each tensor, so that only the call can decide;
    * ``reason``: why the layer isn't fast, or isn't on the backend that was asked for;
    * ``adapter``: the names of a PEFT layer's active adapters;
    * ``r``: the sum of their ranks;
    * ``parameters``: the number of adapted parameters of the base, out · in for each expert;
    * ``packed``: the format of a quantized base, such as "NF4".
    """

    name: str
    shape: tuple[int, int]  # out_features, in_features
    r: int
    fast: bool
    plan: str
    reason: str = ""
    adapter: str = ""
    parameters: int = 0
    packed: str = ""

    @property
    def runs_adapter(self) -> bool:
        """Whether the call runs an adapter fast, or may do so if it is sharded."""
        return self.plan == SHARDED or (self.fast and self.plan not in _BASE_ALONE)

    @property
    def _where(self) -> str:
        """The plan as words of the report: "on torch", "in PEFT's forward"."""
        return f"{'on ' if self.fast else 'in ' if self.plan == PEFT_FORWARD else ''}{self.plan}"


@dataclass(frozen=True)
class GatedMLPCoverage:
    """One gated MLP.  ``fast``: a training step runs it as one block; ``reason``: why not."""

    name: str
    fast: bool
    reason: str = ""

    @property
    def _where(self) -> str:
        return SHARDED if self.reason == IN_THE_CALL else "layer by layer"


@dataclass(frozen=True)
class Coverage:
    """A record for each adapted layer and each gated MLP.  Prints as a short report.

    ``frozen_linears`` names the fast layers without an adapter, on a CPU that multiplies their
    16-bit weights slowly.  ``notes`` are about the whole model.
    """

    layers: tuple[LayerCoverage, ...]
    notes: tuple[str, ...] = ()
    frozen_linears: tuple[str, ...] = ()
    gated_mlps: tuple[GatedMLPCoverage, ...] = ()
    loss: str = ""  # of optimize(loss=True): "loss without logits: lm_head", or the reason why not

    @property
    def fast(self) -> tuple[LayerCoverage, ...]:
        return tuple(layer for layer in self.layers if layer.fast)

    @property
    def not_fast(self) -> tuple[LayerCoverage, ...]:
        return tuple(layer for layer in self.layers if not (layer.fast or layer.plan == SHARDED))

    @property
    def share(self) -> float:
        """The share of the adapted parameters that runs fast, from 0 to 1."""
        total = sum(layer.parameters for layer in self.layers)
        return sum(layer.parameters for layer in self.fast) / total if total else 0.0

    @property
    def counts(self) -> str:
        """The number of fast layers, and their share of the parameters if not all are fast."""
        text = f"{len(self.fast)} of {len(self.layers)} layers fast"
        if sharded := len(self.layers) - len(self.fast) - len(self.not_fast):
            text += f", {sharded} sharded"
        if self.fast and self.not_fast and any(layer.parameters for layer in self.layers):
            text += f", {100 * self.share:.0f} % of the adapted parameters"
        return text

    def __str__(self) -> str:
        if not self.layers:
            return NO_LAYERS
        plans = Counter(layer.plan for layer in self.fast)
        # The plans that remain after this line are names of backends.
        alone = [f"{plans.pop(plan)} {plan}" for plan in _BASE_ALONE if plan in plans]
        notes = [f"backend {plan}" for plan in sorted(plans)] + alone
        note = f" ({'; '.join(notes)})" if notes else ""
        lines = [f"{self.counts}{note}"]
        lines += _by_reason((layer.name, layer._where, layer.reason) for layer in self.layers)
        formats = Counter(layer.packed for layer in self.layers if layer.packed)
        lines += [f"{count} quantized: {name}" for name, count in formats.items()]
        if self.gated_mlps:
            count = sum(mlp.fast for mlp in self.gated_mlps)
            lines.append(f"{count} of {len(self.gated_mlps)} gated MLPs as one block")
            lines += _by_reason((mlp.name, mlp._where, mlp.reason) for mlp in self.gated_mlps)
        lines += filter(None, [self.loss])
        if self.frozen_linears:
            linears = self.frozen_linears
            lines.append(
                f"{len(linears)} without an adapter: {some(linears)}: in float32, a block of the "
                "weight at a time, because this CPU multiplies 16 bits slowly; attention in 16 "
                "bits stays slow, which a float32 model avoids"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _by_reason(found: Iterable[tuple[str, str, str]]) -> list[str]:
    """A line for each place and reason with some of its names, from (name, place, reason)."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, where, reason in found:
        if reason:
            names.setdefault((where, reason), []).append(name)
    return [f"{len(n)} {where}: {some(n)}: {reason}" for (where, reason), n in names.items()]


def is_fast(plan: str) -> bool:
    """Whether a layer with this plan is fast."""
    return plan not in (PEFT_FORWARD, NOT_FAST, SHARDED)


def format_of(output: Output) -> str:
    """The name of a packed weight's format; "" for a plain weight."""
    weight = output.base.weight
    return weight.format.label if isinstance(weight, Quantized) else ""


def left_out_notes(model: nn.Module) -> tuple[str, ...]:
    """A note on parameters that each rank trains separately.  Pass the model in its wrappers."""
    names = left_out(model)
    note = (
        f"{some(names)}: plain parameters that FSDP, DDP or ZeRO leaves out: each rank trains its "
        "own copy, and only one rank's copy is saved.  Attach adapters before fully_shard, FSDP or "
        "DDP wraps the model, and let it wrap all of them; or average these gradients yourself"
    )
    return (note,) if names else ()


def cover_lora_linears(model: nn.Module) -> list[LayerCoverage]:
    """A record of every :class:`LoRALinear` of the model, as a call would run it now."""
    layers = [(plain_name(n), m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    return [_cover(name, layer) for name, layer in layers]


def cover_frozen(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers without an adapter that are fast now, without PEFT's base layers."""
    linear = [(n, layer) for n, layer in model.named_modules() if isinstance(layer, Linear)]
    names = [plain_name(name) for name, layer in linear if slow_weight(layer) is not None]
    return tuple(name for name in names if not name.endswith(".base_layer"))


def _cover(name: str, layer: LoRALinear) -> LayerCoverage:
    plan, reason = NOT_FAST, ""
    if "forward" in vars(layer):
        reason = "its forward was replaced on the instance, so fastlora's forward isn't called"
    elif layer.merged:
        plan = "merged"
    elif has_sharded(layer):
        # Before read(), because a shard's shape between calls isn't the weight's.
        plan, reason = SHARDED, IN_THE_CALL
    else:
        plan, reason = planned_backend(layer.read().outputs)
    shape = layer.out_features, layer.in_features
    size = math.prod(shape)
    return LayerCoverage(name, shape, layer.r, is_fast(plan), plan, reason, parameters=size)
