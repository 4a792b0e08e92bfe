"""The functional API: public functions that check a call, in the caller's words, and run it.

A call whose key is cached (:mod:`.kinds`) passed the checks before, and skips them.
"""

from collections.abc import Sequence

from torch import Tensor

from ..backends import Call
from ..checks import adapters_of, check_call, check_many, check_tensor, numbers_of
from ..projection import Adapter, Base, Output, Projection, as_outputs, is_plain
from ..rows import AdapterMapping, Many, Rows
from .dispatch import autocast_is_on
from .kinds import call_of, key_of_outputs, remember
from .run import run, run_checked


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

    ``weight`` may be packed (docs/quantized.md): then it has no dtype to agree with x's, gets no
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
    of gradients (``create_graph=True``) are right, but not fast: they take the composite
    path.  Besides its arguments the call keeps only h [M, r], and 8 bytes of seed with dropout.
    (Up to 32 rows on a CPU, time is all that counts: with dropout such a call keeps the mask and
    the dropped x.)

    Nested tensors, the transforms of ``torch.func`` and forward-mode differentiation work as with
    ``torch.nn.functional.linear``: these calls take the composite path, with torch's own dropout.

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
    return linears(x, projections, dropout, training, backend)[0]


def linears(
    x: Tensor,
    projections: Sequence[Projection | Output],
    dropout: float,
    training: bool = True,
    backend: str | None = None,
) -> tuple[tuple[Tensor, ...], Call | None]:
    """As :func:`lora_linears`; and the call to reuse for eager calls of the same kind, or None."""
    key, inputs = key_of_outputs(x, projections, dropout, training, backend)
    call = call_of(key)
    if call is not None:
        return run(inputs, call), call
    if not is_plain(x):
        check_tensor("x", x)
    outputs = as_outputs(projections)
    check_call(x, outputs, dropout, training, autocast_is_on(x.device.type))
    p = dropout if training and any([output.adapters for output in outputs]) else 0.0
    ys, call = run_checked(x, outputs, p, backend, captures=key is not None)
    if key is not None and call is not None:
        remember(None, key, call)
    return ys, call


def grouped_lora_linear(
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
    ValueError on a CPU.  On a GPU the kernels don't look, and give anything.

    Dtypes, ``scale``, ``dropout`` (one mask [S, K]), ``training``, ``backend``, autocast, gradients
    of gradients and the errors are those of :func:`fastlora.lora_linear`.

    Beside its arguments the call keeps only h [S, r], and 8 bytes of seed with dropout.  Neither
    lora_b lora_a nor a gradient of a frozen weight is ever formed.  On a GPU nothing is read
    on the host; but where the weight or the bias trains, or the backend is ``torch``, the offsets
    are, once in a forward and once in a backward.

    Transforms of ``torch.func`` and forward-mode differentiation take the composite path, which
    reads the offsets on the host.  x can't be nested.
    """
    for name, tensor in (("x", x), ("offsets", offsets)):
        if not is_plain(tensor):
            check_tensor(name, tensor)
    output = Output(Base(weight, bias), (Adapter(lora_a, lora_b, scale),))
    check_call(x, [output], dropout, training, autocast_is_on(x.device.type), offsets)
    return run_checked(x, [output], dropout if training else 0.0, backend, Rows(offsets))[0][0]


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    adapter_indices: Tensor | Sequence[int] | AdapterMapping,
    *,
    bias: Tensor | None = None,
    scales: Tensor | Sequence[float],
    ranks: Tensor | Sequence[int] | None = None,
    dropout: float | Sequence[float] = 0.0,
    training: bool = True,
) -> Tensor:
    """Rows of one x, each through the LoRA layer of its own adapter, as one autograd node.

    y = x weightᵀ + scales[i] · drop_i(x) lora_a[i]ᵀ lora_b[i]ᵀ + bias, in the rows of adapter i

    Shapes: x [..., K] with any leading dimensions and strides; weight [N, K]; bias [N]; the result
    is [..., N].  The n adapters are banks, lora_a [n, r, K] and lora_b [n, N, r], or lists of n
    tensors, [r_i, K] and [N, r_i], whose ranks may differ.

    ``adapter_indices``, int32, has the shape of x's first dimensions: an index a row, or one a
    sequence.  -1 is for no adapter: the base layer alone.  Layers that share a batch should share
    one :class:`fastlora.AdapterMapping`, which sorts the rows once.

    ``scales`` [n] are alpha / r, or alpha / sqrt(r) for rsLoRA.  ``ranks`` [n]: of adapter i only
    the first ranks[i] rows of lora_a and columns of lora_b are read; the gradients behind are zero.
    Both are tensors or lists.  As tensors they recompile nothing when their numbers change; they
    are read on the host, so keep them on the CPU.

    ``dropout``: a probability for all adapters, or one for each.  An adapter's mask is one of its
    own rows, in their order: [rows, K].  Dtypes, ``training``, autocast, gradients of gradients and
    the errors are those of :func:`fastlora.lora_linear`; the weight may be packed, as there.

    Gradients reach the adapters that have rows.  One of a list without rows gets none; a bank's are
    zero there.  Besides its arguments the call keeps h [M, the largest r], and 8 bytes of seed an
    adapter with dropout.  The base product is one, of x as it lies.  An adapter whose rows lie
    together reads a view of x; else its rows are copied while it runs, or on a GPU looked up.

    Transforms of ``torch.func`` and forward-mode differentiation take the composite path.  x can't
    be nested.
    """
    output = Output(Base(weight, bias), adapters_of(lora_a, lora_b))
    if not is_plain(x):
        check_tensor("x", x)
    check_many(x, output, adapter_indices, training, autocast_is_on(x.device.type))
    numbers = numbers_of(scales, ranks, dropout, output.adapters)
    if not training:
        numbers = numbers._replace(dropouts=[0.0] * len(output.adapters))
    rows = Many(adapter_indices, numbers, isinstance(lora_a, Tensor))
    return run_checked(x, [output], 0.0, rows=rows)[0][0]
