"""Conv1D (GPT-2), whose weight is [in, out]: all that apply_lora promises, with PEFT's numbers."""

import peft
import pytest
import torch
from models import adapt, assert_untouched, randomise, snapshot, trained
from peft_models import BATCH, gpt2
from process import run_python
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import LoRAConfig, blocks
from fastlora.layers import adapted

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")


def plain() -> nn.Module:
    """The same weights each time; nothing is dropped outside of the adapters."""
    torch.manual_seed(7)
    model = gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=BATCH).logits


def ours(**settings) -> nn.Module:
    torch.manual_seed(8)
    return adapt(plain(), 0.1, **{"r": 4, "target_modules": "all-linear"} | settings)


def theirs(**settings) -> peft.PeftModel:
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 16, "target_modules": "all-linear"} | settings
    )
    torch.manual_seed(8)
    return randomise(peft.get_peft_model(plain(), config), 0.1)


def twins(**settings) -> tuple[nn.Module, peft.PeftModel]:
    """Ours and PEFT's with the same adapters and the same trained biases."""
    our, their = ours(**settings), theirs(**settings)
    with torch.no_grad():
        for name, parameter in our.named_parameters():
            parameter.copy_(their.get_parameter(peft_name(our, name)))
    return our, their


def peft_name(our: nn.Module, name: str) -> str:
    owner, _, last = name.rpartition(".")
    if last in ("lora_A", "lora_B"):
        return f"base_model.model.{name}.default.weight"
    if isinstance(our.get_submodule(owner), adapted.LoRALayer):
        return f"base_model.model.{owner}.base_layer.{last}"
    return f"base_model.model.{name}"


def test_three_steps_with_peft_s_outputs_and_gradients():
    our, their = twins(bias="all", rank_pattern={r"0\..*c_proj": 2})
    torch.testing.assert_close(logits(our), logits(their))
    our.train(), their.train()
    names = {name: peft_name(our, name) for name in trained(our)}
    assert set(names.values()) == trained(their)
    assert any(name.endswith("bias") for name in names)
    # With its own eps AdamW makes steps of one size even of gradients that are all rounding.
    steps = [torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5) for model in (our, their)]
    for _ in range(3):
        for model, step in zip((our, their), steps, strict=True):
            step.zero_grad()
            model(input_ids=BATCH, labels=BATCH).loss.backward()
        for name, of_peft in names.items():
            gradient, expected = our.get_parameter(name).grad, their.get_parameter(of_peft).grad
            size = expected.abs().max().item()
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * size)
        for step in steps:
            step.step()
    torch.testing.assert_close(logits(our), logits(their), rtol=1e-3, atol=1e-4)


def test_merged_weights_are_peft_s(monkeypatch):
    monkeypatch.setattr(blocks, "rows_at_a_time", lambda _: 7)
    our, their = twins()
    before, y = snapshot(our), logits(our)
    fastlora.merge_lora(our)
    merged = logits(our)
    torch.testing.assert_close(merged, y, rtol=1e-4, atol=1e-5)
    assert str(fastlora.coverage(our)) == "8 of 8 layers fast (8 merged)"
    fastlora.unmerge_lora(our)
    assert_untouched(our, before)
    assert torch.equal(logits(our), y)
    whole = their.merge_and_unload()
    fastlora.remove_lora(fastlora.merge_lora(our))
    assert torch.equal(logits(our), merged)
    assert {type(module) for module in our.modules()} == {type(m) for m in whole.modules()}
    state = our.state_dict()
    assert state.keys() == whole.state_dict().keys()
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(state[name], expected)


def test_a_conv1d_is_no_target_parameter():
    """PEFT takes such a weight for [out, in]: the file would have other shapes."""
    model = plain()
    before = snapshot(model)
    config = LoRAConfig(target_parameters=["c_attn.weight"])
    with pytest.raises(ValueError, match=r"c_attn.weight, a Conv1D's .* in target_modules"):
        fastlora.apply_lora(model, config)
    assert_untouched(model, before)


def test_a_pickle_of_one_layer_loads_in_another_process(tmp_path):
    model = adapt(nn.Sequential(Conv1D(6, 8)), target_modules=["0"])
    torch.save(model, tmp_path / "layer.pt")
    code = (
        "import sys, torch; "
        f"model = torch.load({str(tmp_path / 'layer.pt')!r}, weights_only=False); "
        "print(type(model[0]).__name__, model(torch.ones(1, 8)).tolist())"
    )
    kind = type(model[0]).__name__
    assert run_python("-c", code) == f"{kind} {model(torch.ones(1, 8)).tolist()}"
