"""The functions of torch that take lazy logits without computing their elements.

Below autograd, a step selects rows, or changes the elements in a way that a loss can also compute:
a cast to float32, a factor, tanh, log_softmax.  Above autograd, ``cross_entropy``, and ``gather``
of logits or of their ``log_softmax``, run :func:`fastlora.ops.loss.head_loss`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

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
    HeadCall,
    LazyHeadFunction,
    LazyLogits,
    Report,
    map_tensors,
    tensors_of,
)
from .loss_seen import WITHOUT_LOGITS

_aten = torch.ops.aten
_NO_INDEX = -(1 << 40)  # an ignore_index that no class has
# DistributedDataParallel's Function passes the gradient on unchanged, and waits for its backward.
_DDP = "_DDPSinkBackward"


def _handles(table: dict[Any, Any], *functions: Any) -> Callable[[Any], Any]:
    """A decorator that registers a function for these functions of torch."""

    def register(handler: Any) -> Any:
        table.update(dict.fromkeys(functions, handler))
        return handler

    return register


def lazy_logits(
    head: Head, is_current: Callable[[], bool] = lambda: True, report: Report = None
) -> Tensor:
    """The lazy output of a head's call.  Autocast has cast x and the head's tensors already.

    A tensor gets a gradient if it requires one now, at the head's call.  Later changes of
    ``requires_grad`` have no effect.  For example, PEFT's ``disable_adapter()`` may freeze the
    head's tensors before the loss runs.

    This function is in this file so that its callers also load the handlers.
    """
    call = HeadCall(head._replace(x=head.x.contiguous()), is_current, report)
    return LazyHeadFunction.apply(call, *tensors_of(call.head))


# Steps that select rows.  A single row isn't lazy: to select it computes all elements.  So a loop
# over the rows of a matrix runs one large product, and not a product for each row.


_VIEWS = (
    _aten.slice.Tensor, _aten.select.int, _aten.split.Tensor, _aten.split_with_sizes.default,
    _aten.unbind.int, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.view.default,
    _aten._unsafe_view.default, _aten._reshape_alias.default, _aten.alias.default,
    _aten.detach.default,
)  # fmt: skip


@_handles(STEPS, *_VIEWS)
def _view(func: Any, cell: Cell, *args: Any) -> list[Cell] | Cell | None:
    """Views that consist of whole rows [..., V].  ``likes``: meta tensors with their strides."""
    likes = func(cell.like, *args)
    found = [_rows_at(cell, like) for like in ([likes] if isinstance(likes, Tensor) else likes)]
    if None in found:
        return None
    return found[0] if isinstance(likes, Tensor) else found  # type: ignore[return-value]


def _rows_at(cell: Cell, like: Tensor) -> Cell | None:
    """The cell of ``like``, a view of ``cell.like``; None if its rows aren't whole rows."""
    *lead, V = like.shape
    if not lead or cell.like.shape[-1] != V or like.stride(-1) != 1:
        return None
    # In elements: where the view starts in the parent's elements, a multiple of V.
    *strides, _ = like.stride()
    offset = like.storage_offset() - cell.like.storage_offset()

    def run(z: Tensor) -> Tensor:
        return z.as_strided(like.shape, like.stride(), z.storage_offset() + offset)

    # All rows in their old order, such as view(-1, V): they need no numbers.
    if cell.recipe.rows is None and like.is_contiguous() and like.numel() == cell.like.numel():
        return cell.with_rows(like, None, run)
    # The same view of the row numbers.  A row is one number there, so strides are divided by V.
    rows = _rows_of(cell)
    strides = [stride // V for stride in strides]
    rows = rows.as_strided(lead, strides, rows.storage_offset() + offset // V)
    return cell.with_rows(like, rows, run)


def _rows_of(cell: Cell) -> Tensor:
    """The cell's row numbers: int64 [...]."""
    if cell.recipe.rows is not None:
        return cell.recipe.rows
    lead = cell.like.shape[:-1]
    return torch.arange(lead.numel(), dtype=torch.int64, device=cell.call.head.x.device).view(lead)


@_handles(STEPS, _aten.index.Tensor)
def _index(func: Any, cell: Cell, *args: Any) -> Cell | None:
    """Rows by number or by a mask: logits[mask]."""
    try:
        rows = func(_rows_of(cell), *args).contiguous()
    except IndexError:  # an index of columns
        return None
    if not rows.dim():  # a single row
        return None
    # Copies, because the caller may change them before the elements are computed.
    args = tree_map_only(Tensor, Tensor.clone, args)
    like = cell.like.new_empty(*rows.shape, cell.like.shape[-1])
    return cell.with_rows(like, rows, lambda z: func(z, *args).contiguous())


@_handles(STEPS, _aten.index_select.default)
def _index_select(func: Any, cell: Cell, dim: int, index: Tensor) -> Cell | None:
    return _index(func, cell, dim % cell.like.dim(), index)


# Steps that change elements.


@_handles(STEPS, _aten.mul.Tensor, _aten.div.Tensor)
def _factor(func: Any, cell: Cell, other: Any) -> Cell | None:
    """factor · s, with a number; or p · log p, with the lazy tensor of log p.

    With a softcap: factor · (softcap · tanh(logit_scale · z / softcap)) = c · tanh(l · z / c),
    where c = factor · softcap and l = factor · logit_scale.  c must be positive, as every softcap.
    """
    form, settings, is_quotient = cell.recipe.form, cell.recipe.settings, func is _aten.div.Tensor
    if isinstance(other, LazyLogits):
        logp = other.cell
        if is_quotient or form != "probs" or cell.parent is not logp:
            return None
        return logp.changed(lambda z: z.exp() * z, form="p_log_p")  # its sum is -entropy
    if type(other) not in (int, float) or form != "logits" or (is_quotient and not other):
        return None
    factor, cap = 1.0 / other if is_quotient else float(other), settings.softcap
    if cap is not None and factor <= 0.0:
        return None
    softcap = None if cap is None else factor * cap
    settings = settings._replace(softcap=softcap, logit_scale=settings.logit_scale * factor)
    return cell.changed(lambda z: func(z, other), settings=settings)


@_handles(STEPS, _aten.tanh.default)
def _tanh(func: Any, cell: Cell) -> Cell | None:
    """tanh(logit_scale · z): a softcap of 1.  A later factor c makes it c · tanh(…)."""
    form, settings = cell.recipe.form, cell.recipe.settings
    if form != "logits" or settings.softcap is not None:
        return None
    return cell.changed(func, settings=settings._replace(softcap=1.0))


@_handles(STEPS, _aten.clone.default)
def _clone(func: Any, cell: Cell, **options: Any) -> Cell:
    return cell.changed(lambda z: func(z, **options))


@_handles(STEPS, _aten._to_copy.default)
def _float(func: Any, cell: Cell, **options: Any) -> Cell | None:
    """From 16 bits to float32.  The loss computes in float32, so other casts need elements."""
    # Only ``dtype`` may be given, and ``memory_format``, which changes no number.
    given = {name for name, value in options.items() if value not in (None, False)}
    is_wider = cell.like.dtype in HALF_DTYPES and options.get("dtype") is torch.float32
    if given - {"memory_format"} != {"dtype"} or not is_wider or cell.recipe.form != "logits":
        return None
    return cell.changed(lambda z: func(z, **options))


@_handles(STEPS, _aten._log_softmax.default)
def _log_softmax(func: Any, cell: Cell, dim: int, half_to_float: bool) -> Cell | None:
    n = cell.like.dim()
    if cell.recipe.form != "logits" or dim % n != n - 1:
        return None
    return cell.changed(lambda z: func(z, dim, half_to_float), form="logprobs")


@_handles(STEPS, _aten.exp.default)
def _exp(func: Any, cell: Cell) -> Cell | None:
    return cell.changed(func, form="probs") if cell.recipe.form == "logprobs" else None


# Losses.


def _loss(
    lazy: LazyLogits,
    target: Any,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """The cross-entropy of a lazy tensor's logits by a fused loss, or NotImplemented.

    The fused loss sends its gradients to x and the head's tensors, past every autograd Function
    between the head and ``lazy``.  Only DDP's Function may be skipped so.
    """
    call, recipe, functions = lazy.cell.call, lazy.cell.recipe, lazy.functions()
    if not isinstance(target, Tensor) or set(functions) - {_DDP}:
        return NotImplemented
    if (target.dtype, target.device, target.shape) != (torch.int64, lazy.device, lazy.shape[:-1]):
        return NotImplemented
    if reduction not in REDUCTIONS or not 0.0 <= label_smoothing <= 1.0:
        return NotImplemented  # torch raises its error
    call.check()
    head = call.head if lazy.requires_grad else map_tensors(call.head, Tensor.detach)
    # torch's cross_entropy returns float32 under autocast.
    dtype = torch.float32 if autocast_is_on(lazy.device.type) else lazy.dtype
    with autocast_off(lazy.device.type):
        settings = recipe.settings._replace(label_smoothing=float(label_smoothing))
        via = lazy if functions else None  # DDP's node: the backward reaches it, with gradient None
        loss = head_loss(head, target, settings, reduction, ignore_index, recipe.rows, via)
    call.report_once(WITHOUT_LOGITS)
    return loss.to(torch.promote_types(dtype, lazy.dtype))


@_handles(HANDLERS, functional.cross_entropy)
def _cross_entropy(
    lazy: LazyLogits, target: Any, *, weight: Any, size_average: Any, reduce: Any, **options: Any
) -> Any:
    """torch passes all arguments, and those after the target by name."""
    if not (weight is size_average is reduce is None):
        return NotImplemented
    # With more than 2 dimensions, cross_entropy's classes are dimension 1, not the last one.
    if lazy.dim() != 2 or lazy.cell.recipe.form != "logits":
        return NotImplemented
    return _loss(lazy, target, **options)


@_handles(HANDLERS, Tensor.gather, torch.gather)
def _gather(lazy: LazyLogits, dim: Any = None, index: Any = None, **others: Any) -> Any:
    """The log-probability of each target, -loss; or its logit in float32 or wider."""
    if others or dim not in (-1, lazy.dim() - 1):
        return NotImplemented
    if not isinstance(index, Tensor) or index.shape != (*lazy.shape[:-1], 1):
        return NotImplemented
    is_logprob, target = lazy.cell.recipe.form == "logprobs", index.squeeze(-1)
    if not is_logprob and not _has_target_logits(lazy):
        return NotImplemented
    # cross_entropy of each row: loss = lse - s[target] = -log_softmax(s)[target].
    loss = _loss(lazy, target, "none", _NO_INDEX)
    if loss is NotImplemented:
        return loss
    return -loss.unsqueeze(-1) if is_logprob else _target_logit(lazy.cell, target, loss)


def _has_target_logits(lazy: LazyLogits) -> bool:
    """Whether :func:`_target_logit` can compute them: a dense head without adapters, not 16-bit."""
    (weight, _), adapters = lazy.cell.call.head.output
    is_wide = lazy.dtype not in HALF_DTYPES and lazy.cell.recipe.form == "logits"
    return is_wide and not adapters and not isinstance(weight, Quantized)


def _target_logit(cell: Cell, target: Tensor, loss: Tensor) -> Tensor:
    """The logit s of each target, s = x · weight[target] + bias[target], scaled and softcapped.

    TRL's ``selective_log_softmax`` gathers s in float32, and then computes s - logsumexp.  A row's
    loss is lse - s, where lse is its logsumexp.  So cell.lse = loss + s, for :func:`_logsumexp`.
    Then TRL's difference is s - (loss + s) = -loss, with the loss's rounding error, and its
    gradient is -d loss, because the gradients of the two s cancel exactly.
    """
    x, (weight, bias) = as_matrix(cell.call.head.x), cell.call.head.output.base
    with autocast_off(x.device.type):
        # [..., 1, K] @ [..., K, 1]
        s = (x[_rows_of(cell)].unsqueeze(-2) @ weight[target].unsqueeze(-1)).squeeze(-1)
        if bias is not None:
            s = s + bias[target].unsqueeze(-1)
        for run in cell.recipe.changes:
            s = run(s)
    if not loss.requires_grad:
        s = s.detach()
    cell.lse = loss + s.squeeze(-1)
    return s


@_handles(HANDLERS, Tensor.logsumexp, torch.logsumexp)
def _logsumexp(lazy: LazyLogits, dim: Any = None, keepdim: bool = False, **others: Any) -> Any:
    """The log-sum-exp of each row, if ``gather`` has computed it for the same rows or for more."""
    # A parent with the same changes has the same s, and perhaps more rows.
    cell, needs = lazy.cell, torch.is_grad_enabled() and lazy.requires_grad
    changes = cell.recipe.changes
    while cell.lse is None and cell.parent is not None and cell.parent.recipe.changes == changes:
        cell = cell.parent
    lse = cell.lse
    if lse is None or lse.requires_grad != needs or dim not in (-1, lazy.dim() - 1):
        return NotImplemented
    rows, known = _rows_of(lazy.cell), _rows_of(cell).flatten()
    # lse.flatten()[i] belongs to row known[i] of z, so place[known[i]] = i.
    place = known.new_empty(as_matrix(cell.call.head.x).shape[0])
    place[known] = torch.arange(len(known), dtype=torch.int64, device=known.device)
    found = lse.flatten()[place[rows]]
    return found.unsqueeze(-1) if keepdim else found


_REDUCTIONS = _aten.argmax.default, _aten.logsumexp.default, _aten.sum.dim_IntList, _aten.mean.dim


@_handles(STEPS, *_REDUCTIONS)
def _reduction(
    func: Any, cell: Cell, dim: Any = None, keepdim: bool = False, **options: Any
) -> Tensor | None:
    """A number for each row, over the last dimension: argmax, logsumexp, sum or mean.

    For example, trainers log an entropy, which is -sum of "p_log_p".  Computed a block of rows at a
    time, so the logits of all rows are never in memory.
    """
    shape, head, rows = cell.like.shape, cell.call.head, cell.recipe.rows
    place = dim if isinstance(dim, list) else [dim]
    if place not in ([-1], [len(shape) - 1]) or 0 in shape:
        return None
    lead = [1] * (len(shape) - 2)  # the functions' ``dim`` counts dimensions of the lazy tensor

    def reduce(z: Tensor) -> Tensor:  # z: a block of the head's output, [rows, V]
        z = z.view(*lead, *z.shape)
        for run in cell.recipe.changes:
            z = run(z)
        return func(z, dim, **options).flatten()

    cell.call.check()
    rows = None if rows is None else rows.flatten()
    with torch.no_grad(), autocast_off(head.x.device.type):
        x = as_matrix(head.x) if rows is None else as_matrix(head.x)[rows]
        found = reduced_rows(x, head.output, head.masks(rows), reduce)
    return found.view(*shape[:-1], *[1] * keepdim)
