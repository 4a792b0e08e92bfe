"""The op of experts as ``torch.library`` has it, beside those of :mod:`.library`."""

import torch
from torch import Tensor

from ..backends import Settings, find_backend
from ..projection import Layout, Output, flatten, layouts_of, unflatten
from ..segments import Segments
from .autocast import autocast_off
from .call import kept, run_grouped, run_grouped_backward, stand_in
from .library import LIBRARY, no_second_backward

_SETTINGS = "Tensor offsets, bool has_bias, float scale, float dropout, Tensor? seeds, str backend"
LIBRARY.define(f"lora_grouped(Tensor x, Tensor[] tensors, {_SETTINGS}) -> (Tensor y, Tensor h)")
LIBRARY.define(
    "lora_grouped_backward(Tensor dy, Tensor x, Tensor[] tensors, Tensor h, bool[] needs, "
    f"{_SETTINGS}) -> Tensor[]"
)


def call_registered(
    x: Tensor,
    output: Output[Tensor],
    segments: Segments,
    dropout: float,
    seeds: Tensor | None,
    backend: str,
) -> Tensor:
    """y, by way of the dispatcher."""
    (layout,) = layouts = layouts_of([output])
    scale, dropout = float(layout.scales[0]), float(dropout)
    tensors = flatten([output], layouts)
    op = torch.ops.fastlora.lora_grouped
    return op(x, tensors, segments.ends, layout.has_bias, scale, dropout, seeds, backend)[0]


def _settings(x: Tensor, has_bias: bool, scale: float, dropout: float, backend: str) -> Settings:
    layouts = (Layout(has_bias, (scale,)),)
    return Settings(layouts, dropout, find_backend(backend or None, x.device))


@torch.library.impl(LIBRARY, "lora_grouped", "CompositeExplicitAutograd")
def _lora_grouped(x, tensors, offsets, has_bias, scale, dropout, seeds, backend):
    settings = _settings(x, has_bias, scale, dropout, backend)
    with autocast_off(x.device.type):
        return run_grouped([x, *tensors], Segments(offsets), seeds, settings)


@torch.library.impl(LIBRARY, "lora_grouped_backward", "CompositeExplicitAutograd")
def _lora_grouped_backward(
    dy, x, tensors, h, needs, offsets, has_bias, scale, dropout, seeds, backend
):
    settings = _settings(x, has_bias, scale, dropout, backend)
    gradients = run_grouped_backward(
        dy, [x, *tensors], Segments(offsets), h, needs, seeds, settings
    )
    return [gradient for gradient, need in zip(gradients, needs, strict=True) if need]


@torch.library.register_fake("fastlora::lora_grouped", lib=LIBRARY)
def _fake_lora_grouped(x, tensors, offsets, has_bias, scale, dropout, seeds, backend):
    (output,) = unflatten(tensors, (Layout(has_bias, (scale,)),))
    rank, (rows, _) = output.adapters[0].lora_a.shape[1], x.shape
    dtype = find_backend(backend or None, x.device).h_dtype(x.dtype, x.device)
    return x.new_empty(rows, output.base.weight.shape[1]), x.new_empty(rows, rank, dtype=dtype)


@torch.library.register_fake("fastlora::lora_grouped_backward", lib=LIBRARY)
def _fake_lora_grouped_backward(
    dy, x, tensors, h, needs, offsets, has_bias, scale, dropout, seeds, backend
):
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip([x, *tensors], needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output):
    x, tensors, offsets, has_bias, scale, *rest, seeds, backend = inputs
    needs = [tensor.requires_grad for tensor in (x, *tensors)]
    kept_x, kept_h = kept(x, [output[1]], needs, (Layout(has_bias, (scale,)),))
    ctx.save_for_backward(kept_x, seeds, offsets, *tensors, *kept_h)
    ctx.settings, ctx.backend = (has_bias, scale, *rest), backend
    ctx.shape, ctx.dtype = x.shape, x.dtype


def _backward(ctx, dy, _):
    x, seeds, offsets, *tensors, h = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    x = stand_in(tensors[0], ctx.shape, ctx.dtype) if x is None else x
    h = x.new_empty(x.shape[0], 0) if h is None else h
    op = torch.ops.fastlora.lora_grouped_backward
    asked = iter(op(dy, x, tensors, h, needs, offsets, *ctx.settings, seeds, ctx.backend))
    dx, *gradients = [next(asked) if need else None for need in needs]
    return dx, gradients, None, None, None, None, None, None


torch.library.register_autograd(
    "fastlora::lora_grouped", _backward, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd("fastlora::lora_grouped_backward", no_second_backward, lib=LIBRARY)
