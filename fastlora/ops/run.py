"""The first call of a kind, after the checks: dispatch, autocast, and the choice of a backend.

Later calls of the kind skip this file.  They find their Call in a cache (:mod:`.kinds`), and run
:func:`.node.run_known`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from ..backends import Call, backend_name, find_backend
from ..call.checks import why_not_mixed
from ..call.projection import Output, flatten, layouts_of, named_tensors, packed_of
from ..call.rows import Many, Rows
from .composite import run_composite, torch_dropout
from .dispatch import COMPOSITE, OP, autocast_inputs, autocast_is_on, autocast_off, path_of
from .few_rows import is_few
from .library import call_registered
from .node import draw_seed, run_known


def run_new(
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    dropout: float,
    backend: str | None = None,
    rows: Rows | Many | None = None,
    captures: bool = False,
    seeds: Tensor | None = None,
    path: str | None = None,
) -> tuple[tuple[Tensor, ...], Call | None]:
    """The outputs of a call that passed the checks, and a Call to reuse for calls of equal kind.

    The Call is None on the composite path and for a registered op.  ``captures``: whether the
    caller reuses it for one kind only.  Then the Call may hold captured launches.
    ``seeds``: of the adapters' dropout; drawn if None, and always on the composite path.
    ``path``: the call's path, if the caller knows it.
    Raises TypeError, with the reason, for tensors that torch refuses to combine.
    """
    try:
        path = path or path_of(x, rows is not None)
        if path == COMPOSITE and rows is None:  # autocast acts on its operations itself
            return run_composite(x, outputs, torch_dropout(dropout)), None
        autocasts = autocast_is_on(x.device.type)
        if autocasts:
            x, outputs = autocast_inputs(x, outputs)
        with autocast_off(x.device.type):
            layouts = layouts_of(outputs)
            numbers = None if rows is None else rows.numbers
            drops = bool(dropout) if numbers is None else any(numbers.dropouts)
            count = sum([len(layout.scales) for layout in layouts]) if drops else 0
            if path == OP:
                # "": the op chooses a backend when it runs.
                name = "" if backend is None else backend_name(backend)
                if seeds is None and count:
                    seeds = draw_seed(count, x.device)
                return call_registered(x, outputs, dropout, seeds, name, rows), None
            if isinstance(rows, Many):
                rows = rows.on(x.device, outputs[0].adapters)
            if path == COMPOSITE:
                return run_composite(x, outputs, torch_dropout(dropout, rows), rows), None
            if rows is not None and x.is_cpu:
                # Here, because wrong ends must raise before seeds are drawn.
                rows = rows._replace(shares=rows.shares_of(len(x)))
            name = backend_name(backend, x.device)
            few = rows is None and is_few(x, outputs, name)
            # A call of few rows launches no kernels.
            captured: dict | None = {} if captures and not few else None
            call = Call(layouts, dropout, find_backend(name), rows, captured, few, count)
            # A tensor may come from a transform of torch.func that has ended.  Such a tensor has
            # no key, so a cached call has none.
            ys = run_known(unwrap_dead_wrappers((x, *flatten(outputs, layouts))), call, seeds)
            return ys, call._replace(autocasts=autocasts)
    # A RuntimeError also, but these tensors' classes don't cause it.
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:
        if reason := why_torch_refuses(x, outputs):
            raise TypeError(reason) from error
        raise


def why_torch_refuses(x: Tensor, outputs: Sequence[Output[Tensor]]) -> str:
    """Why torch can't combine these tensors, each valid by itself; "" if no reason is known."""
    if x.is_nested:
        return (
            f"x is nested and has {x.dim()} dimensions, but torch.nn.functional.linear takes 3, "
            "[parts, rows, in_features]: make it contiguous, or jagged (layout=torch.jagged)"
        )
    named = [pair for output in outputs for pair in named_tensors(output)]
    named += [("a packed weight", tensor) for output in outputs for tensor in packed_of(output)]
    for name, tensor in (("x", x), *named):
        if tensor is None:
            continue
        if reason := why_not_mixed(name, tensor, x):
            return reason
        if tensor.is_inference() and torch.is_grad_enabled():
            return (
                f"{name} was made in inference mode and can't be saved for backward: clone it, or "
                "call this in torch.no_grad()"
            )
    return ""
