"""Dropout masks that the fast path and PEFT's share, so that their numbers can be compared."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .dropout import SeededDropout, Seeds


@contextmanager
def shared_masks(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT's own forward drops what the fast path would drop after the same manual_seed."""
    swapped = []
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        seeds = Seeds(layer)
        for dropout in layer.lora_dropout.values():
            if type(dropout) is nn.Dropout:
                dropout.__class__ = SeededDropout
                dropout.__dict__["seeds"] = seeds
                swapped.append(dropout)
    try:
        yield
    finally:
        for dropout in swapped:
            dropout.__class__ = nn.Dropout
            del dropout.seeds
