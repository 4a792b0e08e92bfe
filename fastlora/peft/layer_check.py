"""Compares each LoRA layer with PEFT and with exact results, on the model's own inputs.

In the outputs of a 16-bit model, the rounding of many layers hides a fault in one of them, and the
rounding of a base product hides a fault in the adapter's product.  So :class:`Judge` puts a hook on
each fast layer.  In the layer's backward (or in its forward, without gradients) it enlarges the
adapters until they are about as large as the base weight.  Then it runs the layer by fastlora, by
PEFT, and by PEFT in a wider dtype, which counts as exact.  A packed base is dense in the last two
runs.  For each result R and each LoRA layer, whose part of R is D (:func:`_parts_of`),

    error = ‖R - exact‖ / ‖exact‖         size error = <R - exact, D> / <D, D>

The size error is also measured for D = exact.  A layer is right if

    error ≤ 2 × PEFT's + 2 units in the last place
    |size error| ≤ 2 × |PEFT's| + 1 % + 2 ‖PEFT's R - exact‖ / ‖D‖ / √rows

The last term is for the rounding of each row of x.  8-bit products also round x and dy, so over a
base in 8 bits PEFT's error counts as at least 2⁻⁷.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..call.projection import HALF_DTYPES
from ..common.other_packages import FSDP, FULLY_SHARDED
from ..formats import PackedLayer, quantized_weight, vendor_of
from ..formats.float8 import SCALE
from ..formats.format import Quantized
from ..layers.classes import change_class, changed_classes
from ..layers.experts_module import packed_names, stack_in
from ..layers.frozen import matrix_of
from ..layers.int8 import AnyInputLinear, Int8Linear, dense_linear
from ..layers.mlp import gated_classes
from ..layers.modules import has_sharded, inside_of, plain_name
from ..layers.report import Coverage
from ..ops.dispatch import autocast_dtype
from .layer import PeftGatedMLP, fast_classes

_SHARE = 0.01  # the largest size error, besides PEFT's
_EXACT = 1e-9  # the largest error of a float64 result
_STEP = 2.0**-8  # the relative change of a scale, for the derivative of a result
_STD = 0.02  # of the random numbers that replace a zero lora_B
_SEED = 20240301  # arbitrary
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # from fine to coarse

_Results = dict[str, Tensor]  # a layer's output, and its gradients


@dataclass(frozen=True)
class Measure:
    """One deviation of a layer's result: an error, or a size error (see the top of this file)."""

    name: str
    value: float  # fastlora's
    peft: float
    allowed: float  # right values are from -allowed to allowed

    @property
    def excess(self) -> float:
        """The deviation, divided by the allowed one; infinite for NaN."""
        excess = abs(self.value) / self.allowed
        return excess if excess >= 0 else float("inf")

    def __str__(self) -> str:
        allowed = f"at most {self.allowed:.2g} is allowed"
        return f"{self.name}: {self.value:.2g} (PEFT's {self.peft:.2g}; {allowed})"


@dataclass(frozen=True)
class LayerCheck:
    """All measures of a LoRA layer, or of a gated MLP with its layers.  True if all are right."""

    name: str
    measures: tuple[Measure, ...]

    @property
    def worst(self) -> Measure:
        return max(self.measures, key=lambda measure: measure.excess)

    def __bool__(self) -> bool:
        return self.worst.excess <= 1.0


class Judge:
    """Collects the layers' measures while the model runs inside of :meth:`watching`."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype | None] = set()  # of the calls' tensors, and of autocast
        self.filled: set[str] = set()  # names of layers whose lora_B was zero
        self.zeros: set[str] = set()  # names of exact results that are zero, so they test nothing
        # A layer's name -> a measure's name -> the worst such measure of all calls.
        self._measures: dict[str, dict[str, Measure]] = {}

    @property
    def layers(self) -> tuple[LayerCheck, ...]:
        found = self._measures.items()
        return tuple(LayerCheck(name, tuple(of_layer.values())) for name, of_layer in found)

    @contextmanager
    def watching(self, model: nn.Module, report: Coverage, mixed: bool) -> Iterator[None]:
        """Inside, measure every call of a layer that is fast in ``report``.

        The model itself runs PEFT's forward.  A gated MLP is measured as one unit, except in a
        ``mixed`` batch: then its layers are measured, because they get the names of adapters.
        """
        names = {layer.name for layer in report.layers if layer.runs_adapter}
        names |= {block.name for block in report.gated_mlps if block.fast and not mixed}
        # FSDP gathers parameters in hooks.  An extra run of a layer could gather on one rank only,
        # and the ranks would wait for each other forever.  Other sharded tensors have no exact run.
        inside = inside_of(model, FULLY_SHARDED, FSDP)
        with ExitStack() as handles:
            for name, unit in [(plain_name(name), unit) for name, unit in model.named_modules()]:
                if name in names and unit not in inside and not has_sharded(unit):
                    inside.update(unit.modules())
                    hook = partial(self._called, name, unit)
                    settings: Any = {"with_kwargs": True, "prepend": True}
                    handles.callback(unit.register_forward_hook(hook, **settings).remove)
            yield

    def _called(
        self, name: str, unit: nn.Module, module: nn.Module, args: Any, kwargs: Any, y: Any
    ) -> None:
        """A forward hook that measures the call in its backward, which knows the gradient of ``y``.

        If ``y`` requires no gradient, the hook measures the call at once.
        """
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # In a copy of the model, which DataParallel makes, ``module`` isn't ``unit``.
        if module is not unit or not (inputs and isinstance(y, Tensor) and y.numel()):
            return
        cast = autocast_dtype(inputs[0])
        dtypes = {cast, y.dtype, *(tensor.dtype for tensor in inputs)}
        self.dtypes |= dtypes
        call = _Call(args, kwargs, inputs[0], cast)
        # A backward's thread has neither autocast nor the backend, which is a context variable.
        here, dtype = copy_context(), coarsest_dtype(unit, dtypes)

        def judge(dy: Tensor | None) -> None:
            here.run(self._judge, name, unit, call, dtype, dy)

        if y.requires_grad:
            y.register_hook(judge)
        else:
            judge(None)

    def _judge(
        self, name: str, unit: nn.Module, call: "_Call", dtype: torch.dtype, dy: Tensor | None
    ) -> None:
        """Run the call by fastlora, by PEFT, and exactly, with enlarged adapters; measure."""
        x, wide = call.x, torch.float32 if dtype in HALF_DTYPES else torch.float64
        # Gradients are linear in dy, so dy may be scaled.  Its largest element becomes 1/32 to
        # 1/16, so that small elements don't underflow in float16.
        if dy is not None and dy.any():
            dy = dy.detach() * 2.0 ** (-4 - max(-120, int(dy.abs().max().frexp().exponent)))
        # A hook may change a parameter's gradient, and a copy of the parameter has no hook.
        hooked = {f"gradient of {n}" for n, p in unit.named_parameters() if p._backward_hooks}
        with ExitStack() as undo:
            self.filled |= {f"{name}.{inner}".rstrip(".") for inner in _enlarge(unit, undo)}
            with changed_classes(
                fast_classes(unit.modules()) | gated_classes([unit], PeftGatedMLP)
            ):
                fast = call.run(unit, dy)
            # Packed layers aren't copied, and the copies of the unit's hooks refer to this judge.
            shared = [self, *(each for each in unit.modules() if vendor_of(each) is not None)]
            unit = copy.deepcopy(unit, {id(each): each for each in shared})
        is_int8 = any(isinstance(module, Int8Linear) for module in unit.modules())
        eps = torch.finfo(dtype).eps
        _make_dense(unit, call.autocast or x.dtype)
        peft = call.run(unit, dy)
        _widen(unit, wide)
        run = partial(call._replace(autocast=None).run, unit, dtype=wide)
        exact = run(dy)
        parts = _parts_of(exact, unit, run, dy)
        of_layer = self._measures.setdefault(name, {})
        for result, truth in exact.items():
            if result in hooked:
                continue
            if not truth.any():
                self.zeros.add(f"{name}: {result}")
            along = {"": truth}
            for layer, part in parts[result].items():
                along[f" of {layer or 'the adapter'}'s part"] = part
            if result.startswith("gradient of input ") and not result.endswith(" 0"):
                along = {}  # a routing weight's gradient is a dot product, whose rounding stays
            found, rows = (fast.get(result), peft.get(result)), x.numel() // max(1, x.shape[-1])
            least = eps if is_int8 else 0.0  # 2⁻⁷: codes are multiples of it, over a row's largest
            for measure in _measures(result, *found, truth, along, eps, least, rows):
                before = of_layer.get(measure.name, measure)
                of_layer[measure.name] = max(before, measure, key=lambda each: each.excess)


def coarsest_dtype(model: nn.Module, others: set[torch.dtype | None]) -> torch.dtype:
    """The coarsest dtype among ``others`` and the model's dtypes."""
    packed = [quantized_weight(module) for module in model.modules()]
    used = {layer.compute_dtype for layer in packed if isinstance(layer, PackedLayer)}
    used |= {parameter.dtype for parameter in model.parameters()} | others
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        used.add(torch.bfloat16)  # its numbers also have 8 bits
    return max((dtype for dtype in _DTYPES if dtype in used), key=_DTYPES.index)


def _loras(unit: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, each) for name, each in unit.named_modules() if isinstance(each, LoraLayer))


def _enlarge(unit: nn.Module, undo: ExitStack) -> Iterator[str]:
    """Multiply each lora_B by a power of two that makes lora_B lora_A as large as the base weight.

    A lora_B that is zero gets random numbers first.  Yields the names of these layers.  Closing
    ``undo`` restores lora_B.
    """
    draw = torch.Generator("cpu").manual_seed(_SEED)
    for name, layer in _loras(unit):
        base, is_stack = layer.get_base_layer(), isinstance(layer, ParamWrapper)
        weight = stack_in(base, layer.parameter_name) if is_stack else matrix_of(base)
        weight = weight.dense(torch.float32) if isinstance(weight, Quantized) else weight
        size = weight.detach().float().norm()
        for adapter, lora_b in layer.lora_B.items():
            up, down = lora_b.weight.detach(), layer.lora_A[adapter].weight.detach()
            if not up.any():
                how: Any = {"dtype": torch.float32, "device": "cpu"}
                up = (_STD * torch.randn(up.shape, generator=draw, **how)).to(up)
                yield name
            product = up.float().norm() * down.float().norm() * abs(layer.scaling[adapter])
            exponent = (size * len(down) ** 0.5 / product).log2()
            up = up * 2.0 ** int(exponent) if 0 < exponent < 100 else up
            undo.callback(lora_b._parameters.update, weight=lora_b.weight)
            lora_b._parameters["weight"] = nn.Parameter(up, lora_b.weight.requires_grad)


def _make_dense(unit: nn.Module, inside: torch.dtype) -> None:
    """Replace packed layers by dense ones.

    ``inside``: the dtype to which a packed weight without a compute dtype is unpacked.
    """
    for module in [*unit.modules()]:
        children: dict[str, Any] = dict(module._modules)
        for name, child in children.items():
            packed = None if child is None else quantized_weight(child)
            if isinstance(packed, PackedLayer):
                dense = dense_linear(child, packed.compute_dtype or inside)
                change_class(dense, AnyInputLinear)
                if "bias" not in child._parameters:  # HQQ's
                    dense.requires_grad_(False)
                module._modules[name] = dense


def _widen(unit: nn.Module, dtype: torch.dtype) -> None:
    """Cast all parameters to this dtype, except packed experts, which are dense only in calls."""
    for module in unit.modules():
        config: Any = vars(module).get("config")
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # grouped_mm has no float64
        codes = packed_names(module)
        for name, p in module._parameters.items():
            is_packed = name in codes or name.endswith(SCALE)
            if p is not None and p.is_floating_point() and not is_packed:
                p.data = p.data.to(dtype)


def _parts_of(
    exact: _Results, unit: nn.Module, run: Callable[..., _Results], dy: Tensor | None
) -> dict[str, _Results]:
    """The parts that single LoRA layers have in each exact result: result -> layer -> part.

    The part of an output is its derivative by the logarithm of the layer's scale.  The part of a
    gradient is the one that reaches it through the layer's lora_A.  PEFT doesn't call lora_A of
    experts, so there it is also the derivative.  ``run``: the exact run for a dy.
    """
    parts: dict[str, _Results] = defaultdict(dict)
    for name, layer in _loras(unit):
        is_stack = isinstance(layer, ParamWrapper)
        scaling = layer.scaling
        layer.scaling = {adapter: scale * (1 + _STEP) for adapter, scale in scaling.items()}
        moved = run(dy if is_stack else None)
        layer.scaling = scaling
        for result, tensor in moved.items():
            parts[result][name] = (tensor - exact[result]) / _STEP
        if is_stack or dy is None:
            continue
        with ExitStack() as undo:
            for dropout in layer.lora_dropout.values():  # it gets the input of lora_A
                hook = dropout.register_forward_pre_hook(lambda _, args: args[0].detach())
                undo.callback(hook.remove)
            without = run(dy)
        for result in exact.keys() - {"output"}:
            parts[result][name] = exact[result] - without.get(result, 0.0)
    return parts


class _Call(NamedTuple):
    """A call of a layer."""

    args: tuple
    kwargs: dict
    x: Tensor  # its first tensor
    autocast: torch.dtype | None

    def run(self, unit: nn.Module, dy: Tensor | None, dtype: torch.dtype | None = None) -> _Results:
        """The output, and the gradients for dy, by name; with inputs cast to ``dtype``, if any.

        The dropout masks are the same in every run.
        """
        own: list[Tensor] = []

        def leaf(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                return value
            needed = value.requires_grad and dy is not None
            own.append(value.detach().to(dtype or value.dtype).requires_grad_(needed))
            return own[-1]

        args, kwargs = tree_map(leaf, (self.args, self.kwargs))
        settings: Any = {"dtype": self.autocast, "enabled": self.autocast is not None}
        devices = [self.x.device] if self.x.is_cuda else []
        with (
            torch.autocast(self.x.device.type, cache_enabled=False, **settings),
            torch.set_grad_enabled(dy is not None),
            torch.random.fork_rng(devices),
        ):
            torch.default_generator.manual_seed(_SEED)
            for device in devices:
                torch.cuda.default_generators[device.index].manual_seed(_SEED)
            y = unit.forward(*args, **kwargs)
        results = {"output": y.detach()}
        wanted = {f"gradient of input {i}": x for i, x in enumerate(own) if x.requires_grad}
        wanted |= {
            f"gradient of {name}": p
            for name, p in unit.named_parameters()
            if p.requires_grad and not p._backward_hooks
        }
        if dy is None or not (wanted and y.requires_grad):
            return results
        gradients = torch.autograd.grad(y, [*wanted.values()], dy.to(y.dtype), allow_unused=True)
        found = zip(wanted, gradients, strict=True)
        return results | {name: gradient for name, gradient in found if gradient is not None}


def _measures(
    name: str,
    fast: Tensor | None,
    peft: Tensor | None,
    truth: Tensor,
    along: _Results,
    eps: float,
    least: float,
    rows: int,
) -> Iterator[Measure]:
    """The measures of one result: its error, and its size errors.

    ``truth``: the exact result.  ``along``: the tensors D of the size errors, by name.  ``eps``: of
    the call's dtype.  ``least``: PEFT's error counts as at least this.  ``rows``: of the input.
    """
    if peft is None or not peft.isfinite().all():
        return  # PEFT's error is unknown, so no error can be judged
    if fast is None or fast.shape != peft.shape:
        yield Measure(f"{name}, error", float("inf"), 0.0, eps)
        return
    truth = truth.double()
    errors = [side.double() - truth for side in (fast, peft)]
    size = float(truth.norm()) or torch.finfo(torch.float64).tiny
    of_fast, of_peft = (float(error.norm()) / size for error in errors)
    rounding = max(of_peft, least)
    # With few elements, PEFT's error may be small by chance.
    allowed = 2 * rounding * (1 + 2 * truth.numel() ** -0.5) + max(2 * eps, _EXACT)
    yield Measure(f"{name}, error", of_fast, of_peft, allowed)
    for of, part in along.items():
        if part.any():
            part = part.double()
            of_fast, of_peft = (float((e * part).sum() / part.square().sum()) for e in errors)
            noise = 2 * rounding * size / float(part.norm()) / rows**0.5
            allowed = 2 * abs(of_peft) + _SHARE + noise
            yield Measure(f"{name}, size error{of}", of_fast, of_peft, allowed)
