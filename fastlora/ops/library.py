"""``fastlora::lora_linears`` and its backward, registered with ``torch.library``.

``torch.compile`` and export see these ops; a plain eager call runs the same implementations
directly (:mod:`fastlora.ops.function`), because the dispatcher's door costs more than a small
kernel.  The schemas carry a group of projections flat: four ``parameters`` for each (weight,
lora_a, lora_b, bias), an empty one standing for none.  An empty ``backend`` leaves the choice to
the moment at which the op runs.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..backends import find_backend
from ..projection import Projection, group
from .autocast import autocast_off

LIBRARY = torch.library.Library("fastlora", "DEF")
LIBRARY.define(
    "lora_linears(Tensor x, Tensor[] parameters, float[] scales, float dropout, Tensor? seed, "
    "str backend) -> (Tensor[] ys, Tensor[] hs)"
)
LIBRARY.define(
    "lora_linears_backward(Tensor[] dys, Tensor x, Tensor[] parameters, Tensor[] hs, bool[] needs, "
    "float[] scales, float dropout, Tensor? seed, str backend) -> Tensor[]"
)


def run_forward(
    x: Tensor,
    projections: Sequence[Projection],
    dropout: float,
    seed: Tensor | None,
    backend: ModuleType,
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, each with x's leading dimensions, and the h [M, r] of every projection.

    There are as many outputs as weights.
    """
    ys, hs = backend.forward(as_matrix(x), projections, dropout=dropout, seed=seed)
    if x.dim() != 2:
        # Resized, not viewed: autograd forbids in-place changes of a view that a Function returns.
        ys = [y.resize_(*x.shape[:-1], y.shape[-1]) for y in ys]
    return ys, hs


def run_backward(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    hs: Sequence[Tensor],
    needs: Sequence[bool],
    dropout: float,
    seed: Tensor | None,
    backend: ModuleType,
) -> list[Tensor | None]:
    """The gradients of x and of the projections' tensors, or None where ``needs`` doesn't ask."""
    dys = [None if dy is None else as_matrix(dy) for dy in dys]
    with autocast_off(x.device.type):
        gradients = backend.backward(
            dys, as_matrix(x), projections, hs, needs, dropout=dropout, seed=seed
        )
    if gradients[0] is not None and x.dim() != 2:
        gradients[0] = gradients[0].view(x.shape)
    return gradients


def kept(
    x: Tensor,
    seed: Tensor | None,
    tensors: Sequence[Tensor | None],
    hs: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """What is saved for the backward, which ``needs`` gradients of these tensors of projections.

    Only the gradients of weight and lora_a are products with x, only lora_b's is one with h.
    """
    reads_x = any(needs[0::4]) or any(needs[1::4])
    read = [h if need else None for h, need in zip(hs, needs[2::4], strict=True)]
    return [x if reads_x else None, seed, *tensors, *read]


def stand_in(dys: Sequence[Tensor | None], shape: torch.Size) -> Tensor:
    """A tensor of x's shape and dtype, for a backward that reads no element of x."""
    return next(dy for dy in dys if dy is not None).new_empty(shape)


def as_matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K], rows or columns dense: copied only if its strides need it."""
    matrix = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    strides = matrix.stride()
    return matrix if 1 in strides and 0 not in strides else matrix.contiguous()


def are_batched(dys: Sequence[Tensor | None]) -> bool:
    """Whether these stand for many gradients each: ``is_grads_batched``, or vmap of a backward.

    torch's own operations take them; kernels, and what writes into a buffer, don't.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return any(dy is not None and is_batched(dy) for dy in dys)


@torch.library.impl(LIBRARY, "lora_linears", "CompositeExplicitAutograd")
def _lora_linears(x, parameters, scales, dropout, seed, backend):
    projections = group(_with_none(parameters), scales)
    with autocast_off(x.device.type):
        return run_forward(x, projections, dropout, seed, find_backend(backend or None, x.device))


@torch.library.impl(LIBRARY, "lora_linears_backward", "CompositeExplicitAutograd")
def _lora_linears_backward(dys, x, parameters, hs, needs, scales, dropout, seed, backend):
    projections = group(_with_none(parameters), scales)
    implementation = find_backend(backend or None, x.device)
    with torch.no_grad():
        gradients = run_backward(dys, x, projections, hs, needs, dropout, seed, implementation)
    return [gradient for gradient in gradients if gradient is not None]


@torch.library.register_fake("fastlora::lora_linears", lib=LIBRARY)
def _fake_lora_linears(x, parameters, scales, dropout, seed, backend):
    tokens = math.prod(x.shape[:-1])
    ys = [
        x.new_empty(*x.shape[:-1], projection.weight.shape[0])
        for projection in group(_with_none(parameters), scales)
        if projection.weight is not None
    ]
    return ys, [
        x.new_empty(tokens, projection.lora_a.shape[0]) for projection in group(parameters, scales)
    ]


@torch.library.register_fake("fastlora::lora_linears_backward", lib=LIBRARY)
def _fake_lora_linears_backward(dys, x, parameters, hs, needs, scales, dropout, seed, backend):
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip([x, *parameters], needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output):
    x, parameters, scales, dropout, seed, backend = inputs
    needs = [parameter.requires_grad for parameter in parameters]
    ctx.save_for_backward(*kept(x, seed, parameters, output[1], needs))
    ctx.scales, ctx.dropout, ctx.backend, ctx.shape = scales, dropout, backend, x.shape


def _backward(ctx, dys, _):
    x, seed, *rest = ctx.saved_tensors
    count = 4 * len(ctx.scales)
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    x = stand_in(dys, ctx.shape) if x is None else x
    hs = [x.new_empty(0) if h is None else h for h in rest[count:]]
    asked = iter(
        torch.ops.fastlora.lora_linears_backward(
            dys, x, rest[:count], hs, needs, ctx.scales, ctx.dropout, seed, ctx.backend
        )
    )
    gradients = [next(asked) if need else None for need in needs]
    return gradients[0], gradients[1:], None, None, None, None


torch.library.register_autograd(
    "fastlora::lora_linears", _backward, setup_context=_setup_context, lib=LIBRARY
)


def _no_second_backward(ctx, *_):
    raise NotImplementedError(
        "gradients of gradients need an eager call of a LoRA layer: here it was compiled or traced"
    )


torch.library.register_autograd("fastlora::lora_linears_backward", _no_second_backward, lib=LIBRARY)


def _with_none(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The parameters with None for each empty one: no bias, or no weight."""
    return [parameter if parameter.numel() else None for parameter in parameters]
