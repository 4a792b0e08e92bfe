"""Experts on the torch backend: x is sorted by expert, and each expert has a layer of its own.

The formulas are those of :mod:`.torch`, of each expert's rows.  They run in one of two ways:

* a loop over the experts that have rows, with the products of a layer (:mod:`.rows`).  It reads the
  ends of the segments on the host, which costs nothing on a CPU.  torch's ``grouped_mm`` is such a
  loop there, too;
* ``grouped_mm`` for all experts at once, on a GPU for which torch has a kernel of it, and where its
  limits hold.  Nothing is read on the host.  It can't scale in its accumulator, so the adapter is
  scaled, in float32, before it is rounded to x's dtype.

No product of lora_b and lora_a is ever made, and a gradient of the weight only if it trains.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from ..projection import Adapter, Base, Output, flatten, layouts_of, unflatten
from ..segments import Segments, parts_of
from .dropout import DropoutMask
from .products import cast, h_dtype
from .protocol import Settings
from .rows import backward_rows, dropped, factor_of, forward_rows

# For tests: True or False decides in the place of the device whether grouped_mm runs, but its
# limits hold.
FORCED: bool | None = None

# grouped_mm's limits: bytes of which every stride and address is a multiple, and experts.
_ALIGNMENT, _MOST_EXPERTS = 16, 1023


def forward_grouped(
    inputs: Sequence[Tensor], segments: Segments, seeds: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """y [S, N] and h [S, r]; zeros in nobody's rows."""
    x, *tensors = inputs
    (output,) = unflatten(tensors, settings.layouts)
    run = _forward_at_once if runs_at_once(x, output.base.weight) else _forward_in_turn
    return run(x, output, segments, _mask(x, segments, seeds, settings))


def backward_grouped(
    dy: Tensor,
    inputs: Sequence[Tensor],
    segments: Segments,
    h: Tensor,
    needs: Sequence[bool],
    seeds: Tensor | None,
    settings: Settings,
) -> list[Tensor | None]:
    """The gradient of each input that needs one, else None; zeros in nobody's rows of dx."""
    x, *tensors = inputs
    needs_x, *needs_flat = needs
    (output,) = unflatten(tensors, settings.layouts)
    (wanted,) = unflatten(needs_flat, settings.layouts)
    run = _backward_at_once if runs_at_once(x, output.base.weight) else _backward_in_turn
    mask = _mask(x, segments, seeds, settings)
    dx, gradients = run(dy, x, output, segments, h, wanted, mask, needs_x)
    return [dx, *flatten([gradients], settings.layouts)]


def _forward_in_turn(
    x: Tensor, output: Output[Tensor], segments: Segments, mask: DropoutMask | None
) -> tuple[Tensor, Tensor]:
    (adapter,) = output.adapters
    y = x.new_empty(len(x), output.base.weight.shape[1])
    h = x.new_empty(len(x), adapter.lora_a.shape[1], dtype=h_dtype(x.dtype, x.device))
    slices = segments.slices(len(x))
    (*ys, nobody), (*hs, nobody_s_h) = _cut(y, slices), _cut(h, slices)
    per_expert = zip(slices, _cut(x, slices), ys, hs, parts_of(output), strict=False)
    for rows, x_rows, y_rows, h_rows, part in per_expert:
        if rows.stop > rows.start:
            masks = [[_from_row(mask, rows.start)]]
            _, (found,) = forward_rows(x_rows, [part], masks, [y_rows])
            h_rows.copy_(found)
    nobody.zero_()
    nobody_s_h.zero_()
    return y, h


def _backward_in_turn(
    dy: Tensor,
    x: Tensor,
    output: Output[Tensor],
    segments: Segments,
    h: Tensor,
    wanted: Output[bool],
    mask: DropoutMask | None,
    needs_x: bool,
) -> tuple[Tensor | None, Output[Tensor | None]]:
    layouts = layouts_of([output])
    tensors, needs = flatten([output], layouts), flatten([wanted], layouts)
    dx = x.new_empty(x.shape) if needs_x else None
    gradients = [
        tensor.new_empty(tensor.shape) if need else None
        for tensor, need in zip(tensors, needs, strict=True)
    ]
    slices, parts = segments.slices(len(x)), parts_of(output)
    places = [None if gradient is None else gradient.unbind() for gradient in gradients]
    dxs = [None] * len(slices) if dx is None else _cut(dx, slices)
    cut = [_cut(tensor, slices) for tensor in (dy, x, h)]
    for e, (rows, dy_rows, x_rows, h_rows, into, part) in enumerate(
        zip(slices, *cut, dxs, parts, strict=False)
    ):
        found: list[Tensor | None] = [None] * len(places)
        if rows.stop > rows.start:
            masks, thin = [[_from_row(mask, rows.start)]], [[h_rows]]
            _, gradients_of_one = backward_rows(
                [dy_rows], x_rows, [part], thin, [wanted], masks, needs_x, into
            )
            found = flatten(gradients_of_one, layouts)
        for place, gradient in zip(places, found, strict=True):
            if place is not None:
                place[e].zero_() if gradient is None else place[e].copy_(gradient)
    if dx is not None:
        dx[slices[-1].stop :].zero_()
    return dx, unflatten(gradients, layouts)[0]


def _cut(tensor: Tensor, slices: Sequence[slice]) -> Sequence[Tensor]:
    """Each expert's rows, as views, and behind them nobody's."""
    lengths = [rows.stop - rows.start for rows in slices]
    return tensor.split([*lengths, len(tensor) - slices[-1].stop])


def _mask(
    x: Tensor, segments: Segments, seeds: Tensor | None, settings: Settings
) -> DropoutMask | None:
    if seeds is None:
        return None
    shape = segments.first + len(x), x.shape[1]
    return DropoutMask(seeds, shape, settings.dropout).from_row(segments.first)


def _from_row(mask: DropoutMask | None, first: int) -> DropoutMask | None:
    return None if mask is None else mask.from_row(first)


def takes_experts_in_turn(device: torch.device) -> bool:
    """On a CPU, where nothing is won by more rows than those of an expert."""
    return device.type == "cpu" and not FORCED


def runs_at_once(x: Tensor, weight: Tensor) -> bool:
    """Whether grouped_mm multiplies for all experts, with no reading of offsets on the host."""
    if not (len(x) and _takes(x, weight)):
        return False
    return FORCED if FORCED is not None else x.dtype == torch.bfloat16 and _has_kernel(x.device)


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


def _forward_at_once(
    x: Tensor, output: Output[Tensor], segments: Segments, mask: DropoutMask | None
) -> tuple[Tensor, Tensor]:
    (weight, bias), (adapter,) = output
    x, ends = aligned(x), segments.ends.contiguous()
    down = _thin(adapter.lora_a, 1, x.dtype, factor_of(adapter, mask))
    h = functional.grouped_mm(dropped(x, mask), down.mT, offs=ends)
    y = functional.grouped_mm(x, weight.mT, offs=ends)
    y.add_(functional.grouped_mm(h, _thin(adapter.lora_b, 2, x.dtype).mT, offs=ends))
    owners = segments.of_rows(len(x))
    if bias is not None:
        y.add_(cast(bias, x.dtype)[owners.clamp(max=len(bias) - 1)])
    nobody = (owners == len(weight)).unsqueeze(1)
    h = h[:, : adapter.lora_a.shape[1]].masked_fill(nobody, 0.0)
    return y.masked_fill_(nobody, 0.0), cast(h, h_dtype(x.dtype, x.device)).contiguous()


def _backward_at_once(
    dy: Tensor,
    x: Tensor,
    output: Output[Tensor],
    segments: Segments,
    h: Tensor,
    wanted: Output[bool],
    mask: DropoutMask | None,
    needs_x: bool,
) -> tuple[Tensor | None, Output[Tensor | None]]:
    (weight, bias), (adapter,) = output
    need_base, (need,) = wanted
    dy, ends, rank = aligned(dy), segments.ends.contiguous(), adapter.lora_a.shape[1]
    dx = d_weight = d_bias = d_lora_a = d_lora_b = dh = None
    # On some GPUs torch's kernel writes anything for an expert without rows.
    empty = (ends.diff(prepend=ends.new_zeros(1)) == 0).view(-1, 1, 1)

    def over_rows(left: Tensor, right: Tensor) -> Tensor:
        """leftᵀ right of each expert's rows."""
        return functional.grouped_mm(left.T, right, offs=ends).masked_fill_(empty, 0.0)

    if needs_x or need.lora_a:
        up = _thin(adapter.lora_b, 2, x.dtype, factor_of(adapter, mask))
        dh = functional.grouped_mm(dy, up, offs=ends)
    if dh is not None and needs_x:
        change = functional.grouped_mm(dh, _thin(adapter.lora_a, 1, x.dtype), offs=ends)
        dx = functional.grouped_mm(dy, weight, offs=ends).add_(dropped(change, mask, change))
        dx.masked_fill_((segments.of_rows(len(x)) == len(weight)).unsqueeze(1), 0.0)
    if dh is not None and need.lora_a:
        d_lora_a = over_rows(dh, dropped(aligned(x), mask))[:, :rank]
        d_lora_a = cast(d_lora_a, adapter.lora_a.dtype).contiguous()
    if need.lora_b:
        d_lora_b = over_rows(dy, _thin(h, 1, x.dtype))[..., :rank]
        d_lora_b = cast(d_lora_b, adapter.lora_b.dtype).contiguous()
    if need_base.weight:
        d_weight = over_rows(dy, aligned(x))
    if need_base.bias and bias is not None:
        ones = dy.new_ones(len(dy), _ALIGNMENT // dy.element_size())
        d_bias = cast(over_rows(dy, ones)[..., 0], bias.dtype).contiguous()
    return dx, Output(Base(d_weight, d_bias), (Adapter(d_lora_a, d_lora_b),))


def aligned(matrix: Tensor) -> Tensor:
    """The matrix with dense rows, aligned as grouped_mm has it: a copy only if it needs one."""
    first, last = matrix.stride()
    size = matrix.element_size()
    fits = last == 1 and first >= matrix.shape[1] and not first * size % _ALIGNMENT
    if fits and not matrix.data_ptr() % _ALIGNMENT:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _thin(tensor: Tensor, dim: int, dtype: torch.dtype, factor: float | None = None) -> Tensor:
    """factor · the tensor in this dtype, dense, its rank, ``dim``, filled up with zeros to fit."""
    if factor is not None:
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor
    shape, unit = [*tensor.shape], _ALIGNMENT // dtype.itemsize
    if shape[dim] % unit == 0:
        tensor = tensor.to(dtype).contiguous()
        return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor
    shape[dim] += -shape[dim] % unit
    filled = tensor.new_zeros(shape, dtype=dtype)
    filled.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return filled
