"""Merging takes one layer beside the model, and beside the originals if they are kept."""

import pytest
import torch
from judge import peak_bytes
from models import assert_untouched, randomise, snapshot
from torch import nn

import fastlora
from fastlora import LoRAConfig
from fastlora.layers.linear import LoRALinear

LAYERS, SIDE = 4, 1024  # a layer is larger than a block of rows in float32, which is 4 MiB


def adapted(dtype: torch.dtype = torch.bfloat16, side: int = SIDE) -> nn.Module:
    model = nn.Sequential(*[nn.Linear(side, 4 * side, bias=False) for _ in range(LAYERS)])
    config = LoRAConfig(r=2, target_modules="all-linear")
    return randomise(fastlora.apply_lora(model.to(dtype), config), 0.01)


BLOCKS = 3 * 4 * 2**20  # base and sum in float32, and what isfinite makes


@pytest.mark.parametrize("keep_base", [True, False], ids=["kept", "freed"])
def test_the_peak_is_one_layer_more(keep_base):
    model = adapted()
    layer = model[0].weight.nbytes
    before, peak, after = peak_bytes(
        model.parameters(), lambda: fastlora.merge_lora(model, keep_base=keep_base)
    )
    kept = LAYERS * layer if keep_base else 0
    assert after - before == kept
    assert peak - before <= max(kept, layer) + layer * (not keep_base) * 0.1 + BLOCKS


@pytest.mark.parametrize("call", [1, LAYERS, LAYERS + 1, 2 * LAYERS])
def test_an_interruption_changes_nothing(monkeypatch, call):
    """Out of memory, or the user's Ctrl-C, at any layer of either pass."""
    model, calls, real = adapted(side=64), [], LoRALinear.merged_weight
    before = snapshot(model)

    def interrupted(layer, *around):
        calls.append(layer)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(layer, *around)

    monkeypatch.setattr(LoRALinear, "merged_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastlora.merge_lora(model)
    assert_untouched(model, before)
    monkeypatch.undo()
    fastlora.merge_lora(model)
