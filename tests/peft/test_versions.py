"""A PEFT that is newer than the tested versions: tried out once a process, by ``optimize``.

The installed PEFT stands for it under another number, as it is or with a part of its meaning
changed.
"""

import subprocess
import sys
import time

import peft
import pytest
import torch
from models import Mlp
from peft.tuners.lora import variants
from peft.tuners.lora.layer import Linear as PeftLinear
from peft_models import counted_calls
from torch import nn
from torch.nn.modules import module as nn_module

import fastlora
from fastlora.peft import moment, trial, versions

NEWER = "PEFT 0.99.0 is newer than the tested versions, 0.19 to 0.21"


@pytest.fixture
def asked_anew():
    """After the test, and after all that it changed is back, the real version is looked at."""
    with moment.on_trial():
        yield


@pytest.fixture
def newer(asked_anew, monkeypatch):
    """The installed PEFT calls itself 0.99.0, and no process has tried that out."""
    monkeypatch.setattr(versions, "_verdicts", [])
    monkeypatch.setattr(peft, "__version__", "0.99.0")


def adapted(**settings) -> peft.PeftModel:
    config = {"r": 4, "target_modules": ["up", "down"], "init_lora_weights": False}
    return peft.get_peft_model(Mlp(), peft.LoraConfig(**config | settings))


pytestmark = pytest.mark.usefixtures("newer")


def test_where_it_agrees_optimize_goes_on_with_a_note():
    model = adapted()
    with counted_calls() as calls:
        report = fastlora.optimize(model, strict=True)
        assert calls  # of the layers that were tried
        calls.clear()
        model(torch.randn(2, 8))
    assert len(calls) == 2
    note = f"{NEWER}; a few small layers gave the same numbers in a self-check"
    assert str(report) == f"2 of 2 layers fast (backend torch)\nnote: {note}"
    assert str(fastlora.coverage(model)) == str(report)
    assert report.notes == (note,)
    assert note in str(fastlora.check(model, torch.randn(2, 8)).coverage)


def test_it_happens_once_and_takes_well_under_a_second(monkeypatch):
    start = time.perf_counter()
    fastlora.optimize(adapted())
    assert time.perf_counter() - start < 1.0
    monkeypatch.setattr(trial, "try_out", None)
    fastlora.optimize(adapted(), strict=True)


def test_coverage_alone_tries_nothing():
    report = fastlora.coverage(adapted())
    assert f"{NEWER}: fastlora.optimize(model) tries it out first" in str(report)
    assert not versions._verdicts


def test_random_states_and_settings_are_as_before():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fastlora.optimize(adapted_on_its_own_seed())
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), before)


def adapted_on_its_own_seed() -> peft.PeftModel:
    with torch.random.fork_rng([]):
        return adapted()


def in_inference_mode():
    return torch.inference_mode()


def on_the_meta_device():
    return torch.device("meta")


@pytest.mark.parametrize("setting", [in_inference_mode, on_the_meta_device])
def test_the_caller_s_settings_do_not_reach_it(setting):
    model = adapted()
    with setting():
        fastlora.optimize(model)
    assert fastlora.coverage(model).eager == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_does_not_reach_it(dtype):
    model = adapted()
    torch.set_default_dtype(dtype)
    try:
        fastlora.optimize(model, strict=True)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_environment_s_backend_does_not_reach_it(monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")
    model = adapted()
    assert fastlora.optimize(model).notes


def changed_scaling(monkeypatch):
    """The adapter's part counts twice."""

    def forward(self, x, *args, **named):
        base = self.base_layer(x)
        return 2 * PEFT_FORWARD(self, x, *args, **named) - base

    monkeypatch.setattr(PeftLinear, "forward", forward)


PEFT_FORWARD = PeftLinear.forward


def changed_dropout(monkeypatch):
    """What is dropped in training is scaled once more."""

    def forward(self, x, *args, **named):
        y = PEFT_FORWARD(self, x, *args, **named)
        dropout = next(iter(self.lora_dropout.values()))
        return y * 1.5 if isinstance(dropout, nn.Dropout) and self.training else y

    monkeypatch.setattr(PeftLinear, "forward", forward)


def changed_gradient(monkeypatch):
    """The right output, and a gradient that lacks the adapter's."""

    def forward(self, x, *args, **named):
        y = PEFT_FORWARD(self, x, *args, **named)
        base = self.base_layer(x)
        return base + (y - base).detach() if y.requires_grad else y

    monkeypatch.setattr(PeftLinear, "forward", forward)


def raises(monkeypatch):
    def forward(self, x):
        raise RuntimeError("a new argument is needed")

    monkeypatch.setattr(PeftLinear, "forward", forward)


def renamed_attribute(monkeypatch):
    monkeypatch.setattr(peft, "LoraConfig", None)


BROKEN = {
    "scaling": (changed_scaling, r"self-check of a plain layer disagreed .*: the output by 0\.\d"),
    "dropout": (changed_dropout, "self-check of dropout disagreed with PEFT's own forward"),
    "gradient": (changed_gradient, "a plain layer (disagreed|failed)"),
    "error": (raises, r"a plain layer failed \(RuntimeError: a new argument is needed\)"),
    "renamed": (renamed_attribute, r"a plain layer failed \(TypeError"),
}


@pytest.mark.parametrize(("broken", "message"), BROKEN.values(), ids=BROKEN)
def test_where_it_disagrees_nothing_changes_and_the_warning_says_in_what(
    broken, message, monkeypatch
):
    model = adapted()
    broken(monkeypatch)
    with pytest.warns(UserWarning, match=rf"changed nothing: {NEWER}, and a (.*){message}"):
        report = fastlora.optimize(model)
    assert type(model.base_model.model.up) is PeftLinear
    assert report.fast == ()
    assert report.notes == ()
    with pytest.warns(UserWarning, match="nothing"), pytest.raises(ValueError, match="is newer"):
        fastlora.optimize(model, strict=True)


def test_where_dora_alone_disagrees_it_alone_stays_peft_s(monkeypatch):
    forward = variants.DoraLinearVariant.forward
    monkeypatch.setattr(
        variants.DoraLinearVariant,
        "forward",
        staticmethod(lambda *args, **named: 2 * forward(*args, **named)),
    )
    assert fastlora.optimize(adapted(), strict=True).fast
    report = fastlora.optimize(adapted(use_dora=True))
    assert report.fast == ()
    assert f"{NEWER}, and a self-check of DoRA disagreed" in report.layers[0].reason


def test_an_old_version_is_not_tried(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.18.1")
    with pytest.warns(UserWarning, match="0.18.1 is not among the tested versions"):
        assert fastlora.optimize(adapted()).fast == ()
    assert not versions._verdicts


def test_the_environment_s_off_switch_wins(monkeypatch):
    monkeypatch.setenv("FASTLORA_DISABLE", "1")
    assert fastlora.optimize(adapted()).fast == ()
    assert not versions._verdicts


def test_while_no_call_can_be_fast_nothing_is_tried_and_nothing_decided():
    handle = nn_module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.warns(UserWarning, match="possible now: a hook on all modules"):
            assert fastlora.optimize(adapted()).fast == ()
    finally:
        handle.remove()
    assert fastlora.optimize(adapted()).eager == ()


@pytest.mark.parametrize("moved", ["peft.tuners.lora.dora", "peft.tuners.lora.variants"])
def test_a_private_module_that_moved_is_a_disagreement(moved):
    code = (
        "import sys, torch, peft, warnings, fastlora; peft.__version__ = '0.99.0';"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4));"
        "model = peft.get_peft_model(model, peft.LoraConfig(target_modules=['0']));"
        f"sys.modules['{moved}'] = None; vars(peft.tuners.lora).pop('{moved.split('.')[-1]}');"
        "warnings.simplefilter('error');\n"
        "try: fastlora.optimize(model)\n"
        "except UserWarning as warning: print(warning)\n"
        "print(type(model.base_model.model[0]).__module__)"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, cwd="/", check=False, text=True
    )
    said, module = result.stdout.strip().splitlines() or (result.stderr, "")
    assert f"changed nothing: {NEWER}" in said
    assert "Error: import" in said
    assert moved in said
    assert module == "peft.tuners.lora.layer"
