"""A trial of a PEFT that the tests weren't run with: small layers, PEFT's forward and the fast one.

It asks whether PEFT means what the fast path takes it to mean, so that the CPU and torch's backend
will do, and random states and settings of the process are as before when it ends.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import use_backend
from ..ops.autocast import autocast_off
from . import moment
from .versions import pass_verdict

_IN, _OUT = 10, 7
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # tests ask for far less of each op
_SEED = 20240229  # any number


@dataclass(frozen=True)
class _Part:
    """A small layer that stands for something the fast path covers."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    adapters: tuple[str, ...] = ("default",)
    dtype: torch.dtype = torch.float32
    conv1d: bool = False
    trains: bool = True


_DORA = {"use_dora": True}
_LORA_PARTS = (
    _Part("a plain layer"),
    _Part("a layer in evaluation", {"lora_dropout": 0.5}, trains=False),
    _Part("dropout", {"lora_dropout": 0.5}),
    _Part("trained biases", {"bias": "all", "lora_bias": True}),
    _Part("rsLoRA", {"use_rslora": True}),
    _Part("two adapters", adapters=("a", "b")),
    _Part("bfloat16", dtype=torch.bfloat16),
    _Part("Conv1D", {"fan_in_fan_out": True}, conv1d=True),
)
_DORA_PARTS = (
    _Part("DoRA", _DORA),
    _Part("DoRA with dropout", _DORA | {"lora_dropout": 0.5}),
    _Part("DoRA in evaluation", _DORA | {"lora_dropout": 0.5}, trains=False),
)


def try_out() -> str:
    """Compare both forwards on every part, and pass a verdict on the PEFT that is imported.

    Whatever goes wrong is a disagreement too: an error, or a private module of PEFT's that moved.
    Returns why there can be no trial at this moment, and then no verdict is passed; "" usually.
    """
    reason = moment.why_not_here()
    if reason:
        return f"no self-check of this version of PEFT is possible now: {reason}"
    with moment.on_trial():
        lora = _first_disagreement(_LORA_PARTS)
        pass_verdict(lora, "" if lora else _first_disagreement(_DORA_PARTS))
    return ""


def _first_disagreement(parts: tuple[_Part, ...]) -> str:
    for part in parts:
        try:
            with _usual_settings():
                reason = _why_not_same(part)
        except Exception as error:
            return _failed(part.name, error)
        if reason:
            return f"a self-check of {part.name} disagreed with PEFT's own forward: {reason}"
    return ""


def _failed(what: str, error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"a self-check of {what} failed ({type(error).__name__}: {text})"


@contextmanager
def _usual_settings() -> Iterator[None]:
    """Whatever the caller has set: the CPU, gradients, no autocast, no warnings, seeds put back."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(autocast_off("cpu"))
        stack.enter_context(use_backend("torch"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(_SEED)
        yield


def _why_not_same(part: _Part) -> str:
    """What differs between PEFT's forward and the fast one; "" if nothing does."""
    from . import masks, records, swap

    model = _adapted(part)
    layers = [layer for layer in model.modules() if isinstance(layer, records.LoraLayer)]
    if not layers:
        return "PEFT made no LoRA layer"
    x, dy = (torch.randn(2, 5, size).to(part.dtype) for size in (_IN, _OUT))
    with masks.shared_masks(model):
        theirs = _numbers(model, x, dy)
        swap.swap_all(layers)
        (record,) = records.records(model, [("", layer) for layer in layers], "it stayed PEFT's")
        if not record.fast:
            return record.reason
        ours = _numbers(model, x, dy)
    if ours.keys() != theirs.keys():
        return f"gradients for {', '.join(sorted(ours.keys() ^ theirs.keys()))} in one alone"
    for name, their in theirs.items():
        size, distance = their.norm().item(), (ours[name] - their).norm().item()
        if not distance <= _TOLERANCES[part.dtype] * size:  # true for NaN
            return f"{name} by {distance / size if size else distance:.2g}"
    return ""


def _adapted(part: _Part) -> nn.Module:
    peft = sys.modules["peft"]
    base: nn.Module = nn.Linear(_IN, _OUT, dtype=part.dtype)
    if part.conv1d:
        # PEFT imports it; where it doesn't, this is an error, and so a disagreement.
        conv1d = sys.modules["transformers.pytorch_utils"].Conv1D
        base = conv1d(_OUT, _IN).to(part.dtype)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["0"], "init_lora_weights": False}
    config = peft.LoraConfig(**settings | part.config)
    first, *others = part.adapters
    model = peft.get_peft_model(
        nn.Sequential(base), config, first, autocast_adapter_dtype=part.dtype == torch.float32
    )
    for name in others:
        model.add_adapter(name, config)
    if others:
        model.base_model.set_adapter(list(part.adapters))
    with torch.no_grad():  # so that no magnitude, bias or adapter is where it can hide
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.train(part.trains)


def _numbers(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of x and of all that trains, from one random state."""
    leaf = x.clone().requires_grad_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.default_generator.manual_seed(_SEED)
    y = model(leaf)
    leaves = {"the gradient of x": leaf}
    leaves |= {f"the gradient of {name.rpartition('0.')[2]}": p for name, p in trained.items()}
    found = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    numbers = zip(leaves, found, strict=True)
    tensors = {name: gradient for name, gradient in numbers if gradient is not None}
    return {"the output": y.detach().double()} | {n: t.double() for n, t in tensors.items()}
