"""optimize(model, base="int8"): PEFT's layers over a base in 8 bits."""

import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
from models import Mlp, assert_near, assert_untouched, numbers, refused, snapshot, tiny_llama
from peft_models import adapted
from torch import nn

import fastlora
from fastlora.formats import rotated_int8
from fastlora.layers.int8 import Int8Linear, dense_linear
from fastlora.peft import int8

F32, BF16 = torch.float32, torch.bfloat16
ALL = {"base": "int8", "int8_from": 0}


@pytest.fixture(autouse=True)
def no_warning_of_this_cpu(monkeypatch):
    monkeypatch.setattr(int8, "_why_slow", lambda base: "")


def llama(dtype=F32, **settings) -> peft.PeftModel:
    settings = {"target_modules": "all-linear"} | settings
    return adapted(tiny_llama(dtype, hidden_size=128, intermediate_size=192), **settings)


def layer_model(k=128, n=96, dtype=F32, bias=True, **settings) -> peft.PeftModel:
    torch.manual_seed(0)
    return adapted(
        nn.Sequential(nn.Linear(k, n, bias, dtype=dtype)), target_modules=["0"], **settings
    )


def layer_of(model):
    return model.base_model.model[0]


def bases(model) -> list[nn.Module]:
    return [m.base_layer for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def with_rounded_weights(model):
    """A copy of the model whose dense weights have the values of 8-bit ones."""
    other = copy.deepcopy(model)
    for base in bases(other):
        packed = rotated_int8.pack_rotated(base.weight.detach())
        base.weight.data = packed.dense(base.weight.dtype)
    return other


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
    model = layer_model(**settings).train()
    x = torch.randn(3, 20, settings.get("k", 128)).to(settings.get("dtype", F32))
    exact = fastlora.optimize(with_rounded_weights(model))
    fastlora.optimize(model, **ALL)
    assert isinstance(layer_of(model).base_layer, Int8Linear)
    found, expected = numbers(model, x), numbers(exact, x)
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    assert_near(found, expected, 0.05)
    assert not torch.equal(found[0], expected[0])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_a_model_trains_and_its_blocks_are_fused(dtype):
    model, ids = llama(dtype).train(), torch.randint(0, 100, (2, 9))
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
    losses = []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]


def test_small_layers_stay_dense_and_the_report_names_them():
    model = adapted(
        nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 64)), target_modules=["0", "1"]
    )
    fastlora.optimize(model, base="int8", int8_from=128)
    assert [type(base) for base in bases(model)] == [Int8Linear, nn.Linear]
    expected = "1 not in 8 bits: base_model.model.1: fewer than 128 input or output features"
    assert expected in str(fastlora.coverage(model))
    fastlora.optimize(model, base="int8", int8_from=0)
    assert [type(base) for base in bases(model)] == [Int8Linear, Int8Linear]


def test_no_layer_in_8_bits_gets_a_warning():
    with pytest.warns(UserWarning, match="base='int8' has no effect: 14 not in 8 bits"):
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
    model = layer_model(dtype=dtype)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fastlora.optimize(model, **ALL)
    assert [warning in str(one.message) for one in found] == [True] * bool(warning)
    assert not warning or warning in str(fastlora.coverage(model))


def trains(model):
    layer_of(model).base_layer.weight.requires_grad_(True)


def tied(model):
    model.other = nn.Embedding(96, 128)
    model.other.weight = layer_of(model).base_layer.weight


def hooked(model):
    layer_of(model).base_layer.register_forward_hook(lambda *_: None)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(layer_of(model).base_layer)


def on_meta(model):
    layer_of(model).base_layer.to("meta")


def infinite(model):
    layer_of(model).base_layer.weight.data[3, 4] = float("inf")


def merged(model):
    model.merge_adapter()


REFUSED = {
    trains: "its weight trains",
    tied: "its weight is tied to another module's",
    hooked: "it is merged, or a hook acts on its base",
    parametrized: "its base is a Parametrized",
    on_meta: "its weight is on meta or sharded",
    infinite: "its weight has infinities or NaN",
    merged: "it is merged",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_layer_that_can_t_be_rounded_stays_as_it_is(change):
    model = layer_model()
    change(model)
    base = layer_of(model).base_layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastlora.optimize(model, **ALL)
    assert layer_of(model).base_layer is base
    assert f"1 not in 8 bits: base_model.model.0: {REFUSED[change]}" in str(
        fastlora.coverage(model)
    )


def test_dora_reads_its_weight_and_stays_dense():
    model = layer_model(use_dora=True)
    with pytest.warns(UserWarning, match="a variant of LoRA"):
        fastlora.optimize(model, **ALL)


WRONG = {
    "base": ({"base": "int4"}, "base is 'int4', but must be \"int8\""),
    "int8_from": ({"base": "int8", "int8_from": "all"}, "int8_from is 'all'"),
    "negative": ({"base": "int8", "int8_from": -1}, "int8_from is -1"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_change_nothing(settings, message):
    model = layer_model()
    with refused(model, message):
        fastlora.optimize(model, **settings)


def test_a_failing_call_changes_nothing(monkeypatch):
    model = adapted(Mlp(), target_modules=["up", "down"])
    before, pack = snapshot(model), int8.pack_weight

    def fail(weight, kind):
        if weight.shape == (8, 12):
            raise RuntimeError("no memory")
        return pack(weight, kind)

    monkeypatch.setattr(int8, "pack_weight", fail)
    with refused(model, "no memory", RuntimeError):
        fastlora.optimize(model, **ALL)
    assert snapshot(model)["keys"] == before["keys"]
    with refused(model, "not every layer would run fast"):
        layer_model(use_rslora=True)
        model.base_model.model.up.forward = lambda x: x
        try:
            fastlora.optimize(model, strict=True, **ALL)
        finally:
            del model.base_model.model.up.forward


def test_restore_gives_the_rounded_weights():
    model = llama(BF16)
    expected = with_rounded_weights(model)
    fastlora.restore(fastlora.optimize(model, **ALL))
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert all(type(base) is nn.Linear for base in bases(model))
    assert "8 bits" not in str(fastlora.coverage(model))


@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_is_pefts_with_the_rounded_weights_and_unmerge_is_exact(safe):
    model, x = layer_model(lora_bias=True), torch.randn(5, 128)
    expected = with_rounded_weights(model)
    fastlora.optimize(model, **ALL)
    y, base = model(x), layer_of(model).base_layer
    for each in (model, expected):
        each.merge_adapter(safe_merge=safe)
    assert torch.equal(layer_of(model).base_layer.weight, layer_of(expected).base_layer.weight)
    assert torch.equal(model(x), expected(x))
    model.unmerge_adapter()
    assert layer_of(model).base_layer is base
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(x))
    model.merge_adapter()
    fastlora.restore(model)
    assert type(layer_of(model).base_layer) is nn.Linear
    model.unmerge_adapter()
    torch.testing.assert_close(
        layer_of(model).base_layer.weight, dense_linear(base).weight, rtol=1e-5, atol=1e-6
    )


def test_a_failing_merge_leaves_the_base_in_8_bits():
    model = layer_model()
    fastlora.optimize(model, **ALL)
    base = layer_of(model).base_layer
    layer_of(model).lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert layer_of(model).base_layer is base


def test_unloading():
    model, x = layer_model(), torch.randn(5, 128)
    expected = with_rounded_weights(model)
    fastlora.optimize(model, **ALL)
    base, merged = copy.deepcopy(model).unload(), model.merge_and_unload()
    assert type(base[0]) is Int8Linear
    assert type(merged[0]) is nn.Linear
    assert torch.equal(merged(x), expected.merge_and_unload()(x))


def test_merged_for_a_while():
    model, x = layer_model(), torch.randn(5, 128)
    expected = with_rounded_weights(model)
    expected.merge_adapter()
    fastlora.optimize(model, **ALL)
    y, base, before = model(x), layer_of(model).base_layer, snapshot(model)
    with fastlora.merged(model):
        torch.testing.assert_close(model(x), expected(x))
    assert layer_of(model).base_layer is base
    assert torch.equal(model(x), y)
    assert_untouched(model, before)


def test_casts_copies_and_pickles_keep_the_bits():
    model, x = layer_model(), torch.randn(5, 128)
    fastlora.optimize(model, **ALL)
    y, bits = model(x), layer_of(model).base_layer.scale.clone()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
    other = copy.deepcopy(model).to(BF16)
    assert torch.equal(layer_of(other).base_layer.scale, bits)
    assert_near([other(x.bfloat16())], [y], 0.02)
    other = layer_model()
    fastlora.optimize(other, **ALL)
    with torch.no_grad():
        layer_of(other).base_layer.codes.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y)


def test_calls_reuse_their_record():
    model, x = layer_model(), torch.randn(5, 128)
    fastlora.optimize(model, **ALL)
    y, layer = model(x), layer_of(model)
    record = vars(layer)["_fastlora_record_followed"]
    assert record.guard is not None
    assert torch.equal(model(x), y)
    assert vars(layer)["_fastlora_record_followed"] is record
    with torch.no_grad():
        layer.base_layer.codes.zero_()
    assert not torch.equal(model(x), y)


@pytest.mark.parametrize("way", ["compiled", "transformed", "hooked", "autocast", "rows"])
def test_calls_that_aren_t_ordinary(way):
    model, x = layer_model().eval(), torch.randn(40, 128)
    exact = with_rounded_weights(model)
    fastlora.optimize(model, **ALL)
    if way == "compiled":
        torch._dynamo.reset()
        found = torch.compile(model, backend="aot_eager")(x)
    elif way == "transformed":
        found = torch.func.vmap(model)(x)
    elif way == "hooked":
        layer_of(model).lora_A["default"].register_forward_hook(lambda *_: None)
        found = model(x)
    elif way == "autocast":
        with torch.autocast("cpu", BF16):
            found = model(x)
        assert found.dtype == BF16
    else:
        found = torch.cat(
            [model(x[:1]), model(x[1:3]), model(x[:0]), model(x[3])[None], model(x[4:])]
        )
    assert_near([found], [exact(x)], 0.02)


def test_a_mixed_batch():
    model, x = layer_model(adapters=("default", "other")).eval(), torch.randn(6, 128)
    exact, names = with_rounded_weights(model), ["default", "other", "__base__"] * 2
    fastlora.optimize(model, **ALL)
    assert_near([model(x, adapter_names=names)], [exact(x, adapter_names=names)], 0.02)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_check_states_the_rounding(dtype):
    model = llama(dtype, lora_dropout=0.1).train()
    before, entries = snapshot(model), {*vars(model)}
    found = fastlora.check(model, batch(), **ALL)
    assert_untouched(model, before)
    assert {*vars(model)} == entries
    assert found, str(found)
    assert len(found.layers) == 10
    assert 0 < found.int8_weights.gradients < 0.2
    assert 0 < found.rounding.gradients < 0.2
    assert found.rounding.cosine > 0.97
    assert abs(found.rounding.loss) < 0.1
    lines = str(found).splitlines()
    (line,) = [i for i, line in enumerate(lines) if "rounding to 8 bits, beside exact" in line]
    assert "rounding of the weights only: loss" in lines[line + 1]
    with torch.no_grad():
        assert (
            fastlora.check(model, batch(), **ALL).rounding.cosine == 1.0
        )  # there are no gradients
    fastlora.optimize(model, **ALL)
    alone = fastlora.check(model, batch())
    assert alone
    assert alone.int8_weights is None
    assert 0 < alone.rounding.gradients < 0.2
    assert fastlora.check(fastlora.restore(model), batch()).rounding is None


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
    monkeypatch.setattr("fastlora.layers.int8.lora_linears", _right)
    assert not fastlora.check(llama().train(), batch(), **ALL)


def _right(x, outputs):
    ((weight, bias), _) = outputs[0]
    return (nn.functional.linear(x, weight.dense(x.dtype), bias),)


def test_auto_and_run_pass_it_on(monkeypatch):
    from fastlora import run

    monkeypatch.setattr(run, "from_environment", lambda: None)
    monkeypatch.setattr(run, "_run_script", lambda name: None)
    monkeypatch.setenv("FASTLORA", "")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(run.sys, "argv", [])
    run.main(["--base", "int8", "train.py"])
    assert json.loads(run.os.environ["FASTLORA"])["base"] == "int8"
    fastlora.auto(base="int8", int8_from=0)
    try:
        assert isinstance(layer_of(layer_model()).base_layer, Int8Linear)
    finally:
        fastlora.auto(False)
