"""Nothing depends on torch's default dtype or device, even if the caller has changed them."""

import ast
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from call_kinds import KINDS, made
from marks import pairwise
from models import Mlp, adapt
from peft_models import assert_same
from torch import nn
from torch.utils._device import _device_constructors

import fastlora

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "fastlora").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
# Functions that make a tensor without taking one, from torch's own list.
FACTORIES = {function.__name__ for function in _device_constructors()}


def factory_calls(tree: ast.AST) -> Iterator[ast.Call]:
    """The calls of torch's factories, and of torch.nn modules that have parameters."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        *before, last = ast.unparse(node.func).split(".")
        is_layer = before[-1] == "nn" and hasattr(getattr(nn, last, None), "reset_parameters")
        if is_layer or (before[0] == "torch" and (last in FACTORIES or last.endswith("Tensor"))):
            yield node


def test_every_factory_is_told_dtype_and_device():
    found, missing = 0, []
    for path in FILES:
        for call in factory_calls(ast.parse(path.read_text())):
            found += 1
            given = {word.arg for word in call.keywords}  # None stands for ``**``
            if None not in given and not {"dtype", "device"} <= given:
                missing.append(f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}")
    assert found > 20
    assert not missing, "\n".join(missing)


def test_no_file_reads_the_defaults_or_imports_a_factory_by_name():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("get_default_dtype", "get_default_device"), path
            elif isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert not {name.name for name in node.names} & FACTORIES, path


def forget() -> None:
    """Clear the package's caches, which may hold results for other defaults."""
    for name, module in [*sys.modules.items()]:
        for value in vars(module).values() if name.startswith("fastlora") else ():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@contextmanager
def default(value: torch.dtype | str) -> Iterator[None]:
    is_dtype, before = isinstance(value, torch.dtype), torch.get_default_dtype()
    forget()
    try:
        torch.set_default_dtype(value) if is_dtype else torch.set_default_device(value)
        yield
    finally:
        torch.set_default_dtype(before) if is_dtype else torch.set_default_device(None)
        forget()


VALUES = {"bf16": torch.bfloat16, "f64": torch.float64, "meta": "meta"}


def assert_independent(value: torch.dtype | str, work: Callable[[], object]) -> None:
    """Require the bits that ``work`` computes under torch's original defaults."""
    torch.manual_seed(0)
    expected = work()
    with default(value):
        torch.manual_seed(0)
        found = work()
    assert_same(found, expected, 0.0)


@pairwise({"name": {name: name for name in KINDS}, "value": VALUES, "backend": ["torch", "triton"]})
def test_calls(name, value, backend):
    kind = made(name)
    leaves = [tensor for tensor in kind.tensors.values() if tensor.requires_grad]

    def work():
        torch.default_generator.manual_seed(3)
        with fastlora.use_backend(backend):
            y = kind.call(*kind.tensors.values(), dropout=0.4)
        return [y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)]

    assert_independent(value, work)


def test_models(tmp_path):
    """A model is adapted, trained and merged; its files are written, resized, combined and read."""
    plain = Mlp()
    adapted = adapt(copy.deepcopy(plain), r=3, target_modules="all-linear")
    folders = iter([tmp_path / "before", tmp_path / "under"])
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))

    def work():
        folder = next(folders)
        own, model = copy.deepcopy(plain), copy.deepcopy(adapted)
        fastlora.replace_linears(own, ["up", "down"], r=3, lora_alpha=6)
        fastlora.optimize(model)
        model(x).square().sum().backward()
        states = [own.state_dict(), model.state_dict()]
        states.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.save_pretrained(folder / "whole")
        spectra = fastlora.resize_adapter(folder / "whole", rank=2, output=folder / "cut")
        pair = [folder / "whole", folder / "cut"]
        fastlora.combine_adapters(pair, [0.5, -1.0], folder / "both", rank=4)
        for name in ("whole", "cut", "both"):
            read = fastlora.load_adapter(copy.deepcopy(plain), folder / name)
            states.append(read.state_dict())
        with fastlora.merged(model):
            states.append(copy.deepcopy(model.state_dict()))
        states.append(model.merge_and_unload().state_dict())
        return states, str(spectra)

    assert_independent(torch.bfloat16, work)
