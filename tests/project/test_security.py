"""Promises of SECURITY.md: which files are read, which code is never run, and hostile files."""

import ast
import json
import pickle
import re
import struct
import time
from pathlib import Path

import pytest
import torch
from models import Mlp, adapt
from safetensors.torch import save_file

import fastlora
from fastlora.packing.files import CONFIG, WEIGHTS

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "fastlora").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}
TEXT = (ROOT / "SECURITY.md").read_text()
# Modules that open pickles, run code or programs, or use the network.
NEVER = {
    "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "subprocess", "ctypes",
    "socket", "urllib", "http", "requests", "httpx", "huggingface_hub", "multiprocessing", "code",
}  # fmt: skip


def calls(*names: str) -> dict[str, list[ast.Call]]:
    """The calls of these functions by file, for example of ``exec`` or ``torch.load``."""
    found: dict[str, list[ast.Call]] = {}
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
                found.setdefault(file, []).append(node)
    return found


def test_nothing_is_imported_that_opens_pickles_or_runs_programs():
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & NEVER, file


def test_torch_loads_weights_only_and_only_run_starts_a_program():
    loads = [call for each in calls("torch.load").values() for call in each]
    assert len(loads) == 1
    for call in loads:
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert given["weights_only"] == "True"
    assert set(calls("exec", "eval", "__import__", "compile")) == {"kernels/capture.py"}
    assert set(calls("os.execv")) == {
        "fastlora/integrations/run.py"
    }  # a program that the user names
    assert not calls("os.system", "os.popen", "os.execve", "torch.hub.load", "pickle.load")
    for path in FILES:
        assert "trust_remote_code" not in path.read_text()


def test_every_module_that_reads_files_is_listed():
    """A new reader of files must also be described in SECURITY.md."""
    opening = calls(
        "open", "safe_open", "read_json", "files.read_adapter", "torch.load", "json.load",
        "json.loads",
    )  # fmt: skip
    for file, tree in TREES.items():
        attributes = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        if {"read_text", "read_bytes", "open", "fromfile", "memmap"} & set(attributes):
            opening.setdefault(file, [])
    assert opening.keys() == {
        *(f"fastlora/adapters/{name}.py" for name in ("llama_cpp", "stored")),
        "fastlora/adapters/servers/rules.py",  # also the JSON files beside it
        "fastlora/doctor/machine.py",  # /proc/cpuinfo
        "fastlora/common/cache_folder.py",  # results of verification and tuning, which are JSON to
        "fastlora/backends/triton/verification.py",  # which also reads /sys/module/nvidia/version
        "fastlora/backends/triton/measured.py",
        "fastlora/packing/checkpoints.py",
        "fastlora/packing/files.py",
        "fastlora/sweeps/record.py",
        "fastlora/integrations/patches.py",  # JSON in the variable FASTLORA
    }
    for name in re.findall(r"`(\w+\.(?:safetensors|json|pt|safetensors\.index\.json))`", TEXT):
        assert any(f'"{name}"' in path.read_text() for path in FILES), name


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder of a valid adapter."""
    adapt(Mlp(), target_modules=["up", "down"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


class Bomb:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_a_pickle_is_never_opened(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    (folder / "adapter_model.bin").write_bytes(bomb)
    fastlora.load_adapter(Mlp(), folder)  # it ignores the pickle beside the other file
    for read in (lambda: fastlora.load_adapter(Mlp(), folder), lambda: resize(folder)):
        (folder / WEIGHTS).unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError, match="a pickle, and fastlora doesn't open pickles"):
            read()
        (folder / WEIGHTS).write_bytes(bomb)
        with pytest.raises(ValueError, match="is damaged, or not a safetensors file"):
            read()
    from fastlora.sweeps.record import FILE, earlier

    torch.save({"settings": Bomb()}, tmp_path / FILE)
    with pytest.raises(ValueError, match="can't be read"):
        earlier(tmp_path, {}, resume=True, replace=False)
    assert not Path("exploded").exists()


def resize(folder):
    return fastlora.resize_adapter(folder)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1, 0])
def test_a_header_that_lies_about_its_length(length, folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{}      ")
    for read in (lambda: fastlora.load_adapter(Mlp(), folder), lambda: resize(folder)):
        with pytest.raises(ValueError, match="is damaged, or not a safetensors file"):
            read()


@pytest.mark.parametrize(
    "part", [".base_layer", ".lora_", ".", "lora_A.weight", ".modules_to_save"]
)
def test_a_long_key_takes_no_long_time_and_no_long_message(part, folder):
    """A key of a million letters took minutes when time grew with the square of its length."""
    key = "base_model.model.x" + part * (10**6 // len(part)) + "!.lora_A.weight"
    save_file({key: torch.ones(1, 1)}, folder / WEIGHTS)
    start = time.process_time()
    reads = (
        lambda: fastlora.load_adapter(Mlp(), folder),
        lambda: resize(folder),
        lambda: fastlora.check_adapter(folder, "vllm"),
    )
    for read in reads:
        with pytest.raises(ValueError, match="is damaged: it has a key of") as error:
            read()
        assert len(str(error.value)) < 2000
    assert time.process_time() - start < 20  # 0.2 on an Intel Xeon


def test_many_patterns_are_compiled_once(folder):
    """The module re caches only 512 patterns."""
    from fastlora.adapters.config import AdapterConfig, _at_end

    config = AdapterConfig(rank_pattern={rf"^layers\.{i}\.q": 2 for i in range(900)})
    before = _at_end.cache_info().misses
    assert {config.rank_of(f"layers.{i}.q") for i in range(900)} == {2}
    assert _at_end.cache_info().misses == before


def test_names_lead_out_of_no_folder(folder, tmp_path):
    """Names of tensors are not used as paths; a link in the output folder is replaced."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("/etc/x", "../../x", "base_model.model.../x.lora_A.weight"):
        save_file({name: torch.ones(1, 1)}, folder / WEIGHTS)
        with pytest.raises(ValueError, match="doesn't fit the model"):
            fastlora.load_adapter(Mlp(), folder)
    adapt(Mlp(), target_modules=["up"]).save_pretrained(folder)
    output = tmp_path / "output"
    output.mkdir()
    for name in (WEIGHTS, CONFIG):
        (output / name).symlink_to(precious)
    fastlora.resize_adapter(folder, rank=2, output=output)
    assert precious.read_text() == "mine"
    assert not (output / WEIGHTS).is_symlink()
    fastlora.load_adapter(Mlp(), output)


@pytest.mark.parametrize(
    "config",
    ["[" * 10**5, '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", '{"r": NaN}', "null", '"LORA"'],
    ids=["deep", "huge", "no-type", "null", "text"],
)
def test_a_hostile_config_is_one_clear_error(config, folder):
    (folder / CONFIG).write_text(config)
    with pytest.raises(ValueError, match=re.escape(CONFIG)):
        fastlora.load_adapter(Mlp(), folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "..", "", "a/../x"])
def test_an_index_may_only_name_files_in_its_folder(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"weight_map|doesn't exist"):
        fastlora.load_packed(Mlp(), tmp_path)
