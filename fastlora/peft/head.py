"""Output heads whose calls return lazy logits, so that the loss runs without logits.

A model's head is the module that ``get_output_embeddings()`` returns.  It becomes lazy when it gets
a class that :class:`LazyHead` and its own class make (:func:`make_lazy`).
:func:`give_back_heads` undoes this.

Each call decides whether its logits are lazy.  Calls aren't lazy when compiled or traced, nor for a
single row without gradients (generation).  :func:`why_not_lazy` gives the other reasons.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..backends import asked_backend
from ..common.other_packages import FULLY_SHARDED, derived_from
from ..layers.classes import change_classes, changed_classes, class_over
from ..layers.frozen import read_frozen
from ..layers.guards import LinearRecord, fits_weight
from ..layers.logits import tensors_of
from ..layers.logits_functions import lazy_logits
from ..layers.loss_seen import RAN, line_of_loss, watch
from ..layers.module_parts import is_hooked, under, why_patched
from ..layers.modules import embeddings_of, has_sharded, parts_of_fsdp, plain_name
from ..ops.dispatch import autocast_inputs, autocast_is_on, is_eager
from ..ops.loss import Head, head_of

_PEFT_COPIES = ("peft.utils.other", "ModulesToSaveWrapper")  # a module with copies that train
_MOBILEBERT = ("transformers.models.mobilebert", "MobileBertLMPredictionHead")
ASKED = "_fastlora_loss"  # in the __dict__ of a model whose head was made lazy


class LazyHead(nn.Module):
    """A mixin for linear layers and LoRA layers that are a model's head.

    It replaces ``__call__`` and not ``forward``, so that the layer keeps its own forward for code
    that inspects or calls it.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        head = None if kwargs or len(args) != 1 else _lazy_call(self, args[0])
        if head is None:
            return super().__call__(*args, **kwargs)
        before = _merged_in(self)
        record = partial(RAN.__setitem__, self) if torch.is_grad_enabled() else None
        return lazy_logits(head, lambda: _merged_in(self) == before, record)


def _merged_in(head: Any) -> list[str]:
    """The adapters that PEFT has merged into the head's weight.

    PEFT merges by writing to ``weight.data``, which doesn't increase the version counter.
    """
    return list(getattr(head, "merged_adapters", ()))


def make_lazy(model: nn.Module) -> dict[nn.Module, Any]:
    """Make the model's head lazy, or warn.  Returns the replaced classes."""
    if reason := why_no_lazy_head(model):
        text = f"loss=True has no effect, the loss computes logits: {reason}"
        warnings.warn(text, stacklevel=4)
        return {}
    classes = change_classes(lazy_classes(heads_of(model)))
    if classes:
        model.__dict__[ASKED] = True
    watch(classes)
    return classes


def give_back_heads(modules: Iterable[nn.Module]) -> None:
    """Give each lazy head the class that it had before."""
    modules = list(modules)
    change_classes(own_heads(modules))
    for module in modules:
        module.__dict__.pop(ASKED, None)


def own_heads(modules: Iterable[nn.Module]) -> dict[nn.Module, Any]:
    """For each lazy head, the class that it had before."""
    heads: Any = [module for module in modules if isinstance(module, LazyHead)]
    return {head: head.lazy_over for head in heads}


def why_no_lazy_head(model: nn.Module) -> str:
    """Why the model's head can never be lazy; "" if calls of it may be."""
    if any(derived_from(type(module), *_MOBILEBERT) for module in model.modules()):
        return "MobileBert reads the head's weight, and doesn't call the head"
    heads = heads_of(model)
    for head in heads:
        if type(head).__call__ not in (nn.Module.__call__, LazyHead.__call__):
            return f"the head is a {type(head).__name__}, which has a __call__ of its own"
        if reason := read_head(head).reason:
            return f"the head: {reason}"
    return "" if heads else "get_output_embeddings() of the model returns no module"


def lazy_classes(heads: Iterable[nn.Module]) -> dict[nn.Module, Any]:
    """The lazy class of each of these heads that isn't lazy yet."""
    classes = {}
    for head in heads:
        if not isinstance(head, LazyHead):
            kind: Any = under(type(head))
            classes[head] = class_over(LazyHead, kind, "")
            classes[head].plain_class = getattr(kind, "plain_class", kind)
            classes[head].lazy_over = kind  # the class without LazyHead
    return classes


@contextmanager
def lazy_head(model: nn.Module) -> Iterator[None]:
    """Inside, the model's head is lazy, if it can be."""
    with changed_classes({} if why_no_lazy_head(model) else lazy_classes(heads_of(model))):
        yield


def cover_head(model: nn.Module) -> str:
    """The report's line on each head; "" if it was never lazy."""
    heads, lines = heads_of(model), []
    for name, head in model.named_modules():
        # PEFT calls the original of a trained copy only while adapters are disabled.
        if head not in heads or name.endswith(".original_module"):
            continue
        if isinstance(head, LazyHead):
            reason = why_not_lazy(head, read_head(head))
        elif isinstance(getattr(head, "base_layer", None), LazyHead):
            reason = "its adapter was added later, call fastlora.optimize with loss=True again"
        elif ASKED in model.__dict__:
            reason = "it replaced the lazy head, call fastlora.optimize with loss=True again"
        else:
            continue
        name = plain_name(name)
        with_logits = f"loss with logits: {name}: {reason}"
        lines.append(with_logits if reason else line_of_loss(name, head, model))
    return "\n".join(lines)


def heads_of(model: nn.Module) -> list[nn.Module]:
    """The modules that compute the logits: the head, and copies of it that PEFT trains in full."""
    head: Any = embeddings_of(model, "output")
    if derived_from(type(head), *_PEFT_COPIES):
        return [head.original_module, *head.modules_to_save.values()]
    return [] if head is None else [head]


def read_head(head: Any) -> LinearRecord:
    """Read the tensors and numbers of a head's calls, or the reason why no call is lazy now."""
    # An optimized LoRA layer has the method.
    return head.read_head() if hasattr(head, "read_head") else read_frozen(head)


def why_not_lazy(head: nn.Module, record: LinearRecord) -> str:
    """Why a call of this head computes logits now; "" if the call can be lazy."""
    if record.reason:
        return record.reason
    if record.variant is not None:
        return "it is DoRA"
    if len(record.outputs[0].adapters) > 1:
        return "it has several active adapters"
    if any(packed is not None and packed.compute_dtype for packed in record.packed):
        return "its packed weight computes in a dtype of its own"
    if is_hooked(head) or why_patched(nn.Linear):
        return "its calls have a hook, or its forward was replaced"
    return "it is sharded: its weight is gone when the loss runs" if _is_sharded(head) else ""


def _is_sharded(head: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 shards the head's parameters."""
    if has_sharded(head) or any(hasattr(p, "ds_id") for p in head.parameters()):  # ZeRO-3's
        return True
    # FSDP1 replaces parameters by views in the modules' __dict__.
    inside = set(head.modules())
    if any(isinstance(value, Tensor) for each in inside for value in vars(each).values()):
        return True
    # FSDP2 may shard the head's parameters together with a module around the head.
    states = sys.modules.get("torch.distributed._composable_state")
    mapping = getattr(states, "_module_state_mapping", {})
    sharding = [module for module in mapping if derived_from(type(module), *FULLY_SHARDED)]
    infos = [part._module_info for module in sharding for part in parts_of_fsdp(module)]
    return any(not inside.isdisjoint((info.module, *info.shared_modules)) for info in infos)


def _lazy_call(module: nn.Module, x: Any) -> Head | None:
    """The record of the call with x if its logits can be lazy; None if the forward must run."""
    if torch.compiler.is_compiling() or nn_module._has_any_global_hook():
        return None
    if not isinstance(x, Tensor) or not is_eager(x) or x.dim() < 2 or not x.numel() or x.is_meta:
        return None
    if not torch.is_grad_enabled() and x.shape[-2] == 1:
        return None
    record = read_head(module)
    if why_not_lazy(module, record) or not fits_weight(x, record.outputs[0].base.weight):
        return None
    (output,), (p,) = record.outputs, record.dropouts
    if autocast_is_on(x.device.type):
        x, (output,) = autocast_inputs(x, [output])
    # Inference tensors have no version that tells whether lazy logits are still right.
    is_inference = [tensor.is_inference() for tensor in tensors_of(Head(x, output))]
    if torch.is_inference_mode_enabled() or any(is_inference):
        return None
    return head_of(x, output, p, asked_backend())
