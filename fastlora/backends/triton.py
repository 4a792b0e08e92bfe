"""The Triton backend: the kernels of ``fastlora.kernels``, on a GPU, or interpreted on a CPU.

The formulas are those of the torch backend, and so is the dropout mask, bit for bit.  A call that
the kernels don't cover runs on the torch backend, and the reason is said once.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..formats.format import Quantised
from ..projection import (
    Adapter,
    Layout,
    Output,
    flatten,
    named_tensors,
    per_adapter,
    unflatten,
)
from ..segments import Segments
from . import torch as torch_backend
from .dropout import dropout_mask
from .protocol import Settings

try:
    from .. import kernels  # type: ignore[attr-defined]  # it lives in kernels/
except ImportError as error:
    raise ImportError(
        f"{__package__.partition('.')[0]} was imported from a source tree, {__file__}, which "
        "has no fastlora.kernels: run from another folder, or pip install --editable ."
    ) from error

__all__ = [
    "TARGETS",
    "backward",
    "backward_grouped",
    "dropout_mask",
    "forward",
    "forward_grouped",
    "gated",
    "gated_backward",
    "h_dtype",
    "is_small",
    "why_not",
    "without_launching",
]

# The GPUs that calls can be planned for, without one.
TARGETS = tuple(name for name, target in kernels.TARGETS.items() if target.kind != "cpu")
_COVERED = (torch.float16, torch.bfloat16, torch.float32)
_LONGEST = 2**31 - 2**17  # an index and a few tiles more fit in 32 bits
_NOTHING = nullcontext()
# z.conj().imag and the like: the minus isn't in their memory, which is what kernels read.
_NEGATED = "a tensor is a negated view, whose resolve_neg() the Triton kernels could take"
_said: set[str] = set()
_INTERNAL = tuple(
    str(Path(file).parent) for file in (Path(__file__).parent, kernels.__file__, torch.__file__)
)


def forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, settings: Settings
) -> tuple[list[Tensor], list[Tensor]]:
    """As the torch backend's: y [M, N] of every output, and h [M, r] of every adapter."""
    x, count = inputs[0], len(settings.layouts)
    with _current(x.device):
        made = kernels.replayed(
            _forward,
            [seeds, *inputs],
            (settings.layouts, settings.dropout, _precision(x)),
            lambda: _covers(inputs, settings.layouts),
            settings.kept,
        )
    if made is None:
        return torch_backend.forward(inputs, seeds, settings)
    return made[:count], made[count:]


def backward(
    dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    hs: Sequence[Tensor],
    needs: Sequence[bool],
    seeds: Tensor | None,
    settings: Settings,
) -> list[Tensor | None]:
    """As the torch backend's: the gradient of each input that needs one, else None."""
    x = inputs[0]
    with _current(x.device):
        made = kernels.replayed(
            _backward,
            [seeds, *inputs, *hs, *dys],
            (settings.layouts, settings.dropout, _precision(x), tuple(needs)),
            lambda: any(dy is not None for dy in dys) and _covers(inputs, settings.layouts, dys),
        )
    if made is None:
        return torch_backend.backward(dys, inputs, hs, needs, seeds, settings)
    return made


def forward_grouped(
    inputs: Sequence[Tensor], segments: Segments, seeds: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The torch backend's: there are no kernels for it as yet."""
    return torch_backend.forward_grouped(inputs, segments, seeds, settings)


def backward_grouped(
    dy: Tensor,
    inputs: Sequence[Tensor],
    segments: Segments,
    h: Tensor,
    needs: Sequence[bool],
    seeds: Tensor | None,
    settings: Settings,
) -> list[Tensor | None]:
    """The torch backend's: there are no kernels for it as yet."""
    return torch_backend.backward_grouped(dy, inputs, segments, h, needs, seeds, settings)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """As the torch backend's: act(gate) ∘ up, [M, N], rounded once."""
    made = _of_gated(_gated, [gate, up], activation)
    if made is None:
        return torch_backend.gated(gate, up, activation)
    (product,) = made
    assert product is not None
    return product


def gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor
) -> None:
    """As the torch backend's: d_gate and d_up are filled, each rounded once."""
    if _of_gated(_gated_backward, [dy, gate, up, d_gate, d_up], activation) is None:
        torch_backend.gated_backward(dy, gate, up, activation, d_gate, d_up)


def h_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """x's."""
    return dtype


def is_small(x: Tensor, outputs: Sequence[Output[Tensor]]) -> bool:
    """Never: a GPU's calls are kernels."""
    return False


def why_not(dtype: torch.dtype, device: torch.device, outputs: Sequence[Output[Tensor]]) -> str:
    """Why the kernels don't cover x of this dtype on this device, or "" if they do."""
    target = kernels.target_of(device)
    if target is None:
        if device.type == "cpu":
            return "on a CPU the Triton kernels run only under TRITON_INTERPRET=1"
        return f"the Triton kernels don't run on {device}"
    for output in outputs:
        if isinstance(output.base.weight, Quantised):
            return "the Triton kernels have no packed weights"
        for _, tensor in named_tensors(output):
            if tensor is None:
                continue
            if tensor.dtype not in _COVERED:
                return f"the Triton kernels don't have {tensor.dtype}"
            if tensor.is_neg():
                return _NEGATED
            if max(tensor.shape) > _LONGEST:
                return f"the Triton kernels count to {_LONGEST}, but a tensor is longer"
    if dtype == torch.float32 and not target.float32:
        return f"{target.name} multiplies no float32 in tensor cores"
    return "" if dtype in _COVERED else f"the Triton kernels don't have {dtype}"


@contextmanager
def without_launching(
    handler: "Callable[[kernels.Launch], None]", where: str | torch.device
) -> Iterator[None]:
    """Calls inside, on meta tensors, hand ``handler`` what they would launch on a target or device.

    Nothing is launched, and the device of a name in ``TARGETS`` need not be here.
    """
    target = kernels.TARGETS[where] if isinstance(where, str) else kernels.target_of(where)
    with kernels.use_target(target), kernels.intercept(handler):
        yield


def _covers(
    inputs: Sequence[Tensor], layouts: Sequence[Layout], dys: Sequence[Tensor | None] = ()
) -> bool:
    x, *tensors = inputs
    if len(x) == 0:
        return False
    reason = why_not(x.dtype, x.device, unflatten(tensors, layouts))
    if not reason and any(tensor is not None and tensor.is_neg() for tensor in (x, *dys)):
        reason = _NEGATED
    if not reason and len(x) > _LONGEST:
        reason = f"the Triton kernels count to {_LONGEST}, but x has {len(x)} rows"
    if reason and reason not in _said:
        _said.add(reason)
        warnings.warn(f"this call runs on the torch backend: {reason}", stacklevel=_user_level())
    return not reason


def _user_level() -> int:
    """The ``stacklevel``, for who calls this, of the first line outside of fastlora and torch."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        level, frame = level + 1, frame.f_back
    return level + 1


class _Common(NamedTuple):
    """What all kernels of a call take."""

    dropout: float
    precision: str
    seeds: Tensor | None

    def factor(self, adapter: Adapter[Tensor]) -> float:
        return float(adapter.scale) / (1.0 - self.dropout)


def _forward(
    tensors: Sequence[Tensor], layouts: Sequence[Layout], dropout: float, precision: str
) -> list[Tensor]:
    """Every y, then every h."""
    seeds, x, *flat = tensors
    outputs, common = unflatten(flat, layouts), _Common(dropout, precision, seeds)
    plans = [_forward_plan(x, output, common) for output in outputs]
    in_one_launch = seeds is None and all(
        plan.fused
        and len(output.adapters) == 1
        and kernels.one_launch_pays(x, len(output.adapters[0].lora_a))
        for plan, output in zip(plans, outputs, strict=True)
        if plan is not None
    )
    adapters = [adapter for output in outputs for adapter in output.adapters]
    if in_one_launch:
        hs = [x.new_empty(len(x), len(adapter.lora_a)) for adapter in adapters]
    else:
        hs = kernels.project(
            x,
            [adapter.lora_a.T for adapter in adapters],
            [common.factor(adapter) for adapter in adapters],
            precision=precision,
            dropout=dropout,
            seeds=seeds,
        )
    ys = [
        _y(x, output, thin, plan, in_one_launch, precision)
        for output, thin, plan in zip(outputs, per_adapter(hs, outputs), plans, strict=True)
    ]
    return ys + hs


def _backward(
    tensors: Sequence[Tensor],
    layouts: Sequence[Layout],
    dropout: float,
    precision: str,
    needs_flat: Sequence[bool],
) -> list[Tensor | None]:
    """dx, then the gradients of the outputs' tensors, laid flat."""
    needs_x, *rest = needs_flat
    seeds, x, *others = tensors
    common, needs = _Common(dropout, precision, seeds), unflatten(rest, layouts)
    flat, others = others[: len(rest)], others[len(rest) :]
    hs, dys = others[: -len(layouts)], others[-len(layouts) :]
    # A hook on saved tensors may give them back in another layout.
    hs = [h if h is None or h.is_contiguous() else h.contiguous() for h in hs]
    outputs = unflatten(flat, layouts)
    gradients: list[Output[Tensor | None]] = []
    terms: list[_Term] = []
    per_output = zip(
        dys, outputs, needs, per_adapter(hs, outputs), _seeds(outputs, seeds), strict=True
    )
    for dy, output, need, thin, own_seeds in per_output:
        if dy is None:
            gradients.append(torch_backend.no_gradients(output))
            continue
        base = torch_backend.base_gradients(dy, x, output.base, need.base)
        adapters = []
        for of_one in zip(output.adapters, need.adapters, thin, own_seeds, strict=True):
            d_adapter, term = _through_lora_b(dy, *of_one, needs_x, common)
            adapters.append(d_adapter)
            terms += [] if term is None else [term]
        gradients.append(Output(base, tuple(adapters)))
    dx = _dx(x, dys, outputs, terms, common) if needs_x else None
    trained = [term for term in terms if term.d_lora_a is not None]
    if trained:
        kernels.weight_grad(
            x,
            [term.dh for term in trained],
            [term.d_lora_a.T for term in trained if term.d_lora_a is not None],
            precision=precision,
            dropout=dropout,
            seeds=_join([term.seed for term in trained], seeds),
        )
    return [dx, *flatten(gradients, layouts)]


def _of_gated(
    function: Callable[..., list[Tensor]], matrices: Sequence[Tensor], activation: str
) -> list[Tensor | None] | None:
    """What a call of these matrices comes to; None if the kernels don't cover it."""
    x = matrices[0]
    with _current(x.device):
        return kernels.replayed(
            function,
            matrices,
            (activation,),
            lambda: (
                not why_not(x.dtype, x.device, ())
                and not any(kernels.why_not_gated(matrix) for matrix in matrices)
            ),
        )


def _gated(matrices: Sequence[Tensor], activation: str) -> list[Tensor]:
    gate, up = matrices
    return [kernels.gated(gate, up, activation, _empty_like(gate))]


def _gated_backward(matrices: Sequence[Tensor], activation: str) -> list[Tensor]:
    dy, gate, up, d_gate, d_up = matrices
    kernels.gated_backward(dy, gate, up, activation, d_gate, d_up)
    return []


class _Term(NamedTuple):
    """An adapter's dh, and what will be made with it: its part of dx, and d lora_a."""

    adapter: Adapter[Tensor]
    dh: Tensor
    d_lora_a: Tensor | None  # to be filled
    seed: Tensor | None


def _forward_plan(x: Tensor, output: Output[Tensor], common: _Common) -> "kernels.Plan | None":
    """How to make this output; None for one without adapters, whose product is torch's."""
    if not output.adapters:
        return None
    ranks = [len(adapter.lora_a) for adapter in output.adapters]
    rows, masked = len(output.base.weight), common.seeds is not None
    return kernels.plan_for(x, rows, x.shape[1], ranks, common.precision, masked=masked)


def _y(
    x: Tensor,
    output: Output[Tensor],
    hs: list[Tensor],
    plan: "kernels.Plan | None",
    makes_h: bool,
    precision: str,
) -> Tensor:
    """x weightᵀ + Σ h lora_bᵀ + bias, [M, N]; ``makes_h``: fill h [M, r] in the same launch."""
    (weight, bias), adapters = output
    if plan is None:
        return linear(x, weight, None if bias is None else bias.to(x.dtype))
    y, v = x.new_empty(len(x), len(weight)), [adapter.lora_b.T for adapter in adapters]
    if plan.fused:
        a, factor = None, 1.0
        if makes_h:
            a, factor = adapters[0].lora_a.T, float(adapters[0].scale)
        kernels.gemm_lowrank(
            y, [x], [weight.T], hs, v, precision=precision, bias=bias,
            a=a, factor=factor, preferred=plan.gemm,
        )  # fmt: skip
        return y
    # The adapter first: torch's product adds to what it finds, behind its own loads.
    kernels.gemm_lowrank(y, [], [], hs, v, precision=precision, bias=bias)
    return torch.addmm(y, x, weight.T, out=y)


def _through_lora_b(
    dy: Tensor,
    adapter: Adapter[Tensor],
    need: Adapter[bool],
    h: Tensor,
    seed: Tensor | None,
    needs_x: bool,
    common: _Common,
) -> tuple[Adapter[Tensor | None], _Term | None]:
    """d lora_b = dyᵀ h, and dh = factor · dy lora_b: what is needed of both.

    The gradient of lora_a is there, but still empty.
    """
    factor, precision, lora_b = common.factor(adapter), common.precision, adapter.lora_b
    d_lora_a = _empty_like(adapter.lora_a) if need.lora_a else None
    d_lora_b = _empty_like(lora_b) if need.lora_b else None
    need_dh, dh = needs_x or need.lora_a, None
    if d_lora_b is not None and need_dh and kernels.one_pass_pays(dy, lora_b, precision):
        dh = kernels.weight_grad(dy, [h], [d_lora_b], precision=precision, b=lora_b, factor=factor)
    else:
        if d_lora_b is not None:
            kernels.weight_grad(dy, [h], [d_lora_b], precision=precision)
        if need_dh:
            (dh,) = kernels.project(dy, [lora_b], [factor], precision=precision)
    term = None if dh is None else _Term(adapter, dh, d_lora_a, seed)
    return Adapter(d_lora_a, d_lora_b), term


def _dx(
    x: Tensor,
    dys: Sequence[Tensor | None],
    outputs: Sequence[Output[Tensor]],
    terms: Sequence[_Term],
    common: _Common,
) -> Tensor:
    """Σ dy weight + Σ mask ∘ (dh lora_a), [M, K]."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    used = [(dy, output) for dy, output in zip(dys, outputs, strict=True) if dy is not None]
    fused = []
    if terms:
        u, v = [term.dh for term in terms], [term.adapter.lora_a for term in terms]
        seeds = _join([term.seed for term in terms], common.seeds)
        depth = sum(len(output.base.weight) for _, output in used)
        ranks, masked = [dh.shape[1] for dh in u], seeds is not None
        plan = kernels.plan_for(
            x, x.shape[1], depth, ranks, common.precision, masked=masked, backward=True
        )
        if plan.fused:
            fused = [(dy, output.base.weight) for dy, output in used if output.adapters]
        kernels.gemm_lowrank(  # first, as in the forward
            dx, [dy for dy, _ in fused], [weight for _, weight in fused], u, v,
            precision=common.precision, dropout=common.dropout, seeds=seeds, preferred=plan.gemm,
        )  # fmt: skip
    by_torch = [(dy, output.base.weight) for dy, output in used if not (fused and output.adapters)]
    for i, (dy, weight) in enumerate(by_torch):
        torch.addmm(dx, dy, weight, beta=float(bool(terms) or i > 0), out=dx)
    return dx


def _seeds(outputs: Sequence[Output], seeds: Tensor | None) -> Iterator[list[Tensor | None]]:
    """For each output its adapters' seeds, or None for each without dropout."""
    if seeds is None:
        return ([None] * len(output.adapters) for output in outputs)
    return per_adapter(seeds.split(1), outputs)


def _join(some: Sequence[Tensor | None], seeds: Tensor | None) -> Tensor | None:
    """These of the call's seeds as one tensor; no index is sent to the device for it."""
    if seeds is None or len(some) == len(seeds):
        return seeds
    return torch.cat([seed for seed in some if seed is not None])


def _precision(x: Tensor) -> str:
    """How tensor cores may read float32; for the 16-bit dtypes it means nothing."""
    target = kernels.target_of(x.device) if x.dtype == torch.float32 else None
    if target is None or not target.tf32:
        return "ieee"
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        # Since torch 2.9: it follows the older switches, whose getters raise if this one was used.
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
