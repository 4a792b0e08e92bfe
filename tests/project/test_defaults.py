"""Nothing depends on torch's default dtype or device, whatever a caller has made of them."""

import ast
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from call_kinds import KINDS, made
from marks import pairwise
from models import Mlp, adapt, tiny_llama
from packed import MAKERS
from torch import Tensor, nn
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten

import fastlora
from fastlora.backends import BACKENDS
from fastlora.doctor import peft_checks, relative_errors
from fastlora.doctor.launches import Asked, would_run
from fastlora.estimates import kept_bytes
from fastlora.formats.packing import KINDS as PACKED_KINDS
from fastlora.formats.packing import pack_weight, packing_error

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "fastlora").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
# What makes a tensor of no other one, by torch's own list.
FACTORIES = {function.__name__ for function in _device_constructors()}


def factory_calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Of torch's factories, and of its modules that have parameters."""
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
            given = {word.arg for word in call.keywords}  # None: of **
            if None not in given and not {"dtype", "device"} <= given:
                missing.append(f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}")
    assert found > 20
    assert not missing, "\n".join(missing)


def test_nobody_asks_what_the_defaults_are_nor_hides_a_factory():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("get_default_dtype", "get_default_device"), path
            elif isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert not {name.name for name in node.names} & FACTORIES, path


def forget() -> None:
    """What functions of the package keep for all calls is made anew."""
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
defaults = pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)


def assert_same(value: torch.dtype | str, work: Callable[[], object]) -> None:
    """The same, to the last bit, as under torch's own defaults."""
    torch.manual_seed(0)
    expected = work()
    with default(value):
        torch.manual_seed(0)
        found = work()
    (ours, shape), (theirs, expected_shape) = tree_flatten(found), tree_flatten(expected)
    assert shape == expected_shape
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other


@defaults
@pytest.mark.parametrize("name", MAKERS)
def test_reading(name, value):
    weight = MAKERS[name]()
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    assert_same(value, lambda: [weight.dense(dtype) for dtype in floats])


@defaults
@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_packing(kind, value):
    """Halfway values too, which go to the even code."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(8)
    weights = torch.randn(3, 64, 64), torch.stack([halves, -halves, halves * 448 / 6])

    def work():
        packed = [pack_weight(weight, kind) for weight in weights]
        errors = [packing_error(*both) for both in zip(weights, packed, strict=True)]
        return [[*map(bytes_of, one.tensors)] for one in packed], errors

    assert_same(value, work)


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pairwise({"name": {name: name for name in KINDS}, "value": VALUES, "backend": ["torch", "triton"]})
def test_calls(name, value, backend):
    kind = made(name)
    leaves = [tensor for tensor in kind.tensors.values() if tensor.requires_grad]

    def work():
        torch.default_generator.manual_seed(3)
        with fastlora.use_backend(backend):
            y = kind.call(*kind.tensors.values(), dropout=0.4)
        return [y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)]

    assert_same(value, work)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


class Models(NamedTuple):
    plain: nn.Module
    adapted: nn.Module
    theirs: nn.Module  # of PEFT's


def apply(models: Models, folder: Path) -> object:
    made = [
        fastlora.apply_lora(
            copy.deepcopy(models.plain),
            fastlora.LoRAConfig(r=3, target_modules="all-linear", **more),
        )
        for more in ({}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": False})
    ]
    return [one.state_dict() for one in made]


def train(models: Models, folder: Path) -> object:
    models.adapted(X).square().sum().backward()
    return {name: parameter.grad for name, parameter in models.adapted.named_parameters()}


def merge(models: Models, folder: Path) -> object:
    states = []
    for change in (fastlora.merge_lora, fastlora.unmerge_lora, fastlora.remove_lora):
        states.append(copy.deepcopy(change(models.adapted).state_dict()))
    return states


def files(models: Models, folder: Path) -> object:
    """Written, cut, put together, and read."""
    fastlora.save_adapter(models.adapted, folder / "whole")
    spectra = fastlora.resize_adapter(folder / "whole", rank=2, output=folder / "cut")
    folders = [folder / "whole", folder / "cut"]
    fastlora.combine_adapters(folders, [0.5, -1.0], folder / "both", rank=4)
    read = [
        fastlora.load_adapter(copy.deepcopy(models.plain), folder / name).state_dict()
        for name in ("whole", "cut", "both")
    ]
    return read, str(spectra)


def plan(models: Models, folder: Path) -> object:
    config = fastlora.LoRAConfig(target_modules="all-linear")
    rank_costs = fastlora.estimate(
        models.plain, [2, 4], config=config, batch=[X], rounds=0
    ).rank_costs
    return [str(cost) for cost in rank_costs], kept_bytes(models.adapted, [X])


def check(models: Models, folder: Path) -> object:
    """Its random combination of the outputs, too."""
    found = fastlora.check(models.theirs, [X])
    return repr((found.loss, found.outputs, found.gradients))


def doctor(models: Models, folder: Path) -> object:
    cpu, asked = torch.device("cpu"), Asked(64, 64, 64, 4, target="sm_90", dropout=0.1)
    errors = [relative_errors(name, cpu, torch.float32) for name in BACKENDS]
    return errors, would_run(asked, cpu), [bool(check) for check in peft_checks().values()]


@defaults
@pytest.mark.parametrize("work", [apply, train, merge, files, plan, check, doctor])
def test_models(work, value, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    models = (
        Mlp(), adapt(Mlp(), r=3, target_modules="all-linear"), peft.get_peft_model(Mlp(), config),
    )  # fmt: skip
    folders = iter([tmp_path / "before", tmp_path / "under"])
    assert_same(value, lambda: work(Models(*map(copy.deepcopy, models)), next(folders)))


def test_a_sweep(tmp_path):
    model, folders = tiny_llama(), iter([tmp_path / "before", tmp_path / "under"])
    rows = torch.randint(0, 100, (4, 2, 7))
    data = [{"input_ids": row, "labels": row} for row in rows]
    trials = [{"r": 2, "learning_rate": 1e-2}, {"r": 3, "learning_rate": 1e-3}]

    def work():
        found = fastlora.sweep(
            copy.deepcopy(model), trials, data[:3], eval_data=data[3:], steps=2, seed=0,
            output_dir=next(folders), progress=False,
        )  # fmt: skip
        return [outcome.loss for outcome in found.outcomes]

    assert_same(torch.bfloat16, work)
