"""Compares PEFT's forward with the fast forward on a batch: ``fastlora.check``."""

import copy
import math
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..call.projection import HALF_DTYPES
from ..common.text import shown
from ..common.values import is_number, must
from ..layers.batch import call, loss_and_outputs, seed_all, undisturbed
from ..layers.classes import changed_classes, own_classes
from ..layers.modules import some, unwrap
from ..layers.report import Coverage
from ..peft.head import own_heads
from ..peft.optimized import while_optimized

if TYPE_CHECKING:  # it imports PEFT
    from ..peft.layer_check import LayerCheck

# The largest relative difference between two runs of a model that counts as rounding, by the
# coarsest dtype of the run.  In 16 bits only the model's own loss counts.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Difference:
    """‖fast - PEFT‖ / ‖PEFT‖ of one tensor.

    It is infinite if one of the two runs lacks the tensor, or if the tensor is zero only in PEFT's
    run.
    """

    name: str
    relative: float


@dataclass(frozen=True)
class Check:
    """The differences between fastlora and PEFT on one batch.

    ``bool(check)`` is True if rounding explains them.

    ``loss``, ``outputs`` and ``gradients`` compare two runs of the whole model.  In 16 bits, only
    the loss counts.  ``layers`` compares each layer on the same inputs, which finds much smaller
    faults.
    """

    loss: Difference
    outputs: tuple[Difference, ...]
    gradients: tuple[Difference, ...]  # for every parameter that trains, and for inputs
    layers: tuple["LayerCheck", ...]  # one for each fast LoRA layer or gated MLP that was called
    tolerance: float  # for loss, outputs and gradients; in 16 bits, for the loss
    coverage: Coverage  # of the fast run
    # The coarsest dtype among parameters, autocast and quantized layers.
    dtype: torch.dtype = torch.float32
    filled: tuple[str, ...] = ()  # layers whose lora_B was zero, and random while they were judged
    zeros: tuple[str, ...] = ()  # results of layers that were zero, so that they tested nothing

    @property
    def largest(self) -> Difference:
        return max((self.loss, *self.outputs, *self.gradients), key=_size)

    def __bool__(self) -> bool:
        # A NaN compares false.
        of_run = math.inf if self.dtype in HALF_DTYPES else self.tolerance
        is_near = self.loss.relative <= self.tolerance and self.largest.relative <= of_run
        return is_near and all(self.layers)

    def __str__(self) -> str:
        verdict = "the same within rounding" if self else "NOT the same"
        is_half = self.dtype in HALF_DTYPES
        judged = f"tolerance {self.tolerance:.2g}{' of the loss' * is_half}"
        lines = [
            f"fastlora ({self.coverage.counts}) and PEFT: {verdict}",
            *self._layer_lines(),
            f"  the whole model (relative differences, {judged}): loss {self.loss.relative:.2g}",
        ]
        for kind, differences in (("output", self.outputs), ("gradient", self.gradients)):
            if differences:
                worst = max(differences, key=_size)
                lines.append(
                    f"    {len(differences)} {kind}s: up to {worst.relative:.2g}, {worst.name}"
                )
        if is_half and all(self.layers) and not self.largest.relative <= self.tolerance:
            lines.append(
                "    every judged layer is right.  16 bits round much in a deep model, and in a "
                "mixture tokens may take other routes: compare in float32 before you report a "
                "defect (model.float(), without autocast)"
            )
        lines += [f"  note: {note}" for note in self.coverage.notes]
        return "\n".join(lines)

    def _layer_lines(self) -> list[str]:
        expected = [one.name for one in self.coverage.layers if one.runs_adapter]
        # A judged gated MLP judges the layers inside of it.
        units = tuple([f"{layer.name}." for layer in self.layers])
        missing = [name for name in expected if not f"{name}.".startswith(units)]
        judged = f"{len(expected) - len(missing)} of {len(expected)} fast layers"
        wrong = [layer for layer in self.layers if not layer]
        lines = [
            f"  each layer on the same inputs, beside exact results: {judged} judged, "
            f"{f'{len(wrong)} WRONG' if wrong else 'all right'}"
        ]
        ordered = sorted(wrong or self.layers, key=lambda layer: layer.worst.excess, reverse=True)
        for layer in ordered[: 5 if wrong else 1]:
            lines.append(f"    {layer.name}: {layer.worst}")
        if missing:
            lines.append(
                f"    {len(missing)} not judged: {some(missing)}: nothing called them with this "
                "batch, no gradient reached them, or they are sharded"
            )
        if self.filled:
            lines.append(
                f"    lora_B was zero in {len(self.filled)} layers: they were judged with small "
                "random numbers in its place, to test lora_A's gradient"
            )
        if self.zeros:
            lines.append(
                f"    {len(self.zeros)} results are zero with this batch, and so not tested: "
                f"{some(self.zeros)}"
            )
        return lines


def check(
    model: nn.Module,
    batch: Any,
    *,
    tolerance: float | None = None,
    base: str | None = None,
    int8_from: int = 1024,
) -> Check:
    """Run ``batch`` through PEFT's forward and through the fast one, and compare all numbers.

    ``model`` holds PEFT LoRA layers, optimized or not.  ``batch`` holds the model's inputs: a
    mapping (keyword arguments), a tuple or list (arguments), or one tensor.  Both runs start with
    the same random state and use the same dropout masks.  The loss is the output's ``loss``.  If
    there is none, it is a fixed random combination of all outputs, and its difference is relative
    to the norm of all outputs.

    Each fast LoRA layer, and each gated MLP, runs on the inputs and the output's gradient that it
    has in the model's run: by fastlora, by PEFT, and by PEFT with all tensors in float32 (float64
    for a layer in float32), which counts as exact.  A packed base is dense in the last two runs.
    The adapters are multiplied by a power of two that makes them as large as the base weight, so
    that rounding of the base product hides no fault of theirs.  An output or gradient is right
    under two conditions.  fastlora's error must be at most 2 × PEFT's own error + 2 units in the
    last place.  Neither the result nor the part of it that an adapter makes may be too large or too
    small by more than 2 × PEFT's deviation + 1 % + the effect of rounding with few rows.  In a
    gated MLP each of the three adapters has its own part.  Layers that run PEFT's forward are not
    judged.

    The two runs of the whole model compare the loss, every floating tensor of the output, and the
    gradient of every parameter that trains and of every input that requires it.  In 16 bits, and
    with a base in 8 bits, only the loss counts, if the model returns one: where all layers are
    right, the other differences come from rounding, or from tokens that a router sends to other
    experts.  The report states them.

    The model runs in its current mode: after ``model.train()``, dropout is active, but not
    that of experts, because PEFT has none.  Where lora_B is zero, as in a new adapter, the layer's
    runs have small random numbers in its place.  For packed experts, which PEFT can't compute, each
    of its calls makes dense weights.

    ``base`` and ``int8_from`` are arguments of ``optimize``: a dense model is converted during the
    check.  8-bit products also round x and dy, so there PEFT's error counts as at least 2⁻⁷.

    The call changes nothing: it copies the batch, and restores gradients, buffers, random states
    (also Python's and numpy's) and the layers' classes.  In addition to the model, it needs memory
    for two sets of gradients and outputs, a copy of the batch, the inputs of all judged layers, and
    one layer with its results in the exact dtype.

    ``tolerance``: the largest relative difference between the two runs that counts as rounding.
    The default is 1e-9 for a float64 model, 1e-3 for float32, and 0.1 for the loss in 16 or 8 bits.

    Raises the errors of :func:`fastlora.optimize` and of the model.  Also raises ValueError if the
    model has fastlora's own layers, if no layer would run fast, if the batch holds only text or is
    a list of dicts, if the tolerance is negative, or if an optimizer steps inside of backward.
    """
    is_valid = tolerance is None or (is_number(tolerance) and tolerance >= 0)
    must(is_valid, "tolerance", tolerance, "a number of at least 0")
    is_list = isinstance(batch, list) and any(isinstance(part, Mapping) for part in batch)
    what = "one batch, such as a dict of the model's keyword arguments, and not a list of rows"
    must(not is_list, "batch", batch, what)
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    if leaves and all(isinstance(leaf, str) for leaf in leaves):
        raise ValueError(
            f"batch holds no tensor, but {shown(leaves[0])}: pass the model's inputs, such as "
            "tokenizer(texts, return_tensors='pt')"
        )
    inner = unwrap(model)
    with ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "PEFT .* is newer")  # it asks to call this function
            report = stack.enter_context(while_optimized(model, base, int8_from))
        from ..peft.baseline import shared_masks  # here, because both files import PEFT
        from ..peft.layer_check import Judge, coarsest_dtype

        if not any(layer.runs_adapter for layer in report.layers):
            raise ValueError(
                f"there is nothing to compare, no layer runs its adapter fast: {report}"
            )
        judge, mixed = Judge(), isinstance(batch, Mapping) and "adapter_names" in batch
        with shared_masks(inner):
            with undisturbed(inner):
                fast = _run(model, batch)
            modules = list(inner.modules())
            with (
                changed_classes(own_heads(modules) | own_classes(modules)),
                undisturbed(inner),
                judge.watching(inner, report, mixed),
                torch.compiler.set_stance("force_eager"),  # compiled code doesn't call the hooks
            ):
                peft = _run(model, batch)
        dtype = coarsest_dtype(inner, judge.dtypes)
    if tolerance is None:
        # Without a loss, the combination of all outputs differs as much as they do.
        is_judged = peft.has_loss or dtype not in HALF_DTYPES
        tolerance = TOLERANCES[dtype] if is_judged else math.inf
    size = None
    if not peft.has_loss:  # the random loss may be near 0; its typical size is the outputs' norm
        size = math.hypot(*[float(y.detach().double().norm()) for y in peft.outputs.values()])
    return Check(
        _differences(fast.loss, peft.loss, size)[0],
        _differences(fast.outputs, peft.outputs),
        _differences(fast.gradients, peft.gradients),
        judge.layers,
        tolerance,
        report,
        dtype,
        tuple(sorted(judge.filled)),
        tuple(sorted(judge.zeros)),
    )


class _Run(NamedTuple):
    """The numbers of one run, by name."""

    loss: dict[str, Tensor]
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    has_loss: bool  # whether the model has a loss; otherwise ``loss`` is a random combination


def _run(model: nn.Module, batch: Any) -> _Run:
    inner = unwrap(model)
    seed_all()
    inner.zero_grad()
    batch = tree_map(_fresh, dict(batch) if isinstance(batch, Mapping) else batch)
    loss, outputs, has_loss = loss_and_outputs(call(model, batch))
    if loss.requires_grad:
        loss.backward()
    inputs = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    named = dict(inner.named_parameters()) | {f"input {i}": x for i, x in enumerate(inputs)}
    gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    return _Run({"loss": loss.detach()}, outputs, gradients, has_loss)


def _fresh(value: Any) -> Any:
    """A copy of a leaf of the batch, because a model may write to it or fill its gradient."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    try:
        return copy.deepcopy(value)
    except TypeError:  # a value that can't be copied
        return value


def _differences(
    fast: dict[str, Tensor], peft: dict[str, Tensor], size: float | None = None
) -> tuple[Difference, ...]:
    """The relative differences of all tensors; relative to ``size``, if it isn't None."""
    differences = []
    for name in peft | fast:
        one, other, relative = fast.get(name), peft.get(name), float("inf")
        if one is not None and other is not None and one.shape == other.shape:
            norm, distance = other.double().norm(), (one.double() - other.double()).norm()
            relative = (distance / (norm if size is None else size)).item() if distance else 0.0
        differences.append(Difference(name, relative))
    return tuple(differences)


def _size(difference: Difference) -> float:
    """The relative difference as a key for ``max``: infinity in place of NaN."""
    return float("inf") if math.isnan(difference.relative) else difference.relative
