"""The autograd node of a call on a backend.  A call of a known kind (ops/kinds.py) starts here:

    run_known → LoRALinearFunction.forward  → backend_forward  → the backend
                LoRALinearFunction.backward → backend_backward → the backend

Gated MLPs, experts, losses and the registered op share ``backend_forward`` and
``backend_backward``.

One node replaces the operations of all outputs of one x, so x is saved once.  On the Triton
backend, a group of q, k and v takes half of the host time of PEFT's three layers (``make bench
ARGS=host``, docs/kernels.md).
"""

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..backends import BackwardCall, Call
from ..call.projection import HALF_DTYPES, Layout, flatten, reads_x, unflatten
from .composite import by_autograd, by_composite
from .dispatch import autocast_dtype, autocast_inputs, autocast_off
from .few_rows import run_few_rows

_SEEDS = -(2**63), 2**63 - 1  # the range of a seed: lowest, and highest + 1
_ARGUMENTS = 3  # the node's arguments before ``inputs``: seeds, ends, call
# The next step in errors of refuse_by_torch_only.
_EACH = "call fastlora.lora_linear for each expert or adapter"
_TRAIN_A = "lora_a and weight are frozen, so let lora_a require gradients"


def run_known(
    inputs: Sequence[Tensor], call: Call, seeds: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The outputs of an eager call whose kind is known: no checks, and no dispatch.

    ``inputs`` are x and the flat tensors.  ``seeds``: of the adapters' dropout; drawn if None.
    """
    if call.autocasts:  # outside of the node, so that autograd records the casts
        x, outputs = autocast_inputs(inputs[0], unflatten(inputs[1:], call.layouts))
        with autocast_off(x.device.type):
            inputs = x, *flatten(outputs, call.layouts)
            return run_known(inputs, call._replace(autocasts=False), seeds)
    rows = call.rows
    if seeds is None and call.seeds:
        seeds = draw_seed(call.seeds, inputs[0].device)
    if call.is_few:
        return (run_few_rows(inputs, seeds, call),)
    if torch.is_grad_enabled():
        # The node saves the ends of experts, because the caller may write to that tensor.  The ends
        # of many adapters belong to an AdapterMapping, which never changes them.
        ends = None if rows is None or rows.has_one_base else rows.ends
        return LoRALinearFunction.apply(seeds, ends, call, *inputs)
    return tuple(backend_forward(inputs, seeds, call)[0])


def run_known_layer(inputs: Sequence[Tensor], call: Call) -> Tensor:
    """The only output of :func:`run_known`."""
    return run_known(inputs, call)[0]


def draw_seed(count: int, device: torch.device) -> Tensor:
    """``count`` seeds, int64, from torch's generator.

    Checkpointing restores this generator's state, so a repeated forward gets equal masks.
    """
    # Inductor replaces torch.randint by its own generator, so a compiled call uses this overload.
    if torch.compiler.is_compiling():
        randint = torch.ops.aten.randint.low_generator
        return randint(*_SEEDS, (count,), generator=None, dtype=torch.int64, device=device)
    return torch.randint(*_SEEDS, (count,), dtype=torch.int64, device=device)


def backend_forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """Every output, with x's leading dimensions, and every h [M, r]."""
    # Backends compute on matrices: x [..., K] as [M, K].
    x, *tensors = inputs
    ys, hs = call.backend.forward([as_matrix(x), *tensors], seeds, call)
    if x.dim() != 2:
        # resize_, not view: autograd forbids in-place changes of a view that a Function returns.
        ys = [y.resize_(*x.shape[:-1], y.shape[-1]) for y in ys]
    return ys, hs


def backend_backward(given: BackwardCall) -> list[Tensor | None]:
    """The gradient of each input; None if the input needs none, or if its adapter has no rows."""
    x, *tensors = given.inputs
    # A backward inside of an autocast block must compute in the forward's dtypes, without casts.
    if torch._C._is_any_autocast_enabled() and autocast_dtype(x) is not None:
        with autocast_off(x.device.type):
            return backend_backward(given)
    dys = [None if dy is None else as_matrix(dy) for dy in given.dys]
    gradients = given.call.backend.backward(BackwardCall(dys, [as_matrix(x), *tensors], *given[2:]))
    dx = gradients[0]
    if dx is not None and x.dim() != 2:
        gradients[0] = dx.view(x.shape)
    return gradients


def to_save(
    x: Tensor,
    hs: Sequence[Tensor],
    needs: Sequence[bool],
    layouts: tuple[Layout, ...],
    one_h: bool = False,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(x, hs) to save for backward, with None in place of a tensor that the backward won't read.

    ``needs``: whether each input (x, then the outputs' tensors) needs a gradient.  ``one_h``:
    whether all adapters of an output share one h, as in calls with many adapters.
    """
    is_read, reads_h = _is_read(tuple(needs), layouts, one_h)
    saved_hs = [h if reads else None for h, reads in zip(hs, reads_h, strict=True)]
    return x if is_read else None, saved_hs


@lru_cache(maxsize=1024)
def _is_read(
    needs: tuple[bool, ...], layouts: tuple[Layout, ...], one_h: bool
) -> tuple[bool, list[bool]]:
    """(whether the backward reads x, whether it reads each h).

    x is read for d weight = dyᵀ x and d lora_a = dhᵀ x, and h for d lora_b = dyᵀ h.
    """
    # Cached, because every training call asks, and the answer depends only on the kind of call.
    wanted, reads_h = unflatten(needs[1:], layouts), []
    for _, adapters in wanted:
        needs_lora_b = [adapter.lora_b for adapter in adapters]
        reads_h += [any(needs_lora_b)] if one_h else needs_lora_b
    return reads_x(wanted), reads_h


def as_matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K], with stride 1 along its rows or along its columns.

    A view if possible.  A copy if no such view exists, or if x has torch's lazy negative bit.
    """
    matrix = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).resolve_neg()
    strides, K = matrix.stride(), matrix.shape[1]
    # A bug of torch 2.13 with AMX: if the matrix is a window of a wider one and K % 8 != 0, 16-bit
    # products of oneDNN read elements past the end of each row.  A NaN there makes the result NaN.
    is_window = strides[1] == 1 and strides[0] > K
    reads_past = is_window and K % 8 and matrix.is_cpu and matrix.dtype in HALF_DTYPES
    return matrix.contiguous() if 1 not in strides or 0 in strides or reads_past else matrix


def by_torch_only(dys: Sequence[Tensor | None]) -> bool:
    """Whether only torch's own operations can compute the gradients that a backward asks for.

    These are gradients of gradients (``create_graph=True``), and batches of gradients
    (``is_grads_batched=True``, vmap).  Kernels have no gradient themselves, and code that writes
    into a buffer can't take a batched tensor.
    """
    # Autograd enables gradients in a backward only for create_graph.
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return True
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return any([dy is not None and is_batched(dy) for dy in dys])


def refuse_by_torch_only(dys: Sequence[Tensor | None], what: str, instead: str) -> None:
    """Raise RuntimeError for gradients of gradients and for batched gradients of ``what``."""
    if by_torch_only(dys):
        raise RuntimeError(
            f"{what} has neither gradients of gradients (create_graph=True) nor batched gradients "
            f"(is_grads_batched=True): {instead}"
        )


class Function(torch.autograd.Function):
    """``autograd.Function`` without the host time of its search for dead ``torch.func`` wrappers.

    A dead wrapper is a tensor of a ``torch.func`` transform that has ended.  The caller must unwrap
    all arguments first (``unwrap_dead_wrappers``).
    """

    apply = vars(torch._C._FunctionBase)["apply"]  # a class method, written in C


class LoRALinearFunction(Function):
    """One node for all outputs of one x.

    Saved for backward: the inputs, the seeds, and every h = factor · (mask ∘ x) lora_aᵀ.  x is
    omitted if no lora_a and no weight needs a gradient.  An h is omitted if its lora_b needs none.
    """

    @staticmethod
    def forward(
        ctx, seeds: Tensor | None, ends: Tensor | None, call: Call, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """``inputs``: x and the flat tensors of the outputs; each may require a gradient.

        ``ends``: ``call.rows.ends`` of experts, else None.  The backward reads it from ``call``.
        The node saves it only so that autograd raises an error after an in-place change of it.
        """
        ys, hs = backend_forward(inputs, seeds, call)
        x, *tensors = inputs
        one_h = call.rows is not None and call.rows.has_one_base
        saved_x, saved_hs = to_save(x, hs, ctx.needs_input_grad[_ARGUMENTS:], call.layouts, one_h)
        ctx.save_for_backward(seeds, ends, saved_x, *tensors, *saved_hs)
        ctx.call = call
        if saved_x is None:
            ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad[_ARGUMENTS:]
        # Saved: seeds, ends, x (or None), the outputs' tensors, then every h (or None).
        seeds, _, *saved = ctx.saved_tensors
        inputs, hs = saved[: len(needs)], saved[len(needs) :]
        nothing = (None,) * _ARGUMENTS
        if all([dy is None for dy in dys]):
            return (*nothing, *[None] * len(needs))
        has_x = inputs[0] is not None
        if not has_x:  # no gradient reads x's elements, but backends read its shape and dtype
            inputs[0] = inputs[1].new_empty(ctx.shape, dtype=ctx.dtype)
        if call.rows is not None:
            refuse_by_torch_only(dys, "a call of experts or of many adapters", _EACH)
        if by_torch_only(dys):
            # Run the formula as torch operations (ops/composite.py) and differentiate them.
            if not has_x:
                if any(h is not None for h in hs):  # h depends on x, so its derivative needs x
                    refuse_by_torch_only(dys, "a layer that saves no x", _TRAIN_A)
                # Without h, only dx is asked for, which depends on no element of x: zeros will do.
                inputs[0] = torch.zeros_like(inputs[0], requires_grad=needs[0])
            function = partial(by_composite, seeds=seeds, call=call)
            gradients = by_autograd(function, inputs, needs, dys)
        else:
            gradients = backend_backward(BackwardCall(dys, inputs, hs, needs, seeds, call))
        if call.rows is not None and call.rows.of_banks:
            # All lora_a are views of one bank, by ``unbind``, and so are all lora_b.  If no row has
            # an adapter, no view has a gradient, and the bank's would be None.  A zero gradient for
            # one view, the last, makes the bank's gradient zeros.
            for i in (-2, -1):
                if needs[i] and gradients[i] is None:
                    gradients[i] = inputs[i].new_zeros(()).expand_as(inputs[i])
        return (*nothing, *gradients)
