"""The functions of torch that take lazy logits without computing their elements.

A handler gets a lazy tensor and the other arguments of the function.  It returns a lazy tensor with
another recipe, or the result of a loss, or NotImplemented if the function needs elements.  A call
with an argument that its handler doesn't take (``out=`` …) also needs elements.

``cross_entropy``, ``nll_loss``, and ``log_softmax`` followed by ``gather`` or ``sum``, run
:func:`fastlora.ops.loss.head_loss`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ..formats.format import Quantized
from ..ops.dispatch import autocast_is_on, autocast_off
from ..ops.loss import REDUCTIONS, Head, head_loss
from ..projection import Base, Output
from .logits import HANDLERS, STEPS, Change, HeadCall, LazyLogits, LinkFunction, Recipe, with_node

_NO_INDEX = -(1 << 40)  # an ignore_index that no class has
# The arguments of torch's losses that a fused loss takes.
_TAKEN = {"target", "reduction", "ignore_index", "label_smoothing"}
F = TypeVar("F", bound=Callable[..., Any])


def _handles(*functions: Any) -> Callable[[F], F]:
    """A decorator for the handler of these functions of torch."""

    def register(handler: F) -> F:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def lazy_logits(head: Head, is_current: Callable[[], bool] = lambda: True) -> Tensor:
    """The lazy output of a head's call.  Autocast has cast x and the head's tensors already.

    Autograd follows the tensors that require gradients now.  PEFT may freeze the head's tensors
    before the loss runs, for example in ``disable_adapter()``.

    This function is in this file so that its callers also load the handlers.
    """
    recipe = Recipe(head, head.x.dtype).of_rows(Tensor.contiguous).of_tensors(_alias)
    call = HeadCall(recipe, is_current)
    return with_node(call, recipe, call.compute)


def _alias(tensor: Tensor) -> Tensor:
    """The same tensor, which keeps its place in autograd's graph if ``requires_grad`` changes."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach()


# Steps on the elements.


def _step(lazy: LazyLogits, name: str, *number: float) -> Any:
    recipe = lazy.recipe
    if recipe.is_logprob:
        return NotImplemented
    steps = (*recipe.steps, (name, *number))
    return _contiguous_step(lazy, lambda z: STEPS[name](z, *number), steps=steps)


def _contiguous_step(lazy: LazyLogits, step: Change, **changes: Any) -> Any:
    """A lazy tensor after a step whose result is a new contiguous tensor.

    ``changes``: the fields of the recipe that the step changes.
    """
    return lazy.then(lazy.recipe.of_rows(Tensor.contiguous)._replace(**changes), step)


def _number(value: Any) -> float | None:
    """The value of a number, or of a CPU tensor without dimensions; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, Tensor) or value.dim() or value.is_complex():
        return None
    return float(value) if value.is_cpu and not value.requires_grad else None


@_handles(Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, torch.multiply)
def _mul(lazy: LazyLogits, other: Any) -> Any:
    factor = _number(other)
    return NotImplemented if factor is None else _step(lazy, "mul", factor)


@_handles(Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide)
def _div(lazy: LazyLogits, other: Any) -> Any:
    divisor = _number(other)
    return NotImplemented if not divisor else _step(lazy, "mul", 1.0 / divisor)


@_handles(Tensor.neg, Tensor.__neg__, torch.neg)
def _neg(lazy: LazyLogits) -> Any:
    recipe = lazy.recipe
    if not recipe.is_logprob:
        return _step(lazy, "mul", -1.0)
    steps = recipe.steps[:-1] if recipe.sign < 0.0 else (*recipe.steps, ("neg",))
    return _contiguous_step(lazy, torch.neg, steps=steps)


@_handles(Tensor.tanh, torch.tanh, functional.tanh)
def _tanh(lazy: LazyLogits) -> Any:
    return _step(lazy, "tanh")


@_handles(Tensor.add, Tensor.__add__, torch.add)
def _add(lazy: LazyLogits, row: Any) -> Any:
    """Add a frozen row [V] to the head's bias: BART's final_logits_bias."""
    recipe, V = lazy.recipe, lazy.shape[-1]
    if not isinstance(row, Tensor) or isinstance(row, LazyLogits) or recipe.steps:
        return NotImplemented
    if row.requires_grad or row.numel() != V or row.shape[-1:] != (V,) or row.dim() > lazy.dim():
        return NotImplemented
    if row.device != lazy.device or row.dtype != recipe.dtype:
        return NotImplemented
    (weight, bias), adapters = recipe.head.output
    row = row.clone()  # the caller may change it before the elements are computed
    shift = row.reshape(-1)
    output = Output(Base(weight, shift if bias is None else bias + shift), adapters)
    made = recipe.of_rows(Tensor.contiguous).with_head(output=output)
    return lazy.then(made, lambda z: z + row)


def _cast(lazy: LazyLogits, dtype: torch.dtype) -> Any:
    recipe = lazy.recipe
    if dtype == recipe.dtype:
        return lazy
    # A narrower dtype would round.
    if torch.promote_types(dtype, recipe.dtype) != dtype or recipe.is_logprob:
        return NotImplemented
    return _contiguous_step(lazy, lambda z: z.to(dtype), dtype=dtype)


@_handles(Tensor.float)
def _float(lazy: LazyLogits, **_: Any) -> Any:
    return _cast(lazy, torch.float32)


@_handles(Tensor.double)
def _double(lazy: LazyLogits, **_: Any) -> Any:
    return _cast(lazy, torch.float64)


@_handles(Tensor.to)
def _to(
    lazy: LazyLogits, *args: Any, dtype: Any = None, device: Any = None, non_blocking: Any = None
) -> Any:
    wanted = None
    for value in (*args, dtype, device):
        if isinstance(value, torch.dtype):
            wanted = value
        elif isinstance(value, Tensor):
            if value.device != lazy.device:
                return NotImplemented
            wanted = value.dtype
        elif isinstance(value, str | torch.device):
            if torch.device(value) != lazy.device:
                return NotImplemented
        elif value is not None and value is not False:
            return NotImplemented
    return lazy if wanted is None else _cast(lazy, wanted)


@_handles(Tensor.contiguous)
def _contiguous(lazy: LazyLogits) -> Any:
    has_all_columns = lazy.shape[-1] == lazy.call.recipe.shape[-1]
    return (_rows if has_all_columns else _contiguous_step)(lazy, Tensor.contiguous)


@_handles(Tensor.clone, torch.clone)
def _clone(lazy: LazyLogits, **options: Any) -> Tensor:
    return _contiguous_step(lazy, lambda z: z.clone(**options))


@_handles(Tensor.detach, torch.detach)
def _detach(lazy: LazyLogits) -> Tensor:
    made = lazy.recipe.of_tensors(Tensor.detach)
    return LazyLogits.make(lazy.call, made, lambda: lazy.elements().detach())


# Rows.


def _is_last(lazy: LazyLogits, dim: Any) -> bool:
    """Whether a function's dimension is the vocabulary."""
    return type(dim) is int and dim in (-1, lazy.dim() - 1)


def _row_dim(lazy: LazyLogits, dim: Any) -> int | None:
    """A function's dimension, counted from 0; None for the vocabulary or for an error."""
    n = lazy.dim()
    return dim % n if type(dim) is int and -n <= dim < n and dim % n != n - 1 else None


def _rows(lazy: LazyLogits, change: Change) -> Any:
    """A lazy tensor whose rows ``change`` has selected or reshaped."""
    made = lazy.recipe.of_rows(change)
    return lazy if made.head.x is lazy.recipe.head.x else lazy.then(made, change)


@_handles(Tensor.view)
def _view(lazy: LazyLogits, *shape: Any) -> Any:
    try:
        return _reshape(lazy, *shape, change=Tensor.view)
    except RuntimeError:  # torch then raises its own error
        return NotImplemented


@_handles(Tensor.reshape, torch.reshape)
def _reshape(lazy: LazyLogits, *shape: Any, change: Any = Tensor.reshape) -> Any:
    if len(shape) == 1 and isinstance(shape[0], tuple | list):
        shape = tuple(shape[0])
    if not shape or not all(type(size) is int for size in shape) or 0 in lazy.shape:
        return NotImplemented
    *lead, last = shape
    if last == -1 and -1 not in lead and torch.Size(lead).numel() == lazy.shape[:-1].numel():
        last = lazy.shape[-1]
    if last != lazy.shape[-1]:
        return NotImplemented
    return _rows(lazy, lambda x: change(x, *lead, x.shape[-1]))


@_handles(Tensor.flatten, torch.flatten)
def _flatten(lazy: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    has_rows_only = None not in (_row_dim(lazy, start_dim), _row_dim(lazy, end_dim))
    return _rows(lazy, lambda x: x.flatten(start_dim, end_dim)) if has_rows_only else NotImplemented


@_handles(Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(lazy: LazyLogits, dim: int) -> Any:
    place = dim if dim >= 0 else dim + lazy.dim() + 1
    if not 0 <= place < lazy.dim():
        return NotImplemented
    return _rows(lazy, lambda x: x.unsqueeze(place))


@_handles(Tensor.squeeze, torch.squeeze)
def _squeeze(lazy: LazyLogits, *dim: Any) -> Any:
    place = _row_dim(lazy, dim[0]) if len(dim) == 1 else None
    return NotImplemented if place is None else _rows(lazy, lambda x: x.squeeze(place))


@_handles(Tensor.__getitem__)
def _getitem(lazy: LazyLogits, index: Any) -> Any:
    """Rows, and the first columns: logits[..., :-1, :], logits[mask], logits[..., :V]."""
    index = index if isinstance(index, tuple) else (index,)
    # Copies, because the caller may change them before the elements are computed.
    index = tuple([each.clone() if isinstance(each, Tensor) else each for each in index])
    used = 0  # the number of dimensions that the entries stand for
    for each in index:
        if isinstance(each, LazyLogits | bool) or getattr(each, "dtype", None) is torch.uint8:
            return NotImplemented
        if isinstance(each, Tensor) and each.dtype is torch.bool:
            used += each.dim()
        elif isinstance(each, int | slice | Tensor):
            used += 1
        elif each is not None and each is not Ellipsis:
            return NotImplemented
    dots = [each is Ellipsis for each in index]
    if any(dots) and index[-1] is None:  # a new dimension after the columns
        return NotImplemented
    # The last entry selects columns if it follows "...", or if all dimensions have an entry.
    if used < lazy.dim() and not (any(dots) and not dots[-1]):
        return _rows(lazy, lambda x: x[index])
    *rows, last = index
    if not isinstance(last, slice) or last.step not in (None, 1) or last.start not in (None, 0):
        return NotImplemented
    recipe = lazy.recipe
    if last.stop is not None and last.stop != lazy.shape[-1]:
        (weight, bias), adapters = recipe.head.output
        cut = slice(last.stop)
        if isinstance(weight, Quantized) or recipe.is_logprob or not len(weight[cut]):
            return NotImplemented
        base = Base(weight[cut], None if bias is None else bias[cut])
        adapters = tuple([each._replace(lora_b=each.lora_b[cut]) for each in adapters])
        recipe = recipe.with_head(output=Output(base, adapters))
    made = recipe.of_rows(lambda x: x[(*rows, slice(None))])
    return lazy.then(made, lambda z: z[index])


@_handles(Tensor.split, torch.split)
def _split(lazy: LazyLogits, split_size: Any, dim: int = 0) -> Any:
    place = _row_dim(lazy, dim)
    if place is None or type(split_size) is not int or split_size < 1:
        return NotImplemented
    before, count = (slice(None),) * place, lazy.shape[place]
    starts = range(0, max(count, 1), split_size)  # one empty part if there are no rows
    return tuple(_getitem(lazy, (*before, slice(at, at + split_size))) for at in starts)


@_handles(Tensor.unbind, torch.unbind)
def _unbind(lazy: LazyLogits, dim: int = 0) -> Any:
    place = _row_dim(lazy, dim)
    if place is None:
        return NotImplemented
    before = (slice(None),) * place
    return tuple(_getitem(lazy, (*before, i)) for i in range(lazy.shape[place]))


@_handles(Tensor.__iter__)
def _iter(lazy: LazyLogits) -> Iterator[Any]:
    parts = _unbind(lazy)
    return iter(lazy.elements() if parts is NotImplemented else parts)


# Losses.


@_handles(functional.log_softmax, Tensor.log_softmax, torch.log_softmax)
def _log_softmax(
    lazy: LazyLogits, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Any:
    recipe = lazy.recipe
    if recipe.is_logprob or not _is_last(lazy, dim):
        return NotImplemented
    if dtype is None and not lazy.is_cpu and autocast_is_on(lazy.device.type):
        dtype = torch.float32  # a GPU's autocast runs log_softmax in float32
    wide = lazy if dtype is None else _cast(lazy, dtype)
    return wide if wide is NotImplemented else _step(wide, "log_softmax")


def _loss(
    lazy: LazyLogits,
    target: Any,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """The cross-entropy of these logits by a fused loss, or NotImplemented."""
    recipe = lazy.recipe
    settings = recipe.settings()
    if settings is None or isinstance(target, LazyLogits) or not isinstance(target, Tensor):
        return NotImplemented
    if (target.dtype, target.device, target.shape) != (torch.int64, lazy.device, lazy.shape[:-1]):
        return NotImplemented
    if reduction not in REDUCTIONS or not 0.0 <= label_smoothing <= 1.0:
        return NotImplemented  # torch raises its error
    lazy.call.check()
    dtype = torch.float32 if autocast_is_on(lazy.device.type) else recipe.dtype
    with autocast_off(lazy.device.type):
        head = recipe.head if lazy.requires_grad else recipe.of_tensors(Tensor.detach).head
        settings = settings._replace(label_smoothing=float(label_smoothing))
        loss = head_loss(head, target, settings, reduction, ignore_index)
    loss = loss.to(torch.promote_types(dtype, recipe.dtype))
    return LinkFunction.apply(loss, lazy) if loss.requires_grad else loss


def _loss_of_torch(function: Any, lazy: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """Handle torch's ``cross_entropy`` of logits, or its ``nll_loss`` of log-probabilities."""
    given = signature(function).bind(lazy, *args, **kwargs).arguments
    taken = {name: given.pop(name) for name in _TAKEN & given.keys()}
    # The other arguments are class weights and the old names of reductions.
    if any(given[name] is not None for name in given.keys() - {"input"}) or lazy.dim() > 2:
        return NotImplemented
    recipe, is_nll = lazy.recipe, function is functional.nll_loss
    if recipe.is_logprob != is_nll or (is_nll and recipe.sign < 0.0):
        return NotImplemented
    return _loss(lazy, **taken)


for _function in (functional.cross_entropy, functional.nll_loss):
    HANDLERS[_function] = partial(_loss_of_torch, _function)


@_handles(Tensor.gather, torch.gather)
def _gather(lazy: LazyLogits, dim: int, index: Any) -> Any:
    """log_softmax(…).gather(-1, index): the log-probability of each target."""
    recipe, shape = lazy.recipe, (*lazy.shape[:-1], 1)
    if not recipe.is_logprob or not _is_last(lazy, dim):
        return NotImplemented
    if not isinstance(index, Tensor) or index.shape != shape:
        return NotImplemented
    loss = _loss(lazy, index.squeeze(-1), "none", _NO_INDEX)
    if loss is NotImplemented:
        return loss
    return -recipe.sign * loss.unsqueeze(-1).to(recipe.dtype)


@_handles(Tensor.sum, torch.sum)
def _sum(lazy: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Σ log_softmax(…) over the vocabulary, as transformers' LabelSmoother computes it."""
    recipe = lazy.recipe
    (place,) = dim if isinstance(dim, tuple | list) and len(dim) == 1 else (dim,)
    if not recipe.is_logprob or not _is_last(lazy, place):
        return NotImplemented
    if dtype is not None and torch.promote_types(dtype, recipe.dtype) != dtype:
        return NotImplemented
    zeros = torch.zeros(lazy.shape[:-1], dtype=torch.int64, device=lazy.device)
    mean = _loss(lazy, zeros, "none", _NO_INDEX, label_smoothing=1.0)  # -Σ log p / V
    if mean is NotImplemented:
        return mean
    total = -recipe.sign * lazy.shape[-1] * (mean if dtype is None else mean.to(dtype))
    return total.unsqueeze(-1) if keepdim else total
