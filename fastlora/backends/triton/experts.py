"""Experts by the Triton kernels: a layer of each segment's own.

A tile looks its expert's tensors up inside of the kernels (``kernels/segments.py``): nothing is
gathered, and nothing is read on the host, but where a weight or bias trains: their gradients are
the torch backend's.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from ...formats.format import Quantised
from ...projection import Adapter, Base, Layout, Output, flatten, unflatten
from .. import torch as torch_backend
from ..protocol import Call
from .at_once import aligned, runs_at_once
from .cover import covers, current, empty_like, kernels, precision_of
from .layer import through_lora_b
from .packed import is_unpackable, made_dense, needs_torch, of_dense, read_by

# Bytes of the largest dense weight of all experts that is made of a packed one, for one product.
_LARGEST = 2**32


def forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """As the torch backend's."""
    if needs_torch(call):
        inputs, call = made_dense(inputs, call)
    ends = _ends_of(call)
    if ends is None:
        return torch_backend.forward(inputs, seeds, call)
    with current(ends.device):
        facts = call.layouts, call.dropout, precision_of(inputs[0]), _runs_at_once(inputs, call)
        tensors = [seeds, ends, *inputs]
        made = kernels.replayed(_forward, tensors, facts, lambda: covers(inputs, call.layouts))
    if made is None:
        return torch_backend.forward(inputs, seeds, call)
    return made[:1], made[1:]


def backward(
    dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    needs: Sequence[bool],
    seeds: Tensor | None,
    call: Call,
) -> list[Tensor | None]:
    """As the torch backend's: the gradient of each input that needs one, else None."""
    if needs_torch(call):
        return of_dense(backward, dys, inputs, hs, needs, seeds, call)
    ends, layouts, x = _ends_of(call), call.layouts, inputs[0]
    if ends is None or dys[0] is None:
        return torch_backend.backward(dys, inputs, hs, needs, seeds, call)
    by_torch, by_kernels = _shared_out(needs, layouts)
    with current(x.device):
        facts = layouts, call.dropout, precision_of(x), _runs_at_once(inputs, call), by_kernels
        tensors = [seeds, ends, *inputs, *hs, dys[0]]
        made = kernels.replayed(_backward, tensors, facts, lambda: covers(inputs, layouts, dys))
    if made is None:
        return torch_backend.backward(dys, inputs, hs, needs, seeds, call)
    if any(by_torch):
        others = torch_backend.backward(dys, inputs, hs, by_torch, seeds, call)
        made = [b if a is None else a for a, b in zip(made, others, strict=True)]
    return made


def _ends_of(call: Call) -> Tensor | None:
    """Dense, if kernels take the call: one output, which has one adapter or none, and rows whose
    masks begin with them."""
    rows, (layout, *others) = call.rows, call.layouts
    assert rows is not None
    return None if others or rows.first or len(layout.scales) > 1 else rows.ends.contiguous()


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


def _forward(
    tensors: Sequence[Tensor],
    layouts: Sequence[Layout],
    dropout: float,
    precision: str,
    at_once: bool,
) -> list[Tensor]:
    """y, and h if there is an adapter."""
    seeds, ends, x, *flat = tensors
    (weight, bias), adapter = _stacked(flat, layouts, x)
    plain = {"precision": precision, "ends": ends}
    masked = plain | {"dropout": dropout, "seeds": seeds}
    (h,) = kernels.project(x, [adapter.lora_a.mT], [adapter.scale / (1.0 - dropout)], **masked)
    y = _product(x, weight, h, adapter.lora_b.mT, at_once, plain | {"bias": bias})
    return [y, h] if layouts[0].scales else [y]


def _backward(
    tensors: Sequence[Tensor],
    layouts: Sequence[Layout],
    dropout: float,
    precision: str,
    at_once: bool,
    needs_flat: Sequence[bool],
) -> list[Tensor | None]:
    """dx, then the gradients of the output's tensors, laid flat."""
    seeds, ends, x, *flat = tensors
    needs_x, *rest = needs_flat
    flat, (*hs, dy) = flat[: len(rest)], flat[len(rest) :]
    (weight, _), adapter = _stacked(flat, layouts, x)
    plain = {"precision": precision, "ends": ends}
    masked = plain | {"dropout": dropout, "seeds": seeds}
    ((_, needs),) = unflatten(rest, layouts)
    need = needs[0] if needs else Adapter(False, False)
    (given,) = unflatten(flat, layouts)
    # In the shapes that came, of which what kernels read may be a copy.
    made = [
        empty_like(tensor) if needed else None
        for pair in given.adapters
        for tensor, needed in zip(pair[:2], need[:2], strict=True)
    ] or [None, None]
    factor = adapter.scale / (1.0 - dropout)
    dh = through_lora_b(dy, adapter.lora_b, hs[0] if hs else None, made[1], factor,
                         needs_x or need.lora_a, plain)  # fmt: skip
    dx = None
    if dh is not None and needs_x:
        dx = _product(dy, weight, dh, adapter.lora_a, at_once, masked, backward=True)
    if dh is not None and made[0] is not None:
        kernels.weight_grad(x, [dh], [made[0].mT], **masked)
    adapters = (Adapter(made[0], made[1]),) * len(given.adapters)
    gradients: Output[Tensor | None] = Output(Base(None, None), adapters)
    return [dx, *flatten([gradients], layouts)]


def _stacked(
    flat: Sequence[Tensor], layouts: Sequence[Layout], x: Tensor
) -> tuple[Base[Tensor], Adapter[Tensor]]:
    """The base, and its adapter as kernels read it; in the place of none one of zeros, of rank 1.

    PEFT's lora_b has the expert as its fastest index: as it lies, no two elements that a thread
    needs are neighbours, so there is a copy.
    """
    ((base, adapters),) = unflatten(flat, layouts)
    if not adapters:
        experts, rows, columns = base.weight.shape
        return base, Adapter(x.new_zeros(experts, 1, columns), x.new_zeros(experts, rows, 1))
    lora_a, lora_b = (
        tensor if 1 in tensor.stride()[1:] else tensor.to(x.dtype).contiguous()
        for tensor in adapters[0][:2]
    )
    return base, Adapter(lora_a, lora_b, float(adapters[0].scale))


def _runs_at_once(inputs: Sequence[Tensor], call: Call) -> bool:
    """Whether torch's grouped_mm takes a plain weight as it lies."""
    return call.layouts[0].format is None and runs_at_once(inputs[0], inputs[1])


def _product(
    x: Tensor,
    weight: Tensor | Quantised,
    u: Tensor,
    v: Tensor,
    at_once: bool,
    options: dict[str, Any],
    backward: bool = False,
) -> Tensor:
    """x weight[e]ᵀ + u v[e] (+ bias[e]), of x [S, K] and weight [E, N, K].

    ``backward``: dy weight[e] + u v[e], of dy [S, N] in the place of x.
    """
    experts, n, k = weight.shape
    if backward:
        n, k = k, n
    masked, precision = options.get("seeds") is not None, options["precision"]
    packed = is_unpackable([weight])
    plan = kernels.plan_for(
        x, n, k, [u.shape[1]], precision,
        masked=masked, backward=backward, packed=packed, segments=experts,
    )  # fmt: skip
    # A dense one that is too large for memory isn't made: tiles are unpacked as they are read.
    unpacks = packed and (plan.unpacks or experts * n * k * x.element_size() > _LARGEST)
    q = read_by(weight, x, unpacks)
    at_once = at_once or (packed and not unpacks and runs_at_once(x, q))
    q = q if backward else q.mT
    if plan.fused or unpacks or not at_once:
        out = x.new_empty(len(x), n)
        kernels.gemm_lowrank(out, [x], [q], [u], [v], preferred=plan.gemm, **options)
        return out
    # torch's product comes first, not the adapter as in a layer: it can't add to what it finds.
    out = functional.grouped_mm(aligned(x), q, offs=options["ends"])
    kernels.lowrank(out, [u], [v], add=True, **options)
    return out
