"""Cross-entropy of a head, with an adapter or without, that never forms the logits [M, V].

One autograd node computes the loss and all gradients in its forward, chunk by chunk
(:mod:`fastlora.backends.loss`).  It saves the gradients: dx [M, K] and the gradients of the tensors
that train.  The backward multiplies them by the gradient of the loss.  With reduction "none" and a
weight, bias or adapter that trains, it saves its inputs instead, and the backward computes the
gradients.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..backends import backend_name, find_backend
from ..backends.dropout import DropoutMask
from ..backends.loss import loss_of_rows
from ..backends.protocol import LossSettings
from ..call.checks import check_call, check_tensor
from ..call.projection import (
    Adapter,
    Base,
    Output,
    flatten,
    is_plain,
    layouts_of,
    unflatten,
)
from ..common.text import shown
from ..common.values import is_number
from .composite import run_composite, torch_dropout
from .dispatch import autocast_inputs, autocast_is_on, autocast_off, is_eager
from .node import Function, as_matrix, draw_seed, refuse_by_torch_only

REDUCTIONS = ("mean", "sum", "none")


class Head(NamedTuple):
    """A call of a head, which is a linear layer before a loss: its x [..., K] and its tensors.

    With dropout, ``seeds`` is int64 [1].
    """

    x: Tensor
    output: Output[Tensor]
    dropout: float = 0.0
    backend: str | None = None
    seeds: Tensor | None = None

    def masks(self, rows: Tensor | None = None) -> list[DropoutMask | None]:
        """The mask of each adapter for these rows of x, int64 [count], or for all rows."""
        if self.seeds is None:
            return [None] * len(self.output.adapters)
        # A head has at most one adapter, hence one seed.
        mask = DropoutMask(self.seeds, as_matrix(self.x).shape, self.dropout)
        return [mask if rows is None else mask.of_rows(rows)]


def head_of(x: Tensor, output: Output[Tensor], dropout: float, backend: str | None = None) -> Head:
    """The record of a head's call with x.  With dropout, this draws the call's seed."""
    if not dropout or not output.adapters:
        return Head(x, output, 0.0, backend)
    return Head(x, output, dropout, backend, draw_seed(1, x.device))


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    training: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of a linear layer's output, without a tensor of the output's size.

    The logits are z = x weightᵀ + scale · drop(x) lora_aᵀ lora_bᵀ + bias, as in
    :func:`fastlora.lora_linear`; both of lora_a and lora_b are given, or neither.  With s =
    logit_scale · z, or softcap · tanh(logit_scale · z / softcap) if there is a ``softcap``, a row's
    loss is :func:`torch.nn.functional.cross_entropy` of s, plus z_loss · (log Σ exp s)².

    Shapes: x [..., K]; weight [V, K]; bias [V]; lora_a [r, K]; lora_b [V, r]; target [...], int64,
    with the classes 0 to V - 1, or ``ignore_index`` for rows that don't count.  The result has no
    dimensions, or with ``reduction`` "none" target's shape, where ignored rows are 0.

    Dtypes are the same as in :func:`fastlora.lora_linear`.  The softmax runs in float32 (float64
    for float64), and the result has this dtype.  ``weight`` may be packed.

    ``reduction`` "mean" divides by the number of rows that count; without any, the mean is NaN.

    Peak memory: a chunk of logits, 24 MiB on a CPU and 512 MiB on a GPU, and the gradients.  The
    node saves dx and the gradients of the tensors that train.  With "none", the backward computes
    the logits again if a weight, bias or adapter trains, because each row then has an upstream
    gradient of its own.  Gradients of gradients are an error.

    Calls that torch traces, compiles or transforms form the logits by torch's operations.

    Raises ValueError for shapes, devices or numbers that don't fit, on a CPU also for a class
    outside of 0 to V - 1, and TypeError for dtypes.  The name follows
    ``torch.nn.functional.linear_cross_entropy``.  Its ``linear_weight`` and ``linear_bias`` are
    ``weight`` and ``bias`` here, and there are no class weights.
    """
    output = Output(Base(weight, bias))
    if lora_a is not None and lora_b is not None:
        output = Output(output.base, (Adapter(lora_a, lora_b, scale),))
    elif lora_a is not None or lora_b is not None:
        absent = "lora_a" if lora_a is None else "lora_b"
        raise ValueError(f"{absent} is None, but an adapter has both: give lora_a and lora_b")
    settings = LossSettings(label_smoothing, softcap, logit_scale, z_loss)
    for name, tensor in (("x", x), ("target", target)):
        if not is_plain(tensor):
            check_tensor(name, tensor)
    check_call(x, [output], dropout, training, autocast_is_on(x.device.type))
    _check_loss(x, target, settings, reduction, ignore_index)
    p = dropout if training and output.adapters else 0.0
    # The node reads the target's values on the host.  A compiled or transformed call can't, nor
    # can meta tensors.
    if not is_eager(x) or x.is_meta or not is_plain(target):
        return _composite(Head(x, output, p), target, settings, reduction, ignore_index)
    if autocast_is_on(x.device.type):
        x, (output,) = autocast_inputs(x, [output])
    with autocast_off(x.device.type):
        head = head_of(x, output, p, backend)
        return head_loss(head, target, settings, reduction, ignore_index)


def token_logprobs(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    training: bool = True,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """log p(target) of each row, target's shape: for GRPO, DPO and distillation.

    p is the softmax of :func:`linear_cross_entropy`'s logits.  The arguments, dtypes, memory and
    errors are the same as there with ``reduction`` "none".  Ignored rows are 0.  If the head is
    frozen and has no adapter, the backward computes no product: it multiplies the saved dx.
    """
    return -linear_cross_entropy(
        x, weight, target, bias=bias, lora_a=lora_a, lora_b=lora_b, scale=scale, dropout=dropout,
        training=training, ignore_index=ignore_index, reduction="none", softcap=softcap,
        logit_scale=logit_scale, backend=backend,
    )  # fmt: skip


def _check_loss(
    x: Tensor, target: Tensor, settings: LossSettings, reduction: str, ignore_index: int
) -> None:
    if target.dtype != torch.int64:
        raise TypeError(
            f"target has dtype {target.dtype}, but must have int64, the class of each row: call "
            "target.long(); probabilities of classes aren't supported"
        )
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but x has {tuple(x.shape)}: target must be "
            f"{list(x.shape[:-1])}, a class for each row"
        )
    if target.device != x.device:
        raise ValueError(
            f"target is on {target.device}, but x is on {x.device}: move them to one device"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {shown(reduction)}, but must be one of {REDUCTIONS}")
    if type(ignore_index) is not int:
        raise ValueError(f"ignore_index is {shown(ignore_index)}, but must be a whole number")
    smoothing, softcap, logit_scale, z_loss = settings
    finite = {"label_smoothing": smoothing, "logit_scale": logit_scale, "z_loss": z_loss}
    for name, value in (finite | ({} if softcap is None else {"softcap": softcap})).items():
        # The comparison is also false for NaN.
        if not is_number(value) or not abs(value) < float("inf"):
            raise ValueError(f"{name} is {shown(value)}, but must be a finite number")
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {smoothing}, but must lie in [0, 1]")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"softcap is {softcap}, but must be positive, or None for no cap")


def _composite(
    head: Head, target: Tensor, settings: LossSettings, reduction: str, ignore_index: int
) -> Tensor:
    """The loss by torch's own operations, which form the logits."""
    # z [..., V]; below, s [M, V], t [M] and losses [M].
    (z,) = run_composite(head.x, [head.output], torch_dropout(head.dropout))
    smoothing, softcap, logit_scale, z_loss = settings
    # reshape, not flatten(0, -2), which a vector z doesn't have.
    z = z.reshape(-1, z.shape[-1])
    s = z.to(torch.promote_types(z.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    t = target.flatten()
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": smoothing}
    losses = functional.cross_entropy(s, t, reduction="none", **options)
    counts = t != ignore_index
    if z_loss:
        # cross_entropy gives ignored rows 0, so this term is also 0 there.
        losses = losses + torch.where(counts, z_loss * s.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


class _LossCall(NamedTuple):
    """The node's arguments that autograd doesn't track.  T rows of the target count."""

    head: Head  # its x is a matrix
    target: Tensor  # int64 [T]
    rows: Tensor | None  # int64 [T]: the row of x for each of them; None: all rows, in order
    settings: LossSettings
    reduction: str

    def losses(
        self, inputs: Sequence[Tensor], needs: Sequence[bool], upstream: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The losses [T], and the gradients of the inputs: dx [T, K] and the other gradients.

        The gradients belong to the sum of the losses, each times its number in ``upstream``.
        """
        x, *tensors = inputs
        layouts, rows = layouts_of([self.head.output]), self.rows
        backend = find_backend(backend_name(self.head.backend, x.device))
        # wanted: a bool for each tensor of the output, whether its gradient is needed.
        (output,), (wanted,) = unflatten(tensors, layouts), unflatten(needs[1:], layouts)
        # In the backward, self.head has an empty x, but the masks need the shape of this one.
        losses, dx, gradients = loss_of_rows(
            x if rows is None else x[rows], self.target, output,
            self.head._replace(x=x).masks(rows), self.settings, backend.row_loss, needs[0],
            wanted, upstream,
        )  # fmt: skip
        flat = [dx, *flatten([gradients], layouts)]
        # Without rows there is no chunk, so needed gradients of weight, bias and adapter are None.
        if not len(self.target):
            pairs = zip([x[:0], *tensors], needs, strict=True)
            flat = [torch.zeros_like(tensor) if need else None for tensor, need in pairs]
        return losses, flat

    def reduced(self, losses: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        total = losses.sum()
        # Without rows that count, the mean is 0 / 0 = NaN, as in torch.
        return total if self.reduction == "sum" else total / len(self.target)


def head_loss(
    head: Head,
    target: Tensor,
    settings: LossSettings,
    reduction: str,
    ignore_index: int,
    rows: Tensor | None = None,
    via: Tensor | None = None,
) -> Tensor:
    """The loss of a head's call without logits.  The caller has checked the arguments.

    ``rows``: for each row of the target, the row of x; None if they are all rows, in order.  The
    backward also reaches the node of ``via``, with None as its gradient.
    """
    x, t = as_matrix(head.x), target.flatten().contiguous()
    rows, counts = None if rows is None else rows.flatten(), t != ignore_index
    # kept: the places in the target of the rows that count, int64 [T]; None if all do.
    kept = None if bool(counts.all()) else counts.nonzero().squeeze(1)
    if kept is not None:
        t, rows = t[kept], kept if rows is None else rows[kept]
    V = head.output.base.weight.shape[0]
    if t.is_cpu and t.numel():
        low, high = (int(end) for end in t.aminmax())
        if low < 0 or high >= V:
            wrong = low if low < 0 else high
            raise ValueError(f"target has the class {wrong}, but the classes are 0 to {V - 1}")
    call = _LossCall(head._replace(x=x), t, rows, settings, reduction)
    inputs = x, *flatten([head.output], layouts_of([head.output]))
    # ctx.needs_input_grad ignores no_grad, so there the node would compute gradients for nothing.
    if torch.is_grad_enabled():
        loss = LinearCrossEntropyFunction.apply(call, via, *inputs)
    else:
        loss = call.reduced(call.losses(inputs, [False] * len(inputs))[0])
    if reduction != "none":
        return loss
    if kept is not None:
        # [T] to [M], with 0 in ignored rows.
        loss = loss.new_zeros(counts.shape).index_copy(0, kept, loss)
    return loss.view(target.shape)


class LinearCrossEntropyFunction(Function):
    """The loss as one node.  It saves the gradients, or the inputs if it computes them later."""

    @staticmethod
    def forward(ctx, call: _LossCall, via: Tensor | None, *inputs: Tensor) -> Tensor:
        needs = ctx.needs_input_grad[2:]
        # The gradients of weight, bias and adapter are sums over rows.  With "none", each row has a
        # factor in them that only the backward knows: its upstream gradient.
        later = call.reduction == "none" and any(needs[1:])
        losses, gradients = call.losses(inputs, [False] * len(needs) if later else needs)
        # The target is saved also, so that autograd notices a change of it.
        ctx.save_for_backward(*([*inputs, call.target] if later else gradients))
        # Without x, which would stay alive until the backward.
        no_x = inputs[0].new_empty(0, inputs[0].shape[1])
        ctx.call = call._replace(head=call.head._replace(x=no_x))
        ctx.later, ctx.like = later, [(tensor.shape, tensor.dtype) for tensor in inputs]
        return call.reduced(losses)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved_tensors
        refuse_by_torch_only([upstream], "the fused loss", "compute the logits and their loss")
        upstream = upstream.contiguous()
        if call.reduction == "mean":  # by 1 if no row counts: all gradients are 0
            upstream = upstream / max(len(call.target), 1)
        if ctx.later:
            *inputs, target = saved
            with autocast_off(upstream.device.type):
                call = call._replace(target=target)
                _, gradients = call.losses(inputs, ctx.needs_input_grad[2:], upstream)
        else:
            # With "none", only dx [T, K] was saved: a number of upstream [T] for each row.
            factor = upstream.unsqueeze(-1) if call.reduction == "none" else upstream
            gradients = [None if g is None else g * factor for g in saved]
        dx = gradients[0]
        if dx is not None and call.rows is not None:
            # [T, K] to [M, K].  A row of x may have several entries in ``rows``, so they are added.
            gradients[0] = dx.new_zeros(ctx.like[0][0]).index_add_(0, call.rows, dx)
        pairs = zip(gradients, ctx.like, strict=True)
        return None, None, *[None if g is None else g.to(dtype) for g, (_, dtype) in pairs]
