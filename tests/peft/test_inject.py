"""fastlora.get_peft_model and load_adapter, over packed bases: PEFT's numbers over dense ones."""

from functools import partial

import peft
import pytest
import torch
from moe_models import MODELS, base_model, logits, parameters_of, train
from packed_experts import (
    SIZES,
    bits_of,
    dense_model,
    fp8_model,
    gguf_model,
    packed_model,
)
from torch import nn

import fastlora
from fastlora.peft.inject import get_peft_model, load_adapter

CASES = {
    "qwen3, mxfp4": ("qwen3", lambda: packed_model("qwen3", "mxfp4")),
    "gpt-oss, mxfp4": ("gpt-oss", lambda: packed_model("gpt-oss", "mxfp4")),
    "gpt-oss, nf4": ("gpt-oss", lambda: packed_model("gpt-oss", "nf4", "grouped_mm")),
    "mixtral, nvfp4": ("mixtral", lambda: packed_model("mixtral", "nvfp4")),
    "deepseek, float8": ("deepseek", lambda: packed_model("deepseek", "float8")),
    "nemotron, mxfp4": ("nemotron", lambda: packed_model("nemotron", "mxfp4")),
    "blocks of fp8": ("qwen3", fp8_model),
    "e8m0 of fp8": ("qwen3", lambda: fp8_model("qwen3", (16, 16), "grouped_mm", scale_fmt="ue8m0")),
    "halves of fp8": ("deepseek", lambda: fp8_model("deepseek", None, "batched_mm")),
    "gguf": ("qwen3", gguf_model),
    "fp4": ("qwen3", lambda: fp8_model(scale_fmt="ue8m0", expert_dtype="fp4")),
}
DENSE = {f"{name}, dense": (name, partial(base_model, name, **SIZES)) for name in MODELS}


def adapted(model: nn.Module, name: str = "qwen3", **changes):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    settings |= {"target_parameters": parameters_of(name)} | changes
    model = get_peft_model(model, peft.LoraConfig(**settings))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES | DENSE)
def test_numbers_and_files_are_peft_s_over_the_dense_weights(case, tmp_path):
    name, make = (CASES | DENSE)[case]
    torch.manual_seed(0)
    base = make().requires_grad_(False)
    dense, bits = dense_model(base, name), bits_of(base)
    ours = adapted(base, name)
    report = fastlora.coverage(ours)
    assert not report.not_fast
    expected = logits(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(dense, tmp_path / "ours", is_trainable=True)
    close(logits(theirs), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    for side in ("ours", "theirs"):
        torch.manual_seed(0)
        again = load_adapter(make(), tmp_path / side)
        assert torch.equal(logits(again), expected)
    for one, other in zip(train(ours, 3), train(theirs, 3), strict=True):
        close(one, other, 1e-5)
    parameters = dict(theirs.named_parameters())
    for key, mine in ours.named_parameters():
        if "lora_" in key:
            close(mine, parameters[key], 1e-5)
            assert mine.grad.norm() > 0
    kept = {key.replace(".base_layer", ""): one for key, one in bits_of(base).items()}
    assert kept.keys() == bits.keys()
    assert all(torch.equal(one, bits[key]) for key, one in kept.items())
