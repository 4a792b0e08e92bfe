"""Experts on the torch backend: x is sorted by expert, and each expert has a layer of its own.

The formulas are those of :mod:`.torch`, of each expert's rows: a loop over the experts that have
rows, with the products of a layer (:mod:`.rows`).  It reads the ends of the segments on the host,
which costs nothing on a CPU.  No product of lora_b and lora_a is ever made, and a gradient of the
weight only if it trains.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..projection import Output, flatten, layouts_of, unflatten
from ..segments import Segments, parts_of
from .dropout import DropoutMask
from .products import h_dtype
from .protocol import Settings
from .rows import backward_rows, forward_rows


def forward_grouped(
    inputs: Sequence[Tensor], segments: Segments, seeds: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """y [S, N] and h [S, r]; zeros in nobody's rows."""
    x, *tensors = inputs
    (output,) = unflatten(tensors, settings.layouts)
    return _forward_in_turn(x, output, segments, _mask(x, segments, seeds, settings))


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
    mask = _mask(x, segments, seeds, settings)
    dx, gradients = _backward_in_turn(dy, x, output, segments, h, wanted, mask, needs_x)
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
    return device.type == "cpu"
