"""Experts by the Triton kernels: each segment of x's rows has a layer of its own.

Each tile of a kernel finds its expert's tensors on the device (``kernels/segments.py``), so no
weights are gathered, and the host never reads the ends.  Exception: if a weight or bias trains, the
torch backend computes its gradient, and reads the ends on the host.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from ...call.projection import Adapter, Base, Layout, Output, flatten, unflatten
from ...formats.format import Quantized
from .. import torch as torch_backend
from ..protocol import BackwardCall, Call
from . import linear as layer
from .grouped_mm import aligned, has_grouped_mm
from .packed import is_unpackable, made_dense, needs_torch, of_dense, read_by
from .supported import empty_gradients, kernels, precision_of
from .verification import run_kernels

# A packed weight is unpacked as a whole only if its dense form (all experts) has at most so many
# bytes.
_LARGEST = 2**32


def forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """The output's y and its adapter's h, as the torch backend returns them."""
    if needs_torch(call.layouts, of_experts=True):
        inputs, call = made_dense(inputs, call)
    ends = _ends_of(call)
    if ends is None:
        return torch_backend.forward(inputs, seeds, call)
    settings = call.layouts, call.dropout, precision_of(inputs[0]), _by_grouped_mm(inputs, call)
    results = run_kernels(_FORWARD, [*inputs, ends, seeds], settings)
    return results[:1], results[1:]


def backward(given: BackwardCall) -> list[Tensor | None]:
    """The gradient of each input that needs one, else None, as the torch backend returns them."""
    dys, inputs, hs, needs, seeds, call = given
    if needs_torch(call.layouts, of_experts=True):
        return of_dense(backward, given)
    ends, layouts, x = _ends_of(call), call.layouts, inputs[0]
    if ends is None or dys[0] is None:
        return torch_backend.backward(given)
    # torch computes the gradients of the weight and the bias.  The kernels compute the gradients of
    # x, which is first, and of the adapter, which is last.
    last = len(needs) - 2 * len(layouts[0].scales)
    by_torch = (False, *needs[1:last], *[False] * (len(needs) - last))
    by_kernels = (needs[0], *[False] * (last - 1), *needs[last:])
    settings = layouts, call.dropout, precision_of(x), _by_grouped_mm(inputs, call), by_kernels
    gradients = run_kernels(_BACKWARD, [*inputs, ends, seeds, *hs, dys[0]], settings)
    if any(by_torch):
        torch_gradients = torch_backend.backward(given._replace(needs=by_torch))
        gradients = [b if a is None else a for a, b in zip(gradients, torch_gradients, strict=True)]
    return gradients


def _ends_of(call: Call) -> Tensor | None:
    """The segments' ends, contiguous; None if the kernels don't support the call.

    They support one output with at most one adapter, and rows.first == 0: the dropout mask's row 0
    must be row 0 of x.
    """
    rows, (layout, *others) = call.rows, call.layouts
    assert rows is not None
    return None if others or rows.first or len(layout.scales) > 1 else rows.ends.contiguous()


def _forward(
    tensors: Sequence[Tensor],
    layouts: Sequence[Layout],
    dropout: float,
    precision: str,
    by_grouped_mm: bool,
) -> list[Tensor]:
    """[y], or [y, h] with an adapter."""
    x, *flat, ends, seeds = tensors
    ((weight, bias), adapters) = _stacked(flat, layouts, x)
    options = {"precision": precision, "ends": ends}
    with_dropout, hs = options | {"dropout": dropout, "seeds": seeds}, []
    for lora_a, _, scale in adapters:
        hs += kernels.project(x, [lora_a.mT], [scale / (1.0 - dropout)], **with_dropout)
    lora_bs = [adapter.lora_b.mT for adapter in adapters]
    return [_product(x, weight, hs, lora_bs, by_grouped_mm, options | {"bias": bias}), *hs]


def _backward(
    tensors: Sequence[Tensor],
    layouts: Sequence[Layout],
    dropout: float,
    precision: str,
    by_grouped_mm: bool,
    needs_flat: Sequence[bool],
) -> list[Tensor | None]:
    """dx, then the gradients of the output's tensors as a flat list."""
    needs_x, *rest = needs_flat
    (x, *flat), saved = tensors[: len(needs_flat)], tensors[len(needs_flat) :]
    ends, seeds, *hs, dy = saved
    ((weight, _), adapters), (given,) = _stacked(flat, layouts, x), unflatten(flat, layouts)
    ((_, needs),) = unflatten(rest, layouts)
    options = {"precision": precision, "ends": ends}
    with_dropout, dhs, gradients = options | {"dropout": dropout, "seeds": seeds}, [], []
    for (_, lora_b, scale), pair, need, h in zip(adapters, given.adapters, needs, hs, strict=True):
        # Gradients have the shapes and dtypes of the given tensors, which ``_stacked`` may have
        # copied.
        d_lora_a, d_lora_b, _ = d_adapter = empty_gradients(pair, need)
        dh = layer.through_lora_b(dy, lora_b, h, d_lora_b, scale / (1.0 - dropout),
                            needs_x or need.lora_a, options)  # fmt: skip
        dhs += [] if dh is None else [dh]
        gradients.append(d_adapter)
    dx, lora_as = None, [adapter.lora_a for adapter in adapters]
    if needs_x:
        dx = _product(dy, weight, dhs, lora_as, by_grouped_mm, with_dropout, backward=True)
    # dhs is empty if neither dx nor d lora_a is needed.
    for dh, (d_lora_a, _, _) in zip(dhs, gradients, strict=False):
        if d_lora_a is not None:
            kernels.weight_grad(x, [dh], [d_lora_a.mT], **with_dropout)
    return [dx, *flatten([Output(Base(None, None), tuple(gradients))], layouts)]


_FORWARD = layer.FORWARD._replace(run=_forward)
_BACKWARD = layer.BACKWARD._replace(run=_backward)


def _stacked(flat: Sequence[Tensor], layouts: Sequence[Layout], x: Tensor) -> Output[Tensor]:
    """The output with adapters in a layout that kernels read well, copied if necessary.

    Kernels need stride 1 along the rows or the columns of each expert's matrix.  In PEFT's lora_b,
    the expert's index has stride 1.  Such a tensor is copied, in x's dtype.
    """
    ((base, adapters),) = unflatten(flat, layouts)

    def stacked(tensor: Tensor) -> Tensor:
        return tensor if 1 in tensor.stride()[1:] else tensor.to(x.dtype).contiguous()

    return Output(base, tuple([Adapter(stacked(a), stacked(b), float(s)) for a, b, s in adapters]))


def _by_grouped_mm(inputs: Sequence[Tensor], call: Call) -> bool:
    """Whether torch's grouped_mm accepts the call's weight without a copy; false if packed."""
    return call.layouts[0].format is None and has_grouped_mm(inputs[0], inputs[1])


def _product(
    x: Tensor,
    weight: Tensor | Quantized,
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    by_grouped_mm: bool,
    options: dict[str, Any],
    backward: bool = False,
) -> Tensor:
    """x weight[e]ᵀ + u v[e] (+ bias[e]) for x [S, K] and weight [E, N, K].

    ``backward``: dy weight[e] + u v[e], with dy [S, N] passed as ``x``.  Without an adapter, ``us``
    and ``vs`` are empty.  ``by_grouped_mm``: torch's grouped_mm accepts the weight.
    """
    experts, n, k = weight.shape
    if backward:
        n, k = k, n
    masked, precision = options.get("seeds") is not None, options["precision"]
    packed = is_unpackable([weight])
    plan = kernels.plan_for(
        x, n, k, [u.shape[1] for u in us], precision,
        masked=masked, backward=backward, packed=packed, segments=experts,
    )  # fmt: skip
    # A packed weight whose dense form would need too much memory is unpacked tile by tile.
    unpacks = packed and (plan.unpacks or experts * n * k * x.element_size() > _LARGEST)
    q = read_by(weight, x, unpacks)
    by_grouped_mm = by_grouped_mm or (packed and not unpacks and has_grouped_mm(x, q))
    q = q if backward else q.mT
    if plan.fused or unpacks or not by_grouped_mm:
        out = x.new_empty(len(x), n)
        kernels.gemm_lowrank(out, [x], [q], us, vs, preferred=plan.gemm, **options)
        return out
    # Unlike in a layer, torch's product comes first, because grouped_mm can't add to its output.
    # Without an adapter, ``lowrank`` still adds the bias, and zeroes rows without an expert.
    out = functional.grouped_mm(aligned(x), q, offs=options["ends"])
    kernels.lowrank(out, us, vs, add=True, **options)
    return out
