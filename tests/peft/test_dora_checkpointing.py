"""DoRA with checkpointing inside a compiled whole graph: a limit of torch's, and the way around."""

import peft
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.utils.checkpoint import checkpoint

import fastlora


def gradient_of(model: nn.Module, x: Tensor, fullgraph: bool) -> Tensor:
    torch._dynamo.reset()
    run = torch.compile(
        lambda x: checkpoint(model, x, use_reentrant=False).square().sum(),
        backend="aot_eager",
        fullgraph=fullgraph,
    )
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(run(leaf), leaf)[0]


def test_it_needs_a_setting_of_torch_s(monkeypatch):
    config = peft.LoraConfig(target_modules=["0"], use_dora=True, init_lora_weights=False)
    model, x = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), config), torch.randn(3, 8)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="nsafe side effect"):
        gradient_of(model, x, fullgraph=True)  # PEFT's own
    fastlora.optimize(model, strict=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="nsafe side effect"):
        gradient_of(model, x, fullgraph=True)
    torch.testing.assert_close(gradient_of(model, x, fullgraph=False), expected)
    monkeypatch.setattr(dynamo_config, "skip_fwd_side_effects_in_bwd_under_checkpoint", True)
    torch.testing.assert_close(gradient_of(model, x, fullgraph=True), expected)
