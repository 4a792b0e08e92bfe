"""The report's line on the loss: promised, without logits, with logits, or of another function."""

from types import MethodType

import peft
import pytest
import torch
from models import tiny_llama
from torch import nn
from torch.nn import functional

import fastlora

IDS = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
HEAD = "base_model.model.lm_head"


@pytest.fixture
def model() -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    return fastlora.optimize(peft.get_peft_model(tiny_llama(), config).train(), loss=True)


def step(model: nn.Module, loss: torch.Tensor) -> None:
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3).step()


def line(model: nn.Module) -> str:
    return fastlora.coverage(model).loss


def test_the_line_promises_a_loss_until_one_ran(model):
    assert line(model) == f"loss without logits: {HEAD} (no loss ran yet)"
    step(model, model(input_ids=IDS, labels=IDS).loss)
    assert line(model) == f"loss without logits: {HEAD}"


def test_a_loss_that_reads_the_logits_is_named_with_its_operation(model):
    step(model, model(input_ids=IDS).logits.amax())
    assert line(model) == f"loss with logits: {HEAD}: aten.amax.default read them"


def test_logits_that_are_read_after_the_loss_or_in_an_evaluation_don_t_count(model):
    outputs = model(input_ids=IDS, labels=IDS)
    step(model, outputs.loss + 0.0 * outputs.logits.amax())
    with torch.no_grad():
        model(input_ids=IDS).logits.amax()
    assert line(model) == f"loss without logits: {HEAD}"


def chunked(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """A trainer's forward that reads the head's weight."""
    hidden = model.model(input_ids).last_hidden_state
    logits = functional.linear(hidden, model.lm_head.weight)
    return functional.cross_entropy(logits.flatten(0, 1), input_ids.flatten())


def test_a_replaced_forward_is_named_before_and_after_its_loss(model):
    base = model.get_base_model()
    base.forward = MethodType(chunked, base)
    first = "it replaced the model's forward, and may not call"
    assert line(model) == f"loss of {__name__}: {first} {HEAD}"
    step(model, base(IDS))
    assert line(model) == f"loss of {__name__}: it doesn't call {HEAD}"


def test_a_loss_of_the_backbone_s_hidden_states_is_noticed(model):
    step(model, chunked(model.get_base_model(), IDS))
    assert line(model) == f"loss of another function: it doesn't call {HEAD}"
    step(model, model(input_ids=IDS, labels=IDS).loss)
    assert line(model) == f"loss without logits: {HEAD}"


def test_trl_s_fused_head_is_named(model):
    trl = pytest.importorskip("trl.trainer.utils", reason="TRL patches the model's forward")
    trl.add_fused_lm_head(model.get_base_model())
    assert line(model).startswith("loss of trl.trainer.utils: ")
    step(model, model(input_ids=IDS, labels=IDS, fused_lm_head=True).loss)
    assert line(model) == f"loss of trl.trainer.utils: it doesn't call {HEAD}"
