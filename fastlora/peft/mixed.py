"""Mixed batches: ``model(…, adapter_names=[…])`` with one name for each sample.

PEFT passes the names to every LoRA layer by hooks, which it removes at the end of the call.  A
fast layer reads the named adapters (:mod:`.read`) and runs all of them as one node
(:func:`mixed_forward`).

PEFT refuses names in training, although its code would be right except for two faults.  First,
activation checkpointing runs layers again in the backward, after PEFT has removed the hooks, so
these runs don't get the names.  Second, the hooks are never removed if a call fails.
:class:`LoraModel` allows training with names and corrects both faults.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel as PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..backends import asked_backend
from ..call.projection import is_plain
from ..call.rows import AdapterMapping, Share
from ..layers.classes import Fast, change_classes
from ..layers.guards import fits_weight
from ..layers.module_parts import why_patched
from ..layers.modules import has_sharded, some
from ..ops.dispatch import autocast_is_on
from ..ops.few_rows import skips_node
from ..ops.functional import multi_lora_linear
from .read import read

_NONE = "__base__"  # PEFT's name for no adapter
_CHECKPOINT = "_gradient_checkpointing_func"  # transformers' attribute with checkpoint()


def mixed_forward(layer: LoraLayer, x: Tensor, names: Sequence[str]) -> Tensor | None:
    """The output for x, where sample i has the adapter names[i]; None if PEFT's forward must run.

    A name may also stand for no adapter.
    """
    if layer.disable_adapters or layer.merged or not isinstance(names, list | tuple):
        return None
    if not isinstance(x, Tensor) or x.dim() < 2 or x.is_nested or len(x) != len(names):
        return None
    # Don't cache a mapping inside of a mode of torch: its tensors may be fake.
    in_mode = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    find = _mapping if in_mode else _kept_mapping
    used, mapping = find(tuple(names), tuple(layer._modules["lora_A"]._modules))
    if not used or why_patched(type(layer)):
        return None  # no sample has an adapter of this layer
    if not (layer.training or in_mode) and _is_few(layer, x):
        return _few_rows(layer, x, used, mapping.on(x.device).shares_of(len(x)))
    record = read(layer, used, mixed=True)
    if record.output is None or not fits_weight(x, record.output.base.weight):
        return None
    (weight, bias), adapters = record.output
    lora_a, lora_b, scales = zip(*adapters, strict=True)

    def run(x: Tensor) -> Tensor:
        return multi_lora_linear(
            x, weight, lora_a, lora_b, mapping, bias=bias, scales=scales, dropout=record.dropouts
        )

    (packed,) = record.packed
    return run(x) if packed is None else packed.call(x, run)


def _is_few(layer: LoraLayer, x: Tensor) -> bool:
    """Whether x has few rows that PEFT's loop multiplies fast: dense, and in one dtype."""
    weight = layer._modules["base_layer"]._parameters.get("weight")
    return (
        is_plain(x)
        and is_plain(weight)
        and weight.dtype == x.dtype
        and not autocast_is_on("cpu")
        and skips_node(x, weight, asked_backend(), mixed=True)
    )


def _few_rows(
    layer: LoraLayer, x: Tensor, names: Sequence[str], shares: Sequence[Share]
) -> Tensor | None:
    """The output by PEFT's loop over adapters, where ``shares`` holds the rows of each.

    It calls the modules and reads no record.  With few rows, reading n adapters takes longer than
    their products: 8 rows with 8 adapters, 512 × 512, take 0.6 ms, and 0.9 ms as a node (one thread
    of a CPU).  All layers use the same shares, so rows are sorted only once for each batch.
    """
    if any([name in layer.lora_variant for name in names]):
        return None
    y = layer.base_layer(x)
    for adapter, items, _ in shares:
        name = names[adapter]
        lora_a, lora_b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        rows = x[items].to(lora_a.weight.dtype)
        change = lora_b(lora_a(layer.lora_dropout[name](rows))) * scale
        # Not +=, which torch refuses for a slice of a whole view, and a linear layer's y is a view.
        y[items] = y[items] + change.to(y.dtype)
    return y


def _mapping(names: tuple[str, ...], adapters: tuple[str, ...]) -> tuple[list[str], AdapterMapping]:
    """The named adapters that a layer has, and the mapping from samples to these.

    It depends only on names, so layers with the same adapters share it, and it stays correct when
    adapters are replaced.
    """
    known = set(adapters)
    used = list(dict.fromkeys(n for n in names if n != _NONE and n in known))
    numbers = {name: i for i, name in enumerate(used)}
    return used, AdapterMapping([numbers.get(name, -1) for name in names], max(1, len(used)))


_kept_mapping = lru_cache(maxsize=64)(_mapping)


def mixed_notes(layers: Sequence[tuple[str, nn.Module]]) -> tuple[str, ...]:
    """Notes on layers with several adapters whose mixed batches run PEFT's forward."""
    reasons: dict[str, list[str]] = {}
    for name, layer in layers:
        if isinstance(layer, LoraLayer) and not has_sharded(layer):
            names = list(layer._modules["lora_A"]._modules)
            reason = read(layer, names, mixed=True).reason if len(names) > 1 else ""
            if reason:
                reasons.setdefault(reason, []).append(name)
    what = "mixed batches (adapter_names) stay PEFT's in"
    return tuple(f"{what} {len(n)}: {some(n)}: {reason}" for reason, n in reasons.items())


class LoraModel(Fast, PeftModel):
    """PEFT's model around the layers, with mixed batches in training and merges of packed layers.

    It has the name of PEFT's class, and no state of its own.
    """

    plain_class = PeftModel
    model: nn.Module
    training: bool  # nn.Module's

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **named: Any) -> None:
        """PEFT's, also over packed weights, whose new wrappers become fast."""
        from .inject import shown_if_packed
        from .layer import fast_classes

        with shown_if_packed(model, self.peft_config[adapter_name]) as is_packed:
            super().inject_adapter(model, adapter_name, *args, **named)
        if is_packed:
            change_classes(fast_classes(model.modules()))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        """PEFT's.  A transformers model then declares the layers that are still packed."""
        from ..packing.declarations import declared

        with declared(self.model):
            return super()._unload_and_optionally_merge(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        hooks = super()._enable_peft_forward_hooks(*args, **kwargs)
        with ExitStack() as stack:
            training: bool = self.training
            # PEFT refuses names if this attribute is true, and uses it for nothing else here.
            # Layers and dropouts have their own.
            self.training = training and names is None
            try:
                hooks.__enter__()
            finally:
                self.training = training
            # PEFT's context removes its hooks only if it isn't told of an error.
            stack.callback(hooks.__exit__, None, None, None)
            if names is not None and torch.is_grad_enabled():  # a backward may follow
                stack.enter_context(_carried(self, list(names)))
            yield


@contextmanager
def _carried(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, checkpointed functions get the names also when they run again in the backward.

    Each module's checkpointing function is replaced by one that wraps its argument in
    :func:`_named`.
    """
    before = {m: m.__dict__[_CHECKPOINT] for m in model.modules() if _CHECKPOINT in m.__dict__}
    for module, checkpoint in before.items():
        run = partial(_named, module, names)
        module.__dict__[_CHECKPOINT] = partial(_checkpointed, checkpoint, run)
    try:
        yield
    finally:
        for module, checkpoint in before.items():
            module.__dict__[_CHECKPOINT] = checkpoint


def _checkpointed(checkpoint: Callable, run: Callable, function: Callable, *rest, **named) -> Any:
    return checkpoint(partial(run, function), *rest, **named)


def _named(
    module: nn.Module, names: Sequence[str], function: Callable, *args: Any, **kwargs: Any
) -> Any:
    """function(…) with hooks that pass these names to every layer of the module."""

    def give(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"adapter_names": names}

    handles = [
        layer.register_forward_pre_hook(give, with_kwargs=True)
        for layer in module.modules()
        if isinstance(layer, LoraLayer | AuxiliaryTrainingWrapper)
    ]
    try:
        return function(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
