"""Frozen layers without an adapter: which are fast, and which of their calls."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from block_calls import noted_blocks
from torch import Tensor, nn

from fastlora.layers import frozen


def fast_layers(model: nn.Module) -> set[str]:
    """The names of the layers that are fastlora's frozen ones now."""
    return {name for name, m in model.named_modules() if isinstance(m, frozen.Linear)}


@contextmanager
def counted_calls() -> Iterator[list[Tensor]]:
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
