"""A PEFT outside of the tested versions, simulated by changing the installed one's number."""

import warnings

import peft
import pytest
from peft.tuners.lora.layer import Linear as PeftLinear
from peft_models import counted_calls, inputs, mlp
from process import run_forked

import fastlora

NEWER = "PEFT 0.99.0 is newer than the tested versions, 0.18 to 0.21"


@pytest.fixture(autouse=True)
def newer(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.99.0")


def test_a_newer_one_is_sped_up_with_a_warning_that_says_how_to_compare():
    model = mlp()
    with pytest.warns(UserWarning, match=NEWER) as warned:
        report = fastlora.coverage(fastlora.optimize(model, strict=True))
    with counted_calls() as calls:
        model(inputs())
    assert len(calls) == 2
    (note,) = report.notes
    assert [str(warning.message) for warning in warned] == [note]
    assert "fastlora.check(model, batch)" in note
    assert "python -m fastlora doctor" in note
    assert fastlora.coverage(model).notes == report.notes


def test_check_does_not_warn_to_run_check():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fastlora.check(mlp(), inputs())
    assert found
    assert NEWER in str(found.coverage)


def test_an_old_one_is_left_alone(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    model = mlp()
    with pytest.warns(UserWarning, match=r"changed nothing: .*0.17.1 is not among the tested"):
        report = fastlora.coverage(fastlora.optimize(model))
    assert (len(report.fast), len(report.not_fast)) == (0, 2)
    assert type(model.base_model.model.up) is PeftLinear
    assert "0.17.1" in str(fastlora.coverage(model))
    with pytest.warns(UserWarning, match="nothing"), pytest.raises(ValueError, match=r"0\.17\.1"):
        fastlora.optimize(model, strict=True)


@pytest.mark.filterwarnings("ignore:PEFT 0.99.0 is newer")
def test_restore_works_under_an_old_peft(monkeypatch):
    fastlora.optimize(model := mlp())
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    fastlora.restore(model)
    assert type(model.base_model.model.up) is PeftLinear


def test_dora_is_fast_in_a_peft_without_its_cache():
    code = (
        "import torch, peft, fastlora; from peft.tuners.lora import dora;"
        "vars(dora).pop('cache_decorator', None); peft.__version__ = '0.18.1';"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4));"
        "config = peft.LoraConfig(target_modules=['0'], use_dora=True, init_lora_weights=False);"
        "model, x = peft.get_peft_model(model, config), torch.randn(40, 4); expected = model(x);"
        "print(fastlora.coverage(fastlora.optimize(model)));"
        "torch.testing.assert_close(model(x), expected)"
    )
    assert "1 of 1 layers fast" in run_forked(code)


def test_where_a_private_module_moved_nothing_changes():
    moved = "peft.tuners.lora.variants"
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
    said, module = run_forked(code).splitlines()
    assert f"changed nothing: {NEWER}, and has moved what fastlora reads (" in said
    assert moved in said
    assert module == "peft.tuners.lora.layer"
