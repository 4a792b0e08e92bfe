"""The functional API of experts: checks, autocast, the seed, and the way to the node or the op."""

import torch
from torch import Tensor

from ..backends import Settings, backend_name, find_backend
from ..projection import Adapter, Base, Output, check_tensor, flatten, is_plain, layouts_of
from ..segments import Segments, check_grouped, parts_of
from .autocast import autocast_inputs, autocast_is_on, autocast_off
from .call import run_grouped
from .functional import draw_seed, why_torch_refuses
from .grouped_function import LoRAGroupedFunction
from .grouped_library import call_registered
from .textbook import needs_textbook, textbook


def lora_grouped(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Rows sorted by expert, each through its expert's LoRA layer, as one autograd node.

    y = x weight[e]ᵀ + scale · drop(x) lora_a[e]ᵀ lora_b[e]ᵀ + bias[e], in the rows of expert e

    Shapes: x [S, K], any strides; weight [E, N, K], any strides, the transpose of a contiguous
    [E, K, N] too; lora_a [E, r, K]; lora_b [E, N, r]; bias [E, N]; the result is [S, N].

    ``offsets``, int32 [E], has the end of each expert's rows, as in
    ``torch.nn.functional.grouped_mm``: expert e has rows offsets[e - 1] to offsets[e], the first
    one from row 0 on.  An expert may have no rows.  Rows behind the last end are nobody's: y is
    zero there, and so is dx, whatever x holds.  Offsets that decrease or lie beyond S are a
    ValueError on a CPU.  On a GPU they aren't looked at, and give anything.

    Dtypes, ``scale``, ``dropout`` (one mask [S, K]), ``training``, ``backend``, autocast, gradients
    of gradients and the errors are those of :func:`fastlora.lora_linear`.

    Beside its arguments the call keeps only h [S, r], and 8 bytes of seed with dropout.  Neither
    lora_b lora_a nor a gradient of a frozen weight is ever formed.  On a GPU nothing is read
    on the host; but where the weight or the bias trains, or the backend is ``torch``, the offsets
    are, once in a forward and once in a backward.

    Transforms of ``torch.func`` and forward-mode differentiation run the textbook formula, which
    reads the offsets on the host.  x can't be nested.
    """
    output = Output(Base(weight, bias), (Adapter(lora_a, lora_b, scale),))
    segments = Segments(offsets)
    if not is_plain(x):
        check_tensor("x", x)
    device = x.device.type
    check_grouped(x, output, segments, dropout, training, autocast_is_on(device))
    p = dropout if training else 0.0
    try:
        if needs_textbook(x):
            return _textbook(x, output, segments, p)
        if not autocast_is_on(device):
            return _call(x, output, segments, p, backend)
        x, (output,) = autocast_inputs(x, [output])
        with autocast_off(device):
            return _call(x, output, segments, p, backend)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:
        reason = why_torch_refuses(x, [output])
        if reason:
            raise TypeError(reason) from error
        raise


def _call(
    x: Tensor, output: Output[Tensor], segments: Segments, p: float, backend: str | None
) -> Tensor:
    if (
        torch.compiler.is_compiling()
        or not is_plain(x)
        or x.is_meta  # then the offsets hold nothing
        or torch._C._len_torch_dispatch_stack()
    ):  # these go through the dispatcher
        name = "" if backend is None else backend_name(backend)
        seeds = draw_seed(1, x.device) if p else None
        return call_registered(x, output, segments, p, seeds, name)
    layouts = layouts_of([output])
    settings = Settings(layouts, p, find_backend(backend, x.device))
    if x.device.type == "cpu":
        segments.slices(len(x))  # raises before anything is drawn
    seeds = draw_seed(1, x.device) if p else None
    inputs = [x, *flatten([output], layouts)]
    if torch.is_grad_enabled():
        return LoRAGroupedFunction.apply(seeds, settings, segments.ends, *inputs)
    return run_grouped(inputs, segments, seeds, settings)[0]


def _textbook(x: Tensor, output: Output[Tensor], segments: Segments, p: float) -> Tensor:
    """By torch's own operations, which everything of torch's can follow."""
    slices = segments.slices(len(x))
    pairs = zip(slices, parts_of(output), strict=True)
    ys = [textbook(x[rows], [part], p)[0] for rows, part in pairs]
    nobody = len(x) - slices[-1].stop
    return torch.cat([*ys, x.new_zeros(nobody, output.base.weight.shape[1])])
