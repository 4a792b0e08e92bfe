"""Gated MLPs and frozen layers: which of them are fast, and which of their calls."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
from torch import Tensor, nn

from fastlora.layers import frozen, mlp


def blocks(model: nn.Module) -> set[str]:
    """The names of the modules that are blocks now."""
    return {name for name, m in model.named_modules() if isinstance(m, mlp.GatedMLP)}


@contextmanager
def noted_calls(place: ModuleType, note: Callable) -> Iterator[None]:
    """``note`` is told of the module and the input of every fast call that this file makes."""
    call = place.call_as_read

    def noted(module, x, *rest):
        y = x  # checkpointing leaves a call by an exception when it has what it wants
        try:
            y = call(module, x, *rest)
        finally:
            if y is not None:
                note(module, x)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "call_as_read", noted)
        yield


@contextmanager
def noted_blocks(note: Callable) -> Iterator[None]:
    """``note`` is told of the input and the outputs (gate, up, down) of every call of a block."""
    with noted_calls(mlp, lambda block, x: note(x, block.read().outputs)):
        yield


@contextmanager
def counted_blocks() -> Iterator[list[Tensor]]:
    """The inputs of the calls inside that run as one block."""
    calls: list[Tensor] = []
    with noted_blocks(lambda x, outputs: calls.append(x)):
        yield calls


def fast_layers(model: nn.Module) -> set[str]:
    """The names of the layers that are fastlora's frozen ones now."""
    return {name for name, m in model.named_modules() if isinstance(m, frozen.Linear)}


@contextmanager
def counted_frozen_calls() -> Iterator[list[Tensor]]:
    """The inputs of the eager calls of frozen layers that run fast inside.

    A block's input counts for each of its layers that has no adapter.
    """
    calls: list[Tensor] = []
    run = frozen.lora_linears

    def recorded(x, *rest, **settings):
        calls.append(x)
        return run(x, *rest, **settings)

    def note(x, outputs):
        calls.extend(x for output in outputs if not output.adapters)

    with pytest.MonkeyPatch.context() as patch, noted_blocks(note):
        patch.setattr(frozen, "lora_linears", recorded)
        yield calls
