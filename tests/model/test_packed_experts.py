"""Adapters on experts with packed weights, compared with PEFT on the dense weights."""

import copy
import io
import pickle
from dataclasses import replace
from functools import partial

import accelerate
import peft
import pytest
import torch
from models import refused
from moe_models import IDS, MODELS, base_model, experts_of, logits, parameters_of, train
from packed_experts import (
    SIZES,
    bits_of,
    dense_model,
    experts_modules,
    fp8_model,
    gguf_model,
    packed_model,
)
from peft_models import counted_calls
from torch import nn
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import fastlora
from fastlora import LoRAConfig
from fastlora.estimates import kept_bytes
from fastlora.layers.experts import PackedWeight, read_module, weight_in
from fastlora.model.inject import injection_of
from fastlora.model.tensors import adapter_tensors


def adapted(model: nn.Module, name: str = "qwen3", **changes) -> nn.Module:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    settings |= {"target_parameters": parameters_of(name)} | changes
    fastlora.apply_lora(model, LoRAConfig(**settings))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def calls_of(model: nn.Module) -> int:
    with counted_calls() as calls:
        logits(model)
    return len(calls)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# The model's name, and a function that makes it.
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


@pytest.mark.parametrize("case", CASES | DENSE)
def test_numbers_and_files_are_peft_s_over_the_dense_weights(case, tmp_path):
    name, make = (CASES | DENSE)[case]
    torch.manual_seed(0)
    ours = make().requires_grad_(False)
    base, keys, bits = dense_model(ours, name), set(ours.state_dict()), bits_of(ours)
    weights = sum(len(read_module(experts).names) for experts in experts_modules(ours))
    adapted(ours, name)
    assert keys < set(ours.state_dict())  # no key was renamed
    assert bool(bits) == (case in CASES)
    report = fastlora.coverage(ours)
    assert calls_of(ours) == weights == (2 if name == "nemotron" else 4)
    assert sum(bool(layer.packed) for layer in report.fast) == weights * bool(bits)
    assert not report.not_fast
    assert ("quantized: " in str(report)) == bool(bits)
    expected = logits(ours)
    fastlora.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours", is_trainable=True)
    close(logits(theirs), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    for side in ("ours", "theirs"):
        torch.manual_seed(0)
        again = fastlora.load_adapter(make(), tmp_path / side)
        assert torch.equal(logits(again), expected)
    for one, other in zip(train(ours, 3), train(theirs, 3), strict=True):
        close(one, other, 1e-5)
    parameters = dict(theirs.named_parameters())
    for key, mine in adapter_tensors(ours, injection_of(ours)).items():
        close(mine, parameters[key.removesuffix("weight") + "default.weight"], 1e-5)
        assert mine.grad.norm() > 0
    assert all(torch.equal(one, bits[key]) for key, one in bits_of(ours).items())


def test_class_names_show_packing_and_adapters():
    model = packed_model("qwen3", "mxfp4")
    assert type(experts_of(model)).__name__ == "PackedQwen3MoeExperts"
    assert type(experts_of(adapted(model))).__name__ == "LoRAQwen3MoeExperts"
    assert type(experts_of(fastlora.remove_lora(model))).__name__ == "PackedQwen3MoeExperts"


@pytest.mark.parametrize("case", ["gpt-oss, mxfp4", "blocks of fp8"])
def test_merged_weights_are_dense_and_packed_again_when_unmerged(case):
    name, make = CASES[case]
    model = make()
    keys, bits = list(model.state_dict()), bits_of(model)
    kind = type(experts_of(model))
    adapted(model, name, target_parameters=["experts.down_proj"])
    down, up = weight_in(experts_of(model), "down_proj"), parameters_of(name)[0].split(".")[1]
    expected = logits(model)
    (_, weight), *_ = experts_of(model).adapted_weights()
    dense = dict(dense_model(model, name).named_modules())
    fastlora.merge_lora(model)
    close(logits(model), expected)
    merged = experts_of(model).down_proj
    lora_a, lora_b, scale = weight.adapter()
    added = scale * (lora_b @ lora_a)
    base = next(m for n, m in dense.items() if n.endswith("experts")).down_proj
    close(merged, base + (added.mT if model.config.model_type == "gpt_oss" else added))
    with pytest.raises(RuntimeError, match="is merged"):
        model.train()(input_ids=IDS)
    copied = copy.deepcopy(model.eval())
    fastlora.unmerge_lora(model)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(one, bits[key]) for key, one in bits_of(model).items())
    back = weight_in(experts_of(model), "down_proj")
    assert back.tensors[0].data_ptr() == down.tensors[0].data_ptr()
    fastlora.remove_lora(copied)
    close(logits(copied), expected)
    # The other weight is still packed, so the plain class couldn't run it.
    assert not isinstance(weight_in(experts_of(copied), up), torch.Tensor)
    again = adapted(copied, name)
    assert calls_of(again) == 4
    fastlora.remove_lora(model)
    assert type(experts_of(model)) is kind
    assert list(model.state_dict()) == keys


def test_casts_copies_and_state_dicts_keep_every_bit():
    model = adapted(packed_model("gpt-oss", "nvfp4"), "gpt-oss")
    bits, expected = bits_of(model), logits(model)
    assert len(bits) == 12
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = adapted(packed_model("gpt-oss", "nvfp4"), "gpt-oss")
    for module in other.modules():
        if isinstance(module, PackedWeight):
            for buffer in module.buffers():
                buffer.zero_()
    assert not torch.equal(logits(other), expected)
    assert not any(other.load_state_dict(torch.load(file)))
    same = [other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(torch.equal(logits(one), expected) for one in same)
    for one in (*same, model.half(), model.to(torch.bfloat16)):
        assert bits_of(one).keys() == bits.keys()
        assert all(torch.equal(found, bits[key]) for key, found in bits_of(one).items())
    assert "NVFP4" in repr(model)
    assert "gate_up_proj: r=4" in repr(model)


@pytest.mark.parametrize("how", [{}, {"scale_fmt": "ue8m0", "expert_dtype": "fp4"}])
def test_casts_keep_the_codes_and_scales_of_fp8_experts(how):
    config = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    experts = experts_of(adapted(fp8_model(**how), **config))
    bits, scales = bits_of(experts), [experts.down_proj_scale_inv.clone(), experts.down_proj]
    assert {str(t.dtype) for t in bits.values()} == {"torch.uint8"}
    args = torch.randn(7, 32), torch.randint(0, 4, (7, 2)), torch.rand(7, 2)
    expected = experts(*args)
    assert torch.equal(experts.float()(*args), expected)
    experts.bfloat16()
    fastlora.unmerge_lora(fastlora.merge_lora(experts).half())
    assert all(torch.equal(one, bits[key]) for key, one in bits_of(experts).items())
    assert torch.equal(experts.down_proj_scale_inv, scales[0])
    fastlora.remove_lora(fastlora.merge_lora(experts.float()))
    bits = {key: one for key, one in bits.items() if "gate_up" in key}
    for one in (experts, experts.half()):  # the other weight is packed
        assert bits_of(one).keys() == bits.keys()
        assert all(torch.equal(found, bits[key]) for key, found in bits_of(one).items())
    cast = experts_of(fp8_model(**how)).half()
    if not how:  # transformers' own codes are float tensors, so torch casts them
        with pytest.raises(ValueError, match="a cast of codes lost their scales"):
            fastlora.apply_lora(cast, LoRAConfig(**config | {"target_parameters": ["down_proj"]}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_frozen_packed_experts_run_and_give_x_its_gradient(dtype):
    packed = packed_model("gpt-oss", "mxfp4").to(dtype)
    dense = dense_model(packed, "gpt-oss").to(dtype)
    ours, theirs = experts_of(packed), experts_of(dense)
    x, index = torch.randn(7, 32, dtype=dtype), torch.randint(0, 4, (7, 2))
    share, found = torch.rand(7, 2, dtype=dtype), []
    for experts in (ours, theirs):
        own = x.clone().requires_grad_()
        y = experts(own, index, share)
        y.sum().backward()
        found.append((y, own.grad))
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(*found, strict=True):
        close(one, other, tolerance)


@pytest.mark.parametrize("case", ["gpt-oss, mxfp4", "e8m0 of fp8"])
def test_calls_without_a_node_use_dense_weights(case):
    name, make = CASES[case]
    model = adapted(make(), name, target_parameters=["experts.down_proj"])
    experts, x, index = experts_of(model), torch.randn(7, 32), torch.randint(0, 4, (7, 2))
    share, keys = torch.rand(7, 2), list(experts.state_dict())

    def total(x):
        return experts(x, index, share).square().sum()

    own = x.clone().requires_grad_()
    total(own).backward()
    own_forward = torch.func.grad(total)
    # FP8Experts' own loop reads expert indices as numbers, which transforms don't allow
    if name == "gpt-oss":
        close(own_forward(x), own.grad, 1e-4)
    of_gpt = "router_indices", "routing_weights"
    names = "hidden_states", *(of_gpt if name == "gpt-oss" else ("top_k_index", "top_k_weights"))
    named = dict(zip(names, (x, index, share), strict=True))
    close(experts(**named), experts(x, index, share), 1e-5)
    assert list(experts.state_dict()) == keys
    experts.lora_dropout = 0.5
    with pytest.raises(RuntimeError, match="can't have lora_dropout"):
        experts.train()(**named)


def test_calls_without_a_node_are_refused_for_gguf_experts():
    experts, index = experts_of(adapted(gguf_model(), "qwen3")), torch.randint(0, 4, (7, 2))
    with pytest.raises(RuntimeError, match="GGUF's experts can't be made: a transform of torch"):
        torch.func.grad(lambda x: experts(x, index, torch.rand(7, 2)).sum())(torch.randn(7, 32))


@pytest.mark.parametrize("adapts", [True, False])
def test_offloaded_packed_weights_raise_a_clear_error(adapts):
    model = packed_model("gpt-oss", "mxfp4")
    model = adapted(model, "gpt-oss") if adapts else model
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    with pytest.raises(RuntimeError, match="is packed, and on meta: it isn't loaded, or offloaded"):
        logits(model)


def test_checkpointing_and_training_keep_nothing_dense():
    packed = adapted(packed_model("qwen3", "nf4"))
    dense = adapted(dense_model(packed, "qwen3"))
    for key, own in dense.named_parameters():
        if "lora_" in key:
            own.data.copy_(packed.get_parameter(key))
    batch = {"input_ids": IDS, "labels": IDS}
    kept = [kept_bytes(model.train(), batch) for model in (packed, dense)]
    assert kept[0] == kept[1]
    expected = train(copy.deepcopy(packed))
    packed.gradient_checkpointing_enable({"use_reentrant": False})
    assert kept_bytes(packed, batch) < kept[0] / 2
    for one, other in zip(train(packed), expected, strict=True):
        close(one, other)


@pytest.mark.parametrize("case", ["gpt-oss, mxfp4", "fp4"])
def test_the_plan_of_a_packed_model_is_the_dense_one_s(case):
    name, make = CASES[case]
    model = make()
    config = LoRAConfig(target_modules=[], target_parameters=parameters_of(name))
    dense, packed = (
        fastlora.estimate(one, [8], config=config)
        for one in (dense_model(model, name), model.to("meta"))
    )
    assert dense.rank_costs == packed.rank_costs
    assert packed.frozen.bytes < dense.frozen.bytes / 2
    assert replace(packed.frozen, bytes=dense.frozen.bytes) == dense.frozen


@pytest.mark.parametrize("name", ["mlp.experts", "lm_head"])
@pytest.mark.parametrize("make", [fp8_model, lambda: packed_model("qwen3", "nvfp4")])
def test_packed_modules_don_t_train_in_full(make, name):
    model = make()
    if name == "lm_head":
        bnb = pytest.importorskip("bitsandbytes")
        model.lm_head = bnb.nn.Linear4bit(32, 100, bias=False, quant_type="nf4").to("cpu")
    config = LoRAConfig(target_modules=["q_proj"], modules_to_save=[name])
    with refused(model, f"{name} can't train in full: it has packed weights"):
        fastlora.apply_lora(model, config)


def test_packed_parameters_are_counted(capsys):
    packed = packed_model("gpt-oss", "mxfp4")
    for model in (packed, dense_model(packed, "gpt-oss")):
        fastlora.print_trainable_parameters(adapted(model, "gpt-oss"))
    one, other = capsys.readouterr().out.splitlines()
    assert one == other


def test_broken_or_foreign_packed_experts_are_refused():
    model = fp8_model()
    experts = experts_of(model)
    config = LoRAConfig(target_parameters=["experts.gate_up_proj"])
    good = experts.gate_up_proj_scale_inv
    short, unlike = good[:, :3], good[:, :, :1]  # without blocks, ``unlike`` has no 16 rows each
    for scale, size in ((short, 16), (good.half().double(), 16), (good[:2], 16), (unlike, None)):
        experts.gate_up_proj_scale_inv = nn.Parameter(scale.contiguous())
        experts.block_size = size and (size, size)
        with refused(model, "gate_up_proj is broken: "):
            fastlora.apply_lora(model, config)
    experts.gate_up_proj_scale_inv, experts.block_size = good, (16, 16)
    fastlora.apply_lora(model, config)
    experts.gate_up_proj_scale_inv = nn.Parameter(short.contiguous())
    (broken, *_) = fastlora.coverage(model).not_fast
    assert "is broken" in broken.reason
    with pytest.raises(ValueError, match="FP8Experts can't be read: its gate_up_proj is broken"):
        logits(model)
    swizzled = base_model("gpt-oss", **SIZES)
    swizzled.model.layers[1].mlp.experts = Mxfp4GptOssExperts(swizzled.config)
    with refused(swizzled, r"the layout of a GPU kernel: .* with fastlora\.load_packed"):
        fastlora.apply_lora(swizzled, config)
    twice = adapted(packed_model("qwen3", "mxfp4"))
    with pytest.raises(ValueError, match="has an adapter already"):
        fastlora.apply_lora(twice, config)
    by_name = LoRAConfig(target_modules=["gate_up_proj"])
    with pytest.raises(ValueError, match=r"PackedWeight, no torch\.nn\.Linear"):
        fastlora.apply_lora(packed_model("qwen3", "mxfp4"), by_name)
