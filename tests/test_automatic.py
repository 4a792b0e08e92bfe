"""``fastlora.auto()``: models that PEFT injects adapters into are optimized, in any program."""

import inspect
import json
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from models import randomize, tiny_llama
from peft.tuners.tuners_utils import BaseTuner
from process import run_python

import fastlora
from fastlora.integrations import patches
from fastlora.layers.mlp import GatedMLP

THEIRS = inspect.unwrap(BaseTuner.inject_adapter)
CONFIG = {"r": 4, "target_modules": "all-linear"}
SAID = "14 of 14 layers fast (backend torch); 2 of 2 gated MLPs as one block"
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(autouse=True)
def _off_afterwards() -> Iterator[None]:
    yield
    fastlora.auto(False)


def model_of(config: peft.PeftConfig | None = None, **settings) -> peft.PeftModel:
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_llama(), config or peft.LoraConfig(**CONFIG | settings))


def is_fast(model: torch.nn.Module) -> bool:
    return bool((report := fastlora.coverage(model)).layers) and not report.not_fast


def test_a_model_of_peft_is_optimized_and_one_line_says_so(log):
    fastlora.auto()
    model = model_of()
    assert log() == [("INFO", SAID)]
    assert is_fast(model)
    expected = fastlora.restore(model_of())(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected)


def test_the_line_says_how_the_loss_runs(log):
    fastlora.auto(loss=True)
    model_of()
    base = tiny_llama()
    base.lm_head = torch.nn.Sequential(base.lm_head)
    peft.get_peft_model(base, peft.LoraConfig(**CONFIG))
    texts = [text for _, text in log()]
    assert texts[0].endswith("; loss without logits: lm_head (no loss ran yet)")
    assert texts[1].endswith("; loss with logits: the head: it is a Sequential, no torch.nn.Linear")


def test_settings_are_those_of_optimize_and_the_last_call_s_hold():
    assert ("model", *patches.SETTINGS) == tuple(inspect.signature(fastlora.optimize).parameters)
    fastlora.auto()
    fastlora.auto(gated_mlps=False)
    model = model_of()
    assert is_fast(model)
    assert not any(isinstance(module, GatedMLP) for module in model.modules())
    with pytest.raises(TypeError, match=r"no setting 'gates': give some of .*gated_mlps"):
        fastlora.auto(gates=False)
    with pytest.raises(ValueError, match="base is 'int4', but must be"):
        fastlora.auto(base="int4")
    with pytest.raises(TypeError, match="no setting 'model'"):
        fastlora.auto(model=model)
    with pytest.raises(TypeError, match="on is 'yes', but must be True or False"):
        fastlora.auto("yes")
    assert patches._settings == {"gated_mlps": False}


def test_off_leaves_optimized_models_and_later_ones_to_peft():
    finders = [*sys.meta_path]
    fastlora.auto()
    model = model_of()
    fastlora.auto(False)
    assert sys.meta_path == finders
    assert is_fast(model)
    assert not is_fast(model_of())


def test_a_wrapper_around_ours_stays_and_no_model_is_optimized_twice(log, monkeypatch):
    fastlora.auto()
    ours = BaseTuner.inject_adapter

    def another(*arguments, **settings):
        return ours(*arguments, **settings)

    monkeypatch.setattr(BaseTuner, "inject_adapter", another)
    fastlora.auto(False)
    assert not is_fast(model_of())
    assert log() == []
    fastlora.auto()
    assert BaseTuner.inject_adapter is another
    assert is_fast(model_of())
    assert len(log()) == 1


def test_threads_wrap_once():
    with ThreadPoolExecutor(8) as threads:
        [*threads.map(fastlora.auto, [True] * 64)]
    assert BaseTuner.inject_adapter.__wrapped__ is THEIRS


def test_settings_of_a_call_replace_those_of_auto():
    fastlora.auto(loss=True)
    model = fastlora.get_peft_model(tiny_llama(), peft.LoraConfig(**CONFIG), loss=False)
    assert not fastlora.coverage(model).loss


def test_an_adapter_that_is_injected_later_is_fast_also():
    model = fastlora.restore(model_of())  # one that was made before
    fastlora.auto()
    model.add_adapter("second", peft.LoraConfig(r=8, target_modules=["q_proj", "down_proj"]))
    assert is_fast(model)
    model.set_adapter("second")
    randomize(model, 0.1)
    got = model(IDS).logits
    torch.testing.assert_close(got, fastlora.restore(model)(IDS).logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_is_loaded_into_fast_layers(low_cpu_mem_usage, tmp_path, log):
    saved = randomize(model_of(), 0.1)
    saved.save_pretrained(tmp_path)
    fastlora.auto()
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(
        tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert is_fast(loaded)
    torch.testing.assert_close(loaded(IDS).logits, saved(IDS).logits)
    # Adapters on the meta device can't be judged when they are injected.
    said = "14 LoRA layers; " if low_cpu_mem_usage else SAID
    ((level, text),) = log()
    assert level == "INFO"
    assert text.startswith(said)


def test_an_error_of_optimize_is_a_warning_and_the_model_is_peft_s(log, monkeypatch):
    fastlora.auto(strict=True)
    model = model_of(target_modules=["q_proj", "embed_tokens"])
    ((level, text),) = log()
    assert level == "WARNING"
    assert text.startswith("this model isn't optimized: ValueError: not every layer would run")
    kinds = {type(module).__module__.split(".")[0] for module in model.modules()}
    assert "fastlora" not in kinds


def test_a_warning_of_optimize_ends_no_program_that_makes_warnings_errors(monkeypatch, log):
    monkeypatch.setattr("fastlora.peft._NEWEST", (0, 1))
    fastlora.auto()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = model_of()
    assert is_fast(model)


def test_no_fast_layer_is_a_warning_with_the_reason(log):
    fastlora.auto()
    model_of(target_modules=["embed_tokens"])
    ((level, text),) = log()
    assert level == "WARNING"
    assert text.startswith("0 of 1 layers fast; 1 in PEFT's forward: ")
    assert "\n" not in text


def test_other_tuners_are_left_alone(log):
    fastlora.auto()
    model_of(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    model_of(peft.LoHaConfig(target_modules=["k_proj"]))
    assert log() == []


def test_a_rank_behind_the_first_logs_nothing_and_disabled_is_no_warning(log, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    fastlora.auto()
    assert is_fast(model_of())
    assert log() == []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("FASTLORA_DISABLE", "1")
    assert not is_fast(model_of())
    ((level, text),) = log()
    assert level == "INFO"
    assert "FASTLORA_DISABLE is set" in text


PEFT = """
import sys
if not hasattr(sys, "tried"):
    sys.tried = True
    raise ValueError("not yet")
class BaseTuner:
    def inject_adapter(self, model, adapter_name): return "theirs"
"""
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
finders, before = [*sys.meta_path], {*sys.modules}
import fastlora; fastlora.auto()
new = {*sys.modules} - before
try: import peft.tuners.tuners_utils
except ValueError: assert sys.tried
from peft.tuners.tuners_utils import BaseTuner, __loader__ as loader
assert sys.meta_path == finders
assert vars(loader).keys() == vars(json.__loader__).keys()
assert hasattr(BaseTuner.inject_adapter, "__wrapped__")
fastlora.auto(False)
assert BaseTuner().inject_adapter(None, "name") == "theirs"
print(json.dumps([*new]))
"""


def test_before_peft_is_imported_it_waits_and_imports_little(tmp_path):
    """PEFT's stand-in fails at its first import, as with a missing dependency."""
    folder = tmp_path / "peft" / "tuners"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder / "tuners_utils.py").write_text(PEFT)
    new = json.loads(run_python("-I", "-c", PROGRAM, tmp_path))
    assert {name.split(".")[0] for name in new} - sys.stdlib_module_names == {"fastlora"}
    assert len(new) < 50  # 21 under Python 3.11, logging's among them


def test_a_program_sees_names_before_and_after_torch_is_imported():
    code = (
        "import sys, fastlora; assert 'optimize' in dir(fastlora); assert fastlora.__version__;"
        "from fastlora import *; assert optimize is fastlora.optimize;"
        "assert fastlora.peft.optimized.optimize is optimize; assert not hasattr(fastlora, 'no')"
    )
    for first in ("", "import torch;"):
        run_python("-c", first + code)
    run_python(
        "-c",
        "import fastlora, sys; hasattr(fastlora, '__wrapped__'); assert 'torch' not in sys.modules",
    )


@pytest.mark.parametrize("name", ["apply_lora", "LoRAConfig", "merge_lora", "save_adapter"])
def test_a_name_of_0_4_is_an_error_that_names_the_page(name):
    with pytest.raises(ImportError, match=rf"{name} is gone .*: use .*docs/from-0\.4\.md"):
        exec(f"from fastlora import {name}")
    with pytest.raises(AttributeError, match=rf"{name} is gone .*: use .*docs/from-0\.4\.md"):
        getattr(fastlora, name)


@pytest.mark.parametrize(
    ("value", "settings"),
    [("", None), ("0", None), ("1", {}), ('{"gated_mlps": false}', {"gated_mlps": False})],
)
def test_the_switch_in_the_environment(value, settings, monkeypatch):
    monkeypatch.setenv("FASTLORA", value)
    patches.from_environment()
    assert patches._settings == settings


def test_a_wrong_setting_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("FASTLORA", '{"gates": true}')
    with pytest.raises(ValueError, match="must be 0, 1 or a JSON object with some of strict, "):
        patches.from_environment()
    assert patches._settings is None


@pytest.mark.parametrize(
    ("setup", "shown"),
    [
        ("logging.basicConfig(format='own %(message)s')", "own a line\n"),
        ("logging.basicConfig(filename='/dev/null')", "fastlora: a line\n"),
        ("logging.getLogger('fastlora').setLevel(30)", ""),
    ],
    ids=["own-handler", "a-file", "own-level"],
)
def test_the_line_is_shown_once_as_the_program_s_logging_says(setup, shown):
    program = (
        "import logging, sys; from fastlora.integrations import patches; sys.stderr = sys.stdout;"
        f"patches.show_log(); patches.show_log(); {setup}; patches.log_line(20, 'a line')"
    )
    assert run_python("-c", program) == shown.strip()
