"""The ops as ``torch.library`` has them: ``torch.compile`` and export see these.

A plain eager call runs the same implementations directly (:mod:`fastlora.ops.function`): a call
through torch's dispatcher takes longer than a small layer.  The schemas carry the outputs flat,
with their layouts: for each output, whether it has a bias and how many adapters, and for each
adapter its scale; ``formats`` has a line for each output, empty where its weight is plain, and none
at all if all are.  An empty ``backend`` leaves the choice to the moment at which the op runs.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Settings, find_backend
from ..formats.format import Quantised, from_text
from ..projection import Layout, Output, flatten, layouts_of, unflatten
from .autocast import autocast_off
from .call import kept, run_backward, run_forward, stand_in
from .norm import norm_of_rows, wide_dtype

find_backend("torch")  # not first while compiling, when the constants that it makes would be fake

LIBRARY = torch.library.Library("fastlora", "DEF")
_SETTINGS = (
    "bool[] biases, int[] adapters, float[] scales, str formats, float dropout, Tensor? seeds, "
    "str backend"
)
LIBRARY.define(
    f"lora_linears(Tensor x, Tensor[] tensors, {_SETTINGS}) -> (Tensor[] ys, Tensor[] hs)"
)
LIBRARY.define(
    "lora_linears_backward(Tensor[] dys, Tensor x, Tensor[] tensors, Tensor[] hs, bool[] needs, "
    f"{_SETTINGS}) -> Tensor[]"
)
LIBRARY.define(
    "dora_norm(Tensor[] weight, Tensor lora_a, Tensor lora_b, float scale, str format) -> Tensor"
)


def call_registered(
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    dropout: float,
    seeds: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    """Every output's y, by way of the dispatcher."""
    layouts = layouts_of(outputs)
    tensors = flatten(outputs, layouts)
    biases = [layout.has_bias for layout in layouts]
    adapters = [len(layout.scales) for layout in layouts]
    scales = [float(scale) for layout in layouts for scale in layout.scales]
    formats = ""
    if any([layout.format is not None for layout in layouts]):
        formats = "\n".join(["" if one.format is None else one.format.text for one in layouts])
    op = torch.ops.fastlora.lora_linears
    rest = biases, adapters, scales, formats, float(dropout), seeds, backend
    return tuple(op(x, tensors, *rest)[0])


def _layouts(
    biases: Sequence[bool], adapters: Sequence[int], scales: Sequence[float], formats: str
) -> tuple[Layout, ...]:
    left, lines = iter(scales), formats.split("\n") if formats else [""] * len(biases)
    return tuple(
        [
            Layout(
                has_bias,
                tuple([next(left) for _ in range(count)]),
                from_text(line) if line else None,
            )
            for has_bias, count, line in zip(biases, adapters, lines, strict=True)
        ]
    )


@torch.library.impl(LIBRARY, "lora_linears", "CompositeExplicitAutograd")
def _lora_linears(x, tensors, biases, adapters, scales, formats, dropout, seeds, backend):
    backend = find_backend(backend or None, x.device)
    settings = Settings(_layouts(biases, adapters, scales, formats), dropout, backend)
    with autocast_off(x.device.type):
        return run_forward([x, *tensors], seeds, settings)


@torch.library.impl(LIBRARY, "lora_linears_backward", "CompositeExplicitAutograd")
def _lora_linears_backward(
    dys, x, tensors, hs, needs, biases, adapters, scales, formats, dropout, seeds, backend
):
    backend = find_backend(backend or None, x.device)
    settings = Settings(_layouts(biases, adapters, scales, formats), dropout, backend)
    with torch.no_grad():
        gradients = run_backward(dys, [x, *tensors], hs, needs, seeds, settings)
    return [gradient for gradient in gradients if gradient is not None]


@torch.library.register_fake("fastlora::lora_linears", lib=LIBRARY)
def _fake_lora_linears(x, tensors, biases, adapters, scales, formats, dropout, seeds, backend):
    outputs = unflatten(tensors, _layouts(biases, adapters, scales, formats))
    tokens = math.prod(x.shape[:-1])
    ys = [x.new_empty(*x.shape[:-1], output.base.weight.shape[0]) for output in outputs]
    ranks = [adapter.lora_a.shape[0] for output in outputs for adapter in output.adapters]
    dtype = find_backend(backend or None, x.device).h_dtype(x.dtype, x.device)
    return ys, [x.new_empty(tokens, r, dtype=dtype) for r in ranks]


@torch.library.register_fake("fastlora::lora_linears_backward", lib=LIBRARY)
def _fake_lora_linears_backward(
    dys, x, tensors, hs, needs, biases, adapters, scales, formats, dropout, seeds, backend
):
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip([x, *tensors], needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output):
    x, tensors, *layout, dropout, seeds, backend = inputs
    needs = [tensor.requires_grad for tensor in (x, *tensors)]
    kept_x, kept_hs = kept(x, output[1], needs, _layouts(*layout))
    ctx.save_for_backward(kept_x, seeds, *tensors, *kept_hs)
    ctx.layout, ctx.dropout, ctx.backend = layout, dropout, backend
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.count = len(tensors)


def _backward(ctx, dys, _):
    x, seeds, *rest = ctx.saved_tensors
    tensors, hs = rest[: ctx.count], rest[ctx.count :]
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    x = stand_in(tensors[0], ctx.shape, ctx.dtype) if x is None else x
    hs = [x.new_empty(0) if h is None else h for h in hs]
    op = torch.ops.fastlora.lora_linears_backward
    asked = iter(op(dys, x, tensors, hs, needs, *ctx.layout, ctx.dropout, seeds, ctx.backend))
    dx, *gradients = [next(asked) if need else None for need in needs]
    # Without an adapter ``scales`` is empty, which torch takes for a list of tensors.
    _, _, scales, _ = ctx.layout
    return dx, gradients, None, None, None if scales else [], None, None, None, None


torch.library.register_autograd(
    "fastlora::lora_linears", _backward, setup_context=_setup_context, lib=LIBRARY
)


def no_second_backward(ctx, *_):
    raise NotImplementedError(
        "gradients of gradients need an eager call of a LoRA layer: here it was compiled or traced"
    )


torch.library.register_autograd("fastlora::lora_linears_backward", no_second_backward, lib=LIBRARY)


@torch.library.impl(LIBRARY, "dora_norm", "CompositeExplicitAutograd")
def _dora_norm(weight, lora_a, lora_b, scale, format):
    weight = Quantised(from_text(format), tuple(weight)) if format else weight[0]
    return norm_of_rows(weight, lora_a, lora_b, scale)


@torch.library.register_fake("fastlora::dora_norm", lib=LIBRARY)
def _fake_dora_norm(weight, lora_a, lora_b, scale, format):
    dtype = wide_dtype(from_text(format) if format else weight[0])
    return lora_b.new_empty(len(lora_b), dtype=dtype)
