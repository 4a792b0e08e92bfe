"""A PEFT that isn't among the tested versions: the installed one under another number."""

import subprocess
import sys
import warnings

import peft
import pytest
import torch
from models import Mlp
from peft.tuners.lora.layer import Linear as PeftLinear
from peft_models import counted_calls

import fastlora

NEWER = "PEFT 0.99.0 is newer than the tested versions, 0.19 to 0.21"


@pytest.fixture(autouse=True)
def newer(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.99.0")


def adapted() -> peft.PeftModel:
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    return peft.get_peft_model(Mlp(), config)


def test_a_newer_one_is_sped_up_with_a_warning_that_says_how_to_compare():
    model = adapted()
    with pytest.warns(UserWarning, match=NEWER) as warned:
        report = fastlora.optimize(model, strict=True)
    with counted_calls() as calls:
        model(torch.randn(2, 8))
    assert len(calls) == 2
    (note,) = report.notes
    assert [str(warning.message) for warning in warned] == [note]
    assert "fastlora.check(model, batch)" in note
    assert "python -m fastlora doctor" in note
    assert fastlora.coverage(model).notes == report.notes


def test_check_does_not_warn_to_run_check():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fastlora.check(adapted(), torch.randn(2, 8))
    assert found
    assert NEWER in str(found.coverage)


def test_an_old_one_is_left_alone(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.18.1")
    model = adapted()
    with pytest.warns(UserWarning, match=r"changed nothing: .*0.18.1 is not among the tested"):
        assert fastlora.optimize(model).fast == ()
    assert type(model.base_model.model.up) is PeftLinear


def test_the_environment_s_off_switch_wins(monkeypatch):
    monkeypatch.setenv("FASTLORA_DISABLE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.optimize(model := adapted())
    assert type(model.base_model.model.up) is PeftLinear


@pytest.mark.parametrize("moved", ["peft.tuners.lora.dora", "peft.tuners.lora.variants"])
def test_where_a_private_module_moved_nothing_changes(moved):
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
    assert f"changed nothing: {NEWER}, and has moved what fastlora reads (" in said
    assert moved in said
    assert module == "peft.tuners.lora.layer"
