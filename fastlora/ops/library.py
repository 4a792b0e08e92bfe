"""The registered ops (``torch.library``), which ``torch.compile`` and export record in a graph.

A plain eager call runs the same implementations directly (:mod:`fastlora.ops.node`), because a call
through torch's dispatcher takes longer than a small layer.

A schema can hold only tensors, numbers, strings and lists of them, no records.  So an op takes x,
the flat tensors of all outputs, and the fields of :class:`_Settings`, which describe the layout of
these tensors.  Calls with segments also pass ``ends``.  Calls with many adapters also pass
``order`` and one scale, rank and dropout for each adapter.  These scales and ranks are tensors on
the CPU, so that new values don't recompile anything.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import BackwardCall, Call, find_backend
from ..backends.torch import widths_of_h
from ..call.projection import Layout, Output, flatten, layouts_of, unflatten
from ..call.rows import Many, Numbers, Rows, rows_on
from ..formats.format import from_text
from .dispatch import autocast_off
from .node import backend_backward, backend_forward, to_save

find_backend("torch")  # imports it now: during compilation its constants would be fake tensors

LIBRARY = torch.library.Library("fastlora", "DEF")
_SETTINGS = (
    "bool[] biases, int[] adapters, float[] scales, str formats, float dropout, Tensor? seeds, "
    "str backend, Tensor? ends=None, Tensor? order=None, Tensor? own_scales=None, "
    "Tensor? own_ranks=None, float[]? own_dropouts=None"
)
LIBRARY.define(
    f"lora_linears(Tensor x, Tensor[] tensors, {_SETTINGS}) -> (Tensor[] ys, Tensor[] hs)"
)
LIBRARY.define(
    "lora_linears_backward(Tensor[] dys, Tensor x, Tensor[] tensors, Tensor[] hs, bool[] needs, "
    f"{_SETTINGS}) -> Tensor[]"
)


class _Settings(NamedTuple):
    """The arguments of both ops after the tensors, in the order of the schema."""

    biases: Sequence[bool]  # for each output: whether it has a bias
    adapters: Sequence[int]  # for each output: the number of its adapters
    scales: Sequence[float]  # for each adapter, output after output
    formats: str  # a line for each output, empty if its weight is dense; "" if all are dense
    dropout: float
    seeds: Tensor | None
    backend: str  # "": choose a backend when the op runs
    ends: Tensor | None = None  # ends and order as in Rows
    order: Tensor | None = None
    own_scales: Tensor | None = None  # for many adapters, as in Numbers
    own_ranks: Tensor | None = None
    own_dropouts: Sequence[float] | None = None

    @property
    def layouts(self) -> tuple[Layout, ...]:
        lines = self.formats.split("\n") if self.formats else [""] * len(self.biases)
        layouts, end = [], 0
        for bias, count, line in zip(self.biases, self.adapters, lines, strict=True):
            first, end = end, end + count
            format = from_text(line) if line else None
            weights = 1 if format is None else len(format.names)
            layouts.append(Layout(bias, tuple(self.scales[first:end]), format, weights))
        return tuple(layouts)

    def call(self, x: Tensor, tensors: Sequence[Tensor]) -> Call:
        """The record for a backend, made anew whenever an op runs."""
        layouts, rows = self.layouts, None
        if self.order is not None and self.ends is not None:
            # A call with many adapters has one output.
            (output,) = unflatten(tensors, layouts)
            numbers: Any = self.own_scales, self.own_ranks, self.own_dropouts
            on_host = Numbers(*numbers).on_host(output.adapters)
            rows = rows_on(self.order, self.ends, x.device)._replace(numbers=on_host)
        elif self.ends is not None:
            rows = Rows(self.ends)
        backend = find_backend(self.backend or None, x.device)
        return Call(layouts, self.dropout, backend, rows)


def call_registered(
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    dropout: float,
    seeds: Tensor | None,
    backend: str,
    rows: Rows | Many | None,
) -> tuple[Tensor, ...]:
    """Every output's y, computed by the registered op through torch's dispatcher."""
    layouts = layouts_of(outputs)
    formats = ["" if layout.format is None else layout.format.text for layout in layouts]
    settings = _Settings(
        [layout.has_bias for layout in layouts],
        [len(layout.scales) for layout in layouts],
        [float(scale) for layout in layouts for scale in layout.scales],
        "\n".join(formats) if any(formats) else "",
        float(dropout),
        seeds,
        backend,
    )
    if isinstance(rows, Many):
        order, ends = rows.sorted(len(outputs[0].adapters))
        scales, ranks = rows.numbers.as_tensors()
        settings = settings._replace(ends=ends, order=order, own_scales=scales, own_ranks=ranks)
        settings = settings._replace(own_dropouts=list(map(float, rows.numbers.dropouts)))
    elif rows is not None:
        settings = settings._replace(ends=rows.ends)
    return tuple(torch.ops.fastlora.lora_linears(x, flatten(outputs, layouts), *settings)[0])


# CompositeExplicitAutograd: one implementation for all devices.  Its autograd is registered below.
@torch.library.impl(LIBRARY, "lora_linears", "CompositeExplicitAutograd")
def _lora_linears(x, tensors, *settings):
    settings = _Settings(*settings)
    with autocast_off(x.device.type):
        return backend_forward([x, *tensors], settings.seeds, settings.call(x, tensors))


@torch.library.impl(LIBRARY, "lora_linears_backward", "CompositeExplicitAutograd")
def _lora_linears_backward(dys, x, tensors, hs, needs, *settings):
    settings, inputs = _Settings(*settings), [x, *tensors]
    hs = [h if h.dim() == 2 else None for h in hs]  # 1-dimensional: not saved, see _backward
    with torch.no_grad():
        call = settings.call(x, tensors)
        gradients = backend_backward(BackwardCall(dys, inputs, hs, needs, settings.seeds, call))
        return [
            # An adapter without rows has no gradient, but the op must return a tensor.
            torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            if gradient is None
            else _in_own_memory(gradient)
            for gradient, tensor, need in zip(gradients, inputs, needs, strict=True)
            if need
        ]


def _in_own_memory(gradient: Tensor) -> Tensor:
    """A copy if it shares memory, because outputs of an op must not overlap."""
    shares = gradient.untyped_storage().nbytes() > gradient.nbytes
    return gradient.clone() if shares else gradient


@torch.library.register_fake("fastlora::lora_linears", lib=LIBRARY)
def _fake_lora_linears(x, tensors, *settings):
    settings = _Settings(*settings)
    outputs, tokens = unflatten(tensors, settings.layouts), math.prod(x.shape[:-1])
    ys = [x.new_empty(*x.shape[:-1], output.base.weight.size()[-2]) for output in outputs]
    dtype = find_backend(settings.backend or None, x.device).h_dtype(x.dtype, x.device)
    widths = widths_of_h(outputs, settings.order is not None)
    return ys, [x.new_empty(tokens, r, dtype=dtype) for r in widths]


@torch.library.register_fake("fastlora::lora_linears_backward", lib=LIBRARY)
def _fake_lora_linears_backward(dys, x, tensors, hs, needs, *settings):
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip([x, *tensors], needs, strict=True)
        if need
    ]


# The settings that are tensors, which a context must save with save_for_backward.
_TENSOR_SETTINGS = ("seeds", "ends", "order", "own_scales", "own_ranks")


def _setup_context(ctx, inputs, output):
    x, tensors, *rest = inputs
    settings = _Settings(*rest)
    needs = [tensor.requires_grad for tensor in (x, *tensors)]
    one_h = settings.order is not None
    saved_x, saved_hs = to_save(x, output[1], needs, settings.layouts, one_h)
    setting_tensors = [getattr(settings, name) for name in _TENSOR_SETTINGS]
    ctx.save_for_backward(saved_x, *setting_tensors, *tensors, *saved_hs)
    ctx.settings = settings._replace(**dict.fromkeys(_TENSOR_SETTINGS))
    ctx.shape, ctx.dtype, ctx.count = x.shape, x.dtype, len(tensors)


def _backward(ctx, dys, _):
    x, *rest = ctx.saved_tensors
    # In the order of _setup_context: x, the settings' tensors, the outputs' tensors, every h.
    setting_tensors, rest = rest[: len(_TENSOR_SETTINGS)], rest[len(_TENSOR_SETTINGS) :]
    tensors, hs = rest[: ctx.count], rest[ctx.count :]
    settings = ctx.settings._replace(**dict(zip(_TENSOR_SETTINGS, setting_tensors, strict=True)))
    # For the argument ``tensors``, needs_input_grad has a list.
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    # No needed gradient reads an x that wasn't saved, but the op takes a tensor of its shape.
    x = tensors[0].new_empty(ctx.shape, dtype=ctx.dtype) if x is None else x
    hs = [x.new_empty(0) if h is None else h for h in hs]  # the schema has no optional list items
    op = torch.ops.fastlora.lora_linears_backward
    asked = iter(op(dys, x, tensors, hs, needs, *settings))
    dx, *gradients = [next(asked) if need else None for need in needs]
    # The returned gradients are for x, tensors, and each setting: None.  There are two exceptions.
    # torch takes an empty ``scales`` for a list of tensors, whose gradient is an empty list.  And
    # torch omits trailing settings with their default, so their gradients must be omitted also.
    given = 1 + max([i for i, setting in enumerate(settings) if setting is not None])
    return dx, gradients, None, None, None if settings.scales else [], *[None] * (given - 3)


torch.library.register_autograd(
    "fastlora::lora_linears", _backward, setup_context=_setup_context, lib=LIBRARY
)


def _no_second_backward(ctx, *_):
    raise NotImplementedError(
        "gradients of gradients need an eager call: call the layer outside of torch.compile"
    )


torch.library.register_autograd("fastlora::lora_linears_backward", _no_second_backward, lib=LIBRARY)
