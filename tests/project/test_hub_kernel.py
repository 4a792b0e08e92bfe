"""tools/hub_kernel.py: a package that Hugging Face's ``kernels`` loads, and its card's example."""

import base64
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from hub_kernel import __main__ as hub_kernel
from marks import DEVICE
from process import run_forked, run_python

CARD = (hub_kernel.PACKAGE / "CARD.md").read_text()
EXAMPLE = re.findall(r"^```python\n(.*?)^```", CARD, re.M | re.S)[-1]
OLD = "fastlora_kernels/__init__.py"  # for old clients


@pytest.fixture
def folder(tmp_path) -> Path:
    hub_kernel.write(tmp_path / "hub")
    return tmp_path / "hub"


def test_it_has_the_kernels_as_they_are_and_their_digests(folder):
    files = {path.name: path.read_bytes() for path in hub_kernel.KERNELS.glob("*.py")}
    files["layers.py"] = (hub_kernel.PACKAGE / "layers.py").read_bytes()
    files["__init__.py"] = (folder / "torch-ext" / "fastlora_kernels" / "__init__.py").read_bytes()
    assert files["__init__.py"].startswith((hub_kernel.KERNELS / "__init__.py").read_bytes())
    places = [folder / "torch-ext" / "fastlora_kernels", *(folder / "build").iterdir()]
    assert {place.name for place in places} == {"fastlora_kernels", "torch-cuda", "torch-rocm"}
    for place in places:
        assert {path.name: path.read_bytes() for path in place.glob("*.py")} == files
    for build in places[1:]:
        metadata = json.loads((build / "metadata.json").read_text())
        assert metadata["id"].isidentifier()
        assert metadata["backend"]["archs"] == hub_kernel.ARCHS[metadata["backend"]["type"]]
        assert build.name == f"torch-{metadata['backend']['type']}"
        files[OLD] = (build / OLD).read_bytes()
        digests = {name: hashlib.sha256(text).digest() for name, text in files.items()}
        listed = metadata["digest"]["files"]
        assert {name: base64.b64decode(text) for name, text in listed.items()} == digests
    with pytest.raises(FileExistsError):
        hub_kernel.write(folder)


def test_a_build_offers_its_layers_by_either_file(folder):
    """Old clients import the folder in a build; each has the launchers and the layers."""
    code = """if True:
        import sys
        from importlib.util import module_from_spec, spec_from_file_location
        for number, path in enumerate(sys.argv[1:]):
            name = f"_hash_{number}"
            spec = spec_from_file_location(name, path)
            module = sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(module)
            assert module.__all__ == ["launchers", "layers"]
            assert module.launchers.project.__name__ == "project"
            print(module.layers.LoRALinear.__name__)"""
    paths = [folder / "build" / "torch-cuda" / file for file in ("__init__.py", OLD)]
    printed = run_forked(code, *paths, TRITON_INTERPRET="1")
    assert printed.split() == ["LoRALinear"] * 2


def test_the_package_s_own_tests_pass(folder, monkeypatch):
    """Run them as a user who has only the package: its layer, forward and backward."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Ignore the settings of folders around the temporary one.
    alone = ("-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider")
    printed = run_python("-m", "pytest", "-q", *alone, "tests", cwd=folder)
    assert "9 passed" in printed


def test_the_card_s_example_is_the_formula():
    from fastlora.kernels import launchers

    shapes = {"x": (34, 40), "weight": (48, 40), "lora_a": (8, 40), "lora_b": (48, 8)}
    tensors = {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()}
    dy, scale = torch.randn(34, 48, device=DEVICE), 2.0
    scope = {"torch": torch, "k": launchers, "dy": dy, "scale": scale, **tensors}
    exec(EXAMPLE, scope)
    x, weight, a, b = (tensor.double().requires_grad_() for tensor in tensors.values())
    y = x @ weight.T + scale * x @ a.T @ b.T
    wanted = [y, *torch.autograd.grad(y, (x, a, b), dy.double())]
    for name, want in zip(("y", "dx", "dA", "dB"), wanted, strict=True):
        torch.testing.assert_close(scope[name].double(), want.detach(), rtol=1e-4, atol=1e-4)
