"""optimize(model, base="int8"): PEFT's layers over a base in 8 bits."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
from models import Mlp, assert_near, assert_untouched, numbers, refused, snapshot, tiny_llama
from peft_models import adapted
from torch import nn
from vendor_layers import quantized

import fastlora
from fastlora.formats import rotated_int8
from fastlora.layers import int8 as layers
from fastlora.layers.int8 import Int8Linear, dense_linear
from fastlora.peft import convert_int8 as int8

F32, BF16 = torch.float32, torch.bfloat16
ALL = {"base": "int8", "int8_from": 0}
X = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_warning_of_this_cpu(monkeypatch):
    monkeypatch.setattr(int8, "_why_slow", lambda base: "")


def llama(dtype=F32, blocks=1, **settings) -> peft.PeftModel:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": blocks}
    return adapted(tiny_llama(dtype, **sizes), **{"target_modules": "all-linear"} | settings)


def layer_model(k=128, n=96, dtype=F32, bias=True, **settings) -> peft.PeftModel:
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias, dtype=dtype)
    return adapted(nn.Sequential(linear), target_modules=["0"], **settings)


def layer_of(model):
    return model.base_model.model[0]


def bases(model) -> list[nn.Module]:
    return [m.base_layer for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def in_8_bits(model) -> tuple[nn.Module, nn.Module]:
    """The model with all bases in 8 bits, and a dense copy of it with the same values."""
    exact = copy.deepcopy(model)
    for base in bases(exact):
        packed = rotated_int8.pack_rotated(base.weight.detach())
        base.weight.data = packed.dense(base.weight.dtype)
    return fastlora.optimize(model, **ALL), exact


CASES = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "no-bias": {"bias": False},
    "two-adapters": {"adapters": ("default", "other")},
    "bias-of-lora": {"lora_bias": True},
    "bf16": {"dtype": BF16},
    "odd-sizes": {"k": 100, "n": 33},
    "small": {"k": 63, "n": 17},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_the_numbers_are_near_pefts_with_the_rounded_weight(settings):
    model, exact = in_8_bits(layer_model(**settings).train())
    x = X[:, : settings.get("k")].to(settings.get("dtype", F32)).view(2, 20, -1)
    assert isinstance(layer_of(model).base_layer, Int8Linear)
    found, expected = numbers(model, x), numbers(fastlora.optimize(exact), x)
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    assert_near(found, expected, 0.05)
    assert not torch.equal(found[0], expected[0])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_a_model_is_smaller_and_its_blocks_are_fused(dtype):
    model = llama(dtype, 2)
    dense = sum(p.nbytes for p in model.parameters())
    fastlora.optimize(model, loss=True, **ALL)
    report = str(fastlora.coverage(model))
    for line in (
        "14 of 14 layers fast (backend torch)",
        "14 quantized: rotated int8",
        "2 of 2 gated MLPs as one block",
        "loss without logits",
        "the weights of 14 layers are rounded to 8 bits: restore and merges give the rounded",
    ):
        assert line in report
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert held < (0.6 if dtype == F32 else 0.8) * dense


def test_small_layers_stay_dense_and_the_report_names_them():
    linears = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 64))
    model = adapted(linears, target_modules=["0", "1"])
    fastlora.optimize(model, base="int8", int8_from=128)
    assert [type(base) for base in bases(model)] == [Int8Linear, nn.Linear]
    expected = "1 not in 8 bits: base_model.model.1: fewer than 128 input or output features"
    assert expected in str(fastlora.coverage(model))
    fastlora.optimize(model, **ALL)
    assert [type(base) for base in bases(model)] == [Int8Linear, Int8Linear]


def test_no_layer_in_8_bits_gets_a_warning():
    with pytest.warns(UserWarning, match="base='int8' has no effect: 7 not in 8 bits"):
        fastlora.optimize(llama(), base="int8")


CPUS = {
    "vnni": (True, False, BF16, ""),
    "neither": (False, False, BF16, "no VNNI"),
    "amx": (True, True, BF16, "by AMX"),
    "amx-f32": (False, True, F32, ""),
}


@pytest.mark.parametrize(("vnni", "amx", "dtype", "warning"), CPUS.values(), ids=CPUS)
def test_a_cpu_that_is_slow_in_8_bits_gets_a_warning(monkeypatch, vnni, amx, dtype, warning):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = fastlora.optimize(layer_model(dtype=dtype), **ALL)
    assert [warning in str(one.message) for one in found] == [True] * bool(warning)
    assert not warning or warning in str(fastlora.coverage(model))


def tied(model, base):
    model.other = nn.Embedding(96, 128)
    model.other.weight = base.weight


def dora(model, base):
    model.add_adapter("dora", peft.LoraConfig(target_modules=["0"], use_dora=True))


def parameter(model, base):
    config = peft.LoraConfig(target_modules=[], target_parameters=["0.weight"])
    peft.get_peft_model(model.unload(), config)


REFUSED = {
    "trains": (lambda model, base: base.weight.requires_grad_(True), "its weight trains"),
    "tied": (tied, "its weight is tied to another module's"),
    "hooked": (
        lambda model, base: base.register_forward_hook(lambda *_: None),
        "it is merged, or a hook acts on its base",
    ),
    "parametrized": (
        lambda model, base: nn.utils.parametrizations.weight_norm(base),
        "its base is a Parametrized",
    ),
    "meta": (lambda model, base: base.to("meta"), "its weight is on meta or sharded"),
    "infinite": (
        lambda model, base: base.weight.data[3, 4].fill_(torch.inf),
        "its weight has infinities or NaN",
    ),
    "merged": (lambda model, base: model.merge_adapter(), "it is merged"),
    "parameter": (parameter, "its adapter is added to the weight itself"),
    "dora": (dora, "its adapter is a variant of LoRA"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_layer_that_can_t_be_rounded_stays_as_it_is(change, reason):
    model = layer_model()
    base = layer_of(model).base_layer
    change(model, base)
    base = layer_of(model).base_layer  # a parametrized one is new
    with pytest.warns(UserWarning, match=reason):
        fastlora.optimize(model, **ALL)
    assert layer_of(model).base_layer is base
    assert f"1 not in 8 bits: base_model.model.0: {reason}" in str(fastlora.coverage(model))


def test_layers_beside_others():
    """A layer without features, torchao's tensors, and weights that are parts of one tensor."""
    sizes = (128, 96), (96, 0), (0, 128), (128, 96)
    linears = [nn.Linear(*each) for each in sizes]
    memory = torch.cat([linears[0].weight.detach(), linears[3].weight.detach()])
    linears[0].weight.data, linears[3].weight.data = memory[:96], memory[96:]
    model = nn.Sequential(*linears, quantized("torchao-int8", 96, 64))
    model = adapted(model, target_modules=["0", "1", "3"])
    fastlora.optimize(model, **ALL)
    assert [type(base) for base in bases(model)] == [Int8Linear, nn.Linear, Int8Linear]
    assert "fewer than 1 input or output features" in str(fastlora.coverage(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "int4"}, "base is 'int4', but must be \"int8\""),
        ({"base": "int8", "int8_from": "all"}, "int8_from is 'all'"),
        ({"base": "int8", "int8_from": -1}, "int8_from is -1"),
    ],
)
def test_wrong_arguments_change_nothing(settings, message):
    model = layer_model()
    with refused(model, message):
        fastlora.optimize(model, **settings)


def test_a_failing_call_changes_nothing(monkeypatch):
    model, pack = adapted(Mlp(), target_modules=["up", "down"]), layers.pack_weight

    def fail(weight, kind):
        if weight.shape == (8, 12):
            raise RuntimeError("no memory")
        return pack(weight, kind)

    monkeypatch.setattr(layers, "pack_weight", fail)
    with refused(model, "no memory", RuntimeError):
        fastlora.optimize(model, **ALL)
    model.base_model.model.up.forward = lambda x: x
    with refused(model, "not every layer would run fast"):
        fastlora.optimize(model, strict=True, **ALL)


def embedding():
    return adapted(tiny_llama(), target_modules=["embed_tokens"])


WARNED = {
    "no-layer": (llama, {"base": "int8"}, "base='int8' has no effect"),
    "no-head": (layer_model, ALL | {"loss": True}, "loss=True has no effect"),
    "no-fast-layer": (embedding, {}, "no layer runs fast"),
}


@pytest.mark.parametrize(("made", "settings", "message"), WARNED.values(), ids=WARNED)
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_warning_that_is_an_error_changes_nothing(made, settings, message):
    model = made()
    entries = {*vars(model)}
    with refused(model, message, UserWarning):
        fastlora.optimize(model, **settings)
    assert {*vars(model)} == entries


def test_restore_gives_the_rounded_weights():
    model, expected = in_8_bits(llama(BF16))
    fastlora.restore(model)
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert all(type(base) is nn.Linear for base in bases(model))
    assert "8 bits" not in str(fastlora.coverage(model))


@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_is_pefts_with_the_rounded_weights_and_unmerge_is_exact(safe):
    model, expected = in_8_bits(layer_model(lora_bias=True))
    y, base = model(X), layer_of(model).base_layer
    for each in (model, expected):
        each.merge_adapter(safe_merge=safe)
    assert torch.equal(layer_of(model).base_layer.weight, layer_of(expected).base_layer.weight)
    assert torch.equal(model(X), expected(X))
    assert "1 not in 8 bits: base_model.model.0: it is merged" in str(fastlora.coverage(model))
    model.unmerge_adapter()
    assert layer_of(model).base_layer is base
    assert torch.equal(model(X), y)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base(X))
    model.merge_adapter()
    fastlora.restore(model)
    assert type(layer_of(model).base_layer) is nn.Linear
    model.unmerge_adapter()
    torch.testing.assert_close(
        layer_of(model).base_layer.weight, dense_linear(base).weight, rtol=1e-5, atol=1e-6
    )


def test_a_failing_merge_leaves_the_base_in_8_bits():
    model = fastlora.optimize(layer_model(), **ALL)
    base = layer_of(model).base_layer
    layer_of(model).lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert layer_of(model).base_layer is base


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_later_adapter_that_reads_the_weight_is_an_error(settings):
    model, config = layer_model(), peft.LoraConfig(target_modules=["0"], **settings)
    fastlora.optimize(model, **ALL)
    y = model(X)
    with pytest.raises(ValueError, match=r"needs the dense weight.*; fastlora\.restore\(model\)"):
        model.add_adapter("other", config)
    assert torch.equal(model(X), y)
    fastlora.restore(model).add_adapter("another", config)


def test_unloading_gives_dense_layers():
    model, expected = in_8_bits(layer_model())
    base, merged = copy.deepcopy(model).unload(), model.merge_and_unload()
    assert type(base[0]) is type(merged[0]) is nn.Linear
    assert torch.equal(base(X), copy.deepcopy(expected).unload()(X))
    assert torch.equal(merged(X), expected.merge_and_unload()(X))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_later_adapter_has_the_base_s_device_and_dtype(device):
    model, _ = in_8_bits(layer_model(dtype=BF16))
    layer_of(model).base_layer.to(device)
    config = peft.LoraConfig(target_modules=["0"])
    model.base_model.peft_config["other"] = config
    model.base_model.inject_adapter(model.base_model.model, "other", autocast_adapter_dtype=False)
    found = layer_of(model).lora_A["other"].weight
    assert (found.device.type, found.dtype) == (device, BF16)


def test_copies_and_pickles_keep_the_bits():
    model = fastlora.optimize(layer_model(), **ALL)
    y = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), y)
    other = fastlora.optimize(layer_model(), **ALL)
    with torch.no_grad():
        layer_of(other).base_layer.codes.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), y)


@pytest.mark.parametrize("merged", [False, True])
def test_a_cast_of_the_model_changes_the_dtype_of_dense_weights_only(merged):
    model = fastlora.optimize(layer_model(bias=False), **ALL)
    y, scale = model(X), layer_of(model).base_layer.scale.clone()
    if merged:
        model.merge_adapter()
    model.to(BF16)
    if merged:
        model.unmerge_adapter()
    assert torch.equal(layer_of(model).base_layer.scale, scale)
    found = [model(X.bfloat16())]
    with fastlora.merged(model):
        found.append(model(X.bfloat16()))
    found.append(fastlora.restore(model)(X.bfloat16()))
    assert layer_of(model).base_layer.weight.dtype == BF16
    assert_near(found, [y] * 3, 0.02)


@pytest.mark.parametrize("way", ["compiled", "transformed", "hooked", "mixed"])
def test_calls_that_aren_t_ordinary(way):
    model, exact = in_8_bits(layer_model(adapters=("default", "other")).eval())
    found, names = model, {}
    if way == "compiled":
        torch._dynamo.reset()
        found = torch.compile(model, backend="aot_eager")
    elif way == "transformed":
        found = torch.func.vmap(model)
    elif way == "hooked":
        layer_of(model).lora_A["default"].register_forward_hook(lambda *_: None)
    else:
        names = {"adapter_names": ["default", "other", "__base__", "default"] * 10}
    assert_near([found(X, **names)], [exact(X, **names)], 0.02)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_check_judges_a_model_as_if_in_8_bits(dtype):
    model = llama(dtype, lora_dropout=0.1).train()
    before, entries = snapshot(model), {*vars(model)}
    found = fastlora.check(model, batch(), **ALL)
    assert_untouched(model, before)
    assert {*vars(model)} == entries
    assert found, str(found)
    assert len(found.layers) == 5


@pytest.mark.parametrize("part", ["linear_in_8_bits", "add_dy_in_8_bits"])
def test_check_finds_a_wrong_product(monkeypatch, part):
    from fastlora.backends import formula

    run = getattr(formula, part)

    def wrong(first, *rest):
        if part == "linear_in_8_bits":
            return run(first, *rest).mul_(1.03)
        (dy, weight), *others = rest[0]
        return run(first, [(dy * 1.03, weight), *others], *rest[1:])

    monkeypatch.setattr(formula, part, wrong)
    assert not fastlora.check(layer_model().train(), X.clone().requires_grad_(), **ALL)
