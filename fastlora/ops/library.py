"""``fastlora::lora_linears`` and its backward, registered with ``torch.library``.

``torch.compile`` and export see these two ops; a plain eager call runs the same implementations
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

# Elements of a weight that become float32 at a time, in dora_norm: they stay in cache.
_NORM_BLOCK = 2**20

_LIBRARY = torch.library.Library("fastlora", "DEF")
_LIBRARY.define(
    "lora_linears(Tensor x, Tensor[] parameters, float[] scales, float dropout, Tensor? seed, "
    "str backend) -> (Tensor[] ys, Tensor[] hs)"
)
_LIBRARY.define(
    "lora_linears_backward(Tensor[] dys, Tensor x, Tensor[] parameters, Tensor[] hs, bool[] needs, "
    "float[] scales, float dropout, Tensor? seed, str backend) -> Tensor[]"
)
_LIBRARY.define("dora_norm(Tensor weight, Tensor lora_a, Tensor lora_b, float scale) -> Tensor")


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


def dora_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """‖weight + scale · lora_b lora_a‖ of each row, [N], in float32 or wider, without a gradient.

    By ‖w‖² + 2 scale ⟨w, ba⟩ + scale² ‖ba‖², from one reading of the weight: ba, lora_b lora_a, is
    never made.
    """
    if torch.compiler.is_compiling():
        tensors = (weight.detach(), lora_a.detach(), lora_b.detach())
        return torch.ops.fastlora.dora_norm(*tensors, scale)
    with torch.no_grad(), autocast_off(weight.device.type):
        wide = torch.promote_types(weight.dtype, torch.float32)
        down, up = lora_a.to(wide), lora_b.to(wide)
        step = max(1, _NORM_BLOCK // weight.shape[1])
        squares, products = [], []
        for rows in weight.split(step):
            rows = rows.to(wide)
            squares.append(torch.linalg.vector_norm(rows, dim=1).square_())
            products.append(rows @ down.T)
        cross, own = torch.cat(products), up @ (down @ down.T)
        total = torch.cat(squares) + (up * own).sum(1).mul_(scale**2)
        return total.add_((up * cross).sum(1), alpha=2 * scale).clamp_min_(0.0).sqrt_()


@torch.library.impl(_LIBRARY, "dora_norm", "CompositeExplicitAutograd")
def _dora_norm(weight, lora_a, lora_b, scale):
    return dora_norm(weight, lora_a, lora_b, scale)


@torch.library.register_fake("fastlora::dora_norm", lib=_LIBRARY)
def _fake_dora_norm(weight, lora_a, lora_b, scale):
    return weight.new_empty(len(weight), dtype=torch.promote_types(weight.dtype, torch.float32))


@torch.library.impl(_LIBRARY, "lora_linears", "CompositeExplicitAutograd")
def _lora_linears(x, parameters, scales, dropout, seed, backend):
    projections = group(_with_none(parameters), scales)
    with autocast_off(x.device.type):
        return run_forward(x, projections, dropout, seed, find_backend(backend or None, x.device))


@torch.library.impl(_LIBRARY, "lora_linears_backward", "CompositeExplicitAutograd")
def _lora_linears_backward(dys, x, parameters, hs, needs, scales, dropout, seed, backend):
    projections = group(_with_none(parameters), scales)
    implementation = find_backend(backend or None, x.device)
    with torch.no_grad():
        gradients = run_backward(dys, x, projections, hs, needs, dropout, seed, implementation)
    return [gradient for gradient in gradients if gradient is not None]


@torch.library.register_fake("fastlora::lora_linears", lib=_LIBRARY)
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


@torch.library.register_fake("fastlora::lora_linears_backward", lib=_LIBRARY)
def _fake_lora_linears_backward(dys, x, parameters, hs, needs, scales, dropout, seed, backend):
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip([x, *parameters], needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output):
    x, parameters, scales, dropout, seed, backend = inputs
    ctx.save_for_backward(x, seed, *parameters, *output[1])
    ctx.scales, ctx.dropout, ctx.backend = scales, dropout, backend


def _backward(ctx, dys, _):
    x, seed, *rest = ctx.saved_tensors
    count = 4 * len(ctx.scales)
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    asked = iter(
        torch.ops.fastlora.lora_linears_backward(
            dys, x, rest[:count], rest[count:], needs, ctx.scales, ctx.dropout, seed, ctx.backend
        )
    )
    gradients = [next(asked) if need else None for need in needs]
    return gradients[0], gradients[1:], None, None, None, None


torch.library.register_autograd(
    "fastlora::lora_linears", _backward, setup_context=_setup_context, lib=_LIBRARY
)


def _no_second_backward(ctx, *_):
    raise NotImplementedError(
        "gradients of gradients need an eager call of a LoRA layer: here it was compiled or traced"
    )


torch.library.register_autograd(
    "fastlora::lora_linears_backward", _no_second_backward, lib=_LIBRARY
)


def _with_none(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The parameters with None for each empty one: no bias, or no weight."""
    return [parameter if parameter.numel() else None for parameter in parameters]
