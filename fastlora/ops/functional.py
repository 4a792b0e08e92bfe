"""The functional API: public functions that check a call and run it.

Errors use the argument names of the called function.  A call with a cached key (:mod:`.kinds`)
skips the checks, because an equal call passed them.
"""

from collections.abc import Sequence

from torch import Tensor

from ..backends import Call
from ..call.checks import adapters_of, check_call, check_many, check_tensor, numbers_of
from ..call.projection import Adapter, Base, Output, Projection, as_outputs, is_plain
from ..call.rows import AdapterMapping, Many, Rows
from ..common.remembered import remember
from . import kinds
from .dispatch import NODE, autocast_is_on, path_of
from .kinds import key_of_outputs
from .node import run_known
from .run import run_new


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

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).

    Shapes: x [..., K]; weight [N, K]; lora_a [r, K]; lora_b [N, r]; bias [N]; the result is
    [..., N].  x may have any leading dimensions, also none or empty ones, and any strides.

    Dtypes: x and weight have one dtype: float16, bfloat16, float32 or float64.  Each of lora_a,
    lora_b and bias may have any of these dtypes; float32 beside a 16-bit x is usual.  They are cast
    when they are read, and their gradients have their own dtypes.  Under ``torch.autocast``, x and
    weight are cast as in ``nn.Linear``.

    ``weight`` may be packed (docs/quantized.md).  Then it needs no particular dtype and gets no
    gradient.  Its dense copy lives only during the call.

    ``scale`` is alpha / r, or alpha / sqrt(r) for rsLoRA.  ``dropout``, a probability in [0, 1),
    acts only on the adapter's input, and only if ``training`` is true.  Its seed comes from the
    torch generator of x's device.  The backward recomputes the mask from the seed.

    Gradients flow to x, lora_a, lora_b, weight and bias, if they require them.  Gradients of
    gradients (``create_graph=True``) are correct, but not fast, because they take the composite
    path.

    Saved for backward besides the arguments: h [M, r], where M is the number of rows, and with
    dropout a seed of 8 bytes.  On a CPU, a call of up to 32 rows with dropout saves the mask and
    the dropped x instead, because this is faster.

    Nested tensors, transforms of ``torch.func`` and forward-mode differentiation work as with
    ``torch.nn.functional.linear``.  Such calls take the composite path, with torch's own dropout.

    ``backend`` overrides :func:`fastlora.use_backend`.  Numbers must be an int or a float, not a
    bool; a numpy.float64 is a float.

    Raises ValueError for wrong shapes, devices or numbers, and TypeError for wrong dtypes, layouts
    or classes.
    """
    output = Output(Base(weight, bias), (Adapter(lora_a, lora_b, scale),))
    return linears(x, (output,), dropout, training, backend)[0][0]


def lora_linears(
    x: Tensor,
    projections: Sequence[Projection | Output],
    *,
    dropout: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Several projections of one x, such as q, k, v or gate, up, as one autograd node.

    x is saved once.  Each projection has its own dropout mask.  The result is a tuple with y
    [..., N] for each projection.  N and r may differ between them.

    Every y equals the result of :func:`lora_linear`, which also describes shapes, dtypes, gradients
    and errors.  dx is summed in the order of ``projections``.  A projection with weight None is a
    further adapter of the preceding projection, and adds to its y.
    """
    return linears(x, as_outputs(projections), dropout, training, backend)[0]


def linears(
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    dropout: float,
    training: bool = True,
    backend: str | None = None,
    seeds: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Call | None]:
    """The result of :func:`lora_linears`, and a Call to reuse for equal eager calls, or None.

    ``seeds``: of the adapters' dropout, int64; drawn if None.
    """
    # An x that isn't a tensor has no path; the checks below report it.
    path, key = path_of(x) if isinstance(x, Tensor) else None, None
    if path == NODE:
        key, inputs = key_of_outputs(x, outputs, dropout, training, backend)
        if (known := kinds.calls.get(key)) is not None:
            return run_known(inputs, known, seeds), known
    if not is_plain(x):
        check_tensor("x", x)
    check_call(x, outputs, dropout, training, autocast_is_on(x.device.type))
    p = dropout if training and any([output.adapters for output in outputs]) else 0.0
    captures = key is not None
    ys, call = run_new(x, outputs, p, backend, None, captures, seeds, path)
    if captures and call is not None:
        remember(kinds.calls, key, call)
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
    """A LoRA layer for each expert, on rows sorted by expert, as one autograd node.

    y = x weight[e]ᵀ + scale · drop(x) lora_a[e]ᵀ lora_b[e]ᵀ + bias[e], in the rows of expert e

    Shapes: x [S, K]; weight [E, N, K]; lora_a [E, r, K]; lora_b [E, N, r]; bias [E, N]; the result
    is [S, N].  x and weight may have any strides; weight may be a transposed [E, K, N].

    ``offsets``, int32 [E], holds the end of each expert's rows, as in
    ``torch.nn.functional.grouped_mm``.  Expert e has the rows from offsets[e - 1], or from 0 for
    expert 0, up to but not including offsets[e].  An expert may have no rows.  Rows after the last
    end belong to no expert: their y and dx are zero, whatever x holds.

    :func:`fastlora.lora_linear` describes dtypes, ``scale``, ``dropout``, ``training``,
    ``backend``, autocast, and the errors.  Dropout has one mask [S, K].  Gradients of gradients
    raise RuntimeError.
    Offsets that decrease or exceed S raise ValueError on a CPU.  On a GPU the kernels don't check
    them, and the result is undefined.

    Saved for backward besides the arguments: h [S, r], and with dropout a seed of 8 bytes.  Neither
    lora_b lora_a nor a gradient of a frozen weight is ever formed.  On a GPU, the host reads the
    offsets only if the weight or the bias trains, or if the backend is ``torch``: once in a forward
    and once in a backward.

    Transforms of ``torch.func`` and forward-mode differentiation take the composite path, which
    reads the offsets on the host.  x can't be nested.
    """
    for name, tensor in (("x", x), ("offsets", offsets)):
        if not is_plain(tensor):
            check_tensor(name, tensor)
    output = Output(Base(weight, bias), (Adapter(lora_a, lora_b, scale),))
    check_call(x, [output], dropout, training, autocast_is_on(x.device.type), offsets)
    return run_new(x, [output], dropout if training else 0.0, backend, Rows(offsets))[0][0]


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
    """A LoRA layer with a different adapter for each row of x, as one autograd node.

    y = x weightᵀ + scales[i] · drop_i(x) lora_a[i]ᵀ lora_b[i]ᵀ + bias, in the rows of adapter i

    Shapes: x [..., K]; weight [N, K]; bias [N]; the result is [..., N].  x may have any leading
    dimensions and strides.  The n adapters are either two banks, lora_a [n, r, K] and lora_b
    [n, N, r], or two lists of n tensors, [r_i, K] and [N, r_i].  In lists the ranks may differ.

    ``adapter_indices``, int32, has the shape of x's first dimensions: one index for each row, or
    one for each sequence.  -1 means no adapter, so that only the base layer acts.  Layers that
    share a batch should share one :class:`fastlora.AdapterMapping`, which sorts the rows once.

    ``scales`` [n] are alpha / r, or alpha / sqrt(r) for rsLoRA.  ``ranks`` [n] limit the adapters:
    only the first ranks[i] rows of lora_a[i] and columns of lora_b[i] are read, and the gradients
    of all others are zero.  Both are tensors or lists.  New values in tensors don't recompile a
    compiled call.  The host reads these tensors, so keep them on the CPU.

    ``dropout`` is one probability for all adapters, or a list with one for each.  The mask of an
    adapter is [its rows, K].  :func:`fastlora.lora_linear` describes dtypes, ``training``,
    autocast, packed weights, and the errors.  Gradients of gradients raise RuntimeError.

    An adapter without rows gets no gradient (None) in a list, and a zero gradient in a bank.

    Saved for backward besides the arguments: h [M, largest r], where M is the number of rows, and
    with dropout a seed of 8 bytes for each adapter.  All rows share one base product, and x is not
    sorted for it.  An adapter with contiguous rows reads a view of x.  Other rows are copied during
    the product, or on a GPU read by index.

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
    # 0.0, because ``numbers`` has a dropout for each adapter.
    return run_new(x, [output], 0.0, rows=rows)[0][0]
