"""Falcon's linear layers, which compute x @ W.T + b: sped up as ``nn.Linear`` is."""

import pytest
import torch
from peft_models import BATCH, KINDS, adapted, counted_calls, falcon, optimized
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

import fastlora


def loss_and_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    loss = model(input_ids=BATCH, labels=BATCH).loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, trained.values())
    return {"loss": loss.detach(), **dict(zip(trained, gradients, strict=True))}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_all_layers_run_fast_with_peft_s_numbers(settings, bias):
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    model = adapted(falcon(bias), target_modules=targets, **settings).double()
    assert (
        type(model.base_model.model.transformer.h[0].mlp.dense_h_to_4h.base_layer) is FalconLinear
    )
    ours = optimized(model)
    assert str(fastlora.coverage(ours)) == "8 of 8 layers fast (backend torch)"
    with counted_calls() as calls:
        found = loss_and_gradients(ours)
    assert len(calls) == 8
    for name, expected in loss_and_gradients(model).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)


class Louder(FalconLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_with_a_forward_of_its_own_is_peft_s():
    model = adapted(falcon(), target_modules=["dense_h_to_4h"])
    for block in model.base_model.model.transformer.h:
        block.mlp.dense_h_to_4h.base_layer.__class__ = Louder
    report = fastlora.optimize(model)
    assert report.fast == ()
    assert "its base is a Louder, no torch.nn.Linear" in str(report)
