"""Compares each LoRA layer with PEFT and with exact results, on the model's own inputs.

In the outputs of a 16-bit model, the rounding of many layers hides a fault in one of them, and the
rounding of a base product hides a fault in the adapter's product.  So :class:`Judge` puts a hook on
each fast layer.  In the layer's backward (or in its forward, without gradients) it enlarges the
adapters until they are about as large as the base weight.  Then it runs the layer by PEFT, by
fastlora, and by PEFT in a wider dtype, which counts as exact.  For each result R and each LoRA
layer, whose part of R is D (:func:`_exact`), it measures

    error = ‖R - exact‖ / ‖exact‖         size = 1 + <R - exact, D> / <D, D>

The size is also measured for D = exact, and the gradient of a routing weight has only an error.
A layer is right if every error is at most 2 × PEFT's
error + 2 units in the last place.  A size may differ from 1 by 2 × PEFT's difference + 1 % +
2 ‖PEFT's R - exact‖ / ‖D‖ / √rows, because each row of x rounds differently.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..backends import asked_backend, use_backend
from ..call.projection import HALF_DTYPES
from ..common.other_packages import FSDP, FULLY_SHARDED
from ..formats import PackedLayer, quantized_weight
from ..formats.float8 import SCALE
from ..formats.rotated_int8 import quantize_rows, rotate
from ..layers.classes import changed_classes
from ..layers.experts_module import packed_names, weight_in
from ..layers.frozen import matrix_of
from ..layers.int8 import Int8Linear
from ..layers.mlp import gated_classes
from ..layers.modules import has_sharded, inside_of, plain_name
from ..layers.report import Coverage
from ..ops.dispatch import autocast_dtype
from .layer import PeftGatedMLP, fast_classes

_SHARE = 0.01  # the largest error of a size, besides PEFT's
_EXACT = 1e-9  # the largest error of a float64 result
_STEP = 2.0**-8  # the relative change of a scale, for the derivative of a result
_STD = 0.02  # of the random numbers that replace a zero lora_B
_SEED = 20240301  # arbitrary
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # from fine to coarse


@dataclass(frozen=True)
class Measure:
    """One number of a layer's call: fastlora's value, PEFT's value, and the range of right values.

    There are two kinds, errors and sizes (see the top of this file).
    """

    name: str
    value: float  # fastlora's, which is right within middle ± allowed
    peft: float
    middle: float  # 0 for an error, 1 for a size
    allowed: float

    @property
    def excess(self) -> float:
        """Distance from the middle, divided by the allowed distance; infinite for NaN."""
        excess = abs(self.value - self.middle) / self.allowed
        return excess if excess >= 0 else float("inf")

    def __str__(self) -> str:
        if self.middle == 0.0:
            allowed = f"at most {self.allowed:.2g} is allowed"
            return f"{self.name}: {self.value:.2g} (PEFT's {self.peft:.2g}; {allowed})"
        low, high = self.middle - self.allowed, self.middle + self.allowed
        allowed = f"{low:.4f} to {high:.4f} is allowed"
        return f"{self.name}: {self.value:.4f} of the exact one (PEFT's {self.peft:.4f}; {allowed})"


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
        device = inputs[0].device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        dtypes = {cast, y.dtype, *(tensor.dtype for tensor in inputs)}
        self.dtypes |= dtypes
        call = _Call(args, kwargs, inputs[0], cast, asked_backend())
        judge = partial(self._judge, name, unit, call, coarsest_dtype(unit, dtypes))
        if y.requires_grad:
            y.register_hook(judge)
        else:
            judge(None)

    def _judge(
        self, name: str, unit: nn.Module, call: "_Call", dtype: torch.dtype, dy: Tensor | None
    ) -> None:
        """Run the call by PEFT, by fastlora, and exactly, with enlarged adapters; measure."""
        x, wide = call.x, torch.float32 if dtype in HALF_DTYPES else torch.float64
        # Gradients are linear in dy, so dy may be scaled.  Its largest element becomes 1/32 to
        # 1/16, so that small elements don't underflow in float16.
        if dy is not None and dy.any():
            dy = dy.detach() * 2.0 ** (-4 - max(-120, int(dy.abs().max().frexp().exponent)))
        classes = fast_classes(unit.modules()) | gated_classes([unit], PeftGatedMLP)
        # In the other runs fastlora's own 8-bit product would hide the faults of that product.
        int8 = [each for each in unit.modules() if isinstance(each, Int8Linear)]
        twins: Any = dict.fromkeys(int8 if x.dtype != torch.float64 else (), _Int8Twin)
        _Int8Twin.inside = call.autocast or x.dtype
        # fastlora computes float32 adapters of a 16-bit base in 16 bits, as PEFT under autocast.
        is_mixed = any(p.dtype != x.dtype for p in unit.parameters() if p.requires_grad)
        like_fast = x.dtype if x.dtype in HALF_DTYPES and is_mixed else None
        with ExitStack() as undo:
            swap = _Swap(undo)
            self.filled |= {f"{name}.{inner}".rstrip(".") for inner in _enlarge(unit, swap)}
            with changed_classes(classes):
                fast = call.run(unit, dy)
            with changed_classes(twins):
                peft = call._replace(autocast=call.autocast or like_fast).run(unit, dy)
                _widen(unit, swap, wide, _Int8Twin.inside)
                exact, parts = _exact(call._replace(autocast=None), unit, wide, dy)
        of_layer = self._measures.setdefault(name, {})
        settings = torch.finfo(dtype).eps, x.numel() // max(1, x.shape[-1])
        for result, truth in exact.items():
            if not truth.any():
                self.zeros.add(f"{name}: {result}")
            along = {"": truth}
            for layer, part in parts[result].items():
                along[f" of {layer or 'the adapter'}'s part"] = part
            if result.startswith("gradient of input ") and not result.endswith(" 0"):
                along = {}  # a routing weight's gradient is a dot product, whose rounding stays
            found = fast.get(result), peft.get(result)
            for measure in _measures(result, *found, truth, along, *settings):
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


class _Swap(NamedTuple):
    """Replaces values of dicts until ``undo`` is closed."""

    undo: ExitStack

    def __call__(self, of: dict, name: str, value: Any) -> None:
        self.undo.callback(of.__setitem__, name, of[name])
        of[name] = value


def _enlarge(unit: nn.Module, swap: _Swap) -> Iterator[str]:
    """Multiply each lora_B by a power of two that makes lora_B lora_A as large as the base weight.

    A lora_B that is zero gets random numbers first.  Yields the names of these layers.
    """
    draw = torch.Generator("cpu").manual_seed(_SEED)
    for name, layer in _loras(unit):
        base = layer.get_base_layer()
        packed = quantized_weight(base)
        if isinstance(packed, PackedLayer):
            size = packed.weight.dense(torch.float32).norm()
        else:
            name_of = getattr(layer, "parameter_name", "weight")
            is_code = name_of in packed_names(base)
            weight = (
                weight_in(base, name_of).dense(torch.float32) if is_code else getattr(base, name_of)
            )
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
            swap(lora_b._parameters, "weight", nn.Parameter(up, lora_b.weight.requires_grad))


def _widen(unit: nn.Module, swap: _Swap, dtype: torch.dtype, inside: torch.dtype) -> None:
    """Replace all parameters by copies in this dtype, and packed layers by dense ones.

    ``inside``: the dtype to which a packed weight without a compute dtype is unpacked.
    """
    for module in [*unit.modules()]:
        children: dict[str, Any] = dict(module._modules)
        for name, child in children.items():
            packed = None if child is None else quantized_weight(child)
            if isinstance(packed, PackedLayer) and not isinstance(child, Int8Linear):
                dense: Any = nn.Linear(1, 1, bias=False, device="meta", dtype=torch.float32)
                weight = packed.weight.dense(packed.compute_dtype or inside)
                dense.weight = nn.Parameter(weight, requires_grad=False)
                dense._parameters["bias"] = child.bias  # in HQQ it is no parameter
                swap(module._modules, name, dense)
        config: Any = copy(vars(module).get("config"))
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # grouped_mm has no float64
            swap(vars(module), "config", config)
    copies: dict[Any, nn.Parameter] = {}
    for module in unit.modules():
        codes = packed_names(module)  # packed experts are dense in the call's dtype anyway
        for name, p in module._parameters.items():
            is_packed = name in codes or name.endswith(SCALE)
            if p is not None and p.is_floating_point() and not is_packed:
                made = nn.Parameter(p.detach().to(dtype), p.requires_grad)
                swap(module._parameters, name, copies.setdefault(p, made))


def _exact(
    call: "_Call", unit: nn.Module, dtype: torch.dtype, dy: Tensor | None
) -> tuple[dict[str, Tensor], "_Parts"]:
    """The call's results, and the parts that single LoRA layers have in each.

    The part of an output is its derivative by the logarithm of the layer's scale.  The part of a
    gradient is the one that reaches it through the layer's lora_A.  If PEFT doesn't call lora_A, as
    in experts, it is also the derivative.
    """
    inputs: list[tuple[str, Tensor]] = []

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        inputs.append((name, args[0].view_as(args[0])))
        return (inputs[-1][1],)

    parts: _Parts = defaultdict(dict)
    with ExitStack() as hooks:
        for name, layer in _loras(unit):
            for dropout in layer.lora_dropout.values():
                hook = dropout.register_forward_pre_hook(partial(note, name))
                hooks.callback(hook.remove)
        exact = call.run(unit, dy, dtype, inputs, parts)
    called = {name for name, _ in inputs}
    for name, layer in _loras(unit):
        with ExitStack() as undo:
            scaled = {adapter: scale * (1 + _STEP) for adapter, scale in layer.scaling.items()}
            _Swap(undo)(vars(layer), "scaling", scaled)
            moved = call.run(unit, None if name in called else dy, dtype)
        for result, tensor in moved.items():
            parts[result][name] = (tensor - exact[result]) / _STEP
    return exact, parts


_Parts = dict[str, dict[str, Tensor]]  # result -> LoRA layer -> part


class _Call(NamedTuple):
    """A call of a layer."""

    args: tuple
    kwargs: dict
    x: Tensor  # its first tensor
    autocast: torch.dtype | None
    backend: str | None

    def run(
        self,
        unit: nn.Module,
        dy: Tensor | None,
        dtype: torch.dtype | None = None,
        inputs: Sequence[tuple[str, Tensor]] = (),
        parts: _Parts | None = None,
    ) -> dict[str, Tensor]:
        """The output, and the gradients for dy, by name; with inputs cast to ``dtype``, if any.

        The dropout masks are the same in every run.  ``inputs``: a list to which the forward adds
        inputs of adapters.  Their gradients' parts of the other gradients are added to ``parts``.
        """
        own: list[Tensor] = []

        def leaf(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                return value
            needed = value.requires_grad and dy is not None
            own.append(value.detach().to(dtype or value.dtype).requires_grad_(needed))
            return own[-1]

        args, kwargs = tree_map(leaf, (self.args, self.kwargs))
        with self._surroundings(is_training=dy is not None):
            y = unit.forward(*args, **kwargs)
        results = {"output": y.detach()}
        wanted = {f"gradient of input {i}": x for i, x in enumerate(own) if x.requires_grad}
        wanted |= {
            f"gradient of {name}": p
            for name, p in unit.named_parameters()
            if p.requires_grad and not p._backward_hooks  # a hook may change the gradient
        }
        if dy is None or not (wanted and y.requires_grad):
            return results
        inner = [(name, x) for name, x in inputs if x.requires_grad]
        ends, settings = [*wanted.values()], {"allow_unused": True, "retain_graph": bool(inner)}
        starts = ends + [x for _, x in inner]
        gradients = torch.autograd.grad(y, starts, dy.to(y.dtype), **settings)
        results |= {n: g for n, g in zip(wanted, gradients, strict=False) if g is not None}
        for (name, x), dx in zip(inner, gradients[len(ends) :], strict=True):
            found = () if dx is None else torch.autograd.grad(x, ends, dx, **settings)
            for result, part in zip(wanted, found, strict=False):
                if part is not None and parts is not None:
                    parts[result][name] = parts[result].get(name, 0) + part
        return results

    @contextmanager
    def _surroundings(self, is_training: bool) -> Iterator[None]:
        """Inside, the call's autocast and backend are set, and the random state is always the same.

        A backward's thread has neither.
        """
        settings: Any = {"dtype": self.autocast, "enabled": self.autocast is not None}
        devices = [self.x.device] if self.x.is_cuda else []
        with ExitStack() as stack:
            if self.backend is not None:
                stack.enter_context(use_backend(self.backend))
            stack.enter_context(torch.autocast(self.x.device.type, cache_enabled=False, **settings))
            stack.enter_context(torch.set_grad_enabled(is_training))
            stack.enter_context(torch.random.fork_rng(devices))
            torch.default_generator.manual_seed(_SEED)
            for device in devices:
                torch.cuda.default_generators[device.index].manual_seed(_SEED)
            yield


class _Int8Twin(Int8Linear):
    """An ``Int8Linear`` that rounds to the same 8 bits, with products and sums in x's dtype."""

    inside: torch.dtype = torch.float32  # the judged call's dtype, in which x is rotated

    def forward(self, x: Tensor) -> Tensor:
        packed: Any = matrix_of(self, Int8Linear)
        (codes, scale), inside = packed.tensors, self.inside
        x = x.to(autocast_dtype(x) or x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)

        def rounded(rows: Tensor, **settings: Any) -> Tensor:
            codes, scale = quantize_rows(rows.detach().to(inside), **settings)
            return codes.to(wide) * scale[:, None]

        rows = x.reshape(-1, x.shape[-1])
        turned = rotate(rows.to(wide))
        turned = turned + (rounded(rows, rotated=True) - turned).detach()  # its gradient: turned's
        y = (turned @ (codes * scale[:, None]).T.to(wide)).to(x.dtype)
        if y.requires_grad:
            y.register_hook(lambda dy: (rounded(dy, factor=scale) / scale).to(dy.dtype))
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _measures(
    name: str,
    fast: Tensor | None,
    peft: Tensor | None,
    truth: Tensor,
    along: dict[str, Tensor],
    eps: float,
    rows: int,
) -> Iterator[Measure]:
    """The measures of one result: its error, and its sizes.

    ``truth``: the exact result.  ``along``: the tensors D of the sizes, by name.  ``eps``: of the
    call's dtype.  ``rows``: of the call's input.
    """
    if peft is None or not peft.isfinite().all():
        return  # PEFT's error is unknown, so no error can be judged
    inf = float("inf")
    if fast is None or fast.shape != peft.shape:
        yield Measure(f"{name}, error", inf, 0.0, 0.0, eps)
        return
    scale = truth.abs().max().clamp_min(torch.finfo(truth.dtype).tiny)
    truth = truth / scale
    errors = [side.to(truth) / scale - truth for side in (fast, peft)]
    size = truth.norm()
    if size:
        of_fast, of_peft = (float(error.norm() / size) for error in errors)
        # With few elements, PEFT's error may be small by chance.
        allowed = 2 * of_peft * (1 + 2 * truth.numel() ** -0.5) + max(2 * eps, _EXACT)
        yield Measure(f"{name}, error", of_fast, of_peft, 0.0, allowed)
    elif fast.any():
        yield Measure(f"{name}, error", inf, float(peft.any()), 0.0, eps)
    for of, part in along.items():
        part = part / scale
        if not part.any():
            continue
        share, of_peft = (float((error * part).sum() / part.square().sum()) for error in errors)
        noise = 2 * float(errors[1].norm() / part.norm()) / rows**0.5
        allowed = 2 * abs(of_peft) + _SHARE + noise
        yield Measure(f"{name}, size{of}", 1 + share, 1 + of_peft, 1.0, allowed)
