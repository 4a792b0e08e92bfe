"""A dense weight in place of a packed one, for as long as PEFT's adapters are merged into it.

The packed weight is kept and put back, so it has its exact bits again.  This file imports nothing
of PEFT.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..formats import vendor_of, weight_of
from ..layers.experts_module import dense_weight, packed_names
from ..layers.int8 import Int8Linear, dense_linear

_KEPT = "_fastlora_packed"  # an attribute of merged layers: the packed base, or weight of experts


def is_packed(layer: Any) -> bool:
    """Whether the weight that a layer of PEFT adapts is packed now."""
    name = getattr(layer, "parameter_name", None)
    if name is not None:
        return name in packed_names(layer.get_base_layer())
    return vendor_of(layer.base_layer) is not None


def make_dense(layer: Any, dtype: torch.dtype | None = None) -> None:
    """Replace the packed weight that the layer adapts by a dense one, until :func:`use_packed`.

    Without ``dtype``, experts' weights become float32; :func:`.dense_linear` explains the others.
    Raises ValueError if the weight can't be read.
    """
    name = getattr(layer, "parameter_name", None)
    if name is None:
        dense_layer = dense_linear(layer.base_layer, dtype)
        vars(layer)[_KEPT], layer.base_layer = layer.base_layer, dense_layer
        return
    base = layer.get_base_layer()
    dense = dense_weight(base, name, dtype or torch.float32)
    vars(layer)[_KEPT] = base._modules.pop(name, None) or base._parameters[name]
    base._parameters[name] = nn.Parameter(dense, requires_grad=False)


def use_packed(layer: Any) -> None:
    """Undo :func:`make_dense`.  An ``Int8Linear`` follows a cast and a move of the dense weight."""
    if not has_packed(layer):
        return
    kept, name = vars(layer).pop(_KEPT), getattr(layer, "parameter_name", None)
    if name is None:
        layer.base_layer = kept.to(layer.base_layer.weight) if type(kept) is Int8Linear else kept
    else:
        base = layer.get_base_layer()
        del base._parameters[name]
        setattr(base, name, kept)


def has_packed(layer: Any) -> bool:
    """Whether the layer's weight is dense in place of a packed one."""
    return _KEPT in vars(layer)


def forget_packed(layer: Any) -> None:
    """Let the weight stay dense."""
    vars(layer).pop(_KEPT, None)


class MergesDense:
    """A mixin for PEFT's layers: a packed base is dense from ``merge`` until ``unmerge``.

    The signatures are PEFT's, because diffusers looks for ``adapter_names`` in them.
    """

    dense_class: Any  # PEFT's class for layers with a dense base

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        with dense_base(self) as is_dense:
            merge = partial(self.dense_class.merge, self) if is_dense else super().merge  # type: ignore[misc]
            merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        with dense_base(self) as is_dense:
            unmerge = partial(self.dense_class.unmerge, self) if is_dense else super().unmerge  # type: ignore[misc]
            unmerge()


@contextmanager
def dense_base(layer: Any) -> Iterator[bool]:
    """Makes the layer's packed weight dense within the context, and longer if it is then merged.

    Yields whether the weight is dense in place of a packed one.  A weight that can't be read stays
    packed, and so does one of GPTQ-Model's, whose layer of PEFT can't be merged.
    """
    can = hasattr(layer, "get_delta_weight") and is_packed(layer)
    if can and not isinstance(weight_of(layer.get_base_layer()), str):
        make_dense(layer)
    try:
        yield has_packed(layer)
    finally:
        if not layer.merged:
            use_packed(layer)
