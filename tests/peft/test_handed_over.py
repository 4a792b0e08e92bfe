"""Calls that an optimised layer leaves to PEFT's own forward, which does what it always did."""

import numpy
import pytest
import torch
from models import tiny_llama
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from peft.tuners.lora import config as lora_config
from peft_models import (
    ROUNDING,
    VOCABULARY,
    adapted,
    assert_runs_the_same,
    assert_same,
    counted_calls,
    gradients,
    inputs,
    mlp,
    optimized,
    other_config,
    run_both,
    up,
)
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

import fastlora

# Each of these makes PEFT's forward take over; the reason is in coverage where the layer shows it.


def hook(part, register, *, result=None):
    """Count the calls of a hook on a part of the layer, and of the same after its removal."""

    def call(model):
        module, calls = part(up(model)), []

        def seen(*args):
            calls.append(len(args))
            return result

        handle = getattr(module, register)(seen)
        found = gradients(model), len(calls)
        handle.remove()
        return found

    return call


def global_hook(register):
    def call(model):
        calls = []
        seen = lambda module, *_: calls.append(type(module).__name__)  # noqa: E731
        handle = getattr(nn_module, register)(seen)
        found = gradients(model), calls
        handle.remove()
        return found

    return call


def replaced_forward(part):
    def call(model):
        module = part(up(model))
        run = module.forward
        module.forward = lambda *args, **named: run(*args, **named) * 2
        return gradients(model)

    return call


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class DoubledCall(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


def other_class(part, cls):
    def call(model):
        part(up(model)).__class__ = cls
        return gradients(model)

    return call


def base(layer):
    return layer.base_layer


def lora_a(layer):
    return layer.lora_A["default"]


def lora_b(layer):
    return layer.lora_B["default"]


def dropout(layer):
    return layer.lora_dropout["default"]


def bias_on_lora_a(model):
    lora_a(up(model)).bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    return gradients(model)


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def parametrized(part):
    def call(model):
        parametrize.register_parametrization(part(up(model)), "weight", Negated())
        return gradients(model)

    return call


def base_inside_another(model):
    """A base layer without a weight of its own, like PEFT's wrapper of trained tokens."""
    up(model).base_layer = nn.Sequential(up(model).base_layer)
    return gradients(model)


def compiled_with_a_global_hook(model):
    handle = nn_module.register_module_forward_hook(
        lambda module, _, y: y * 2 if type(module) is nn.Linear else None
    )
    torch._dynamo.reset()
    y = torch.compile(model, backend="eager")(inputs())
    handle.remove()
    return y


class Fives(nn.Dropout):
    def forward(self, x):
        return x * 5


def with_dropout(module):
    def call(model):
        up(model).lora_dropout["default"] = module
        return gradients(model.train())

    return call


def dropout_in_place(model):
    """It changes the layer's input, which others may read."""
    up(model).lora_dropout["default"] = nn.Dropout(0.5, inplace=True)
    torch.manual_seed(0)
    x = inputs()
    y = up(model.train())(x)
    return y, x


def casting_switched_off(model):
    with disable_input_dtype_casting(model):
        return gradients(model)


def scaling_of(value):
    def call(model):
        up(model).scaling["default"] = value
        return up(model)(inputs())

    return call


def mixed_batch(model):
    model.add_adapter("b", other_config(init_lora_weights="gaussian"))
    return model(inputs(), adapter_names=["b", "default", "__base__"])


HANDED_OVER = {
    "hook-base": hook(base, "register_forward_hook"),
    "hook-lora_A": hook(lora_a, "register_forward_hook"),
    "hook-lora_B": hook(lora_b, "register_forward_hook"),
    "hook-dropout": hook(dropout, "register_forward_hook"),
    "pre-hook-base": hook(base, "register_forward_pre_hook"),
    "pre-hook-lora_A": hook(lora_a, "register_forward_pre_hook"),
    "backward-hook-base": hook(base, "register_full_backward_hook"),
    "backward-hook-lora_B": hook(lora_b, "register_full_backward_hook"),
    "backward-pre-hook-lora_A": hook(lora_a, "register_full_backward_pre_hook"),
    "old-backward-hook-lora_A": hook(lora_a, "register_backward_hook"),
    "hook-that-changes": hook(
        dropout, "register_forward_hook", result=torch.ones(3, 5, 8).double()
    ),
    "global-hook": global_hook("register_module_forward_hook"),
    "global-pre-hook": global_hook("register_module_forward_pre_hook"),
    "global-backward-hook": global_hook("register_module_full_backward_hook"),
    "global-backward-pre-hook": global_hook("register_module_full_backward_pre_hook"),
    "forward-base": replaced_forward(base),
    "forward-lora_A": replaced_forward(lora_a),
    "forward-lora_B": replaced_forward(lora_b),
    "forward-dropout": replaced_forward(dropout),
    "class-base": other_class(base, Doubled),
    "class-lora_A": other_class(lora_a, Doubled),
    "class-lora_B": other_class(lora_b, Doubled),
    "call-base": other_class(base, DoubledCall),
    "bias-lora_A": bias_on_lora_a,
    "parametrized-lora_A": parametrized(lora_a),
    "parametrized-base": parametrized(base),
    "base-inside-another": base_inside_another,
    "compiled-global-hook": compiled_with_a_global_hook,
    "dropout-class": with_dropout(Fives(0.5)),
    "dropout-one": with_dropout(nn.Dropout(1.0)),
    "dropout-in-place": dropout_in_place,
    "casting-off": casting_switched_off,
    "scaling-numpy-f32": scaling_of(numpy.float32(1.5)),
    "scaling-nan": scaling_of(float("nan")),
    "scaling-infinite": scaling_of(float("inf")),
    "scaling-large": scaling_of(1e39),
    "scaling-per-row": scaling_of(torch.arange(12, dtype=torch.float64)),
    "mixed-batch": mixed_batch,
}


@pytest.mark.parametrize("name", HANDED_OVER)
def test_leaves_the_call_to_peft(name):
    got, expected, calls = run_both(HANDED_OVER[name], mlp())
    assert_same(got, expected, ROUNDING)  # `down` is fast in most of them
    assert not [x for x in calls if x.shape[-1] == 8]  # those of `up`


@pytest.mark.parametrize(
    ("name", "reason"),
    {
        "hook-base": "its base layer",
        "forward-lora_A": "its lora_A",
        "class-base": "Doubled",
        "class-lora_B": "Doubled",
        "parametrized-lora_A": "its lora_A",
        "dropout-class": "its dropout",
        "dropout-one": "drops everything",
    }.items(),
)
def test_coverage_says_why(name, reason):
    model = optimized(mlp())
    hooked = up(model)
    if name == "hook-base":
        hooked.base_layer.register_forward_hook(lambda *_: None)
    else:
        HANDED_OVER[name](model)
    report = {layer.name: layer for layer in fastlora.coverage(model).layers}
    assert reason in report["base_model.model.up"].reason
    assert report["base_model.model.down"].fast


def test_hooks_on_a_dora_magnitude_are_called():
    magnitude = lambda layer: layer.lora_magnitude_vector["default"]  # noqa: E731
    got, expected, _ = run_both(hook(magnitude, "register_forward_hook"), mlp(use_dora=True))
    assert got[1] == 1
    assert_same(got, expected, ROUNDING)


def test_coverage_tells_of_a_hook_on_all_modules():
    model = optimized(mlp())
    handle = nn_module.register_module_forward_hook(lambda *_: None)
    report = fastlora.coverage(model)
    handle.remove()
    assert not report.fast
    assert "a hook on all modules" in str(report)


def test_a_report_computes_no_parametrised_weight():
    """spectral_norm's would take a step each time."""
    model = optimized(mlp()).train()
    base_layer = nn.utils.parametrizations.spectral_norm(up(model).base_layer)
    vector = base_layer.parametrizations.weight[0]._u.clone()
    assert "parametrised" in str(fastlora.coverage(model))
    assert torch.equal(base_layer.parametrizations.weight[0]._u, vector)


def test_once_a_hook_is_gone_the_layer_is_fast_again():
    model = optimized(mlp())
    handle = lora_a(up(model)).register_forward_hook(lambda *_: None)
    assert not fastlora.coverage(model).layers[0].fast
    handle.remove()
    with counted_calls() as calls:
        up(model)(inputs())
    assert len(calls) == 1


VARIANTS = {
    "velora": {"velora_config": lora_config.VeloraConfig(num_groups=2)},
    "bdlora": {"use_bdlora": lora_config.BdLoraConfig(["up"], ["down"], nblocks=2)},
    "monteclora": {"monteclora_config": lora_config.MontecloraConfig(num_samples=2)},
    "kasa": {"kasa_config": lora_config.KasaConfig()},
    "mica": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_variants_are_peft_s(settings):
    theirs = mlp(**settings)
    ours = optimized(theirs)
    assert not any(layer.fast for layer in fastlora.coverage(ours).layers)

    def run(model):
        return gradients(model.train()), model.eval()(inputs())

    assert_runs_the_same(run, theirs, ours, fast=0, tolerance=0.0)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian", "eva"])
def test_other_initial_values_are_fast(init):
    """These change what the tensors hold, not what is computed."""
    theirs = mlp(init_lora_weights=init)
    assert_runs_the_same(gradients, theirs, fast=2, tolerance=ROUNDING)


def logits_of(ids):
    return lambda model: model(input_ids=ids).logits


def test_alora_is_peft_s():
    settings = {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"}
    theirs = adapted(tiny_llama(torch.float64), target_modules=["q_proj", "v_proj"], **settings)
    ours = optimized(theirs)
    ids = torch.randint(9, VOCABULARY, (2, 10))
    ids[0, 4:6] = torch.tensor([7, 8])  # the second row isn't adapted
    assert_runs_the_same(logits_of(ids), theirs, ours, fast=0, tolerance=0.0)
    assert "ALora" in str(fastlora.coverage(ours))


def test_arrow_is_peft_s(tmp_path):
    settings = {"target_modules": ["q_proj", "v_proj"], "r": 4}
    folders = [str(tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        adapted(tiny_llama(torch.float64), **settings).save_pretrained(folder)
    theirs = lora.arrow.create_arrow_model(
        tiny_llama(torch.float64),
        task_specific_adapter_paths=folders,
        arrow_config=lora_config.ArrowConfig(top_k=1, rng_seed=42),
    ).eval()
    ours = optimized(theirs)
    ids = torch.randint(0, VOCABULARY, (2, 10))
    assert_runs_the_same(logits_of(ids), theirs, ours, fast=0, tolerance=0.0)
    ours.set_adapter("task_0")
    with counted_calls() as calls:
        ours(input_ids=ids)
    assert len(calls) == 4
