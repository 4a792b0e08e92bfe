"""How a checked call runs: autocast, dispatch, the choice of backend, and the seeds of dropout."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from ..backends import Call, backend_name, find_backend
from ..checks import why_not_mixed
from ..projection import Layout, Output, flatten, layouts_of, named_tensors, packed_of, unflatten
from ..rows import Many, Rows
from .composite import of_few_rows, run_composite, torch_s_dropout
from .dispatch import (
    COMPOSITE,
    OP,
    autocast_dtype,
    autocast_inputs,
    autocast_is_on,
    autocast_off,
    is_few,
    path_of,
)
from .library import call_registered
from .node import LoRALinearFunction, run_forward

_SEEDS = -(2**63), 2**63 - 1  # from, to


def run_checked(
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    dropout: float,
    backend: str | None = None,
    rows: Rows | Many | None = None,
    captures: bool = False,
) -> tuple[tuple[Tensor, ...], Call | None]:
    """The outputs of a call that passed the checks; and the Call to reuse for equal eager calls.

    ``captures``: that is for calls of one kind only, so it may hold captured launches.
    """
    try:
        path, _ = path_of(x, rows is not None)
        if path == COMPOSITE and rows is None:  # which autocast's own operations follow
            return run_composite(x, outputs, torch_s_dropout(dropout)), None
        device = x.device.type
        if not autocast_is_on(device):
            return _run_on(path, x, outputs, dropout, backend, rows, captures)
        x, outputs = autocast_inputs(x, outputs)
        with autocast_off(device):
            return _run_on(path, x, outputs, dropout, backend, rows, captures)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:
        reason = why_torch_refuses(x, outputs)
        if reason:
            raise TypeError(reason) from error
        raise


def _run_on(
    path: str,
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    dropout: float,
    backend: str | None,
    rows: Rows | Many | None,
    captures: bool,
) -> tuple[tuple[Tensor, ...], Call | None]:
    layouts = layouts_of(outputs)
    if path == COMPOSITE:
        cut = rows.on(x.device, outputs[0].adapters) if isinstance(rows, Many) else rows
        return run_composite(x, outputs, torch_s_dropout(dropout, cut), cut), None
    if path == OP:
        name = "" if backend is None else backend_name(backend)
        seeds = _seeds(layouts, dropout, rows, x.device)
        return call_registered(x, outputs, dropout, seeds, name, rows), None
    if isinstance(rows, Many):
        rows = rows.on(x.device, outputs[0].adapters)
    elif rows is not None and x.device.type == "cpu":
        rows = rows._replace(shares=rows.shares_of(len(x)))  # it raises before anything is drawn
    name = backend_name(backend, x.device)
    few = rows is None and is_few(x, outputs, name)
    captured: dict | None = {} if captures and not few else None
    call = Call(layouts, dropout, find_backend(name), rows, captured, few)
    # Some may have outlived a transform of torch.func, which no cached call has.
    return run(unwrap_dead_wrappers((x, *flatten(outputs, layouts))), call), call


def run(inputs: Sequence[Tensor], call: Call) -> tuple[Tensor, ...]:
    """The outputs of an eager call that passed the checks: x, and its tensors laid flat."""
    x = inputs[0]
    if autocast_dtype(x) is not None:
        x, outputs = autocast_inputs(x, unflatten(inputs[1:], call.layouts))
        with autocast_off(x.device.type):
            return run((x, *flatten(outputs, call.layouts)), call)
    rows, seeds = call.rows, None
    if call.dropout or rows is not None:
        seeds = _seeds(call.layouts, call.dropout, rows, x.device)
    if call.is_few:
        return (of_few_rows(inputs, seeds, call),)
    if torch.is_grad_enabled():
        ends = None if rows is None or rows.shares_base else rows.ends
        return LoRALinearFunction.apply(seeds, ends, call, *inputs)
    return tuple(run_forward(inputs, seeds, call)[0])


def run_one(inputs: Sequence[Tensor], call: Call) -> Tensor:
    """As :func:`run`, of a call with one output."""
    return run(inputs, call)[0]


def _seeds(
    layouts: Sequence[Layout], dropout: float, rows: Rows | Many | None, device: torch.device
) -> Tensor | None:
    """One for each adapter of a call with dropout."""
    numbers = None if rows is None else rows.numbers
    count = sum([len(layout.scales) for layout in layouts])
    drops = bool(dropout) if numbers is None else any(numbers.dropouts)
    return draw_seed(count, device) if drops and count else None


def draw_seed(count: int, device: torch.device) -> Tensor:
    """One seed an adapter, from torch's generator, which checkpointing and users replay."""
    if torch.compiler.is_compiling():  # inductor has numbers of its own for a randint that it knows
        randint = torch.ops.aten.randint.low_generator
        return randint(*_SEEDS, (count,), generator=None, dtype=torch.int64, device=device)
    return torch.randint(*_SEEDS, (count,), dtype=torch.int64, device=device)


def why_torch_refuses(x: Tensor, outputs: Sequence[Output[Tensor]]) -> str:
    """Why torch can't work with these tensors, each right by itself; "" if that isn't known."""
    if x.is_nested:
        return (
            f"x is nested and has {x.dim()} dimensions, and torch.nn.functional.linear takes 3, "
            "[parts, rows, in_features]: make it contiguous, or jagged (layout=torch.jagged)"
        )
    named = [pair for output in outputs for pair in named_tensors(output)]
    named += [("a packed weight", tensor) for output in outputs for tensor in packed_of(output)]
    for name, tensor in (("x", x), *named):
        if tensor is None:
            continue
        reason = why_not_mixed(name, tensor, x)
        if reason:
            return reason
        if tensor.is_inference() and torch.is_grad_enabled():
            return (
                f"{name} was made in inference mode, and no backward can keep it: clone it, or "
                "call this in torch.no_grad()"
            )
    return ""
