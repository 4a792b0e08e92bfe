"""PEFT models sped up in place, and back: optimize and restore."""

import sys
import warnings
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from torch import nn

from ..layers import mlp
from ..layers.frozen import give_back_frozen, take_frozen
from ..layers.modules import lora_layers
from ..projection import check_switch
from ..report import Coverage
from .coverage import checked, cover, frozen_layers, peft_layers
from .versions import is_disabled, untested, why_never, why_not_peft


@dataclass(frozen=True)
class Optimized(Coverage):
    """What ``optimize`` returns: the report; as a context manager it undoes that call at its end.

    Layers that were optimised before stay so.
    """

    _changed: tuple[Any, ...] = field(default=(), repr=False, compare=False)  # weak references

    def __enter__(self) -> "Optimized":
        return self

    def __exit__(self, *exception: object) -> None:
        _unswap([layer for changed in self._changed if (layer := changed()) is not None])

    def __reduce__(self):
        return Coverage, (self.layers, self.notes, self.frozen, self.blocks)


def optimize(
    model: nn.Module, *, strict: bool = False, frozen: bool = True, blocks: bool = True
) -> Optimized:
    """Run the PEFT LoRA layers of ``model`` through fastlora, in place, and report on each.

    ``model`` is a PeftModel, or any module that holds PEFT's LoRA layers, wrapped (DDP, FSDP2,
    ``torch.compile``) or not.  Parameters, names, files and PEFT's own functions stay as they are;
    every call decides for itself whether it runs fast, and PEFT's forward takes all the others.
    Layers that were optimised before are left alone; layers that PEFT adds later need another call.
    :func:`restore` undoes it, and so does the end of ``with fastlora.optimize(model):``.

    On a CPU that multiplies 16 bits slowly, so do the model's frozen ``torch.nn.Linear`` layers of
    16 bits (the head, and what no adapter is on; a base, in calls without its adapter), which the
    report lists apart; ``frozen=False`` leaves them alone.

    Gated MLPs of transformers' models, down(act(gate(x)) · up(x)), become blocks: a call in
    training keeps neither act(gate) nor the product for the backward (docs/blocks.md).  The report
    lists them, too; ``blocks=False`` leaves them alone.

    The results are PEFT's within its own rounding; dropout draws other masks of the same kind.

    ``FASTLORA_DISABLE=1`` in the environment makes this change nothing.  So does, with a warning, a
    PEFT that is older than the tested versions.  A newer one is sped up, with a warning and a note
    in the report: :func:`fastlora.check` says whether the numbers are the same.

    Raises TypeError for what is no module, and ValueError for a model without PEFT LoRA layers, for
    a switch that is no bool, or if ``FASTLORA_BACKEND`` names no backend.
    With ``strict``, a layer that would not run fast is a ValueError too, with the report as its
    text.  After an error the model is as it was.
    """
    inner = checked(model)
    check_switch("strict", strict)
    check_switch("frozen", frozen)
    check_switch("blocks", blocks)
    layers = peft_layers(inner)
    if not layers:
        raise ValueError(_why_nothing(inner))
    reason = why_nothing_changes()
    if reason and not is_disabled():
        warnings.warn(f"fastlora.optimize changed nothing: {reason}", stacklevel=2)
    elif untested() and not reason:
        warnings.warn(untested(), stacklevel=2)
    report = cover(inner, layers, unreached=reason)
    if strict and report.eager:
        raise ValueError(f"not every layer would run fast: {report}")
    if reason:
        found = mlp.cover_blocks(inner, reason)
        return Optimized(report.layers, report.notes, frozen_layers(inner), found)
    from .swap import Block, swap_all  # here, since it imports PEFT

    changed = swap_all(inner.modules())
    changed += _take_frozen(inner) if frozen else []
    changed += mlp.take(inner.modules(), Block) if blocks else []
    found = mlp.cover_blocks(inner, "left alone (blocks=False)")
    kept = tuple(map(ref, changed))
    return Optimized(report.layers, report.notes, frozen_layers(inner), found, kept)


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`optimize`: every layer runs PEFT's or torch's forward again.  Returns the model.

    A model that wasn't optimised stays as it is.  Raises TypeError for what is no module.
    """
    _unswap(list(checked(model).modules()))
    return model


def why_nothing_changes() -> str:
    """Why optimize leaves every layer as it is; or ""."""
    return why_never() or why_not_peft()


def _take_frozen(model: nn.Module) -> list[nn.Module]:
    """Make the frozen layers fast that gain by it, and return those that weren't before.

    Not those of adapters: one that isn't active is frozen, too, and its layer reads it itself.
    """
    return take_frozen(layer for name, layer in model.named_modules() if ".lora_" not in name)


def _unswap(layers: list[nn.Module]) -> None:
    give_back_frozen(layers)
    mlp.give_back(layers)
    if "fastlora.peft.layer" in sys.modules:  # else no layer was ever made fast
        from .swap import unswap_all

        unswap_all(layers)


def _why_nothing(model: nn.Module) -> str:
    """Why a model without PEFT LoRA layers can't be optimised, and what to do."""
    if any(True for _ in lora_layers(model)):
        return f"this {type(model).__name__} needs none: its LoRA layers are fastlora's own"
    config = getattr(model, "peft_config", None)
    if isinstance(config, dict):
        kinds = ", ".join(str(getattr(c, "peft_type", c)).split(".")[-1] for c in config.values())
        return f"this PEFT model has no LoRA layers (its adapters: {kinds}): only LoRA is sped up"
    return (
        f"this {type(model).__name__} has no PEFT LoRA layers: give it some by "
        "peft.get_peft_model(model, peft.LoraConfig(…)), or use fastlora's own layers: "
        "fastlora.apply_lora(model, fastlora.LoRAConfig(…))"
    )
