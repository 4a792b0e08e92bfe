"""fastlora.get_peft_model and load_adapter, over packed bases: PEFT's numbers over dense ones."""

import copy
import warnings
from functools import partial

import peft
import pytest
import torch
import transformers
from models import refused, tiny_llama
from moe_models import MODELS, base_model, logits, parameters_of, train
from packed_experts import SIZES, bits_of, dense_model, fp8_model, gguf_model, packed_model
from safetensors.torch import load_file, save_file
from torch import nn
from vendor_layers import BITSANDBYTES, KINDS, quantized

import fastlora
from fastlora.formats import quantized_weight
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


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_files_are_peft_s_over_the_dense_weights(case, tmp_path):
    name, make = CASES[case]
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


K, N = 256, 96
# PEFT has no layer for a stand-in of AWQ's.
LINEARS = [*BITSANDBYTES, *(kind for kind in KINDS if kind != "awq"), "rotated-int8"]


def linears(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"up": quantized(kind, K, N, dtype), "down": nn.Linear(N, 4, dtype=dtype)})


class Two(nn.Module):
    """A quantized layer, then a dense one."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = linears(kind, dtype)

    def forward(self, x):
        return self.layers["down"](self.layers["up"](x))


@pytest.mark.parametrize("kind", LINEARS)
def test_a_quantized_layer_has_the_formula_s_numbers(kind, tmp_path):
    base = Two(kind)
    layer = base.layers["up"]
    weight = quantized_weight(layer).weight.dense(torch.float32).double()
    bits = {key: value.clone() for key, value in base.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules=["up"], init_lora_weights=False)
    model = get_peft_model(base, config)
    assert not fastlora.coverage(model).not_fast
    lora = base.layers["up"]
    assert lora.base_layer is layer
    assert [*lora.parameters()][-1].dtype == torch.float32
    x = torch.randn(5, K, requires_grad=True)
    leaves = [x, lora.lora_A["default"].weight, lora.lora_B["default"].weight]
    y = lora(x)
    found = [y, *torch.autograd.grad(y.square().sum(), leaves)]
    z, a, b = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = z @ weight.T + layer.bias.double() + 2 * (z @ a.T @ b.T)
    expected = [y, *torch.autograd.grad(y.square().sum(), [z, a, b])]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= (0.02 if kind == "rotated-int8" else 2e-6) * other.norm()
    y = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_adapter(Two(kind), tmp_path)(x), y)
    if kind != "gptq":  # PEFT can't merge it
        model.merge_adapter()
        assert (model(x) - y).norm() <= (0.03 if kind == "rotated-int8" else 1e-3) * y.norm()
        model.unmerge_adapter()
        assert torch.equal(model(x), y)
    restored = model.unload()
    if kind != "rotated-int8":  # which becomes dense
        assert restored.layers["up"] is layer
        assert restored.state_dict().keys() == bits.keys()


def test_all_linear_includes_gguf_and_int8_layers_and_no_router():
    torch.manual_seed(0)
    model = base_model("qwen3", **SIZES)
    gate = model.model.layers[0].mlp.gate
    attention = model.model.layers[0].self_attn
    sizes = attention.q_proj.in_features, attention.q_proj.out_features
    attention.q_proj = quantized("rotated-int8", *sizes)
    model = get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert isinstance(attention.q_proj, peft.tuners.lora.LoraLayer)
    mlp = model.base_model.model.model.layers[0].mlp
    assert mlp.gate is gate
    assert isinstance(mlp.experts, peft.tuners.lora.LoraLayer)


def two_places() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.ModuleDict({"first": layer, "second": layer, "third": nn.Linear(8, 8)})


EXPERTS = {"target_modules": [], "target_parameters": parameters_of("qwen3")}
MISTAKES = {
    "misspelled": (lambda: Two("rotated-int8"), {"target_modules": ["up", "dwn"]}, "has 'dwn'"),
    "misspelled regex": (
        lambda: Two("rotated-int8"),
        {"target_modules": "u"},
        "has 'u', .*: a string is a regular expression .*; the ends of names are down, layers, up",
    ),
    "misspelled in full": (
        lambda: Two("rotated-int8"),
        {"target_modules": ["up"], "modules_to_save": ["head"]},
        "modules_to_save has 'head'",
    ),
    "DoRA": (lambda: Two("rotated-int8"), {"use_dora": True}, "use_dora=True"),
    "PiSSA": (lambda: Two("float8"), {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    **{
        f"{init} on torchao's float8": (
            lambda: Two("torchao-float8"),
            {"init_lora_weights": init},
            f"init_lora_weights='{init}' needs the dense weight.* a Float8Tensor",
        )
        for init in ("pissa", "pissa_niter_4", "olora")
    },
    "two places": (two_places, {"target_modules": ["first", "third"]}, "first and second"),
    "skipped": (
        lambda: nn.TransformerEncoderLayer(8, 2),
        {"target_modules": ["linear1"]},
        "TransformerEncoderLayer around it",
    ),
    "no whole rank": (lambda: Two("float8"), {"r": 4.0}, "r is 4.0, but .* whole number"),
    "no such setting": (lambda: Two("rotated-int8"), {"fast": True}, "fast"),
    "PiSSA on experts": (
        partial(packed_model, "qwen3", "mxfp4"),
        EXPERTS | {"init_lora_weights": "pissa"},
        "init_lora_weights='pissa' needs the dense weight",
    ),
    "a router's dropout": (
        partial(base_model, "mixtral", **SIZES),
        {"target_modules": [], "target_parameters": ["gate.weight"], "lora_dropout": 0.1},
        "MixtralTopKRouter, can't have dropout",
    ),
    "a saved layer": (
        lambda: Two("rotated-int8"),
        {"target_modules": ["down"], "modules_to_save": ["up"]},
        "modules_to_save=.* needs the dense weight",
    ),
    "saved experts": (
        partial(packed_model, "qwen3", "mxfp4"),
        {"target_modules": ["q_proj"], "modules_to_save": ["perts"]},  # PEFT compares ends
        "modules_to_save=.* needs the dense weight",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_leaves_the_model_as_it_was(mistake):
    make, settings, text = MISTAKES[mistake]
    model = make()
    settings = {"target_modules": ["up"]} | settings
    extra = {"fast": settings.pop("fast")} if "fast" in settings else {}
    names, attributes = dict(model.named_modules()), dict(vars(model))
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, TypeError), match=text):
        get_peft_model(model, peft.LoraConfig(**settings), **extra)
    assert dict(model.named_modules()) == names
    assert vars(model) == attributes
    assert [p.requires_grad for p in model.parameters()] == trained


BAD_FILES = {
    "missing": (lambda t: t.pop(next(iter(t))), "it lacks .*, which the model has"),
    "unexpected": (
        lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(1)}),
        "it has .*, which the model lacks",
    ),
    "NaN": (lambda t: next(iter(t.values())).fill_(torch.nan), "NaN or infinity"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_files_with_a_fault_are_refused(fault, tmp_path):
    spoil, text = BAD_FILES[fault]
    config = peft.LoraConfig(r=4, target_modules=["up", "down"])
    get_peft_model(Two("rotated-int8"), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    model = Two("rotated-int8")
    names, attributes = dict(model.named_modules()), dict(vars(model))
    with pytest.raises(ValueError, match=text):
        load_adapter(model, tmp_path)
    assert dict(model.named_modules()) == names
    assert vars(model) == attributes


@pytest.mark.parametrize("is_second", [False, True], ids=["first adapter", "second adapter"])
@pytest.mark.parametrize("target", ["q_proj", "experts"])
def test_an_adapter_of_another_model_size_is_refused(target, is_second, tmp_path):
    """The error names one tensor and both shapes."""
    make = partial(base_model, "qwen3", **SIZES)
    settings = EXPERTS if target == "experts" else {"target_modules": [target]}
    get_peft_model(make(hidden_size=96), peft.LoraConfig(r=4, **settings)).save_pretrained(tmp_path)
    model = (
        get_peft_model(make(), peft.LoraConfig(target_modules=["v_proj"])) if is_second else make()
    )
    with refused(
        model, rf"{target}.*lora_A.*has shape \(\d+, 96\) in .*, but \(\d+, 32\) in the model"
    ):
        load_adapter(model, tmp_path, "another")


def test_a_second_adapter_on_packed_experts_and_layers():
    model = adapted(packed_model("qwen3", "mxfp4"))
    first = logits(model)
    names = {"target_modules": ["q_proj"], "target_parameters": parameters_of("qwen3")}
    config = peft.LoraConfig(r=2, init_lora_weights=False, **names)
    assert get_peft_model(model, config, "second") is model
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert not fastlora.coverage(model).not_fast
    assert not torch.allclose(logits(model), first)
    with pytest.raises(ValueError, match="third"):
        get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "third"]), "third")
    assert [*model.peft_config] == ["default", "second"]


def test_experts_have_dropout_in_training_and_a_config_that_peft_loads(tmp_path):
    base = packed_model("qwen3", "mxfp4")
    dense = dense_model(base, "qwen3")
    model = adapted(base, lora_dropout=0.5)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    close(logits(peft.PeftModel.from_pretrained(dense, tmp_path)), expected)
    model.train()
    assert not torch.allclose(logits(model), expected)
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize(
    "make", [lambda: packed_model("qwen3", "mxfp4"), gguf_model], ids=["mxfp4", "gguf"]
)
def test_auto_injects_by_peft_s_own_functions(make, tmp_path):
    settings = {"target_modules": ["q_proj"], "target_parameters": parameters_of("qwen3")}
    expected = adapted(make())
    expected.save_pretrained(tmp_path)
    fastlora.auto()
    try:
        found = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
        assert torch.equal(logits(found), logits(expected))
        again = peft.get_peft_model(make(), peft.LoraConfig(r=4, **settings))
        assert not fastlora.coverage(again).not_fast
    finally:
        fastlora.auto(False)


@pytest.mark.parametrize("model", [two_places(), two_places], ids=["a config", "a function"])
def test_arguments_of_another_kind(model):
    config = {"r": 4} if isinstance(model, nn.Module) else peft.LoraConfig(r=4)
    with pytest.raises(TypeError, match=r"peft\.LoraConfig|torch\.nn\.Module"):
        get_peft_model(model, config)


def test_a_whole_model_s_checkpoint_of_0_4_loads(tmp_path):
    """transformers' Trainer wrote such files of a model that apply_lora had changed."""
    torch.manual_seed(0)
    base = packed_model("qwen3", "mxfp4")
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
    config = peft.LoraConfig(**settings, target_parameters=parameters_of("qwen3"))
    model = adapted(base, **settings)
    expected = logits(model)
    state = {}
    for key, tensor in base.state_dict().items():
        if ".lora_" not in key:
            state[key.replace(".base_layer", "")] = tensor.clone()
            continue
        *owner, which, _, _ = key.split(".")
        layer = base.get_submodule(".".join(owner))
        parameter = getattr(layer, "parameter_name", "")
        start = ".".join(part for part in owner if part != "base_layer")
        end = f"{parameter}_{which}" if parameter else which
        state[f"{start}.{end}"] = tensor.clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = load_adapter(packed_model("qwen3", "mxfp4"), tmp_path, config=config)
    assert torch.equal(logits(again), expected)
    del state["model.layers.0.self_attn.q_proj.lora_A"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .*q_proj\.lora_A"):
        load_adapter(packed_model("qwen3", "mxfp4"), tmp_path, config=config)


@pytest.mark.parametrize("case", CASES)
def test_packed_experts_are_dense_while_merged_and_get_their_bits_back(case):
    name, make = CASES[case]
    base = make().requires_grad_(False)
    bits = bits_of(base)
    model = adapted(base, name, target_modules=[])
    expected = logits(model)

    def check_bits():
        kept = {key.replace(".base_layer", ""): one for key, one in bits_of(base).items()}
        assert all(torch.equal(kept[key], value) for key, value in bits.items())
        assert torch.equal(logits(model), expected)

    model.merge_adapter()
    close(logits(model), expected, 1e-4)
    model.unmerge_adapter()
    check_bits()
    with fastlora.merged(model):
        close(logits(model), expected, 1e-4)
    check_bits()
    with model.disable_adapter():
        close(logits(model), logits(dense_model(make(), name)), 1e-4)
    close(logits(model.merge_and_unload()), expected, 1e-4)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
OF_TRANSFORMERS_4 = {  # the names of experts' layers in transformers 4
    "qwen3": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
    "mixtral": [*ATTENTION, "w1", "w2", "w3"],
    "a regex": r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
}


@pytest.mark.parametrize("case", OF_TRANSFORMERS_4)
def test_names_of_experts_in_transformers_4_mean_their_weights(case):
    name = case if case in MODELS else "qwen3"
    model = packed_model(name, "mxfp4")
    config = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=OF_TRANSFORMERS_4[case])
    report = fastlora.coverage(get_peft_model(model, config))
    assert (len(report.fast), len(report.not_fast)) == (12, 0)


def test_the_given_config_is_not_written_to():
    config = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)
    before = copy.deepcopy(config.to_dict())
    get_peft_model(base_model("qwen3", **SIZES), config)
    assert config.to_dict() == before


def classifier() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=20, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config)


LEFT_OUT = {  # settings with "all-linear", and the part of names that gets no adapter
    "excluded": (tiny_llama, {"exclude_modules": ["q_proj"]}, "q_proj"),
    "a classifier": (classifier, {"task_type": "SEQ_CLS"}, "score"),
    "saved": (tiny_llama, {"modules_to_save": ["o_proj"]}, "o_proj"),
    "gemma4's router": (lambda: base_model("gemma4", **SIZES), {}, "router"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_all_linear_leaves_layers_out_without_a_warning(case):
    make, settings, part = LEFT_OUT[case]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*get no adapter")
        model = get_peft_model(make(), peft.LoraConfig(target_modules="all-linear", **settings))
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert adapted
    assert not any(part in name for name in adapted)


def test_a_name_that_the_model_has_is_refused(tmp_path):
    model = adapted(packed_model("qwen3", "mxfp4"))
    model.save_pretrained(tmp_path)
    with refused(model, "has an adapter 'default' already: give another adapter_name"):
        get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with refused(model, "has an adapter 'default' already: give another adapter_name"):
        load_adapter(model, tmp_path)


def test_an_error_removes_peft_s_hook_for_checkpointing():
    model = tiny_llama().train()
    model.gradient_checkpointing_enable()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(TypeError, match="fast"):
        get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]), fast=True)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_second_adapter_of_experts_has_dropout():
    model = adapted(packed_model("qwen3", "mxfp4"))
    settings = {"target_modules": ["q_proj"], "target_parameters": parameters_of("qwen3")}
    config = peft.LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.5, **settings)
    get_peft_model(model, config, "second").set_adapter("second")
    assert not torch.equal(logits(model.train()), logits(model))


@pytest.mark.parametrize("own", [True, False], ids=["load_adapter", "PEFT's"])
def test_a_second_adapter_of_other_packed_layers(own, tmp_path):
    settings = {"target_modules": ["k_proj"], "target_parameters": parameters_of("qwen3")}
    second = adapted(packed_model("qwen3", "mxfp4"), **settings)
    expected = logits(second)
    second.save_pretrained(tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(packed_model("qwen3", "mxfp4"), config)
    if own:
        load_adapter(model, tmp_path, "second")
    else:
        model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    dense = dense_model(packed_model("qwen3", "mxfp4"), "qwen3")
    close(logits(peft.PeftModel.from_pretrained(dense, tmp_path / "second")), expected)


@pytest.mark.parametrize("own", [True, False], ids=["load_adapter", "PEFT's"])
def test_layers_that_peft_has_no_class_for_get_a_second_adapter(own, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    first = get_peft_model(Two("rotated-int8"), config)
    first.save_pretrained(tmp_path)
    other = peft.LoraConfig(r=2, target_modules=["down"])
    model = get_peft_model(Two("rotated-int8"), other)
    if own:
        load_adapter(model, tmp_path, "second")
    else:
        model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert not fastlora.coverage(model).not_fast
    x = torch.randn(3, K)
    assert torch.equal(model(x), first(x))


@pytest.mark.parametrize("merged", [["gate_up_proj", "down_proj"], ["down_proj"]], ids=len)
def test_files_after_a_merge_fit_the_dense_model(merged, tmp_path):
    """PEFT nests its wrappers in the order of the module's parameters."""
    names = {"target_modules": [], "target_parameters": merged}
    model = adapted(packed_model("qwen3", "mxfp4"), **names).merge_and_unload()
    dense = dense_model(model, "qwen3")
    model = adapted(model, target_modules=[])
    model.save_pretrained(tmp_path)
    close(logits(peft.PeftModel.from_pretrained(dense, tmp_path)), logits(model))


@pytest.mark.parametrize("trains", [True, False])
def test_a_whole_checkpoint_is_loaded_to_train_or_not(trains, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    state = get_peft_model(tiny_llama(), config).get_base_model().state_dict()
    strip = lambda key: key.replace(".base_layer", "").replace(".default.weight", "")  # noqa: E731
    save_file({strip(key): one.clone() for key, one in state.items()}, tmp_path / "m.safetensors")
    model = load_adapter(tiny_llama(), tmp_path, config=config, is_trainable=trains)
    assert any(parameter.requires_grad for parameter in model.parameters()) == trains


MIXTURES = ["gpt-oss, mxfp4", "qwen3, mxfp4", "blocks of fp8", "gguf", "qwen3, dense"]
BATCH = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "dropout"])
@pytest.mark.parametrize("case", MIXTURES)
def test_check_compares_experts_and_restore_runs_them_without_fastlora(case, training):
    dense = {"qwen3, dense": ("qwen3", partial(base_model, "qwen3", **SIZES))}
    name, make = (CASES | dense)[case]
    model = adapted(make().requires_grad_(False), name, lora_dropout=0.1)
    report = fastlora.check(model.train(training), BATCH)
    assert report, report
    assert any("experts" in layer.name for layer in report.layers)
    assert {m.training for m in model.modules()} == {training}
    expected = logits(model.eval())
    close(logits(fastlora.restore(model)), expected)
    assert fastlora.coverage(model).not_fast
    assert torch.equal(logits(fastlora.optimize(model)), expected)


@pytest.mark.parametrize("case", ["qwen3, mxfp4", "gguf"])
def test_check_finds_a_wrong_number_in_packed_experts(case, monkeypatch):
    name, make = CASES[case]
    model = adapted(make().requires_grad_(False), name)
    run = fastlora.peft.experts.run_experts
    monkeypatch.setattr(fastlora.peft.experts, "run_experts", lambda *args: run(*args) * 1.03)
    wrong = [layer.name for layer in fastlora.check(model, BATCH).layers if not layer]
    assert wrong
    assert all("experts" in each for each in wrong)


def test_packed_experts_run_with_fastlora_disabled(monkeypatch):
    name, make = CASES["qwen3, mxfp4"]
    expected = logits(adapted(make(), name))
    monkeypatch.setenv("FASTLORA_DISABLE", "1")
    model = adapted(make(), name)
    assert fastlora.coverage(model).not_fast
    close(logits(model), expected)
    with pytest.raises(ValueError, match="FASTLORA_DISABLE is set"):
        adapted(make(), name, lora_dropout=0.1)
