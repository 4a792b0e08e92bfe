"""The functional API: thin doors that check a call, in the caller's words, and build its record.

A call of a kind that passed the checks needs no second look.  A kind is everything that the checks,
the choice of backend and the launches of a forward look at: whoever adds a check adds what it looks
at to :func:`key_of`.  A module's calls needn't come here: what was read of it is kept with its
calls (:mod:`fastlora.layers.reading`).
"""

from collections.abc import Hashable, Sequence
from threading import Lock
from typing import Any

from torch import Tensor

from ..backends import Call, asked_backend
from ..checks import adapters_of, check_call, check_many, check_tensor, numbers_of
from ..formats.format import Quantized
from ..projection import Adapter, Base, Output, Projection, as_outputs, facts_of, is_plain
from ..rows import AdapterMapping, Many, Rows
from .door import run, through
from .way import autocast_dtype, autocast_is_on, is_ordinary

_MOST_KINDS = 1024
_changes = Lock()  # to find the oldest, no other thread may change them
_known: dict[Hashable, Any] = {}


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
    of gradients (``create_graph=True``) are right, but not fast: they go through the textbook
    formula.  Besides its arguments the call keeps only h [M, r], and 8 bytes of seed with dropout.
    (Up to 32 rows on a CPU, time is all that counts: with dropout such a call keeps the mask and
    the dropped x.)

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
    return linears(x, projections, dropout, training, backend)[0]


def linears(
    x: Tensor,
    projections: Sequence[Projection | Output],
    dropout: float,
    training: bool = True,
    backend: str | None = None,
) -> tuple[tuple[Tensor, ...], Call | None]:
    """As :func:`lora_linears`; and what an eager call of this kind is, if that is known now."""
    key, inputs = key_of(x, projections, dropout, training, backend)
    call = call_known_by(key)
    if call is not None:
        return run(inputs, call), call
    if not is_plain(x):
        check_tensor("x", x)
    outputs = as_outputs(projections)
    check_call(x, outputs, dropout, training, autocast_is_on(x.device.type))
    p = dropout if training and any([output.adapters for output in outputs]) else 0.0
    ys, call = through(x, outputs, p, backend, keeps=key is not None)
    if key is not None and call is not None:
        remember(key, call)
    return ys, call


def key_of(
    x: Tensor,
    projections: Sequence[Projection | Output],
    dropout: Hashable,
    training: bool = True,
    backend: str | None = None,
) -> tuple[Hashable, list[Tensor]]:
    """The key of an eager call, and its tensors laid flat, x first; None: it has to be checked.

    Two calls with the same key are right or wrong both.  ``dropout``: of a call that is more than
    linear layers, a tuple of all that it hangs on beside them.
    """
    if not is_ordinary(x) or type(projections) not in (list, tuple):
        return None, []
    inputs, switch = [x], training is True or training is False
    rest: list[Any] = [asked_backend(backend), dropout, type(dropout), switch, training]
    try:
        for projection in projections:
            rest.append(type(projection))
            if isinstance(projection, Projection):
                weight, lora_a, lora_b, bias, scale = projection
                rest += weight is None, bias is None, scale, type(scale)
                if isinstance(weight, Quantized):
                    rest.append(weight.format)
                    inputs += weight.tensors
                    weight = None
                inputs += [each for each in (weight, bias) if each is not None]
                inputs += lora_a, lora_b
            else:
                base, adapters = projection
                weight, bias = base
                rest += type(base), type(adapters), len(adapters), bias is None
                if isinstance(weight, Quantized):
                    rest.append(weight.format)
                    inputs += weight.tensors if bias is None else (*weight.tensors, bias)
                else:
                    inputs += (weight,) if bias is None else (weight, bias)
                for lora_a, lora_b, scale in adapters:
                    rest += scale, type(scale)
                    inputs += lora_a, lora_b
        key = autocast_dtype(x), *rest, *map(facts_of, inputs)
        hash(key)
        return key, inputs
    except Exception:  # whatever it is, the checks say it better
        return None, []


def call_known_by(key: Hashable) -> Any:
    """The record of a call that passed the checks before; None: there is none."""
    return None if key is None else _known.get(key)


def remember(key: Hashable, call: Any) -> None:
    """The record of a call that passed the checks; the oldest kinds are forgotten."""
    with _changes:
        while len(_known) >= _MOST_KINDS and key not in _known:
            del _known[next(iter(_known))]
        _known[key] = call


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

    Transforms of ``torch.func`` and forward-mode differentiation run the textbook formula, which
    reads the offsets on the host.  x can't be nested.
    """
    for name, tensor in (("x", x), ("offsets", offsets)):
        if not is_plain(tensor):
            check_tensor(name, tensor)
    output = Output(Base(weight, bias), (Adapter(lora_a, lora_b, scale),))
    check_call(x, [output], dropout, training, autocast_is_on(x.device.type), offsets)
    return through(x, [output], dropout if training else 0.0, backend, Rows(offsets))[0][0]


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

    Transforms of ``torch.func`` and forward-mode differentiation run the textbook formula.  x can't
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
    return through(x, [output], 0.0, rows=rows)[0][0]
