"""Rows cut into segments, by the Triton kernels: experts, or many adapters over one base.

A tile looks up its segment's tensors inside of the kernels (``kernels/segments.py``), and of many
adapters where its rows lie in x, dy, y and dx: nothing is gathered, and nothing is read on the
host, but where an expert's weight or bias trains: their gradients are the torch backend's.  The
base product of many adapters is a layer's, of all rows as they lie.  Adapters of unlike ranks are
padded to the largest; of a bank nothing is copied.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...formats.format import Quantised
from ...projection import Adapter, Base, Layout, Output, flatten, layouts_of, unflatten
from ...rows import Rows
from .. import torch as torch_backend
from ..protocol import Call
from . import layer
from .at_once import aligned, runs_at_once
from .cover import covers, current, empty_like, kernels, precision_of
from .packed import is_unpackable, made_dense, needs_torch, of_dense, read_by

# Bytes of the largest dense weight of all experts that is made of a packed one, for one product.
_LARGEST = 2**32


def forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """As the torch backend's."""
    rows, x = call.rows, inputs[0]
    assert rows is not None
    if not rows.shares_base and needs_torch(call):
        inputs, call = made_dense(inputs, call)
    with current(x.device):
        if not _takes(call, rows):
            return torch_backend.forward(inputs, seeds, call)
        if rows.shares_base and covers(inputs, call.layouts):
            return _forward_many(inputs, seeds, call, rows)
        made = None
        if not rows.shares_base:
            facts = call.layouts, call.dropout, precision_of(x), _runs_at_once(inputs, call)
            tensors = [seeds, rows.ends, *inputs]
            made = kernels.replayed(_experts, tensors, facts, lambda: covers(inputs, call.layouts))
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
    rows, x = call.rows, inputs[0]
    assert rows is not None
    if not rows.shares_base and needs_torch(call):
        return of_dense(backward, dys, inputs, hs, needs, seeds, call)
    with current(x.device):
        if dys[0] is None or not _takes(call, rows):
            return torch_backend.backward(dys, inputs, hs, needs, seeds, call)
        if rows.shares_base:
            if covers(inputs, call.layouts, dys):
                return _backward_many(dys[0], inputs, hs[0], needs, seeds, call, rows)
            return torch_backend.backward(dys, inputs, hs, needs, seeds, call)
        by_torch, by_kernels = _shared_out(needs, call.layouts)
        facts = call.layouts, call.dropout, precision_of(x), _runs_at_once(inputs, call), by_kernels
        tensors = [seeds, rows.ends, *inputs, *hs, dys[0]]
        made = kernels.replayed(
            _experts_backward, tensors, facts, lambda: covers(inputs, call.layouts, dys)
        )
    if made is None:
        return torch_backend.backward(dys, inputs, hs, needs, seeds, call)
    if any(by_torch):
        others = torch_backend.backward(dys, inputs, hs, by_torch, seeds, call)
        made = [b if a is None else a for a, b in zip(made, others, strict=True)]
    return made


def _takes(call: Call, rows: Rows) -> bool:
    """One output; of experts one adapter or none, and rows whose masks begin with them."""
    adapters = [len(layout.scales) for layout in call.layouts]
    return len(adapters) == 1 and not rows.first and (rows.shares_base or adapters[0] < 2)


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


# --- experts


def _experts(
    tensors: Sequence[Tensor],
    layouts: Sequence[Layout],
    dropout: float,
    precision: str,
    at_once: bool,
) -> list[Tensor]:
    """y, and h if there is an adapter."""
    seeds, ends, x, *flat = tensors
    (weight, bias), adapter = _stacked(flat, layouts, x)
    plain = {"precision": precision, "ends": _contiguous(ends)}
    masked = plain | {"dropout": dropout, "seeds": seeds}
    (h,) = kernels.project(x, [adapter.lora_a.mT], [adapter.scale / (1.0 - dropout)], **masked)
    y = _product(x, weight, h, adapter.lora_b.mT, at_once, plain | {"bias": bias})
    return [y, h] if layouts[0].scales else [y]


def _experts_backward(
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
    plain = {"precision": precision, "ends": _contiguous(ends)}
    masked = plain | {"dropout": dropout, "seeds": seeds}
    ((_, needs),) = unflatten(rest, layouts)
    need = needs[0] if needs else Adapter(False, False)
    (given,) = unflatten(flat, layouts)
    # In the shapes that came, of which what kernels read may be a copy.
    made = [
        empty_like(tensor) if needed else None
        for own in given.adapters
        for tensor, needed in zip(own[:2], need[:2], strict=True)
    ] or [None, None]
    factor = adapter.scale / (1.0 - dropout)
    dh = _through_lora_b(dy, adapter.lora_b, hs[0] if hs else None, made[1], factor,
                         needs_x or need.lora_a, plain)  # fmt: skip
    dx = None
    if dh is not None and needs_x:
        dx = _product(dy, weight, dh, adapter.lora_a, at_once, masked, backward=True)
    if dh is not None and made[0] is not None:
        kernels.weight_grad(x, [dh], [made[0].mT], **masked)
    own = (Adapter(made[0], made[1]),) * len(given.adapters)
    gradients: Output[Tensor | None] = Output(Base(None, None), own)
    return [dx, *flatten([gradients], layouts)]


def _through_lora_b(
    dy: Tensor,
    lora_b: Tensor,
    h: Tensor | None,
    d_lora_b: Tensor | None,
    factor: float,
    needs_dh: bool,
    options: dict[str, Any],
) -> Tensor | None:
    """d lora_b is filled, if it is there; dh, if it is needed: both from one reading of dy."""
    dh = None
    if d_lora_b is not None:
        assert h is not None
        also: dict[str, Any] = {}
        rows = dy if options.get("order") is None else dy[: len(h)]
        if needs_dh and kernels.one_pass_pays(rows, lora_b, options["precision"]):
            also = {"b": lora_b, "factor": factor}
        # A hook on saved tensors may give h back in another layout.
        dh = kernels.weight_grad(dy, [_contiguous(h)], [d_lora_b], **also, **options)
    if needs_dh and dh is None:
        (dh,) = kernels.project(dy, [lora_b], [factor], **options)
    return dh


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


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


# --- many adapters


def _forward_many(
    inputs: Sequence[Tensor], seeds: Tensor | None, call: Call, rows: Rows
) -> tuple[list[Tensor], list[Tensor]]:
    x, *flat = inputs
    (output,) = unflatten(flat, call.layouts)
    (y,), _ = layer.forward(*_base_call(x, output))
    width, places = _width(output), _places(x, rows)
    if not places.rows:
        return [y], [x.new_zeros(len(x), width)]
    lora_a, lora_b = _banks(output, rows)
    tensors = [*_shared(places, rows, seeds), places.of(x), places.of(y), lora_a, lora_b]
    made = kernels.replayed(_added, tensors, (precision_of(x),), lambda: True)
    assert made is not None
    (h,) = made
    assert h is not None
    if len(h) < len(x):
        h = torch.cat([h, h.new_zeros(len(x) - len(h), width)])
    return [y], [h]


def _backward_many(
    dy: Tensor,
    inputs: Sequence[Tensor],
    h: Tensor | None,
    needs: Sequence[bool],
    seeds: Tensor | None,
    call: Call,
    rows: Rows,
) -> list[Tensor | None]:
    x, *flat = inputs
    (output,), (wanted,) = unflatten(flat, call.layouts), unflatten(needs[1:], call.layouts)
    base_inputs, _, base_call = _base_call(x, output)
    base_needs = [needs[0], *flatten([Output(wanted.base)], base_call.layouts)]
    dx, *found = layer.backward([dy], base_inputs, [], base_needs, None, base_call)
    ((of_base, _),) = unflatten(found, base_call.layouts)
    shares = rows.shares or []
    places, own = _places(x, rows), [share.segment for share in shares]
    some = [wanted.adapters[i] for i in own]
    need = Adapter(any([n.lora_a for n in some]), any([n.lora_b for n in some]))
    gradients: list[Adapter[Tensor | None]] = [Adapter(None, None) for _ in output.adapters]
    if places.rows and (needs[0] or need.lora_a or need.lora_b):
        lora_a, lora_b = _banks(output, rows)
        tensors = [
            *_shared(places, rows, seeds), places.of(x), places.of(dy),
            None if dx is None else places.of(dx), lora_a, lora_b,
            h[: places.rows] if need.lora_b and h is not None else None,
        ]  # fmt: skip
        facts = precision_of(x), need.lora_a, need.lora_b
        made = kernels.replayed(_added_backward, tensors, facts, lambda: True)
        assert made is not None
        for place, i in enumerate(own):
            gradients[i] = _cut(made, place, output.adapters[i], wanted.adapters[i])
    return [dx, *flatten([Output(of_base, tuple(gradients))], call.layouts)]


def _added(tensors: Sequence[Tensor], precision: str) -> list[Tensor]:
    """h; and what it gives is added to y."""
    seeds, ends, order, *own, x, y, lora_a, lora_b = tensors
    shared = {"precision": precision, "ends": ends, "order": order, "own": kernels.Own(*own)}
    (h,) = kernels.project(x, [lora_a.mT], [1.0], seeds=seeds, **shared)
    kernels.lowrank(y, [h], [lora_b.mT], add=True, **shared)
    return [h]


def _added_backward(
    tensors: Sequence[Tensor], precision: str, needs_a: bool, needs_b: bool
) -> list[Tensor | None]:
    """The gradients of both banks; and what dh gives is added to dx, if it is there."""
    seeds, ends, order, *own, x, dy, dx, lora_a, lora_b, h = tensors
    shared = {"precision": precision, "ends": ends, "order": order, "own": kernels.Own(*own)}
    d_lora_a, d_lora_b = (
        torch.empty_like(bank, memory_format=torch.contiguous_format) if needed else None
        for bank, needed in ((lora_a, needs_a), (lora_b, needs_b))
    )
    dh = _through_lora_b(dy, lora_b, h, d_lora_b, 1.0, dx is not None or needs_a, shared)
    if dh is not None and dx is not None:
        kernels.lowrank(dx, [dh], [lora_a], add=True, seeds=seeds, **shared)
    if dh is not None and d_lora_a is not None:
        kernels.weight_grad(x, [dh], [d_lora_a.mT], seeds=seeds, **shared)
    return [d_lora_a, d_lora_b]


class _Places(NamedTuple):
    """Where the rows of the adapters lie."""

    rows: int  # how many there are
    first: int  # of x, if they lie there in their order
    ends: Tensor  # int32 [adapters with rows]
    order: Tensor | None  # int32 [rows]: where each is, if they lie in another order

    def of(self, matrix: Tensor) -> Tensor:
        """The part of x, y … that kernels get."""
        if self.order is not None:
            return matrix
        return matrix[self.first : self.first + self.rows]


def _places(x: Tensor, rows: Rows) -> _Places:
    """Kept for all layers, and for the backward."""
    each = len(x) // max(1, rows.items(len(x)))  # rows of an item
    kept = {} if rows.kept is None else rows.kept
    key = ("triton places", each, x.device)
    if key not in kept:
        kept[key] = _new_places(x, rows, each)
    return kept[key]


def _new_places(x: Tensor, rows: Rows, each: int) -> _Places:
    shares = rows.shares or []
    ends = [share.place.stop * each for share in shares]
    count = ends[-1] if ends else 0
    there = torch.tensor(ends, dtype=torch.int32, device=x.device)
    shifts = {
        share.items.start - share.place.start if isinstance(share.items, slice) else None
        for share in shares
    }
    (shift, *others) = shifts or {0}
    if shift is not None and not others:
        return _Places(count, shift * each, there, None)
    assert rows.order is not None
    items = rows.order[: shares[-1].place.stop].to(x.device, torch.int32)
    numbers = torch.arange(each, dtype=torch.int32, device=x.device)
    return _Places(count, 0, there, (items.unsqueeze(1) * each + numbers).flatten())


def _shared(places: _Places, rows: Rows, seeds: Tensor | None) -> list[Tensor | None]:
    """What all kernels of a call take: seeds, ends, order, and each adapter's own numbers."""
    assert rows.own is not None
    own, (scales, _, dropouts) = [share.segment for share in rows.shares or []], rows.own
    numbers = [(scales[i], 0.0 if seeds is None else dropouts[i]) for i in own]
    if seeds is not None and len(own) < len(seeds):
        seeds = torch.cat([seeds[i : i + 1] for i in own])
    return [seeds, places.ends, places.order, *_own(tuple(numbers), places.ends.device)]


@lru_cache(maxsize=256)  # all layers of a model have the same, or a few kinds
def _own(numbers: tuple[tuple[float, float], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    factors = [scale / (1.0 - p) for scale, p in numbers]
    thresholds = [kernels.dropout_threshold(p) for _, p in numbers]
    return (
        torch.tensor(factors, dtype=torch.float32, device=device),
        torch.tensor(thresholds, dtype=torch.int32, device=device),
    )


def _banks(output: Output[Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
    """lora_a [n, r, K] and lora_b [n, N, r] of the adapters with rows; zeros behind a rank."""
    width = _width(output)
    pairs = [rows.part(output, share.segment).adapters[0] for share in rows.shares or []]
    features, out_features = pairs[0].lora_a.shape[1], pairs[0].lora_b.shape[0]
    lora_a = _bank([adapter.lora_a for adapter in pairs], (width, features))
    lora_b = _bank([adapter.lora_b for adapter in pairs], (out_features, width))
    return lora_a, lora_b


def _bank(parts: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """These [rows, columns] in one tensor [n, *shape]; of one that they are views of, itself."""
    first, whole = parts[0], all([part.shape == shape for part in parts])
    if whole and 1 in first.stride() and _lie_evenly(parts):
        step = parts[1].storage_offset() - first.storage_offset() if len(parts) > 1 else 0
        return first.as_strided((len(parts), *shape), (step, *first.stride()))
    if whole:
        return torch.stack([part.contiguous() for part in parts])
    dtype = first.dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    bank = first.new_zeros(len(parts), *shape, dtype=dtype)
    places = [bank[i, : len(p), : p.shape[1]] for i, p in enumerate(parts)]
    torch._foreach_copy_(places, list(parts))
    return bank


def _lie_evenly(parts: Sequence[Tensor]) -> bool:
    """Whether they lie in one memory, alike, and each as far behind the one before it."""
    kinds = {(part.untyped_storage().data_ptr(), part.stride(), part.dtype) for part in parts}
    steps = {b.storage_offset() - a.storage_offset() for a, b in pairwise(parts)}
    return len(kinds) == 1 and len(steps) <= 1 and min(steps, default=0) >= 0


def _cut(
    made: Sequence[Tensor | None], place: int, adapter: Adapter[Tensor], need: Adapter[bool]
) -> Adapter[Tensor | None]:
    """One adapter's gradients of the banks', in its tensors' shapes and dtypes."""
    d_lora_a, d_lora_b = made
    own_a = own_b = None
    if d_lora_a is not None and need.lora_a:
        own_a = d_lora_a[place, : len(adapter.lora_a)].to(adapter.lora_a.dtype)
    if d_lora_b is not None and need.lora_b:
        own_b = d_lora_b[place, :, : adapter.lora_b.shape[1]].to(adapter.lora_b.dtype).contiguous()
    return Adapter(own_a, own_b)


def _base_call(x: Tensor, output: Output[Tensor]) -> tuple[list[Tensor], None, Call]:
    """The layer without adapters: inputs, no seeds, and the call."""
    alone = [Output(output.base)]
    layouts = layouts_of(alone)
    # The record's backend is what ops ask; in here nobody does.
    return [x, *flatten(alone, layouts)], None, Call(layouts, 0.0, torch_backend)


def _width(output: Output[Tensor]) -> int:
    return max([len(adapter.lora_a) for adapter in output.adapters])
