"""Compares each LoRA layer with PEFT and with exact results, on the model's own inputs.

In the outputs of a 16-bit model, the rounding of many layers hides a fault in one of them, and the
rounding of a base product hides a fault in the adapter's product.  So :class:`Judge` puts a hook on
each fast layer.  In the layer's backward (or in its forward, without gradients) it enlarges the
adapters until they are about as large as the base weight.  Then it runs the layer by PEFT, by
fastlora, and by PEFT in a wider dtype, which counts as exact.  For each result R and each LoRA
layer, whose part of R is D (:func:`_exact`), it measures

    error = ‖R - exact‖ / ‖exact‖         size = 1 + <R - exact, D> / <D, D>

The size is also measured for D = exact.  A layer is right if every error is at most 2 × PEFT's
error + 2 units in the last place.  A size may differ from 1 by 2 × PEFT's difference + 1 % +
‖PEFT's R - exact‖ / ‖D‖ / √rows, because each row of x rounds differently.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..backends import asked_backend, use_backend
from ..backends.int8 import runs_in_8_bits
from ..foreign import FSDP, FULLY_SHARDED
from ..formats import PackedLayer, quantized_weight
from ..formats.rotated_int8 import quantize_rows, rotate
from ..layers.classes import changed_classes, twin
from ..layers.frozen import matrix_of
from ..layers.int8 import Int8Linear
from ..layers.members import plain_class_of
from ..layers.mlp import gated_classes
from ..layers.modules import has_sharded, inside_of, plain_name
from ..ops.dispatch import autocast_dtype
from ..projection import HALF_DTYPES
from ..report import Coverage
from .layer import PeftGatedMLP, fast_classes

_SHARE = 0.01  # the largest error of a size, besides PEFT's
_EXACT = 1e-9  # the largest error of a float64 result
_STEP = 2.0**-8  # the relative change of a scale, for the derivative of a result
_STD = 0.02  # of the random numbers that replace a zero lora_B
_SEED = 20240301  # arbitrary
_OF_ACCELERATE = ("forward", "_old_forward", "_hf_hook")  # accelerate's entries in a __dict__
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

    def _called(self, name: str, unit: nn.Module, module: nn.Module, *call: Any) -> Tensor | None:
        """A forward hook that measures the call in its backward, which knows the gradient of ``y``.

        If ``y`` requires no gradient, the hook measures the call at once.
        """
        *tree, y = call
        leaves, form = tree_flatten(tree)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        # In a copy of the model, which DataParallel makes, ``module`` isn't ``unit``.
        if module is not unit or not (tensors and isinstance(y, Tensor)):
            return None
        device = tensors[0].device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.dtypes |= {cast, y.dtype, *(tensor.dtype for tensor in tensors)}
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        needs = [tensor.requires_grad for tensor in tensors]
        made = _Call(name, unit, others, needs, form, y.dtype, cast, asked_backend())
        if y.requires_grad:
            return _Probe.apply(partial(self._judge, made), y, *tensors)
        self._judge(made, tuple(tensors), None)
        return None

    def _judge(self, call: "_Call", tensors: tuple[Tensor, ...], dy: Tensor | None) -> None:
        """Run the call by PEFT, by fastlora, and exactly, with enlarged adapters; measure."""
        unit, x = call.unit, tensors[0]
        dtype = coarsest_dtype(unit, {call.dtype, call.autocast, *(t.dtype for t in tensors)})
        wide = torch.float32 if dtype in HALF_DTYPES else torch.float64
        # Gradients are linear in dy, so dy may be scaled.  Its largest element becomes 1/32 to
        # 1/16, so that small elements don't underflow in float16.
        if dy is not None and dy.any():
            dy = dy * 2.0 ** (-4 - max(-120, int(dy.abs().max().frexp().exponent)))
        classes = fast_classes(unit.modules()) | gated_classes([unit], PeftGatedMLP)
        # In PEFT's run fastlora's own 8-bit product would hide the faults of that product.
        int8 = [each for each in unit.modules() if isinstance(each, Int8Linear)]
        twins: Any = dict.fromkeys(int8 if x.dtype != torch.float64 else (), _Int8Twin)
        with _enlarged(call.name, unit) as filled:
            with call.surroundings(x):
                with changed_classes(twins):
                    peft = call.run(unit, tensors, dy)
                with changed_classes(classes):
                    fast = call.run(unit, tensors, dy)
            tensors = tuple([t.to(wide) if t.is_floating_point() else t for t in tensors])
            exact_unit = _wide_twin(unit, wide, call.autocast or x.dtype, {})
            with torch.autocast(x.device.type, enabled=False):
                exact, parts = _exact(
                    call, exact_unit, tensors, None if dy is None else dy.to(wide)
                )
        self.filled |= filled
        of_layer = self._measures.setdefault(call.name, {})
        settings = torch.finfo(dtype).eps, x.numel() // max(1, x.shape[-1])
        for name, truth in exact.items():
            if not truth.any():
                self.zeros.add(f"{call.name}: {name}")
            found = fast.get(name), peft.get(name)
            for measure in _measures(name, *found, truth, parts[name], *settings):
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


@contextmanager
def _enlarged(name: str, unit: nn.Module) -> Iterator[set[str]]:
    """Inside, each lora_B is multiplied by a power of two, which makes lora_B lora_A as large as W.

    A lora_B that is zero gets random numbers first.  Yields the names of these layers.
    """
    before, filled = [], set()
    draw = torch.Generator("cpu").manual_seed(_SEED)
    try:
        for inner, layer in _loras(unit):
            size = _size_of_base(layer)
            for adapter, lora_b in layer.lora_B.items():
                up, down = lora_b.weight, layer.lora_A[adapter].weight
                if up.is_meta:
                    continue
                # Through .data, so that autograd graphs that saved lora_B stay valid.
                before.append((up, up.detach().clone()))
                if not up.any():
                    how: Any = {"dtype": torch.float32, "device": "cpu", "generator": draw}
                    up.data.copy_(_STD * torch.randn(up.shape, **how))
                    filled.add(f"{name}.{inner}".rstrip("."))
                product = up.detach().float().norm() * down.detach().float().norm()
                ratio = size * len(down) ** 0.5 / (product * abs(layer.scaling[adapter]))
                if 1.0 < ratio < float("inf"):
                    up.data.mul_(2.0 ** (int(ratio.frexp().exponent) - 1))
        yield filled
    finally:
        for up, data in before:
            up.data.copy_(data)


def _size_of_base(layer: Any) -> Tensor:
    """The norm of the weight that the layer adapts."""
    base = layer.get_base_layer()
    packed = quantized_weight(base)
    if isinstance(packed, PackedLayer):
        return packed.weight.dense(torch.float32).norm()
    return getattr(base, getattr(layer, "parameter_name", "weight")).detach().float().norm()


def _exact(
    call: "_Call", unit: nn.Module, tensors: tuple[Tensor, ...], dy: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The call's results, and the parts that single LoRA layers have in each: by result, by layer.

    The part of an output is its derivative by the logarithm of the layer's scale.  The part of a
    gradient is the one that reaches it through the layer's lora_A.  If PEFT doesn't call lora_A, as
    in experts, it is also the derivative.
    """
    inputs: list[tuple[str, Tensor]] = []

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        inputs.append((name, args[0].view_as(args[0])))
        return (inputs[-1][1],)

    layers = dict(_loras(unit))
    for name, layer in layers.items():
        for dropout in layer.lora_dropout.values():
            dropout.register_forward_pre_hook(partial(note, name))
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    exact = call.run(unit, tensors, dy, inputs, parts)
    called = {name for name, _ in inputs}
    for name, layer in layers.items():
        scaling = layer.scaling
        layer.scaling = {adapter: scale * (1 + _STEP) for adapter, scale in scaling.items()}
        moved = call.run(unit, tensors, None if name in called else dy)
        layer.scaling = scaling
        for result, tensor in moved.items():
            parts[result][name] = (tensor - exact[result]) / _STEP
    return exact, parts


class _Probe(torch.autograd.Function):
    """Returns a copy of y.  The backward calls ``judge`` with the layer's inputs and dy."""

    @staticmethod
    def forward(ctx, judge: Callable, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.judge = judge
        ctx.save_for_backward(*tensors)
        return y.clone()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # read only once: checkpointing recomputes them for each read
        ctx.judge(tensors, dy.detach())
        return None, dy, *[None for _ in tensors]


class _Call(NamedTuple):
    """A call of a layer without its tensors, because autograd saves the tensors."""

    name: str
    unit: nn.Module
    others: list[Any]  # the leaves of its arguments, with None in place of each tensor
    needs: list[bool]  # which tensors require a gradient
    form: TreeSpec
    dtype: torch.dtype  # of its output
    autocast: torch.dtype | None
    backend: str | None

    @contextmanager
    def surroundings(self, x: Tensor) -> Iterator[None]:
        """Inside, the call's autocast and backend are set.  A backward's thread has neither."""
        settings: Any = {"dtype": self.autocast, "enabled": self.autocast is not None}
        with ExitStack() as stack:
            if self.backend is not None:
                stack.enter_context(use_backend(self.backend))
            stack.enter_context(torch.autocast(x.device.type, cache_enabled=False, **settings))
            yield

    def run(
        self,
        unit: nn.Module,
        tensors: tuple[Tensor, ...],
        dy: Tensor | None,
        inputs: Sequence[tuple[str, Tensor]] = (),
        parts: dict[str, dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """The output for these tensors, and the gradients for dy, by name.

        The dropout masks are the same in every run.  ``inputs``: a list to which the forward adds
        inputs of adapters.  Their gradients' parts of the other gradients are added to ``parts``.
        """
        own = [
            tensor.detach().requires_grad_(needs and dy is not None)
            for tensor, needs in zip(tensors, self.needs, strict=True)
        ]
        rest = iter(own)
        leaves = [next(rest) if leaf is None else leaf for leaf in self.others]
        args, kwargs = tree_unflatten(leaves, self.form)
        with torch.set_grad_enabled(dy is not None), _same_masks(tensors[0].device):
            y = unit.forward(*args, **kwargs)
            results = {"output": y.detach()}
            wanted = {f"gradient of input {i}": x for i, x in enumerate(own) if x.requires_grad}
            wanted |= {
                f"gradient of {name}": p
                for name, p in unit.named_parameters()
                if p.requires_grad and not p._backward_hooks  # a hook may change the gradient
            }
            if not (wanted and y.requires_grad):
                return results
            inner = [(name, x) for name, x in inputs if x.requires_grad]
            ends, how = [*wanted.values()], {"allow_unused": True, "retain_graph": bool(inner)}
            gradients = torch.autograd.grad(y, ends + [x for _, x in inner], dy, **how)
            results |= {n: g for n, g in zip(wanted, gradients, strict=False) if g is not None}
            for (name, x), dx in zip(inner, gradients[len(ends) :], strict=True):
                found = () if dx is None else torch.autograd.grad(x, ends, dx, **how)
                for result, part in zip(wanted, found, strict=False):
                    if part is not None:
                        parts[result][name] = parts[result].get(name, 0) + part
        return results


@contextmanager
def _same_masks(device: torch.device) -> Iterator[None]:
    """Inside, the random state is the same each time.  At the end, the earlier one is restored."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(_SEED)
        if on_gpu:
            torch.cuda.default_generators[device.index].manual_seed(_SEED)
        yield


def _wide_twin(
    module: nn.Module, dtype: torch.dtype, inside: torch.dtype, made: dict[nn.Module, nn.Module]
) -> nn.Module:
    """A copy of a module that computes in this dtype, with its own weights and gradients.

    ``inside``: the dtype to which a packed weight without a compute dtype is unpacked.  ``made``:
    the copies so far, by module, so that a shared module has one copy.
    """
    if module in made:
        return made[module]
    packed: Any = quantized_weight(module)
    other: Any
    is_packed, x = isinstance(packed, PackedLayer), torch.empty(0, dtype=inside, device="cpu")
    if is_packed and runs_in_8_bits(x, packed.weight):
        other = made[module] = _Int8Twin(packed.weight)
        other.inside = inside
    elif is_packed:
        weight = packed.weight.dense(packed.compute_dtype or inside)
        other = made[module] = nn.Linear(1, 1, bias=False, dtype=torch.float32, device="meta")
        other.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    else:
        other = made[module] = twin(module, plain_class_of(module))
    bias: Any = getattr(module, "bias", None)
    parameters = {"bias": bias} if is_packed else module._parameters
    for name, p in parameters.items():
        if p is not None:
            p = nn.Parameter(p.detach().to(dtype), p.requires_grad) if p.is_floating_point() else p
        other._parameters[name] = p
    for name in _OF_ACCELERATE:
        other.__dict__.pop(name, None)
    if hasattr(vars(other).get("config"), "_experts_implementation"):
        other.config = copy(other.config)
        other.config._experts_implementation = "eager"  # grouped_mm has no float64
    for name, child in module._modules.items() if packed is None else ():
        other._modules[name] = None if child is None else _wide_twin(child, dtype, inside, made)
    return other


class _Int8Twin(Int8Linear):
    """An exact ``Int8Linear``: the same rounding to 8 bits, but products and sums in x's dtype."""

    inside: torch.dtype | None = None  # the call's dtype, if x has a wider one.  x is rotated in it

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(autocast_dtype(x) or x.dtype)
        wide, inside = torch.promote_types(x.dtype, torch.float32), self.inside or x.dtype
        packed: Any = matrix_of(self, Int8Linear)
        codes, scale = packed.tensors

        def rounded(rows: Tensor, **settings: Any) -> Tensor:
            codes, scale = quantize_rows(rows.detach().to(inside), **settings)
            return codes.to(wide) * scale[:, None]

        rows = x.reshape(-1, x.shape[-1])
        turned = rotate(rows.to(wide))
        turned = turned + (rounded(rows, rotated=True) - turned).detach()  # gradient: of turned
        y = turned @ (codes * scale[:, None]).T.to(wide)
        y = y.to(x.dtype)
        if y.requires_grad:
            y.register_hook(lambda dy: (rounded(dy, factor=scale) / scale).to(dy.dtype))
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _measures(
    name: str,
    fast: Tensor | None,
    peft: Tensor | None,
    truth: Tensor,
    parts: dict[str, Tensor],
    eps: float,
    rows: int,
) -> Iterator[Measure]:
    """The measures of one result: its error, and its size along itself and along the parts.

    ``truth``: the exact result.  ``eps``: of the call's dtype.  ``rows``: of the call's input.
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
    for layer, part in {None: truth, **parts}.items():
        part = part / scale
        if not part.any():
            continue
        of = "" if layer is None else f" of {layer or 'the adapter'}'s part"
        share, of_peft = (float((error * part).sum() / part.square().sum()) for error in errors)
        noise = float(errors[1].norm() / part.norm()) / rows**0.5
        allowed = 2 * abs(of_peft) + _SHARE + noise
        yield Measure(f"{name}, size{of}", 1 + share, 1 + of_peft, 1.0, allowed)
