"""The functional API of many adapters: checks, autocast, the seeds, and the way to node or op."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout as torch_dropout
from torch.nn.functional import linear

from ..backends import find_backend
from ..mapping import AdapterMapping, as_indices, shares_of, sort_items
from ..projection import Adapter, Base, Output, check_switch, check_tensor, flatten, is_plain
from .autocast import autocast_inputs, autocast_is_on, autocast_off
from .functional import draw_seed, why_torch_refuses
from .multi_checks import Numbers, check_adapters, check_multi, numbers_of
from .multi_function import MultiCall, MultiLoRAFunction, run_multi
from .multi_library import call_registered
from .textbook import needs_textbook, textbook


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
    adapters, banks = check_adapters(lora_a, lora_b), isinstance(lora_a, Tensor)
    output = Output(Base(weight, bias), tuple([Adapter(*pair) for pair in adapters]))
    if not is_plain(x):
        check_tensor("x", x)
    device = x.device.type
    check_multi(x, output, adapter_indices, autocast_is_on(device))
    check_switch("training", training)
    numbers = numbers_of(scales, ranks, dropout, adapters)
    if not training:
        numbers = numbers._replace(dropouts=[0.0] * len(adapters))
    try:
        if needs_textbook(x):
            return _textbook(x, output, adapter_indices, numbers)
        if not autocast_is_on(device):
            return _call(x, output, adapter_indices, numbers, banks)
        x, (output,) = autocast_inputs(x, [output])
        with autocast_off(device):
            return _call(x, output, adapter_indices, numbers, banks)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:
        reason = why_torch_refuses(x, [output])
        if reason:
            raise TypeError(reason) from error
        raise


def _call(
    x: Tensor,
    output: Output[Tensor],
    indices: Tensor | Sequence[int] | AdapterMapping,
    numbers: Numbers,
    banks: bool,
) -> Tensor:
    count = len(output.adapters)
    seeds = None
    if (
        torch.compiler.is_compiling()
        or not is_plain(x)
        or x.is_meta  # then the indices may hold nothing
        or torch._C._len_torch_dispatch_stack()
    ):  # these go through the dispatcher
        order, ends = _sorted(indices, count)
        if any(numbers.dropouts):
            seeds = draw_seed(count, x.device)
        scales, ranks = numbers.as_tensors()
        return call_registered(x, output, order, ends, scales, ranks, numbers.dropouts, seeds)
    mapping = indices if isinstance(indices, AdapterMapping) else AdapterMapping(indices, count)
    mix = numbers.as_mix(output)
    call = MultiCall(mix, mapping.on(x.device), find_backend(device=x.device), banks)
    if any(mix.dropouts):
        seeds = draw_seed(count, x.device)
    inputs = [x, *flatten([output], [mix.layout])]
    if torch.is_grad_enabled():
        return MultiLoRAFunction.apply(seeds, call, *inputs)
    return run_multi(inputs, seeds, call)[0]


def _sorted(indices: Tensor | Sequence[int] | AdapterMapping, count: int) -> tuple[Tensor, Tensor]:
    """What a mapping holds, by torch's operations alone: a compiler merges those of all layers."""
    if isinstance(indices, AdapterMapping):
        return indices.order, indices.ends
    return sort_items(as_indices(indices), count)


def _textbook(
    x: Tensor,
    output: Output[Tensor],
    indices: Tensor | Sequence[int] | AdapterMapping,
    numbers: Numbers,
) -> Tensor:
    """By torch's own operations, which everything of torch's can follow."""
    base, adapters = output
    order, ends = _sorted(indices, len(adapters))
    mix, dtype = numbers.as_mix(output), x.dtype
    (y,) = textbook(x, [Output(base)], 0.0)
    if not y.numel():
        return y
    items, changes = x.reshape(len(order), -1, x.shape[-1]), y.reshape(len(order), -1, y.shape[-1])
    for i, own, _ in shares_of(order, ends, x.device):
        lora_a, lora_b, _ = adapters[i]
        rank = mix.ranks[i]
        at = torch.arange(len(order), device=x.device)[own]
        rows = torch_dropout(items[own], mix.dropouts[i])
        thin = linear(rows, mix.scales[i] * lora_a[:rank].to(dtype))
        change = linear(thin, lora_b[:, :rank].to(dtype))
        changes = changes.index_add(0, at, change)
    return changes.reshape(y.shape)
