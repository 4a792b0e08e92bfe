"""The files that axolotl, ms-swift and verl load, with stand-ins for these trainers.

``make integrations`` runs them in the real packages (tests/integrations).
"""

import importlib
import importlib.util
import logging
import re
import sys
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace

import peft
import pytest
import torch
from models import randomize, tiny_llama
from process import run_python
from pydantic import BaseModel, ValidationError

import fastlora
from fastlora.__main__ import main
from fastlora.integrations import patches
from fastlora.layers.mlp import GatedMLP
from fastlora.trainer import MergedSampling

ROOT = Path(__file__).parents[1]
NAMED = {"plugins": ["fastlora.integrations.axolotl.FastLoRAPlugin"]}  # by the YAML
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
# axolotl 0.21.0, axolotl/integrations/base.py: the methods of BasePlugin that the plugin overrides.
AXOLOTL = """
class BasePlugin:
    def __init__(self): ...
    def register(self, cfg: dict): ...
    def get_input_args(self) -> "str | None": ...
    def add_callbacks_pre_trainer(self, cfg, model): ...
    def post_model_load(self, cfg, model): ...
"""
# ms-swift 4.6.0, swift/tuners/peft.py.
SWIFT = """
def keep_device_forward(self, *args, **kwargs):
    x = args[0]
    weight = self.weight if hasattr(self, 'weight') else self.weight0
    if weight.device != x.device:
        return self.forward_origin(x.to(weight.device), *args[1:], **kwargs)
    else:
        return self.forward_origin(*args, **kwargs)
"""


@pytest.fixture
def module_of(monkeypatch):
    """A function that makes a module of this name and text, and the packages above it."""

    def make(name: str, text: str) -> ModuleType:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:count]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(text, vars(module))
        return module

    return make


@pytest.fixture
def axolotl(module_of, monkeypatch) -> ModuleType:
    module_of("axolotl.integrations.base", AXOLOTL)
    monkeypatch.delitem(sys.modules, "fastlora.integrations.axolotl", raising=False)
    yield importlib.import_module("fastlora.integrations.axolotl")
    del sys.modules["fastlora.integrations.axolotl"]


def peft_model() -> peft.PeftModel:
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules="all-linear"))


def entry_point(group: str) -> str:
    """The value in pyproject.toml.  Python 3.10 has no tomllib."""
    _, _, section = (ROOT / "pyproject.toml").read_text().partition(f'entry-points."{group}"]')
    return re.search(r'^fastlora = "(fastlora[\w.:]+)"', section, re.M)[1]


def is_fast(model: torch.nn.Module) -> bool:
    return not fastlora.coverage(model).not_fast


def test_axolotl_s_kernels_stay_off_unless_the_config_sets_them(axolotl):
    cfg = NAMED | {"lora_o_kernel": True, "lora_mlp_kernel": None}
    axolotl.FastLoRAPlugin().register(cfg)
    assert cfg == NAMED | dict.fromkeys(KERNELS, False) | {"lora_o_kernel": True}


def test_axolotl_s_filter_leaves_the_plugin_s_logger_and_others_stay(axolotl, monkeypatch):
    logger, own = logging.getLogger("fastlora"), logging.Filter()
    theirs = type("AxolotlOrWarnErrorFilter", (logging.Filter,), {})("axolotl")
    monkeypatch.setattr(type(theirs), "__module__", "axolotl.logging_config")
    monkeypatch.setattr(logger, "filters", [own, theirs])
    axolotl.FastLoRAPlugin().register({**NAMED})
    assert logger.filters == [own]


@pytest.mark.parametrize("value", ["", "0", "1", '{"gated_mlps": false}'])
def test_axolotl_s_entry_point_acts_only_with_its_variable(axolotl, caplog, monkeypatch, value):
    caplog.set_level(logging.INFO, "fastlora")
    monkeypatch.setenv("FASTLORA", value)
    plugin, model, cfg = axolotl.FastLoRAPlugin(), peft_model(), {"fastlora_merged_sampling": True}
    plugin.register(cfg)
    plugin.post_model_load(cfg, model)
    is_on = value not in ("", "0")
    assert is_fast(model) == is_on == ("lora_mlp_kernel" in cfg)
    callbacks = plugin.add_callbacks_pre_trainer(cfg, model)
    assert [type(each) for each in callbacks] == [MergedSampling] * is_on
    assert any(isinstance(module, GatedMLP) for module in model.modules()) == (value == "1")
    assert len(caplog.messages) == is_on


def test_axolotl_s_model_that_auto_has_optimized_gets_one_line(axolotl, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "fastlora")
    monkeypatch.setenv("FASTLORA", '{"frozen_linears": false}')
    patches.from_environment()
    try:
        model = peft_model()
        axolotl.FastLoRAPlugin().post_model_load({}, model)
        assert len(caplog.messages) == 1
        axolotl.FastLoRAPlugin().post_model_load({"fastlora_gated_mlps": False}, model)
        assert len(caplog.messages) == 2
    finally:
        fastlora.auto(False)


def test_axolotl_s_entry_point_is_the_plugin():
    assert [entry_point("axolotl.plugins").replace(":", ".")] == NAMED["plugins"]


def test_axolotl_s_model_is_optimized_by_the_plugin_s_keys(axolotl, caplog):
    caplog.set_level(logging.INFO, "fastlora")
    plugin, model = axolotl.FastLoRAPlugin(), peft_model()
    cfg = NAMED | {"fastlora_gated_mlps": False, "lora_o_kernel": False}
    plugin.post_model_load(cfg, model)
    assert is_fast(model)
    assert not any(isinstance(module, GatedMLP) for module in model.modules())
    assert caplog.messages[0].startswith("14 of 14 layers fast (backend torch)")
    [callback] = plugin.add_callbacks_pre_trainer(cfg | {"fastlora_merged_sampling": True}, model)
    assert isinstance(callback, MergedSampling)
    plugin.post_model_load(NAMED, model)
    assert any(isinstance(module, GatedMLP) for module in model.modules())
    assert plugin.add_callbacks_pre_trainer(NAMED, model) == []


def test_axolotl_s_own_kernels_win_with_a_warning(axolotl, caplog):
    model = peft_model()
    axolotl.FastLoRAPlugin().post_model_load(NAMED | {"lora_qkv_kernel": True}, model)
    assert not is_fast(model)
    assert caplog.messages == [
        "axolotl's own kernels are on, so fastlora changes nothing: remove lora_qkv_kernel from "
        "the YAML to run fastlora"
    ]


def test_a_full_fine_tuning_in_axolotl_goes_on(axolotl, caplog):
    axolotl.FastLoRAPlugin().post_model_load(NAMED, tiny_llama())
    assert "has no PEFT LoRA layers" in caplog.messages[0]


def test_axolotl_validates_the_plugin_s_keys(axolotl):
    """axolotl derives its config's class from the named class (axolotl/integrations/config.py)."""
    module, _, name = axolotl.FastLoRAPlugin().get_input_args().rpartition(".")
    keys = getattr(importlib.import_module(module), name)

    class Config(BaseModel):
        adapter: str | None = None

    merged = type("Merged", (Config, keys), {})
    given = {"adapter": "lora", "fastlora_frozen_linears": False}
    assert merged(**given).model_dump(exclude_none=True) == given
    with pytest.raises(ValidationError, match="fastlora_gated_mlps"):
        merged(fastlora_gated_mlps="some")
    settings = {name.removeprefix("fastlora_") for name in keys.model_fields} - {"merged_sampling"}
    fastlora.auto(False, **dict.fromkeys(settings, True))  # raises for another setting


def test_ms_swift_s_callback_is_in_a_folder_without_names_of_packages(module_of, capsys):
    """ms-swift puts the file's folder at the start of ``sys.path``, and imports the file."""
    callbacks = module_of("swift.callbacks", "callbacks_map = {}")
    main(["path", "swift"])
    path = Path(capsys.readouterr().out.strip())
    names = {each.stem for each in path.parent.iterdir()} - {"__init__", "__pycache__"}
    assert names == {"fastlora_swift"}
    spec = importlib.util.spec_from_file_location("_swift_external_1", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    callback = callbacks.callbacks_map["fastlora"]("args", "trainer")
    model = peft_model()
    callback.on_train_begin(None, None, None, model=model)
    assert is_fast(model)
    assert isinstance(callbacks.callbacks_map["fastlora_merged"]("args", "trainer"), MergedSampling)


# ms-swift 4.6.0, swift/rlhf_trainers/utils.py: ``patch_lora_merge`` and ``patch_lora_unmerge``.
def merge_group(model: torch.nn.Module, group: list[str]) -> None:
    """ms-swift's merge of the layers of some parameters."""

    def merge(self, safe_merge=False, adapter_names=None):
        if all(self.name not in parameter for parameter in group):
            return None
        return self.merge_origin(safe_merge, adapter_names)

    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    for name, layer in model.named_modules():
        if layer in layers:
            layer.name, layer.merge_origin, layer.merge = name, layer.merge, None
            layer.merge = MethodType(merge, layer)
    model.merge_adapter()
    for layer in layers:
        layer.merge = layer.merge_origin
        del layer.merge_origin


def test_ms_swift_s_merges_of_groups_leave_the_bits():
    model, theirs = peft_model().bfloat16(), peft_model().bfloat16()
    for each in (model, theirs):
        torch.manual_seed(1)
        randomize(each)
    fastlora.optimize(model)
    sampling = MergedSampling()
    arguments = SimpleNamespace(use_vllm=True)
    sampling.on_train_begin(arguments, None, None, model=model)
    names = [name for name, _ in model.named_parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    for group in (names[: len(names) // 2], names[len(names) // 2 :]):
        for each in (model, theirs):
            merge_group(each, group)
        for name, p in theirs.named_parameters():
            if name in group:
                assert torch.equal(model.get_parameter(name), p), name
        assert 0 < sum(getattr(m, "merged", False) for m in model.modules()) < 14
        for each in (model, theirs):
            each.unmerge_adapter()
        assert all(map(torch.equal, model.parameters(), before))
    sampling.put_back()
    assert is_fast(model)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_lora_a_with_ms_swift_s_forward_is_fast(module_of, compiled):
    model = peft_model()
    ids = torch.arange(12).reshape(2, 6)
    expected = model(ids).logits
    forward = module_of("swift.tuners.peft", SWIFT).keep_device_forward
    for layer in [module for module in model.modules() if hasattr(module, "lora_A")]:
        for part in (*layer.lora_A.values(), *layer.lora_B.values()):
            part.forward_origin = part.forward
            part.forward = MethodType(forward, part)
    fastlora.optimize(model)
    assert is_fast(model)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    torch.testing.assert_close(run(ids).logits, expected)
    watched = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_A["default"]
    watched.forward_origin = lambda x: torch.zeros(*x.shape[:-1], 4)
    report = fastlora.coverage(model)
    assert [layer.name.rpartition(".")[2] for layer in report.not_fast] == ["up_proj"]


def test_verl_s_entry_point_acts_only_with_its_variable():
    """verl loads the module and calls nothing (verl/__init__.py)."""
    name = entry_point("verl.plugins")
    code = (
        f"import sys, {name}; from fastlora.integrations import patches; print(patches._settings,"
        "patches._FINDER in sys.meta_path, 'torch' in sys.modules)"
    )
    assert run_python("-c", code, FASTLORA="1") == "{} True False"
    assert run_python("-c", code, FASTLORA=None) == "None False False"
