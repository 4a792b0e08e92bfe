"""The functional API: checks, autocast, the seeds, and the way to the node or the op."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from ..backends import Settings, backend_name, find_backend
from ..projection import (
    Layout,
    Output,
    Projection,
    as_outputs,
    check_call,
    check_tensor,
    flatten,
    is_plain,
    layouts_of,
    named_tensors,
    packed_of,
    unflatten,
    why_not_mixed,
)
from .autocast import autocast_dtype, autocast_inputs, autocast_is_on, autocast_off
from .call import run_forward
from .few import few_rows
from .function import LoRALinearFunction
from .kinds import key_of, known, may_be_known, remember
from .library import call_registered
from .textbook import needs_textbook, textbook


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """y = x weightᵀ + scale · drop(x) lora_aᵀ lora_bᵀ + bias, as one autograd node.

    The formula is that of Hu et al., arXiv 2106.09685.

    ``weight`` may be packed (docs/quantised.md): then it has no dtype to agree with x's, gets no
    gradient, and no dense copy of it outlives the call.

    Shapes: x [..., K] with any leading dimensions, none and empty included, and any strides; weight
    [N, K]; lora_a [r, K]; lora_b [N, r]; bias [N]; the result is [..., N].

    Dtypes: float16, bfloat16, float32 or float64 for x and weight, which agree; the adapter and the
    bias may have any floating dtype (float32 beside a 16-bit x is usual): they are cast as they are
    read, and their gradients come back in their own dtype.  Under ``torch.autocast`` x and weight
    are cast as ``nn.Linear`` casts them.

    ``scale`` is alpha / r, or alpha / sqrt(r) for rsLoRA.  ``dropout`` in [0, 1) acts on the
    adapter's input alone, and only while ``training``; its mask is drawn from torch's generator of
    x's device, and made again in the backward.

    Gradients flow to x, lora_a, lora_b, and to weight and bias where they require them.  Gradients
    of gradients (``create_graph=True``) are right, but not fast: they go through the textbook
    formula.  Besides its arguments the call keeps only h [M, r], and 8 bytes of seed with dropout.
    (Up to 32 rows of float32 on a CPU, time is all that counts: with dropout such a call keeps the
    mask and the dropped x.)

    Nested tensors, the transforms of ``torch.func`` and forward-mode differentiation work as with
    ``torch.nn.functional.linear``: these calls run the textbook formula, with torch's own dropout.

    ``backend`` overrides :func:`fastlora.use_backend`.  Numbers are Python's: an int or a float, of
    which numpy.float64 is one, and no bool.  Raises ValueError for shapes, devices or numbers that
    don't fit, and TypeError for dtypes, layouts and classes.
    """
    projection = Projection(weight, lora_a, lora_b, bias, scale)
    return lora_linears(x, (projection,), dropout=dropout, training=training, backend=backend)[0]


def lora_linears(
    x: Tensor,
    projections: Sequence[Projection | Output],
    *,
    dropout: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Several projections of one x (q, k, v; gate, up): one node, x saved once, a mask each.

    Each output, its gradients and the errors are those of :func:`lora_linear`; out_features and r
    may differ between the projections.  dx is summed in the order given.  A projection whose weight
    is None is one more adapter of the layer before it, and has no output of its own.
    """
    key, settings = None, None
    if may_be_known(x):
        key, inputs = key_of(x, projections, dropout, training, backend)
        settings = known(key, inputs)
    try:
        if settings is not None:
            return run(inputs, settings)
        outputs: Sequence[Output[Tensor]] = _checked(x, projections, dropout, training)
        if needs_textbook(x):
            return textbook(x, outputs, dropout if training else 0.0)
        device = x.device.type
        if not autocast_is_on(device):
            ys, settings = _call(x, outputs, dropout, training, backend, key is not None)
        else:
            x, outputs = autocast_inputs(x, outputs)
            with autocast_off(device):
                ys, settings = _call(x, outputs, dropout, training, backend, key is not None)
        if key is not None and settings is not None:
            remember(key, unwrap_dead_wrappers((*inputs,)), settings)
        return ys
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:
        reason = why_torch_refuses(x, as_outputs(projections))
        if reason:
            raise TypeError(reason) from error
        raise


def _checked(
    x: Tensor, projections: Sequence[Projection | Output], dropout: float, training: bool
) -> list[Output[Tensor]]:
    if not is_plain(x):
        check_tensor("x", x)
    outputs = as_outputs(projections)
    check_call(x, outputs, dropout, training, autocast_is_on(x.device.type))
    return outputs


def _call(
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    dropout: float,
    training: bool,
    backend: str | None,
    keeps: bool,
) -> tuple[tuple[Tensor, ...], Settings | None]:
    """The outputs of a call that passed the checks; and what an eager one like it may run with.

    ``keeps``: the settings are for calls of this kind alone.
    """
    layouts = layouts_of(outputs)
    if not training or not any(layout.scales for layout in layouts):
        dropout = 0.0
    if (
        torch.compiler.is_compiling()
        or not is_plain(x)
        or torch._C._len_torch_dispatch_stack()  # selective checkpointing, a FLOP counter …
    ):  # these go through the dispatcher
        name = "" if backend is None else backend_name(backend)
        seeds = _seeds(layouts, dropout, x.device)
        return call_registered(x, outputs, dropout, seeds, name), None
    chosen = find_backend(backend, x.device)
    kept: dict | None = {} if keeps else None
    settings = Settings(layouts, dropout, chosen, kept, chosen.is_small(x, outputs))
    # Some may have outlived a transform of torch.func, which no known kind has.
    return run(unwrap_dead_wrappers((x, *flatten(outputs, layouts))), settings), settings


def run(inputs: Sequence[Tensor], settings: Settings) -> tuple[Tensor, ...]:
    """The outputs of an eager call that passed the checks: x, and its tensors laid flat."""
    if autocast_dtype(inputs[0]) is not None:
        x, *tensors = inputs
        x, outputs = autocast_inputs(x, unflatten(tensors, settings.layouts))
        with autocast_off(x.device.type):
            return run((x, *flatten(outputs, settings.layouts)), settings)
    seeds = _seeds(settings.layouts, settings.dropout, inputs[0].device)
    if settings.is_small:
        return few_rows(inputs, seeds, settings)
    if torch.is_grad_enabled():
        return LoRALinearFunction.apply(seeds, settings, *inputs)
    return tuple(run_forward(inputs, seeds, settings)[0])


def _seeds(layouts: Sequence[Layout], dropout: float, device: torch.device) -> Tensor | None:
    """One for each adapter of a call with dropout."""
    if not dropout:
        return None
    return draw_seed(sum([len(layout.scales) for layout in layouts]), device)


def draw_seed(count: int, device: torch.device) -> Tensor:
    """One seed an adapter, from torch's generator, which checkpointing and users replay."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), device=device)


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
