"""``python -m fastlora doctor``: every line is true, and every broken part is reported."""

import json
import os
import sys

import numpy
import peft
import pytest
import torch
import transformers
import triton
from process import run_forked, run_python

import fastlora.doctor as doctor
from fastlora.__main__ import main
from fastlora.doctor import machine
from fastlora.peft.layer import Linear as FastLinear
from fastlora.version import __version__

CPU = torch.device("cpu")


def examined(capsys, *arguments: str, status: int = 0) -> dict:
    assert main(["doctor", "--json", *arguments]) == status
    return json.loads(capsys.readouterr().out)


def test_versions_machine_and_the_text_on_about_a_screen(capsys):
    found = examined(capsys)
    assert f"numpy {numpy.__version__}, " in found["versions"].pop("others")
    pair = triton.__version__, torch.__version__, torch.cuda.is_available()
    assert found["versions"] == {
        "fastlora": __version__,
        "Python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "triton": triton.__version__ + machine.note_of_pair(*pair),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    assert found["fastlora.optimize"] == {"PEFT": "supported"}
    assert found["machine"]["threads"] == str(torch.get_num_threads())
    assert torch.backends.cpu.get_cpu_capability() in found["machine"]["processor"]
    assert found["installation"].keys() == {"fastlora", "fastlora.kernels"}
    assert found["broken"] == []
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert lines[-1] == "nothing is broken"
    for title, entries in found.items():
        assert title == "broken" or title in lines
        for name, text in dict(entries).items():
            assert any(line.split() == [*name.split(), *text.split()] for line in lines), name


def test_a_clone_with_the_package_s_name_is_said_with_the_error_it_causes(tmp_path, monkeypatch):
    assert "another fastlora" not in machine.installation()
    (tmp_path / "fastlora" / "fastlora").mkdir(parents=True)
    (tmp_path / "fastlora" / "fastlora" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    said = machine.installation()["another fastlora"]
    assert said.startswith(f"{tmp_path / 'fastlora'} is a clone with the package's name")
    assert "no attribute 'optimize'" in said


NEEDS_INTERPRETER = "on a CPU the Triton kernels run only under TRITON_INTERPRET=1"


# Set in place of FASTLORA_BACKEND, because a process reads the variable only once.
OF_PROCESS = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO
from fastlora import backends
from fastlora.__main__ import main
found = []
for backend in sys.argv[1:]:
    backends._ENVIRONMENT = backend
    with redirect_stdout(StringIO()) as printed:
        status = main(["doctor", "--json"])
    found.append((status, json.loads(printed.getvalue())))
print(json.dumps(found))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the default backend differs on a GPU")
@pytest.mark.parametrize("interpret", [False, True], ids=["compiled", "interpreted"])
def test_backends_as_the_settings_choose_them(interpret):
    settings = {"TRITON_INTERPRET": str(int(interpret)), "FASTLORA_BACKEND": "triton"}
    names = ["triton"] if interpret else ["triton", "metal"]
    (status, found), *unknown = json.loads(run_forked(OF_PROCESS, *names, **settings))
    assert status == 0
    for name, value in settings.items():
        assert found["settings"][name] == value
    backends = found["backends"]
    assert backends["torch on cpu"].startswith("possible, by FASTLORA_BACKEND=")
    if interpret:
        assert backends["triton on cpu"] == "runs by default"
    else:
        said = f"asked for, but calls run on torch: {NEEDS_INTERPRETER}"
        assert backends["triton on cpu"] == said
    assert float(found["self-test, relative errors"]["PEFT optimized on cpu"]) < 1e-5
    for status, found in unknown:
        assert status == 1
        text = "backends: ValueError: FASTLORA_BACKEND asks for the backend 'metal'"
        assert any(each.startswith(text) for each in found["broken"]), found["broken"]


def raising(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


FAST_FORWARD, OPTIMIZED = FastLinear.forward, "self-test of fastlora.optimize on cpu: fastlora (1"
FAULTS = {  # Values: the object to replace, its replacement, and the expected message
    "raising": (
        doctor, "peft_check", raising(RuntimeError("no\nmemory")),
        "self-test, relative errors: RuntimeError: no memory",
    ),
    "doubled": (
        FastLinear, "forward",
        lambda self, x, *more: 2 * FAST_FORWARD(self, x, *more) - self.base_layer(x), OPTIMIZED,
    ),
    "package": (
        machine, "import_module", raising(ImportError("undefined symbol")),
        "transformers is installed, but can't be imported: ImportError: undefined symbol",
    ),
    "section": (
        doctor, "hardware", raising(ZeroDivisionError("by zero")),
        "machine: ZeroDivisionError: by zero",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("place", "name", "other", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_reported_and_the_other_checks_run(
    capsys, monkeypatch, place, name, other, words
):
    monkeypatch.setattr(place, name, other)
    found = examined(capsys, status=1)
    said = [text for text in found["broken"] if text.startswith(words)]
    assert said, found["broken"]
    assert words != OPTIMIZED or "NOT the same" in said[0]
    assert found["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("0.17.1", "PEFT 0.17.1 is not among the tested versions"),
        ("0.99.0", "PEFT 0.99.0 is newer than the tested versions"),
        ("", "FASTLORA_DISABLE is set"),
    ],
)
def test_another_peft_or_a_switch_is_a_note(capsys, monkeypatch, version, text):
    if version:
        monkeypatch.setattr(peft, "__version__", version)
    else:
        monkeypatch.setenv("FASTLORA_DISABLE", "1")
    found = examined(capsys)
    assert found["fastlora.optimize"]["PEFT"].startswith(text)
    assert ("self-test, relative errors" in found) == (version == "0.99.0")
    assert found["settings"].get("FASTLORA_DISABLE") == os.environ.get("FASTLORA_DISABLE")


@pytest.mark.parametrize(
    ("triton", "pytorch", "has_gpu", "note"),
    [
        ("3.9.0", "2.13.0+cpu", False, ": PyTorch 2.13 for GPUs comes with 3.7; a CPU needs no "),
        ("3.9.0", "2.11.0", True, ": PyTorch 2.11 for GPUs comes with 3.6; pip install 'triton=="),
        ("3.7.1", "2.13.0", True, ""),
        ("not installed", "2.13.0", False, ""),
        ("3.9.0", "3.0.0a0", True, ""),  # not known
    ],
)
def test_a_triton_of_another_pytorch_is_named(triton, pytorch, has_gpu, note):
    found = machine.note_of_pair(triton, pytorch, has_gpu)
    assert found.startswith(note)
    assert bool(found) == bool(note)


def test_what_slows_a_gpu_s_steps_is_named(monkeypatch):
    """Synchronizing optimizers, missing kernels, and the search for unused parameters."""
    installed = {"bitsandbytes": "0.50.2", "transformers": "5.24.0"}
    monkeypatch.setattr(machine, "version_of", lambda name: installed.get(name, ""))
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu = [CPU, torch.device("cuda", 0)]
    assert machine.slow_steps([CPU]) == {}
    found = machine.slow_steps(gpu)
    assert found.keys() == {"bitsandbytes", "linear attention", "DDP"}
    assert "adamw_8bit" in found["bitsandbytes"]
    assert "pip install flash-linear-attention" in found["linear attention"]
    assert "ddp_find_unused_parameters=False" in found["DDP"]
    monkeypatch.setattr(machine, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    installed.pop("bitsandbytes")
    assert machine.slow_steps(gpu) == {}


def test_without_triton_and_peft_it_is_no_fault_and_an_import_brings_no_doctor():
    code = (
        "import sys; sys.modules['triton'] = sys.modules['peft'] = None; import fastlora;"
        "assert not [name for name in sys.modules if 'doctor' in name];"
        "from fastlora.__main__ import main; sys.exit(main(['doctor', '--json']))"
    )
    found = json.loads(run_python("-c", code))
    assert found["versions"]["triton"] == found["versions"]["peft"] == "not installed"
    assert "the package triton isn't installed" in found["backends"]["triton on cpu"]
    assert "self-test, relative errors" not in found


def test_a_triton_that_fails_to_import_is_the_cause_that_is_shown(tmp_path):
    """Such as a wheel that needs a newer libstdc++; an op on its backend says the same."""
    cause = "libstdc++.so.6: version `GLIBCXX_3.4.32' not found"
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text(f'raise ImportError("{cause}")')
    code = """if True:
        import json, sys, torch
        sys.modules["peft"] = None
        import fastlora
        from fastlora.doctor import examine
        broken, x = examine().broken, torch.ones(2, 2)
        try:
            fastlora.lora_linear(x, x, x, x, backend="triton")
        except ImportError as error:
            print(json.dumps([broken, str(error)]))"""
    broken, said = json.loads(run_python("-c", code, PYTHONPATH=str(tmp_path)))
    shown = [text for text in broken if text.startswith("triton is installed, but can't be import")]
    for text in (*shown, said):
        assert cause in text
        assert "pip install --editable" not in text
    assert len(shown) == 1


def test_without_arguments_it_prints_usage():
    printed = run_python("-m", "fastlora")
    assert printed.startswith("usage: python -m fastlora")
    assert "fastlora.estimate(model)" in printed
