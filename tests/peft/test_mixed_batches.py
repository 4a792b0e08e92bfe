"""``model(…, adapter_names=[…])``: PEFT's numbers; in training, each adapter's own gradients."""

import copy

import peft
import pytest
import torch
from models import Mlp, randomize, tiny_llama
from peft_models import BATCH, assert_same, gemma3, gpt2, optimized
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlora
from fastlora.peft import mixed

NAMES = ["a", "__base__", "c", "b"]
SETTINGS = {
    "a": {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1},
    "b": {"r": 8, "lora_alpha": 3, "use_rslora": True},
    "c": {"r": 1, "lora_alpha": 2, "lora_dropout": 0.5},
}


def many(base: nn.Module, targets="all-linear", changes=None) -> nn.Module:
    """The base with adapters a, b and c in evaluation mode; all adapters are trainable."""
    model = None
    for name, settings in SETTINGS.items():
        settings = settings | (changes or {}).get(name, {})
        config = peft.LoraConfig(**{"target_modules": targets} | settings)
        if model is None:
            model = peft.get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(list(SETTINGS))
    return randomize(model, std=0.1).eval()


def mlp(**changes) -> nn.Module:
    return many(Mlp(), ["up", "down"], changes).double()


def rows(samples: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 5, 8, generator=generator, dtype=torch.float64)


@pytest.fixture
def mixed_calls(monkeypatch):
    """For each layer call that ran as one node, its number of adapters."""
    calls = []
    run = mixed.multi_lora_linear

    def noted(x, weight, lora_a, *rest, **options):
        calls.append(len(lora_a))
        return run(x, weight, lora_a, *rest, **options)

    monkeypatch.setattr(mixed, "multi_lora_linear", noted)
    return calls


@pytest.mark.parametrize("make", [gemma3, gpt2], ids=lambda make: make.__name__)
def test_evaluation_and_generation_are_peft_s(make, mixed_calls, monkeypatch):
    monkeypatch.setattr("fastlora.ops.few_rows.MOST_MIXED_ROWS", 0)
    theirs = many(make())
    ours = optimized(theirs)
    layers = sum(layer.fast for layer in fastlora.coverage(ours).layers)
    with torch.no_grad():
        logits = [model(BATCH, adapter_names=NAMES).logits for model in (theirs, ours)]
        assert mixed_calls == [3] * layers
        assert_same(*logits, 1e-5)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
        options |= {"attention_mask": torch.ones_like(BATCH), "adapter_names": NAMES}
        tokens = [model.generate(input_ids=BATCH, **options) for model in (theirs, ours)]
        assert torch.equal(*tokens)
    assert len(mixed_calls) == layers * 5  # prefill and 3 steps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_few_rows_in_evaluation_are_no_node(dtype, mixed_calls):
    """Also with adapters of another dtype, a bias, a hook, and a scaling that is a tensor."""
    theirs = mlp(b={"lora_bias": True})
    for name, parameter in theirs.named_parameters():
        parameter.data = parameter.data.to(dtype if ".lora_" in name else parameter.dtype)
    ours = optimized(theirs)
    for layer in (model.base_model.model.up for model in (theirs, ours)):
        layer.scaling["a"] = torch.tensor(0.75)  # PEFT's hotswapping makes a tensor of it
        layer.lora_B["c"].register_forward_hook(lambda *call: 2 * call[-1])
    for names in (NAMES * 3, sorted(NAMES * 3)):  # 60 rows
        y = ours(rows(12), adapter_names=names)
        torch.testing.assert_close(y, theirs(rows(12), adapter_names=names))
    assert not mixed_calls
    optimized(mlp())(rows(13), adapter_names=(NAMES * 4)[:13])
    assert mixed_calls == [3, 3]
    with pytest.raises(ValueError, match="when DoRA is enabled"):
        optimized(mlp(b={"use_dora": True}))(rows(12), adapter_names=NAMES * 3)


@pytest.mark.parametrize("names", [["a"] * 4, ["a", "a", "b", "b"], NAMES], ids="-".join)
@pytest.mark.parametrize("targets", [["up"], ["up", "down"]], ids="-".join)
def test_few_rows_with_gradients_beside_a_bias(targets, names, mixed_calls):
    """x needs no gradient, and all samples may have one adapter, whose rows are the whole of y."""
    theirs = many(Mlp(), targets).double()
    ours = optimized(theirs)
    for model in (theirs, ours):
        model(rows(), adapter_names=names).sum().backward()
    assert not mixed_calls
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_each_adapter_has_the_gradients_that_it_would_have_alone(mixed_calls):
    """An adapter that isn't named gets none."""
    start = mlp(a={"lora_dropout": 0.0}, c={"lora_dropout": 0.0}).train()
    x, names = rows(6), ["a", "b", "b", "b", "a", "__base__"]

    def own(model, adapter):
        return [p.grad for n, p in model.named_parameters() if f".{adapter}." in n]

    together = optimized(start)
    together(x, adapter_names=names).square().sum().backward()
    assert mixed_calls == [2, 2]
    assert own(together, "c") == [None] * 4
    for name in ("a", "b"):
        alone = copy.deepcopy(start)
        alone.base_model.set_adapter(name)
        alone(x[[each == name for each in names]]).square().sum().backward()
        torch.testing.assert_close(own(together, name), own(alone, name))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_runs_blocks_again_with_their_names(use_reentrant, mixed_calls):
    model = optimized(many(tiny_llama(num_hidden_layers=1)))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model.zero_grad()
        losses = [  # both forwards run before the backwards
            model.train()(BATCH, labels=BATCH, adapter_names=names).loss
            for names in (NAMES, ["b", "b", "a", "__base__"])
        ]
        for loss in losses:
            loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    # 7 layers × two calls: once without checkpointing, twice with it
    assert len(mixed_calls) == 14 * 3
    assert_same(*found, 1e-5)


def test_adapters_come_and_go_between_steps(tmp_path):
    """Adapters are deleted while an optimizer has their state, added again by name, and loaded."""
    model = optimized(mlp()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(names):
        optimizer.zero_grad()
        model(rows(len(names)), adapter_names=names).square().sum().backward()
        optimizer.step()

    step(["a", "b", "c", "a"])
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    model.delete_adapter("b")
    with pytest.raises(ValueError, match="non-existing adapter"):
        step(["a", "b"])
    step(["a", "c", "c", "a"])
    other = peft.LoraConfig(r=5, lora_alpha=7, target_modules=["up"])
    model.add_adapter("b", other)
    model.load_adapter(tmp_path / "b", "d", is_trainable=True)
    fastlora.optimize(model)
    names = ["b", "d", "c", "a"]
    theirs = fastlora.restore(copy.deepcopy(model)).eval()
    found, expected = (each(rows(), adapter_names=names) for each in (model.eval(), theirs))
    torch.testing.assert_close(found, expected)


def test_a_call_that_fails_leaves_no_names_behind():
    model = optimized(mlp())
    expected = model(rows())
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 5, 9, dtype=torch.float64), adapter_names=NAMES)
    assert torch.equal(model(rows()), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_call_caches_no_fake_tensors():
    model = optimized(mlp())
    mixed._kept_mapping.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(rows()), adapter_names=NAMES)
    assert model(rows(), adapter_names=NAMES).isfinite().all()


def test_peft_s_errors_are_the_same():
    model = optimized(mlp()).train()
    with pytest.raises(ValueError, match="same as the number of inputs"):
        model(rows(3), adapter_names=NAMES)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): x"):
        model(rows(), adapter_names=["a", "x", "a", "a"])
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="merged adapters"):
        model(rows(), adapter_names=NAMES)
    assert model.training
    assert model.base_model.training


@pytest.mark.parametrize("name", ["lora_bias", "hooked"])
def test_adapters_left_to_peft_train_correctly_and_are_reported(name, mixed_calls):
    settings = {"lora_dropout": 0.0, "lora_bias": name == "lora_bias"}
    theirs = mlp(**{adapter: settings for adapter in SETTINGS})
    ours = optimized(theirs)
    if name == "hooked":
        assert not fastlora.coverage(ours).notes
        for layer in (ours.base_model.model.up, ours.base_model.model.down):
            layer.lora_A["c"].register_forward_hook(lambda *_: None)
    y = ours.train()(rows(), adapter_names=NAMES)
    assert not mixed_calls
    torch.testing.assert_close(y, theirs(rows(), adapter_names=NAMES))
    y.sum().backward()
    (note,) = (note for note in fastlora.coverage(ours).notes if "adapter_names" in note)
    assert ("has a bias" if name == "lora_bias" else "a hook watches") in note
    assert "up" in note


def test_compiled_layers_take_the_names_of_each_call():
    torch.compiler.reset()
    model = optimized(many(Mlp(), ["up"]).double())
    compiled = torch.compile(model, backend="aot_eager")
    for names in (NAMES, ["c", "c", "a", "b"]):
        found, expected = (each(rows(), adapter_names=names) for each in (compiled, model))
        torch.testing.assert_close(found, expected)


def test_check_judges_the_layers_of_a_mixed_batch():
    """The names go to layers, so a gated MLP's layers are judged one by one."""
    model = many(gemma3())
    found = fastlora.check(model, {"input_ids": BATCH, "labels": BATCH, "adapter_names": NAMES})
    assert found, str(found)
    count = len(found.coverage.layers)
    assert f"{count} of {count} fast layers judged, all right" in str(found)
    assert len(found.layers) == count
