"""Gated MLPs: which of their calls run as one block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
from torch import Tensor, nn

from fastlora.layers import mlp


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
