"""Experts by the Triton kernels: the formulas of a layer, over segments of the rows.

Each expert's rows find its tensors inside of the kernels (``kernels/segments.py``).  Nothing is
read on the host, but where the weight or the bias trains: their gradients are the torch backend's.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...projection import Adapter, Base, Layout, Output, flatten, unflatten
from ...segments import Segments
from .. import torch as torch_backend
from ..protocol import Settings
from .cover import covers, current, empty_like, kernels, precision_of
from .layer import Common

# Limits of torch's grouped_mm: bytes of which strides and addresses are multiples, and experts.
_ALIGNMENT, _MOST_EXPERTS = 16, 1023


def forward_grouped(
    inputs: Sequence[Tensor], segments: Segments, seeds: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """As the torch backend's: y [S, N] and h [S, r]; zeros in nobody's rows."""
    if segments.first:  # whose masks begin elsewhere
        return torch_backend.forward_grouped(inputs, segments, seeds, settings)
    x = inputs[0]
    with current(x.device):
        made = kernels.replayed(
            _forward,
            [seeds, segments.ends, *inputs],
            (settings.layouts, settings.dropout, precision_of(x), runs_at_once(x, inputs[1])),
            lambda: covers(inputs, settings.layouts),
        )
    if made is None:
        return torch_backend.forward_grouped(inputs, segments, seeds, settings)
    y, h = made
    assert y is not None
    assert h is not None
    return y, h


def backward_grouped(
    dy: Tensor,
    inputs: Sequence[Tensor],
    segments: Segments,
    h: Tensor,
    needs: Sequence[bool],
    seeds: Tensor | None,
    settings: Settings,
) -> list[Tensor | None]:
    """As the torch backend's: the gradient of each input that needs one, else None."""
    if segments.first:
        return torch_backend.backward_grouped(dy, inputs, segments, h, needs, seeds, settings)
    x = inputs[0]
    by_torch, by_kernels = _shared_out(needs, settings.layouts)
    with current(x.device):
        made = kernels.replayed(
            _backward,
            [seeds, segments.ends, *inputs, h, dy],
            (
                settings.layouts,
                settings.dropout,
                precision_of(x),
                runs_at_once(x, inputs[1]),
                by_kernels,
            ),
            lambda: covers(inputs, settings.layouts, [dy]),
        )
    if made is None:
        by_torch, made = tuple(needs), [None] * len(needs)
    if any(by_torch):
        others = torch_backend.backward_grouped(dy, inputs, segments, h, by_torch, seeds, settings)
        made = [b if a is None else a for a, b in zip(made, others, strict=True)]
    return made


def _shared_out(
    needs: Sequence[bool], layouts: Sequence[Layout]
) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Which gradients torch's own operations give, and which the kernels."""
    x, *flat = needs
    ((base, adapters),) = unflatten(flat, layouts)
    nothing = Base(False, None if base.bias is None else False)
    frozen = tuple([adapter._replace(lora_a=False, lora_b=False) for adapter in adapters])
    by_torch, by_kernels = Output(base, frozen), Output(nothing, adapters)
    return (False, *flatten([by_torch], layouts)), (x, *flatten([by_kernels], layouts))


class _Call(NamedTuple):
    """What all kernels of a call take."""

    common: Common
    ends: Tensor  # int32 [E], contiguous
    at_once: bool  # torch's grouped_mm takes x and the weight, and is a kernel

    def masked(self) -> dict[str, Any]:
        return self.plain() | {"dropout": self.common.dropout, "seeds": self.common.seeds}

    def plain(self) -> dict[str, Any]:
        return {"precision": self.common.precision, "ends": self.ends}


def _forward(
    tensors: Sequence[Tensor],
    layouts: Sequence[Layout],
    dropout: float,
    precision: str,
    at_once: bool,
) -> list[Tensor]:
    seeds, ends, x, *flat = tensors
    call = _Call(Common(dropout, precision, seeds), _contiguous(ends), at_once)
    (weight, bias), adapter = _stacked(flat, layouts, x.dtype)
    lora_a, lora_b, factor = adapter.lora_a.mT, adapter.lora_b.mT, call.common.factor(adapter)
    (h,) = kernels.project(x, [lora_a], [factor], **call.masked())
    return [_product(x, weight.mT, h, lora_b, call, call.plain() | {"bias": bias}), h]


def _backward(
    tensors: Sequence[Tensor],
    layouts: Sequence[Layout],
    dropout: float,
    precision: str,
    at_once: bool,
    needs_flat: Sequence[bool],
) -> list[Tensor | None]:
    seeds, ends, x, *flat, h, dy = tensors
    call = _Call(Common(dropout, precision, seeds), _contiguous(ends), at_once)
    (weight, _), adapter = _stacked(flat, layouts, x.dtype)
    needs_x, *rest = needs_flat
    ((_, (need,)),) = unflatten(rest, layouts)
    lora_b, factor = adapter.lora_b, call.common.factor(adapter)
    d_lora_a, d_lora_b = (
        empty_like(tensor) if needed else None
        for tensor, needed in zip(unflatten(flat, layouts)[0].adapters[0][:2], need, strict=False)
    )
    needs_dh, dx, dh = needs_x or need.lora_a, None, None
    if d_lora_b is not None:
        also: dict[str, Any] = {}
        if needs_dh and kernels.one_pass_pays(dy, lora_b, precision):
            also = {"b": lora_b, "factor": factor}
        # A hook on saved tensors may give h back in another layout.
        dh = kernels.weight_grad(dy, [_contiguous(h)], [d_lora_b], **also, **call.plain())
    if needs_dh and dh is None:
        (dh,) = kernels.project(dy, [lora_b], [factor], **call.plain())
    if dh is not None and needs_x:
        dx = _product(dy, weight, dh, adapter.lora_a, call, call.masked(), backward=True)
    if dh is not None and d_lora_a is not None:
        kernels.weight_grad(x, [dh], [d_lora_a.mT], **call.masked())
    gradients: Output[Tensor | None] = Output(Base(None, None), (Adapter(d_lora_a, d_lora_b),))
    return [dx, *flatten([gradients], layouts)]


def _stacked(
    flat: Sequence[Tensor], layouts: Sequence[Layout], dtype: torch.dtype
) -> tuple[Base[Tensor], Adapter[Tensor]]:
    """The base, and its adapter as kernels read it.

    PEFT's lora_b has the expert as its fastest index: as it lies, no two elements that a thread
    needs are neighbours, so there is a copy.
    """
    ((base, (adapter,)),) = unflatten(flat, layouts)
    lora_a, lora_b = (
        tensor if 1 in tensor.stride()[1:] else tensor.to(dtype).contiguous()
        for tensor in adapter[:2]
    )
    return base, Adapter(lora_a, lora_b, adapter.scale)


def _product(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    call: _Call,
    options: dict[str, Any],
    backward: bool = False,
) -> Tensor:
    """x weight[e] + u v[e] (+ bias[e]), of x or dy [S, K] and weight [E, K, N]."""
    experts, k, n = weight.shape
    masked, precision = options.get("seeds") is not None, call.common.precision
    plan = kernels.plan_for(
        x, n, k, [u.shape[1]], precision, masked=masked, backward=backward, segments=experts
    )
    if plan.fused or not call.at_once:
        out = x.new_empty(len(x), n)
        kernels.gemm_lowrank(out, [x], [weight], [u], [v], preferred=plan.gemm, **options)
        return out
    # torch's product comes first, not the adapter as in a layer: it can't add to what it finds.
    out = functional.grouped_mm(aligned(x), weight, offs=call.ends)
    kernels.lowrank(out, [u], [v], add=True, **options)
    return out


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def runs_at_once(x: Tensor, weight: Tensor) -> bool:
    """Whether grouped_mm multiplies for all experts, with no reading of offsets on the host."""
    if not (len(x) and _takes(x, weight)):
        return False
    return x.dtype == torch.bfloat16 and _has_kernel(x.device)


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether grouped_mm takes this weight, and x and dy too, if need be as contiguous copies."""
    if not hasattr(functional, "grouped_mm") or x.dtype == torch.float64:
        return False
    if len(weight) > _MOST_EXPERTS:
        return False
    unit, last = _ALIGNMENT // x.element_size(), weight.stride()[1:]
    if any(size % unit for size in weight.shape[1:]) or weight.data_ptr() % _ALIGNMENT:
        return False
    rows, columns = weight.shape[1:]
    dense = last[0] >= columns if last[1] == 1 else last[0] == 1 and last[1] >= rows
    return dense and not max(last) % unit and not weight.stride(0) % unit


@cache
def _has_kernel(device: torch.device) -> bool:
    """Whether torch's grouped_mm of bfloat16 is a kernel; elsewhere it reads its offsets itself."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def aligned(matrix: Tensor) -> Tensor:
    """The matrix with dense rows, aligned as grouped_mm has it: a copy only if it needs one."""
    first, last = matrix.stride()
    size = matrix.element_size()
    fits = last == 1 and first >= matrix.shape[1] and not first * size % _ALIGNMENT
    if fits and not matrix.data_ptr() % _ALIGNMENT:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)
