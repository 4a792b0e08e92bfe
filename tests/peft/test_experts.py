"""PEFT's LoRA on the experts of transformers' models, with fastlora and without."""

import copy

import peft
import pytest
import torch
from moe_models import IDS, MODELS, base_model, experts_of, parameters_of, train
from peft_models import adapted, assert_runs_the_same, counted_calls, optimized, run_both
from torch import nn

import fastlora
from fastlora.peft import experts as fast_experts

_TARGETS = ("target_modules", "target_parameters")


def model_of(name: str = "qwen3", implementation: str = "eager", **settings) -> nn.Module:
    targets = {"target_modules": ["q_proj"], "target_parameters": parameters_of(name)}
    return adapted(base_model(name, implementation), **targets | settings)


def fast_calls(model: nn.Module, run=train) -> int:
    """The number of fast calls; a call of experts counts twice, a linear layer once."""
    with counted_calls() as calls:
        run(model)
    return len(calls)


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_peft_s(name):
    theirs = model_of(name).double()
    ours = optimized(theirs)
    fast = sum(layer.fast for layer in fastlora.coverage(ours).layers)
    assert fast == len(fastlora.coverage(ours).layers)
    # NemotronH computes its routing in float32
    tolerance = 1e-6 if name == "nemotron" else 1e-11
    assert_runs_the_same(train, theirs, ours, fast=fast, tolerance=tolerance)


def test_wrappers_of_a_peft_that_swaps_no_features_are_fast():
    theirs = model_of("gpt-oss").double()
    ours = optimized(theirs)
    for module in ours.modules():
        vars(module).pop("_did_swap_in_out_features", None)  # PEFT 0.18 has no such attribute
    assert all(layer.fast for layer in fastlora.coverage(ours).layers)
    assert_runs_the_same(train, theirs, ours, fast=6, tolerance=1e-11)


def merge(model):
    model.merge_adapter()


def disable(model):
    model.base_model.disable_adapter_layers()


def add_another(model):
    targets = {k: getattr(model.peft_config["default"], k) for k in _TARGETS}
    model.add_adapter("other", peft.LoraConfig(r=2, **targets))
    model.base_model.set_adapter(["default", "other"])


def hook_the_experts(model):
    experts_of(model).get_base_layer().register_forward_hook(lambda *_: None)


def hook_lora_a(model):
    experts_of(model).lora_A["default"].register_forward_hook(lambda *_: None)


def replace_the_forward(model):
    experts = experts_of(model).get_base_layer()
    experts.forward = lambda *args: type(experts).forward(experts, *args)


def replace_the_gate(model):
    experts = experts_of(model).get_base_layer()
    experts._apply_gate = lambda pre: pre.chunk(2, dim=-1)[1]


CHANGES = [
    merge, disable, add_another, hook_the_experts, hook_lora_a,
    replace_the_forward, replace_the_gate,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_switch_to_peft_s_forward(change):
    """The next call notices a change of the model, and the report names the reason."""
    theirs = model_of()
    ours = optimized(theirs.double())
    before = fast_calls(ours, lambda model: model(input_ids=IDS))
    for model in (theirs, ours):
        change(model)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    assert fast_calls(ours, lambda model: model(input_ids=IDS)) < before
    if change not in (merge, disable):
        report = fastlora.coverage(ours)
        reasons = [layer.reason for layer in report.not_fast if "experts" in layer.name]
        assert len(reasons) >= 2
        assert all(reasons)


def test_one_adapted_parameter():
    theirs = model_of(target_parameters=["experts.down_proj"]).double()
    assert_runs_the_same(train, theirs, fast=4, tolerance=1e-11)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_autocast(implementation):
    """Under autocast, the eager implementation casts to bfloat16; grouped_mm stays in float32."""
    theirs = model_of("gpt-oss", implementation)
    exact = copy.deepcopy(theirs)
    exact.get_base_model().set_experts_implementation("eager")

    def run(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return train(model)

    got, expected, calls = run_both(run, theirs)
    assert len(calls) == 6
    for ours, their, truth in zip(got, expected, train(exact.double()), strict=True):
        assert ours.dtype == their.dtype
        assert (ours - truth).norm() < 2.5 * (their - truth).norm() + 1e-3 * truth.norm()


def test_files_and_merging_are_peft_s(tmp_path):
    theirs = model_of()
    ours = optimized(theirs)
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base_model("qwen3"), tmp_path)
    for name, tensor in peft.get_peft_model_state_dict(again).items():
        assert torch.equal(tensor, peft.get_peft_model_state_dict(theirs)[name])
    merged = copy.deepcopy(theirs).merge_and_unload()
    assert torch.equal(
        optimized(theirs).merge_and_unload()(input_ids=IDS).logits, merged(input_ids=IDS).logits
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_check_judges_experts(monkeypatch, dtype):
    model = model_of().to(dtype).train()
    batch = {"input_ids": IDS, "labels": IDS}
    found = fastlora.check(model, batch)
    assert all(found.layers), str(found)
    count = sum(layer.fast for layer in found.coverage.layers)
    assert f"{count} of {count} fast layers judged, all right" in str(found)
    run = fast_experts.run_experts

    def wrong(arguments, how, up, down):
        return run(arguments, how, up, down) * 1.02

    monkeypatch.setattr(fast_experts, "run_experts", wrong)
    wrong_ones = [layer.name for layer in fastlora.check(model, batch).layers if not layer]
    assert wrong_ones
    assert all("experts" in name for name in wrong_ones)
