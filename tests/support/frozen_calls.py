"""Frozen layers without an adapter: which are fast, and which of their calls."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor, nn

from fastlora import frozen


def fast_layers(model: nn.Module) -> set[str]:
    """The names of the layers that are fastlora's frozen ones now."""
    return {name for name, m in model.named_modules() if isinstance(m, frozen.Linear)}


@contextmanager
def counted_calls() -> Iterator[list[Tensor]]:
    """The inputs of the eager calls of frozen layers that run fast inside."""
    calls: list[Tensor] = []
    run = frozen.lora_linears

    def recorded(x, *rest, **settings):
        calls.append(x)
        return run(x, *rest, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "lora_linears", recorded)
        yield calls
