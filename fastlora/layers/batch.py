"""Runs a model on one batch: the call, its loss, and restoring the model's state afterwards."""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..formats import PackedLayer, quantized_weight

_SEED = 20240229  # arbitrary, the same for every run


def seed_all() -> None:
    """Set the random states of torch, Python and numpy (if imported) to fixed values."""
    torch.manual_seed(_SEED)
    random.seed(_SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(_SEED)


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a mapping (keyword arguments), a sequence (arguments), or a tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, Sequence) else model(batch)


def loss_and_outputs(output: Any) -> tuple[Tensor, dict[str, Tensor], bool]:
    """A model's loss, its other floating tensors by key or by number, and whether it has a loss.

    The loss is the sum of the output's ``loss``.  Without one it is a random linear combination of
    all outputs, with the same coefficients each time.  Raises ValueError for an output without a
    floating tensor.
    """
    items = output.items() if isinstance(output, Mapping) else {"output": output}.items()
    outputs: dict[str, Tensor] = {}
    for key, value in items:
        leaves = [v for v in tree_leaves(value) if isinstance(v, Tensor) and v.is_floating_point()]
        outputs |= {key if len(leaves) == 1 else f"{key}[{i}]": v for i, v in enumerate(leaves)}
    loss = outputs.pop("loss", None)
    if loss is None:
        if not outputs:
            raise ValueError(
                f"the model returned {type(output).__name__}, without a float tensor: let it "
                "return the loss or the logits"
            )
        # On the CPU, so that models on all devices get the same coefficients.
        draw = torch.Generator().manual_seed(_SEED)
        options: Any = {"dtype": torch.float32, "device": "cpu", "generator": draw}
        sums = [(y * torch.randn(y.shape, **options).to(y)).sum() for y in outputs.values()]
        return torch.stack(sums).sum(), outputs, False
    return loss.sum(), outputs, True


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter has a gradient.  At the end everything except weights is restored.

    That is gradients, buffers and random states.  The runs inside must not change weights.
    """
    parameters = list(model.parameters())
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters):
        raise ValueError(
            "a hook runs when a gradient is ready (an optimizer inside of backward?), and would "
            "change the model: do this before you register the hook"
        )
    # Gradients with copies of their values: under DDP they are views of its buckets, which the runs
    # overwrite.
    gradients = [None if p.grad is None else (p.grad, p.grad.clone()) for p in parameters]
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    numpy, state = sys.modules.get("numpy"), random.getstate()  # some models draw numbers from both
    numpy_state = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices), kept_buffers(model):
        for parameter in parameters:
            parameter.grad = None
        try:
            yield
        finally:
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
            with torch.no_grad():
                for parameter, saved in zip(parameters, gradients, strict=True):
                    parameter.grad = None if saved is None else saved[0].copy_(saved[1])


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """At the end, every buffer is the same object with the same values as at the start.

    A forward may write to a buffer or replace it.  Buffers of quantized layers are skipped, because
    they hold the weight, which no call changes.
    """
    buffers = [
        (module, {name: b if b is None else (b, b.clone()) for name, b in module._buffers.items()})
        for module in model.modules()
        if module._buffers and not isinstance(quantized_weight(module), PackedLayer)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, before in buffers:
                # Also drops buffers that the call has added.
                module._buffers.clear()
                for name, saved in before.items():
                    module._buffers[name] = None if saved is None else saved[0].copy_(saved[1])


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Inside, the model is in training or evaluation mode; at the end each mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
