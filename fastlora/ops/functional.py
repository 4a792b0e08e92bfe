"""The functional API: checks, autocast, the seeds, and the way to the node or the op."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Settings, backend_name, find_backend
from ..projection import Output, Projection, as_outputs, check_call, flatten, layouts_of
from .autocast import autocast_inputs, autocast_is_on, autocast_off
from .call import run_forward
from .function import LoRALinearFunction
from .library import call_registered

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(tensor: Tensor) -> bool:
    """Whether it is of torch's own class, and not a FakeTensor, a DTensor …"""
    return type(tensor) in _PLAIN


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

    Shapes: x [..., K] with any leading dimensions, none and empty included, and any strides; weight
    [N, K]; lora_a [r, K]; lora_b [N, r]; bias [N]; the result is [..., N].

    Dtypes: float16, bfloat16, float32 or float64 for x and weight, which agree; the adapter and the
    bias may have any floating dtype (float32 beside a 16-bit x is usual): they are cast as they are
    read, and their gradients come back in their own dtype.  Under ``torch.autocast`` x and weight
    are cast as ``nn.Linear`` casts them.

    ``scale`` is alpha / r, or alpha / sqrt(r) for rsLoRA.  ``dropout`` in [0, 1) acts on the
    adapter's input alone, and only while ``training``; its mask is drawn from torch's generator of
    x's device, and is not stored.

    Gradients flow to x, lora_a, lora_b, and to weight and bias where they require them.  Gradients
    of gradients (``create_graph=True``) are right, but not fast: they go through the textbook
    formula.  Besides its arguments the call keeps only h [M, r], and 8 bytes of seed with dropout.

    ``backend`` overrides :func:`fastlora.use_backend`.  Raises ValueError for shapes, devices or
    numbers that don't fit, and TypeError for dtypes.
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
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    outputs: Sequence[Output[Tensor]] = as_outputs(projections)
    if autocast_is_on(x.device.type):
        x, outputs = autocast_inputs(x, outputs)
        with autocast_off(x.device.type):
            return _call(x, outputs, dropout, training, backend)
    return _call(x, outputs, dropout, training, backend)


def _call(
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    dropout: float,
    training: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    check_call(x, outputs, dropout)
    seeds, count = None, sum([len(output.adapters) for output in outputs])
    if dropout and training and count:
        seeds = draw_seed(count, x.device)
    else:
        dropout = 0.0
    if (
        torch.compiler.is_compiling()
        or not is_plain(x)
        or torch._C._len_torch_dispatch_stack()  # selective checkpointing, a FLOP counter …
    ):  # these go through the dispatcher
        name = "" if backend is None else backend_name(backend)
        return call_registered(x, outputs, dropout, seeds, name)
    layouts = layouts_of(outputs)
    settings = Settings(layouts, dropout, find_backend(backend, x.device))
    inputs = [x, *flatten(outputs, layouts)]
    if torch.is_grad_enabled():
        return LoRALinearFunction.apply(seeds, settings, *inputs)
    return tuple(run_forward(inputs, seeds, settings)[0])


def draw_seed(count: int, device: torch.device) -> Tensor:
    """One seed an adapter, from torch's generator, which checkpointing and users replay."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), device=device)
