"""Calls with few rows on a CPU run torch's operations instead of a node.

The time of such a call is almost only overhead, and within a training step it grows with the amount
of distinct code that runs (docs/cpu.md, "A layer's time").  Three paths use :func:`has_few_rows`:

* A layer with one output runs :func:`run_few_rows` under torch's autograd.
* A gated MLP runs layer by layer, because reading the module takes longer than its products.
* A mixed batch in evaluation runs PEFT's loop over adapters (:mod:`fastlora.peft.mixed`).

The Triton kernels have another limit.  Up to ``FEW_ROWS`` rows (kernels/config.py), a GPU's product
spends most of its time on loading the weight.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..backends.dropout import dropped_of_few_rows
from ..backends.products import are_wide, cast
from ..backends.protocol import Call
from ..call.projection import Output
from ..formats.format import Quantized

# The limit for a layer or a gated MLP.  16 rows with 256 features and dropout take 1.04 × the time
# of PEFT's layer, and 1.90 × with a node; without dropout 1.01 × and 1.29 × (``make bench
# ARGS="-k few-16x256"``; with 0 here, it times the node).  More rows gain less.  The cost without a
# node is that dropout saves its mask and the dropped x: 21 KiB instead of 17 for these 16 rows.
MOST_ROWS = 32
# The limit for a mixed batch.  It is higher, because this path runs only in evaluation: it saves
# nothing for a backward, and it doesn't read the n adapters, which takes longer than a node.
MOST_MIXED_ROWS = 64


def has_few_rows(x: Tensor, mixed: bool = False) -> bool:
    """Whether x is on a CPU, and has at least one row and no more rows than the limit."""
    most = MOST_MIXED_ROWS if mixed else MOST_ROWS
    return x.is_cpu and x.dim() > 0 and 0 < x.numel() <= most * x.shape[-1]


def skips_node(x: Tensor, weight: Tensor, backend: str | None, mixed: bool = False) -> bool:
    """Whether a call skips the node: x has few rows, and torch multiplies it fast by this weight.

    ``backend``: the name of the call's backend; None for the default on a CPU.
    """
    return (
        has_few_rows(x, mixed)
        and (backend or "torch") == "torch"
        and not isinstance(weight, Quantized)
        and not are_wide(x)
    )


def is_few(x: Tensor, outputs: Sequence[Output[Tensor]], backend: str) -> bool:
    """Whether a call with these outputs runs :func:`run_few_rows`; it must have one output."""
    (weight, _), adapters = outputs[0]
    if len(outputs) > 1 or not skips_node(x, weight, backend):
        return False
    # 16-bit adapters need the node, because torch would round h to 16 bits before scaling it.
    wide = torch.promote_types(x.dtype, torch.float32)
    return all([a.dtype == b.dtype == wide for a, b, _ in adapters])


def run_few_rows(inputs: Sequence[Tensor], seeds: Tensor | None, call: Call) -> Tensor:
    """The only output of a call with few rows; ``inputs`` are x and the flat tensors.

    For one row with 256 features, it takes 15 µs, and ``composite.run_composite`` takes 24 µs.
    """
    (x, weight, *rest), (layout,) = inputs, call.layouts
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    # take() returns the next tensor: the bias, if any, then each lora_a and its lora_b.
    take = iter(rest).__next__
    numbers = [] if seeds is None else seeds.tolist()
    y = linear(rows, weight, cast(take(), weight.dtype) if layout.has_bias else None)
    for i, scale in enumerate(layout.scales):
        lora_a, lora_b = take(), take()
        kept, factor = rows, float(scale)
        if numbers:  # masked_fill takes less time than where or native_dropout, both ways
            dropped = dropped_of_few_rows(numbers[i], rows.shape, call.dropout)
            kept, factor = rows.masked_fill(dropped, 0.0), factor / (1.0 - call.dropout)
        # x may have 16 bits, and the adapter 32.  addmm_'s backward would scale d lora_b [N, r].
        y.add_(linear(linear(kept.to(lora_a.dtype), lora_a), lora_b), alpha=factor)
    if x.dim() == 2:
        return y
    shape = *x.shape[:-1], y.shape[-1]
    # Not a view, because an in-place change of a view drops its hooks, and raises an error if the
    # view was made in no_grad.
    return torch.ops.aten._unsafe_view(y, shape) if y.requires_grad else y.resize_(shape)
