"""The records of a call: bases, adapters and outputs; and the flat list of their tensors."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import starmap
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # typing.NamedTuple of Python 3.10 can't be generic

from ..common.other_packages import PLAIN
from ..formats.format import Format, Quantized

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)
AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # autocast casts these

# A record holds one T for each tensor: the tensor, a bool (whether its gradient is needed), or its
# gradient.
T = TypeVar("T")


class Base(NamedTuple, Generic[T]):
    """A frozen linear layer: ``weight`` [N, K], in the dtype of x, and ``bias`` [N] or None.

    The weight may be packed (:class:`fastlora.formats.format.Quantized`); then x may have any
    dtype.
    """

    weight: T
    bias: T | None = None


class Adapter(NamedTuple, Generic[T]):
    """A low-rank product: ``lora_a`` [r, K] and ``lora_b`` [N, r], times a finite ``scale``."""

    lora_a: T
    lora_b: T
    scale: float = 1.0


class Output(NamedTuple, Generic[T]):
    """One output of a call: a base and its adapters.  A frozen layer has no adapter.

    y = x weightᵀ + bias + Σ scale · drop(x) lora_aᵀ lora_bᵀ, over the adapters
    """

    base: Base[T]
    adapters: tuple[Adapter[T], ...] = ()


class Projection(NamedTuple):
    """A frozen linear layer with an adapter: x weightᵀ + scale · drop(x) lora_aᵀ lora_bᵀ + bias.

    With in_features K, out_features N and rank r:

    * ``weight`` [N, K], in the dtype of x, or packed;
    * ``lora_a`` [r, K], ``lora_b`` [N, r] and ``bias`` [N] (or None), in float16, bfloat16, float32
      or float64: kernels cast them when they read them;
    * ``scale``, a finite number: alpha / r, or alpha / √r for rsLoRA.

    In a list, a projection with ``weight`` None is another adapter of the layer before it: its
    product is added to that layer's output, and it can't have a bias.

    The record checks nothing; :func:`fastlora.lora_linears` checks it together with x.
    """

    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None = None
    scale: float = 1.0


class Layout(NamedTuple):
    """An output without its tensors; it gives each tensor's position in a flat list."""

    has_bias: bool
    scales: tuple[float, ...]  # one for each adapter
    format: Format | None = None  # of a packed weight; None: the weight is dense
    weights: int = 1  # the number of the weight's tensors, which a packed weight has several of

    @property
    def bias_at(self) -> int | None:
        """The place of the bias in the flat list: after the weight's tensors."""
        return self.weights if self.has_bias else None


def layouts_of(outputs: Iterable[Output]) -> tuple[Layout, ...]:
    """The layout of each output."""
    layouts = []
    for (weight, bias), adapters in outputs:
        packed = (weight.format, len(weight.tensors)) if isinstance(weight, Quantized) else ()
        scales = tuple([adapter.scale for adapter in adapters])
        # The defaults of a Layout describe a dense weight.
        layouts.append(Layout(bias is not None, scales, *packed))
    return tuple(layouts)


def flatten(outputs: Iterable[Output[T]], layouts: Iterable[Layout]) -> list[T]:
    """All tensors in one list: for each output its weight, its bias if any, each lora_a and lora_b.

    A packed weight contributes all of its tensors.  autograd.Function and a registered op's schema
    take only a flat list, hence this function and :func:`unflatten`.
    """
    flat: list = []
    for (base, adapters), layout in zip(outputs, layouts, strict=True):
        if layout.format is None:
            # torch.compile of 2.11 and 2.12 can't extend a list by a named tuple, hence [*base].
            flat += [*base] if layout.has_bias else [base.weight]
        else:
            weight: Any = base.weight
            packed = isinstance(weight, Quantized)
            # A flag or a gradient stands for all tensors of the weight, so it is repeated.
            flat += weight.tensors if packed else [weight] * layout.weights
            flat += [base.bias] if layout.has_bias else []
        for adapter in adapters:
            flat += adapter[:2]
    return flat


def unflatten(flat: Sequence[T], layouts: Iterable[Layout]) -> list[Output[T]]:
    """The outputs of these layouts, from the list that :func:`flatten` returned."""
    outputs, at = [], 0  # at: the place in ``flat`` of the next tensor
    for has_bias, scales, format, weights in layouts:
        weight: Any = flat[at]
        # Packed weights have no gradients.  In a list of flags or of gradients, the entry of the
        # weight's first tensor stands for all of them.
        if format is not None and isinstance(weight, Tensor):
            parts: Any = flat[at : at + weights]
            weight = Quantized(format, tuple(parts))
        at += weights
        base, at = Base(weight, flat[at] if has_bias else None), at + has_bias
        end = at + 2 * len(scales)
        pairs = flat[at:end:2], flat[at + 1 : end : 2]  # every lora_a, every lora_b
        outputs.append(Output(base, tuple(map(Adapter, *pairs, scales))))
        at = end
    return outputs


def per_adapter(values: Sequence[T], outputs: Iterable[Output]) -> list[list[T]]:
    """A flat list with one value per adapter (an h, a seed), cut into one list per output."""
    lists, end = [], 0
    for output in outputs:
        first, end = end, end + len(output.adapters)
        lists.append(list(values[first:end]))
    return lists


def map_outputs(function: Callable[..., Any], first: Output, *others: Output) -> Output[Any]:
    """The output of what ``function`` gives for each place of these outputs: weight, bias, lora_a …

    It has the scales of the first one.
    """
    base = Base(*map(function, first.base, *[output.base for output in others]))
    pairs = zip(first.adapters, *[output.adapters for output in others], strict=True)
    # a[:2] leaves out the scale, which isn't a T.
    made = [(*map(function, *[a[:2] for a in pair]), pair[0].scale) for pair in pairs]
    return Output(base, tuple(starmap(Adapter, made)))


def reads_x(needs: Iterable[Output[bool]]) -> bool:
    """Whether a gradient of a weight or a lora_a is needed: both are products with x."""
    return any([base.weight or any([a.lora_a for a in adapters]) for base, adapters in needs])


def as_outputs(projections: Sequence[Projection | Output]) -> list[Output]:
    """The outputs that a list stands for.  Raises TypeError unless it is a list of projections."""
    if not isinstance(projections, list | tuple):
        raise TypeError(f"projections must be a list, not {type(projections).__name__}")
    outputs: list[Output] = []
    for projection in projections:
        if type(projection) is Projection:
            weight, lora_a, lora_b, bias, scale = projection
            adapter = Adapter(lora_a, lora_b, scale)
            # Without a layer before it, the None stays, and check_tensors raises.
            if weight is None and outputs:
                if bias is not None:
                    raise ValueError("a projection without a weight of its own can't have a bias")
                base, adapters = outputs.pop()
                outputs.append(Output(base, (*adapters, adapter)))
            else:
                outputs.append(Output(Base(weight, bias), (adapter,)))
        elif type(projection) is Output:
            base, adapters = projection
            records = type(base) is Base and type(adapters) is tuple
            if not records or any(type(adapter) is not Adapter for adapter in adapters):
                raise TypeError(
                    f"an Output has {type(base).__name__} and {type(adapters).__name__}, but must "
                    "be an Output of a Base and Adapters: Output(Base(…), (Adapter(…), …))"
                )
            outputs.append(projection)
        else:
            raise TypeError(
                f"projections has a {type(projection).__name__}, but must be a list of "
                "fastlora.Projection"
            )
    return outputs


def named_tensors(output: Output[T]) -> list[tuple[str, T | None]]:
    """The tensors of an output with their names, without a packed weight; the bias may be None."""
    (weight, bias), adapters = output
    named: list[tuple[str, T | None]] = []
    if not isinstance(weight, Quantized):
        named.append(("weight", weight))
    for lora_a, lora_b, _ in adapters:
        named += ("lora_a", lora_a), ("lora_b", lora_b)
    named.append(("bias", bias))
    return named


def packed_of(output: Output[Tensor]) -> tuple[Tensor, ...]:
    """The tensors of a packed weight; empty for a dense one."""
    weight = output.base.weight
    return weight.tensors if isinstance(weight, Quantized) else ()


def is_plain(tensor: Tensor) -> bool:
    """Whether its class is Tensor or Parameter, not a subclass such as FakeTensor or DTensor."""
    return type(tensor) in PLAIN


def facts_of(tensors: Iterable[Tensor]) -> tuple[Hashable, ...]:
    """The tensors' part of a cache key: everything that checks and launchers read but the values.

    The address modulo 16 is part of it, because kernels load 16 bytes at once from aligned
    addresses.  Raises ValueError for a nested tensor, which has no strides.
    """
    facts: list[Hashable] = []
    for t in tensors:
        if t.is_nested:
            raise ValueError("a nested tensor isn't of a known kind")
        facts += t.dtype, t.device, t.shape, t.stride(), t.data_ptr() & 15
        facts += type(t), t.requires_grad, t.is_neg(), t.is_inference()
    return tuple(facts)
