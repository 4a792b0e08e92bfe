"""The user's own batch as the judge: PEFT's forward and the fast one, side by side."""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..formats import PackedLayer, quantized_weight
from ..layers import mlp
from ..layers.batch import call, loss_and_outputs, seed_all, undisturbed
from ..layers.modules import plain_name, some, unwrap
from ..projection import HALF_DTYPES, is_number, shown
from ..report import Coverage
from .optimize import optimize, peft_layers

# The relative difference that is put down to rounding, by the coarsest dtype of the run.  In 16
# bits it is that of two blocks, and grows as √(blocks - 1): over 40 random qwen3 models in bfloat16
# the largest were 0.05 with 2 blocks, 0.19 with 8, 0.31 with 16, 0.42 with 32.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Difference:
    """‖fast - PEFT‖ / ‖PEFT‖ of one tensor; infinite where one is missing or PEFT's alone is 0."""

    name: str
    relative: float


@dataclass(frozen=True)
class Check:
    """How far the fast path was from PEFT's on one batch.  True if that can be rounding."""

    loss: Difference
    outputs: tuple[Difference, ...]
    gradients: tuple[Difference, ...]  # of every parameter that trains, and of inputs
    layers: tuple[Difference, ...]  # of every LoRA layer with gradients: the largest of them
    tolerance: float
    coverage: Coverage  # of the fast run
    dtype: torch.dtype = (
        torch.float32
    )  # the coarsest of the parameters, of autocast, of quantized layers

    @property
    def largest(self) -> Difference:
        return max((self.loss, *self.outputs, *self.gradients), key=_size)

    def __bool__(self) -> bool:
        return self.largest.relative <= self.tolerance  # false for NaN

    def __str__(self) -> str:
        verdict = "the same within rounding" if self else "NOT the same"
        lines = [
            f"fastlora ({self.coverage.counts}) and PEFT: {verdict} "
            f"(relative differences, tolerance {self.tolerance:g})",
            f"  loss {self.loss.relative:.2g}",
        ]
        for kind, differences in (("output", self.outputs), ("gradient", self.gradients)):
            if differences:
                worst = max(differences, key=_size)
                lines.append(
                    f"  {len(differences)} {kind}s: up to {worst.relative:.2g}, {worst.name}"
                )
        for layer in sorted(self.layers, key=_size, reverse=True)[:5]:
            lines.append(f"    {layer.name}: {layer.relative:.2g}")
        checked = {layer.name for layer in self.layers}
        idle = [
            one.name for one in self.coverage.layers if one.runs_adapter and one.name not in checked
        ]
        if self.gradients and idle:
            lines.append(
                f"  {len(idle)} layers without a gradient: {some(idle)}: frozen, or nothing called "
                "them with this batch"
            )
        if self.dtype in HALF_DTYPES:
            hint = (
                "small differences hide in the rounding of 16 bits: compare in float32 to see them"
                if self
                else "the rounding of 16 bits alone can do that: compare in float32 before you "
                "take it for a defect"
            )
            lines.append(f"  {hint} (model.float(), without autocast)")
        lines += [f"  note: {note}" for note in self.coverage.notes]
        return "\n".join(lines)


def check(model: nn.Module, batch: Any, *, tolerance: float | None = None) -> Check:
    """Run ``batch`` through PEFT's forward and through the fast one, and compare all numbers.

    ``model`` holds PEFT LoRA layers, optimized or not; ``batch`` is what it is called with: a
    mapping (keyword arguments), a tuple or list (arguments) or one tensor.  Both runs have the same
    dropout masks and, for the rest, the same random state.  The loss is the output's ``loss``, or
    else a fixed random combination of all outputs.  Compared are the loss, every floating tensor of
    the output, and the gradient of every parameter that trains and of every input that requires it.

    The model runs in the mode it is in: ``model.train()`` includes dropout.  Take one that has
    trained a few steps: while lora_B is zero, outputs and lora_A's gradients say little.

    It changes nothing: the batch is copied, and gradients, buffers, random states (also Python's
    and numpy's) and the layers' classes are put back.  It needs memory
    for two sets of gradients and outputs, and a copy of the batch, beside the model.

    ``tolerance``: the largest relative difference that is taken for rounding; by default 1e-3 for
    a float32 model, 0.02 with float16 parameters or autocast, 0.1 with bfloat16, and for more than
    two blocks these two times √(blocks - 1).  In a deep model both paths are that far from the
    truth: compare in float32 to see more.

    Raises what :func:`fastlora.optimize` raises, and ValueError if no layer would run fast, for a
    negative tolerance, or if an optimizer steps inside of backward; and what the model raises.
    """
    if tolerance is not None and not (is_number(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance is {shown(tolerance)}, but must be a number of at least 0")
    inner = unwrap(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PEFT .* is newer")  # which asks for this
        optimized = optimize(model)
    with optimized as report:
        from .baseline import shared_masks  # here, since they import PEFT
        from .layer import swapped_back

        if not any(layer.runs_adapter for layer in report.layers):
            raise ValueError(
                f"there is nothing to compare, no layer runs its adapter fast: {report}"
            )
        with shared_masks(inner):
            with undisturbed(inner):
                fast = _run(model, batch)
            with swapped_back(inner), undisturbed(inner):
                peft = _run(model, batch)
    packed = [quantized_weight(module) for module in inner.modules()]
    used = {layer.compute_dtype for layer in packed if isinstance(layer, PackedLayer)}
    used |= {p.dtype for p in inner.parameters()} | fast.autocast | peft.autocast
    dtype = max((dtype for dtype in _TOLERANCES if dtype in used), key=_TOLERANCES.__getitem__)
    if tolerance is None:
        # Blocks are counted by the numbers in layers' names.
        parts = [part for layer in report.layers for part in layer.name.split(".")]
        last = max([int(part) for part in parts if part.isdigit()], default=0)
        deeper = math.sqrt(max(1, last)) if dtype in HALF_DTYPES else 1.0
        tolerance = _TOLERANCES[dtype] * deeper
    gradients, layers = _differences(fast.gradients, peft.gradients), []
    for layer in report.layers:
        of_layer = [g for g in gradients if plain_name(g.name).startswith(f"{layer.name}.")]
        if of_layer:
            layers.append(Difference(layer.name, max(of_layer, key=_size).relative))
    return Check(
        _differences(fast.loss, peft.loss)[0],
        _differences(fast.outputs, peft.outputs),
        gradients,
        tuple(layers),
        tolerance,
        Coverage(report.layers, report.notes, report.frozen, report.blocks),
        dtype,
    )


class _Run(NamedTuple):
    """What one run computed, by name; and the dtypes of autocast where LoRA layers were called."""

    loss: dict[str, Tensor]
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    autocast: set[torch.dtype]


def _run(model: nn.Module, batch: Any) -> _Run:
    inner = unwrap(model)
    seed_all()
    inner.zero_grad()
    batch = tree_map(_fresh, dict(batch) if isinstance(batch, Mapping) else batch)
    with _noted_autocast(inner) as autocast:
        output = call(model, batch)
    loss, outputs = loss_and_outputs(output)
    if loss.requires_grad:
        loss.backward()
    inputs = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    named = chain(inner.named_parameters(), ((f"input {i}", x) for i, x in enumerate(inputs)))
    gradients = {name: tensor.grad.clone() for name, tensor in named if tensor.grad is not None}
    return _Run({"loss": loss.detach()}, outputs, gradients, autocast)


def _fresh(value: Any) -> Any:
    """A copy of a part of the batch: a model may write to it, or fill its gradient."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    try:
        return copy.deepcopy(value)
    except TypeError:  # it can't be copied
        return value


@contextmanager
def _noted_autocast(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """The dtypes of the autocast that LoRA layers are called under, inside; e.g. accelerate's.

    Of a block the block is asked: a hook on one of its layers would send it layer by layer.
    """
    dtypes = set()
    blocks = [module for module in model.modules() if isinstance(module, mlp.GatedMLP)]
    inside = {part for block in blocks for part in block.children()}
    layers = [layer for _, layer in peft_layers(model) if layer not in inside]

    def note(_, args):
        device = args[0].device.type if args and isinstance(args[0], Tensor) else "cpu"
        if not torch.compiler.is_compiling() and torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))

    with ExitStack() as handles:
        for module in (*blocks, *layers):
            handles.callback(module.register_forward_pre_hook(note).remove)
        yield dtypes


def _differences(fast: dict[str, Tensor], peft: dict[str, Tensor]) -> tuple[Difference, ...]:
    differences = []
    for name in {**peft, **fast}:
        one, other, relative = fast.get(name), peft.get(name), float("inf")
        if one is not None and other is not None and one.shape == other.shape:
            size, distance = other.double().norm(), (one.double() - other.double()).norm()
            relative = (distance / size).item() if distance else 0.0
        differences.append(Difference(name, relative))
    return tuple(differences)


def _size(difference: Difference) -> float:
    """Its place in an order in which NaN is largest."""
    return float("inf") if math.isnan(difference.relative) else difference.relative
