"""Routers of a mixture of experts, which PEFT's "all-linear" adapts: files, calls, merging."""

import peft
import pytest
import torch
from models import randomize, refused
from moe_models import IDS, base_model
from torch import nn

import fastlora
from fastlora import LoRAConfig

CASES = {
    "qwen3": ("qwen3", "gate", torch.float32),
    "deepseek-bf16": ("deepseek", "gate", torch.bfloat16),
    # It has a bias, and PEFT's "all-linear" doesn't adapt it.
    "gpt-oss": ("gpt-oss", "router", torch.float32),
}
IGNORED = "ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning"
pytestmark = pytest.mark.filterwarnings(IGNORED)


def plain(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return base_model(name).to(dtype).eval()


def adapted(name: str = "qwen3", **settings) -> nn.Module:
    settings = {
        "r": 2,
        "target_modules": ["q_proj"],
        "target_parameters": ["gate.weight"],
    } | settings
    return randomize(fastlora.apply_lora(plain(name), LoRAConfig(**settings))).eval()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """The gradients of the routers' adapters, by their names."""
    model(input_ids=IDS, labels=IDS).loss.backward()
    named = {
        name.replace(".default.weight", "").removeprefix("base_model.model."): parameter.grad
        for name, parameter in model.named_parameters()
        if ".lora_" in name and "expert" not in name
    }
    return [named[name] for name in sorted(named)]


@pytest.mark.parametrize(("name", "router", "dtype"), CASES.values(), ids=CASES)
def test_peft_s_file_both_ways_and_merged(name, router, dtype, tmp_path):
    settings = {"r": 2, "target_modules": "all-linear"}
    if name == "gpt-oss":
        settings["target_parameters"] = ["router.weight"]
    theirs = randomize(peft.get_peft_model(plain(name, dtype), peft.LoraConfig(**settings))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastlora.load_adapter(plain(name, dtype), tmp_path / "theirs").eval()
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    y = theirs(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, y, **close)
    if dtype == torch.float32:
        for our, their in zip(gradients(ours), gradients(theirs), strict=True):
            torch.testing.assert_close(our, their, **close)
    fastlora.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(plain(name, dtype), tmp_path / "ours")
    torch.testing.assert_close(again(IDS).logits, y, **close)
    layer = ours.model.layers[0].mlp.get_submodule(router)
    before = layer.weight
    fastlora.merge_lora(ours)
    torch.testing.assert_close(ours(IDS).logits, y, **close)
    assert fastlora.unmerge_lora(ours).model.layers[0].mlp.get_submodule(router).weight is before
    fastlora.remove_lora(fastlora.merge_lora(ours))
    assert type(layer) is type(plain(name).model.layers[0].mlp.get_submodule(router))
    torch.testing.assert_close(ours(IDS).logits, y, **close)


def test_it_is_reported_as_a_router():
    model = adapted()
    assert len(model(IDS, output_router_logits=True).router_logits) == 2
    report = fastlora.coverage(model)
    assert [layer.name for layer in report.not_fast] == [
        f"model.layers.{i}.mlp.gate" for i in (0, 1)
    ]
    assert "2 not fast: model.layers.0.mlp.gate, model.layers.1.mlp.gate: a router's own" in str(
        report
    )
    with pytest.raises(RuntimeError, match="merged, so its adapter would get no gradient"):
        fastlora.merge_lora(model).train()(IDS)


def test_dropout_and_shared_batches_are_refused_for_routers(tmp_path):
    model = plain("qwen3")
    with refused(
        model, r"gate is a router \(Qwen3MoeTopKRouter\), whose adapter can't have dropout"
    ):
        fastlora.apply_lora(model, LoRAConfig(target_modules=["gate"], lora_dropout=0.1))
    batch = {"input_ids": IDS, "labels": IDS}
    configs = [{"target_modules": ["gate"], "learning_rate": 0.1}]
    with refused(model, "gate is a router, and trials can't share a batch"):
        fastlora.sweep(model, configs, [batch], eval_data=[batch], steps=1, output_dir=tmp_path)


def test_optimize_names_the_owner_of_a_parameter():
    config = peft.LoraConfig(target_modules=[], target_parameters=["gate.weight", "q_proj.weight"])
    report = str(fastlora.coverage(fastlora.optimize(peft.get_peft_model(plain("qwen3"), config))))
    assert "mlp.gate: it is on a router, to whose weight PEFT adds lora_B lora_A" in report
    assert "q_proj: it is on a matrix of a Linear, to whose weight" in report
