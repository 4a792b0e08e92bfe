"""The functions of torch that take lazy logits without computing their elements.

Below autograd, a step selects rows, or changes the elements in a way that a loss can also compute:
a cast to float32, a factor, tanh, log_softmax.  Above autograd, ``cross_entropy``, ``nll_loss``,
and ``log_softmax`` followed by ``gather``, run :func:`fastlora.ops.loss.head_loss`.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ..backends.loss import reduced_rows
from ..call.projection import HALF_DTYPES
from ..formats.format import Quantized
from ..ops.dispatch import autocast_is_on, autocast_off
from ..ops.loss import REDUCTIONS, Head, head_loss
from ..ops.node import as_matrix
from .logits import (
    HANDLERS,
    STEPS,
    Cell,
    Change,
    HeadCall,
    LazyHeadFunction,
    LazyLogits,
    Recipe,
    Record,
    Step,
    after,
    tensors_of,
)
from .loss_seen import WITHOUT_LOGITS

_aten = torch.ops.aten
_NO_INDEX = -(1 << 40)  # an ignore_index that no class has
# DistributedDataParallel's Function passes the gradient on unchanged, and waits for its backward.
_DDP = "_DDPSinkBackward"
# The arguments of torch's losses that a fused loss takes.
_TAKEN = {"target", "reduction", "ignore_index", "label_smoothing"}
F = TypeVar("F", bound=Callable[..., Any])


def _handles(table: dict[Any, Any], *functions: Any) -> Callable[[F], F]:
    """A decorator that registers a function for these functions of torch."""

    def register(handler: F) -> F:
        table.update(dict.fromkeys(functions, handler))
        return handler

    return register


def lazy_logits(
    head: Head, is_current: Callable[[], bool] = lambda: True, record: Record = None
) -> Tensor:
    """The lazy output of a head's call.  Autocast has cast x and the head's tensors already.

    Autograd follows the tensors that require gradients now.  PEFT may freeze the head's tensors
    before the loss runs, for example in ``disable_adapter()``.

    This function is in this file so that its callers also load the handlers.
    """
    call = HeadCall(head._replace(x=head.x.contiguous()), is_current, record)
    return LazyHeadFunction.apply(call, *tensors_of(call.head))


# Steps that select rows.


@_handles(STEPS, _aten.slice.Tensor, _aten.select.int, _aten.unsqueeze.default, _aten.squeeze.dim)
def _of_dim(func: Any, lazy: LazyLogits, dim: int = 0, *rest: Any) -> Step | None:
    dims = lazy.dim() + (func is _aten.unsqueeze.default)
    if dim % dims == dims - 1:
        return None
    run = lambda z: func(z, dim, *rest)  # noqa: E731
    return Step(run, run)


@_handles(STEPS, _aten.split.Tensor)
def _split(func: Any, lazy: LazyLogits, size: int, dim: int = 0) -> list[Step] | None:
    n = lazy.dim()
    if dim % n == n - 1 or size < 1:
        return None
    starts = range(0, max(lazy.shape[dim], 1), size)  # one empty part if there are no rows
    return [_of_dim(_aten.slice.Tensor, lazy, dim, at, at + size) for at in starts]  # type: ignore[misc]


@_handles(STEPS, _aten.unbind.int)
def _unbind(func: Any, lazy: LazyLogits, dim: int = 0) -> list[Step] | None:
    """The matrices of a batch.  A loop over the rows of a matrix gets ordinary rows."""
    n = lazy.dim()
    if n == 2 or dim % n == n - 1:
        return None
    count = range(lazy.shape[dim])
    return [_of_dim(_aten.select.int, lazy, dim, at) for at in count]  # type: ignore[misc]


@_handles(STEPS, _aten.view.default, _aten._unsafe_view.default, _aten._reshape_alias.default)
def _view(func: Any, lazy: LazyLogits, size: Any, *strides: Any) -> Step | None:
    *lead, last = size or [0]
    V, rows = lazy.shape[-1], lazy.shape[:-1].numel()
    if last == -1 and -1 not in lead and torch.Size(lead).numel() == rows:
        last = V
    if last != V or not rows:
        return None
    return Step(lambda z: func(z, size, *strides), lambda x: x.reshape(*lead, x.shape[-1]))


@_handles(STEPS, _aten.clone.default)
def _clone(func: Any, lazy: LazyLogits, **options: Any) -> Step:
    return Step(lambda z: func(z, **options))


@_handles(STEPS, _aten.index.Tensor)
def _index(func: Any, lazy: LazyLogits, indices: Any) -> Step | None:
    """Rows by number or by a mask: logits[mask]."""
    # Copies, because the caller may change them before the elements are computed.
    indices = [each if each is None else each.clone() for each in indices]
    is_mask = [each is not None and each.dtype is torch.bool for each in indices]
    used = sum(each.dim() if mask else 1 for each, mask in zip(indices, is_mask, strict=True))
    if used >= lazy.dim() or any(isinstance(each, LazyLogits) for each in indices):
        return None
    column = torch.empty(*lazy.shape[:-1], 1, dtype=lazy.dtype, device=lazy.device)
    rows = func(column, indices).shape[:-1]

    def run(z: Tensor) -> Tensor:
        return z.new_empty(*rows, z.shape[-1]) if z.is_meta else func(z, indices)

    return Step(run, lambda x: x[tuple([slice(None) if i is None else i for i in indices])])


@_handles(STEPS, _aten.index_select.default)
def _index_select(func: Any, lazy: LazyLogits, dim: int, index: Tensor) -> Step | None:
    before: list[Any] = [None] * (dim % lazy.dim())
    return _index(_aten.index.Tensor, lazy, [*before, index]) if index.dim() == 1 else None


# Steps that change elements.


def _is_logprob(lazy: LazyLogits) -> bool:
    return any(step.number == ("log_softmax",) for step in lazy.cell.steps())


def _number(value: Any) -> float | None:
    """The value of a number, or of a CPU tensor without dimensions; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        return None
    return float(value) if value.is_cpu and not value.requires_grad else None


@_handles(STEPS, _aten.mul.Tensor, _aten.div.Tensor)
def _factor(func: Any, lazy: LazyLogits, other: Any) -> Step | LazyLogits | None:
    is_quotient = func is _aten.div.Tensor
    if isinstance(other, LazyLogits):
        return None if is_quotient else _p_log_p(lazy.cell, other.cell)
    number = _number(other)
    if number is None or _is_logprob(lazy) or (is_quotient and not number):
        return None
    return Step(lambda z: func(z, number), None, ("mul", 1.0 / number if is_quotient else number))


@_handles(STEPS, _aten.exp.default)
def _exp(func: Any, lazy: LazyLogits) -> Step | None:
    return Step(func, None, ("exp",)) if lazy.cell.step.number == ("log_softmax",) else None


def _p_log_p(p: Cell, logp: Cell) -> LazyLogits | None:
    """exp(logp) · logp, whose sum is an entropy."""
    if p.step.number != ("exp",) or p.parent is not logp:
        return None
    return after(logp, Step(lambda z: z.exp() * z, None, ("exp",)))


@_handles(STEPS, _aten.tanh.default)
def _tanh(func: Any, lazy: LazyLogits) -> Step | None:
    return None if _is_logprob(lazy) else Step(func, None, ("tanh",))


@_handles(STEPS, _aten.neg.default)
def _neg(func: Any, lazy: LazyLogits) -> Step:
    return Step(func, None, ("neg",) if _is_logprob(lazy) else ("mul", -1.0))


@_handles(STEPS, _aten._to_copy.default)
def _float(func: Any, lazy: LazyLogits, **options: Any) -> Step | None:
    """From 16 bits to float32.  The loss computes in float32, so other casts need elements."""
    given = {name for name, value in options.items() if value not in (None, False)}
    given -= {"memory_format"}
    is_wider = lazy.dtype in HALF_DTYPES and options.get("dtype") is torch.float32
    if given != {"dtype"} or not is_wider or _is_logprob(lazy):
        return None
    return Step(lambda z: func(z, **options))


@_handles(STEPS, _aten._log_softmax.default)
def _log_softmax(func: Any, lazy: LazyLogits, dim: int, half_to_float: bool) -> Step | None:
    if _is_logprob(lazy) or dim % lazy.dim() != lazy.dim() - 1:
        return None
    return Step(lambda z: func(z, dim, half_to_float), None, ("log_softmax",))


# Losses.


def _loss(
    lazy: LazyLogits,
    recipe: Recipe,
    target: Any,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    of_target: Tensor | None = None,
) -> Any:
    """The cross-entropy of these logits by a fused loss, or NotImplemented."""
    settings = recipe.settings()
    if settings is None or isinstance(target, LazyLogits) or not isinstance(target, Tensor):
        return NotImplemented
    if (target.dtype, target.device, target.shape) != (torch.int64, lazy.device, lazy.shape[:-1]):
        return NotImplemented
    if reduction not in REDUCTIONS or not 0.0 <= label_smoothing <= 1.0:
        return NotImplemented  # torch raises its error
    functions = lazy.functions()
    if set(functions) - {_DDP}:
        return NotImplemented
    lazy.cell.call.check()
    dtype = torch.float32 if autocast_is_on(lazy.device.type) else lazy.dtype
    with autocast_off(lazy.device.type):
        settings = settings._replace(label_smoothing=float(label_smoothing))
        given = recipe.head, target, settings, reduction, ignore_index
        loss = head_loss(*given, lazy if functions else None, of_target)
    lazy.cell.call.say(WITHOUT_LOGITS)
    return loss.to(torch.promote_types(dtype, lazy.dtype))


def _loss_of_torch(function: Any, lazy: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """Handle torch's ``cross_entropy`` of logits, or its ``nll_loss`` of log-probabilities."""
    given = signature(function).bind(lazy, *args, **kwargs).arguments
    taken = {name: given.pop(name) for name in _TAKEN & given.keys()}
    # The other arguments are class weights and the old names of reductions.
    if any(given[name] is not None for name in given.keys() - {"input"}) or lazy.dim() > 2:
        return NotImplemented
    recipe, is_nll = Recipe.of(lazy), function is functional.nll_loss
    if recipe.is_logprob != is_nll or (is_nll and recipe.sign < 0.0):
        return NotImplemented
    return _loss(lazy, recipe, **taken)


for _function in (functional.cross_entropy, functional.nll_loss):
    HANDLERS[_function] = partial(_loss_of_torch, _function)


@_handles(HANDLERS, Tensor.gather, torch.gather)
def _gather(lazy: LazyLogits, dim: Any = None, index: Any = None, **others: Any) -> Any:
    """The log-probability of each target, or its float32 logit."""
    if others or dim not in (-1, lazy.dim() - 1):
        return NotImplemented
    if not isinstance(index, Tensor) or index.shape != (*lazy.shape[:-1], 1):
        return NotImplemented
    recipe, target = Recipe.of(lazy), index.squeeze(-1)
    if not recipe.is_logprob:
        return _target_logit(lazy, recipe, target)
    loss = _loss(lazy, recipe, target, "none", _NO_INDEX)
    if loss is NotImplemented:
        return loss
    return -recipe.sign * loss.unsqueeze(-1).to(lazy.dtype)


# Numbers of rows.


def _target_logit(lazy: LazyLogits, recipe: Recipe, target: Tensor) -> Any:
    """The logit s of each target, which TRL's ``selective_log_softmax`` gathers in float32.

    With lse = log Σ exp(s) of a row, its loss is lse - s.  So one pass gives s and lse, which the
    cell keeps for the ``logsumexp`` that follows.  The difference s - lse is as precise as the
    loss, and its gradient is the loss's: the gradients by s cancel exactly.
    """
    x, ((weight, bias), adapters) = recipe.head.x, recipe.head.output
    if lazy.dtype in HALF_DTYPES or adapters or isinstance(weight, Quantized):
        return NotImplemented
    z = x.new_empty(target.numel())
    loss = _loss(lazy, recipe, target, "none", _NO_INDEX, of_target=z)
    if loss is NotImplemented:
        return loss
    s = z.view(target.shape).unsqueeze(-1)
    if loss.requires_grad:  # the same logit by torch's operations, for its gradient
        source = (x * weight[target]).sum(-1, keepdim=True)
        source = source if bias is None else source + bias[target].unsqueeze(-1)
        s = s + (source - source.detach())
    for run in _element_steps(lazy.cell):
        s = run(s)
    lazy.cell.lse = loss.unsqueeze(-1) + s
    return s


def _element_steps(cell: Cell) -> list[Change]:
    return [step.run for step in cell.steps() if step.rows is None]


@_handles(HANDLERS, Tensor.logsumexp, torch.logsumexp)
def _logsumexp(lazy: LazyLogits, dim: Any = None, keepdim: bool = False, **others: Any) -> Any:
    """The log-sum-exp that ``gather`` has computed, for these rows or for more."""
    cell, changes = lazy.cell, []
    while cell.lse is None and cell.parent is not None and cell.step.rows is not None:
        changes.append(cell.step.rows)
        cell = cell.parent
    lse, needs = cell.lse, torch.is_grad_enabled() and lazy.requires_grad
    if lse is None or lse.requires_grad != needs or dim not in (-1, lazy.dim() - 1):
        return NotImplemented
    for change in reversed(changes):
        lse = change(lse)
    return lse if keepdim else lse.squeeze(-1)


_REDUCTIONS = _aten.argmax.default, _aten.logsumexp.default, _aten.sum.dim_IntList, _aten.mean.dim


@_handles(STEPS, *_REDUCTIONS)
def _reduction(
    func: Any, lazy: LazyLogits, dim: Any = None, keepdim: bool = False, **options: Any
) -> Tensor | None:
    """A number for each row: the argmax and the entropy that trainers log, for example."""
    place = dim if isinstance(dim, list) else [dim]
    if place not in ([-1], [lazy.dim() - 1]) or 0 in lazy.shape or lazy.dim() < 2:
        return None
    runs, lead = _element_steps(lazy.cell), [1] * (lazy.dim() - 2)

    def reduce(z: Tensor) -> Tensor:
        z = z.view(*lead, *z.shape)
        for run in runs:
            z = run(z)
        return func(z, dim, **options).flatten()

    lazy.cell.call.check()
    head = Recipe.of(lazy).head
    with torch.no_grad(), autocast_off(lazy.device.type):
        found = reduced_rows(as_matrix(head.x), head.output, head.masks(), reduce)
    return found.view(*lazy.shape[:-1], *[1] * keepdim)
