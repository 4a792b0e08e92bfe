"""Compares each LoRA layer with PEFT and with exact results, on the model's own inputs.

In the outputs of a 16-bit model, the rounding of many layers hides a fault in one of them.  In the
results of a single layer, the fault is easier to see.  It is easiest to see in the projection of
the error onto the adapter's part of the result, where rounding errors cancel and a systematic error
adds up.

:class:`Judge` puts a hook on each fast layer.  In the layer's backward (or in its forward, without
gradients) it runs the layer by PEFT, by fastlora, and by PEFT in a wider dtype, which counts as
exact.  It adds the :class:`Measure` objects of each result to the layer's :class:`LayerCheck`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from .baseline import SeededDropout
from .check import TOLERANCES, coarsest_dtype
from .layer import PeftGatedMLP, fast_classes

_SHARE = 0.01  # a systematic error below this share of a result may be rounding
# The allowed multiple of the standard deviation of rounding.  A large model has 10,000 measures, so
# a smaller multiple would report faults in a correct model.
_SIGMAS = 6.0
_ROWS = 1024  # the most rows with an exact result, because a GPU's float32 is up to 16 × slower
_SEED = 20240301  # arbitrary
_OF_ACCELERATE = ("forward", "_old_forward", "_hf_hook")  # accelerate's entries in a __dict__


@dataclass(frozen=True)
class Measure:
    """One number of a layer's call: fastlora's value, PEFT's value, and the range of right values.

    There are two kinds.  An error is ‖result - exact‖ / ‖exact‖.  A size is
    <result, D> / <exact, D>, where D is the exact result, or the adapters' part of it.
    """

    name: str
    value: float  # fastlora's, which is right within middle ± allowed
    peft: float
    middle: float  # 0 for an error, near 1 for a size
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

    @property
    def relative(self) -> float:
        """fastlora's largest error in this layer."""
        return max(measure.value for measure in self.measures if measure.middle == 0.0)

    def __bool__(self) -> bool:
        return self.worst.excess <= 1.0


class Judge:
    """Collects the layers' measures while the model runs inside of :meth:`watching`."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype | None] = set()  # of the calls' tensors, and of autocast
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
        """Run the call by PEFT, by fastlora, exactly, and exactly without adapters; measure."""
        unit, x = call.unit, tensors[0]
        dtypes = {call.dtype, call.autocast, *(tensor.dtype for tensor in tensors)}
        dtype = coarsest_dtype(unit, dtypes)
        wide = torch.float32 if dtype in HALF_DTYPES else torch.float64
        rows, count = None, x.numel() // max(1, x.shape[-1])
        if count > _ROWS and len(call.others) == 1:
            numbers = torch.linspace(0, count - 1, _ROWS, dtype=torch.float64, device=x.device)
            rows = numbers.round().long()
        if rows is not None and dy is not None:
            kept = torch.zeros_like(dy, memory_format=torch.contiguous_format)
            kept.view(count, -1)[rows] = dy.reshape(count, -1)[rows]
            dy = kept
        # Gradients are linear in dy, so dy may be scaled.  Its largest element becomes 1/32 to
        # 1/16, so that small elements don't underflow in float16.
        if dy is not None and dy.any():
            dy = dy * 2.0 ** (-4 - max(-120, int(dy.abs().max().frexp().exponent)))
        classes = fast_classes(unit.modules()) | gated_classes([unit], PeftGatedMLP)
        # In PEFT's run fastlora's own 8-bit product would hide the faults of that product.
        int8 = [each for each in unit.modules() if isinstance(each, Int8Linear)]
        twins: Any = dict.fromkeys(int8 if x.dtype != torch.float64 else (), _Int8Twin)
        with call.surroundings(x):
            with changed_classes(twins):
                peft = call.run(unit, tensors, dy)
            with changed_classes(classes):
                fast = call.run(unit, tensors, dy)
        exact_unit = _wide_twin(unit, wide, call.autocast or x.dtype, {})
        for module in exact_unit.modules():
            if isinstance(module, SeededDropout):
                module.__dict__["rows"] = None if rows is None else (count, rows)
        tensors = tuple([_rows_of(tensor, rows, wide) for tensor in tensors])
        dy = None if dy is None else _rows_of(dy, rows, wide)
        with torch.autocast(x.device.type, enabled=False):
            exact = call.run(exact_unit, tensors, dy)
            for module in exact_unit.modules():
                if isinstance(module, LoraLayer):
                    module._disable_adapters = True
            base = call.run(exact_unit, tensors, dy, of_parameters=False)
        of_layer = self._measures.setdefault(call.name, {})
        for name, truth in exact.items():
            if not truth.any():
                self.zeros.add(f"{call.name}: {name}")
            of_rows = rows if name in base else None
            found = [
                _rows_of(each[name], of_rows) if name in each else None for each in (fast, peft)
            ]
            for measure in _measures(name, found, truth, base.get(name), torch.finfo(dtype).eps):
                before = of_layer.get(measure.name, measure)
                of_layer[measure.name] = max(before, measure, key=lambda each: each.excess)


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
        of_parameters: bool = True,
    ) -> dict[str, Tensor]:
        """The output for these tensors, and the gradients for dy, by name.

        The dropout masks are the same in every run.
        """
        inputs = [
            tensor.detach().requires_grad_(needs and dy is not None)
            for tensor, needs in zip(tensors, self.needs, strict=True)
        ]
        rest = iter(inputs)
        leaves = [next(rest) if leaf is None else leaf for leaf in self.others]
        args, kwargs = tree_unflatten(leaves, self.form)
        with torch.set_grad_enabled(dy is not None), _same_masks(tensors[0].device):
            y = unit.forward(*args, **kwargs)
            results = {"output": y.detach()}
            wanted = {f"gradient of input {i}": x for i, x in enumerate(inputs) if x.requires_grad}
            if of_parameters:
                wanted |= {
                    f"gradient of {name}": p
                    for name, p in unit.named_parameters()
                    if p.requires_grad and not p._backward_hooks  # a hook may change the gradient
                }
            if wanted and y.requires_grad:
                gradients = torch.autograd.grad(y, [*wanted.values()], dy, allow_unused=True)
                named = zip(wanted, gradients, strict=True)
                results |= {name: each for name, each in named if each is not None}
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
    for name, child in module._modules.items() if packed is None else ():
        other._modules[name] = None if child is None else _wide_twin(child, dtype, inside, made)
    return other


class _Int8Twin(Int8Linear):
    """An exact ``Int8Linear``: the same rounding to 8 bits, but products and sums in x's dtype."""

    inside: torch.dtype | None = None  # the call's dtype, if x has a wider one.  x is rotated in it

    def forward(self, x: Tensor) -> Tensor:
        packed: Any = matrix_of(self, Int8Linear)
        x = x.to(autocast_dtype(x) or x.dtype)
        y = _Int8Product.apply(x, *packed.tensors, self.inside or x.dtype)
        return y if self.bias is None else y + self.bias


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scale: Tensor, inside: torch.dtype) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.inside, rows = inside, x.reshape(-1, x.shape[-1]).to(inside)
        xq, of_x = quantize_rows(rows, rotated=True)
        weight, wide = codes * scale[:, None], torch.promote_types(x.dtype, torch.float32)
        y = (xq.to(wide) * of_x[:, None]) @ weight.T.to(wide)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        dq, of_dy = quantize_rows(dy.reshape(-1, dy.shape[-1]).to(ctx.inside), scale)
        wide = torch.promote_types(dy.dtype, torch.float32)
        dx = rotate((dq.to(wide) * of_dy[:, None]) @ codes.to(wide))
        return dx.to(dy.dtype).view(*dy.shape[:-1], -1), None, None, None


def _rows_of(tensor: Tensor, rows: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """The rows with these indices (None: all rows) in this dtype; integers keep their dtype."""
    tensor = tensor if rows is None else tensor.reshape(-1, tensor.shape[-1])[rows]
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _measures(
    name: str,
    found: Sequence[Tensor | None],
    truth: Tensor,
    base: Tensor | None,
    eps: float,
) -> Iterator[Measure]:
    """The measures of one result: its error, its size, and its size along the adapters' part.

    ``found``: fastlora's result and PEFT's.  ``truth``: the exact result.  ``base``: the exact
    result without adapters, or None.  ``eps``: of the call's dtype.
    """
    fast, peft = found
    if peft is None or not peft.isfinite().all():
        return  # PEFT's error is unknown, so no error can be judged
    inf = float("inf")
    if fast is None or fast.shape != peft.shape:
        yield Measure(f"{name}, error", inf, 0.0, 0.0, eps)
        return
    scale = truth.abs().max().clamp_min(torch.finfo(truth.dtype).tiny)
    truth = truth / scale
    error, peft_error = (
        side.reshape(truth.shape).to(truth) / scale - truth for side in (fast, peft)
    )
    size = truth.norm()
    if size:
        of_fast, of_peft = (float(each.norm() / size) for each in (error, peft_error))
        allowed = 2 * of_peft + max(2 * eps, TOLERANCES[torch.float64])
        yield Measure(f"{name}, error", of_fast, of_peft, 0.0, allowed)
    elif fast.any():
        yield Measure(f"{name}, error", inf, float(peft.any()), 0.0, eps)
    parts = {"size": truth}
    if base is not None:
        parts["size of the adapter's part"] = truth - base / scale
    for what, part in parts.items():
        if part.any():
            share, sigma = _share_of(error, part)
            of_peft, sigma_of_peft = _share_of(peft_error, part)
            allowed = max(_SHARE, _SIGMAS * sigma, _SIGMAS * sigma_of_peft)
            # If PEFT loses a part of the size to rounding, fastlora may lose as much.  So the range
            # is from PEFT's size to 1, extended by ``allowed`` at both ends.
            middle, reach = 1.0 + of_peft / 2, abs(of_peft) / 2
            yield Measure(f"{name}, {what}", 1.0 + share, 1.0 + of_peft, middle, allowed + reach)


def _share_of(error: Tensor, part: Tensor) -> tuple[float, float]:
    """<error, part> / <part, part>, and its standard deviation if the error is only rounding.

    Rounding errors in one row or column may be correlated, because all its elements depend on one
    rounded number, such as an element of h.  So the deviation is estimated in three ways: from
    single elements, from sums of rows, and from sums of columns, each after the share is
    subtracted.  The largest estimate counts.
    """
    columns = part.shape[-1] if part.dim() else 1
    error, part = error.reshape(-1, columns), part.reshape(-1, columns)
    products, squares = error * part, part.square()
    total = squares.sum()
    share = products.sum() / total
    rest = products - share * squares
    sigma = max(each.norm() for each in (rest, rest.sum(0), rest.sum(1)))
    return float(share), float(sigma / total)
