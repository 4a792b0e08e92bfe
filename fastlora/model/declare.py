"""What a transformers model says of itself: which weights are packed, and that it can be trained.

Others ask it, and config.json has it.  ``transformers.Trainer`` asks the model's quantizer.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

from torch import nn

from ..foreign import derived_from
from ..formats import Vendor, vendor_of
from ..layers.experts import PackedWeight, packed_names, read_module
from ..layers.modules import plain_name

_RECORD = "_fastlora_declared"
# By these save_pretrained renames what it writes, and splits it.
_CONVERSIONS = "_weight_conversions"
_QUANTIZER = "hf_quantizer"
_ATTRIBUTES = (
    _QUANTIZER, "quantization_method", "is_quantized", "is_loaded_in_4bit",
    "is_loaded_in_8bit", _CONVERSIONS,
)  # fmt: skip
# Without a quant_method, so that from_pretrained refuses: it would make random experts.
_OURS = {"packed_by": "fastlora", "load_with": "fastlora.load_packed(model, folder)"}
# Where a config names the modules that aren't quantized; "modules_to_not_convert" in the others.
_SKIPPED = {"bitsandbytes": "llm_int8_skip_modules", "hqq": "skip_modules"}
_adapters_alone = ContextVar("_adapters_alone", default=False)


class _Declared(NamedTuple):
    """What a model says of its quantized layers, if it has some."""

    attributes: dict[str, Any]  # transformers' own, of the model
    config: Any  # its quantization_config, or None


@contextmanager
def declared(model: nn.Module, linears: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Let transformers models say which of their weights are packed, where that changes inside.

    ``linears``: the linear layers that fastlora packs there.

    Where nothing is packed, nothing of a quantizer is left.  Where layers of a quantizer are, its
    config names those that are dense.  Where fastlora has packed experts, save_pretrained writes
    the model's own names, which ``load_packed`` and ``load_state_dict`` read, and config.json has
    what makes ``from_pretrained`` refuse.
    """
    outers, before = list(_pretrained(model)), _packed(model)
    # What may fail does so before anything has changed.
    made = {outer: _said(outer, next(iter(linears), None)) for outer in outers}
    yield
    changed = _packed(model) != before
    for outer, said in made.items():
        # Of a GGUF file on a CPU transformers makes a dense model, and leaves it the quantizer.
        if changed or (said.config is not None and _method_of(said.config) == "gguf"):
            outer.__dict__[_RECORD] = said
            _declare(outer, said)


def other_vendor(model: nn.Module, vendor: Vendor | None) -> bool:
    """Whether a transformers model, whose config can say one, has layers of another vendor."""
    vendors = {vendor_of(each) for outer in _pretrained(model) for each in outer.modules()}
    return bool(vendors - {vendor, None})


def _said(outer: Any, linear: nn.Module | None) -> _Declared:
    """What the model says, or said; ``linear``: a layer that fastlora has packed for it."""
    said = outer.__dict__.get(_RECORD)
    if said is None:
        attributes = {name: outer.__dict__[name] for name in _ATTRIBUTES if name in outer.__dict__}
        quantized = getattr(outer.config, "quantization_config", None)
        said = _Declared(attributes, quantized if _QUANTIZER in attributes else None)
    if linear is None or said.config is not None:
        return said
    theirs: Any = import_module("transformers")
    if type(linear) is nn.Linear:
        quantization: Any = import_module("torchao.quantization")
        config = theirs.TorchAoConfig(quantization.Float8WeightOnlyConfig())
    else:
        how: Any = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        config = theirs.BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=outer.dtype)
    # It writes torchao's tensors, which save_pretrained can't without.
    make: Any = import_module("transformers.quantizers.auto").AutoHfQuantizer.from_config
    return _Declared(said.attributes | {_QUANTIZER: make(config)}, config)


def _declare(outer: Any, said: _Declared) -> None:
    attributes, config = dict(said.attributes), said.config
    ours = [isinstance(module, PackedWeight) for module in _packed(outer).values()]
    if all(ours):
        # A dense checkpoint is none of those that a quantizer's conversions are for.
        keeps = {_CONVERSIONS} & attributes.keys() if _QUANTIZER not in attributes else set()
        attributes, config = {name: attributes[name] for name in keeps}, None
    elif config is not None:
        config = _without(config, outer)
        attributes[_QUANTIZER] = copy(attributes[_QUANTIZER])
        attributes[_QUANTIZER].quantization_config = config
    if any(ours):
        attributes[_CONVERSIONS], config = [], dict(_OURS)
    _say(outer, attributes, config)


def _pretrained(model: nn.Module) -> Iterator[Any]:
    """transformers' models that are inside no other one."""
    inside = set[nn.Module]()
    for module in model.modules():
        known = derived_from(type(module), "transformers.modeling_utils", "PreTrainedModel")
        if known and module not in inside:
            inside |= set(module.modules())
            yield module


def _packed(model: nn.Module) -> dict[str, nn.Module]:
    """The packed weights of fastlora's, vendors' packed layers, and vendors' packed experts."""
    modules = {}
    for name, module in model.named_modules():
        vendor = vendor_of(module, getattr(module, "plain_class", None))  # also with an adapter
        is_theirs = vendor is not None and not getattr(module, "is_dense", False)
        is_experts = any(each in module._parameters for each in packed_names(module))
        if isinstance(module, PackedWeight) or is_theirs or is_experts:
            modules[plain_name(name)] = module
    return modules


def _without(config: Any, outer: nn.Module) -> Any:
    """The same quantization_config, by which the modules that are dense now stay so.

    Named, they take the place of what a quantizer leaves out by itself: the output head.
    """
    packed = _packed(outer)
    dense = {
        plain_name(name)
        for name, module in outer.named_modules()
        if isinstance(module, nn.Linear) or not (read_module(module).reason or not name)
    }
    key = _SKIPPED.get(_method_of(config), "modules_to_not_convert")
    config = copy(config)  # other models may have the same one
    setattr(config, key, sorted({*(getattr(config, key, None) or ()), *dense} - packed.keys()))
    return config


def _method_of(config: Any) -> str:
    return getattr(config.quant_method, "value", config.quant_method)


def _say(outer: Any, attributes: dict[str, Any], config: Any) -> None:
    for name in _ATTRIBUTES:
        outer.__dict__.pop(name, None)
    outer.__dict__.update(attributes)
    if config is not None:
        outer.config.quantization_config = config
    else:  # the other is transformers 4's, which can't write it without the first
        for name in ("quantization_config", "_pre_quantization_dtype"):
            outer.config.__dict__.pop(name, None)
    for module in outer.modules():
        about: Any = getattr(module, "config", None)
        if hasattr(about, "_is_quantized"):
            about._is_quantized = bool(attributes.get("is_quantized"))


@cache
def _trainable(kind: Any) -> Any:
    """The class of quantizers of this ``kind``, of models with adapters.

    ``transformers.Trainer`` takes a quantized model if it has PEFT's adapters, or if these two are
    true.  They are: fastlora's layers give gradients over any base that it reads.
    """

    class Trainable(kind):
        plain_class = kind

        @property
        def is_trainable(self) -> bool:
            check_savable(self)
            return True

        @property
        def is_qat_trainable(self) -> bool:
            return True

        def __reduce_ex__(self, protocol: Any) -> tuple:  # nobody can import this class
            return _blank, (kind,), vars(self)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Trainable, name, getattr(kind, name))
    return Trainable


def _blank(kind: Any) -> Any:
    return object.__new__(_trainable(kind))


def check_savable(quantizer: Any) -> None:
    """Raise ValueError if Trainer's first checkpoint, of the whole model, would fail."""
    safe = (True,) if signature(quantizer.is_serializable).parameters else ()  # transformers 4
    if not (_adapters_alone.get() or quantizer.is_serializable(*safe)):
        method = getattr(quantizer.quantization_config, "quant_method", "")
        raise ValueError(
            f"transformers can't save this quantized base ({getattr(method, 'value', method)}), "
            "which transformers.Trainer's checkpoints hold: use fastlora.trainer.AdapterTrainer, "
            "whose checkpoints hold the adapter alone"
        )


@contextmanager
def saving_adapters_alone() -> Iterator[None]:
    """A trainer made in here never saves the base."""
    token = _adapters_alone.set(True)
    try:
        yield
    finally:
        _adapters_alone.reset(token)


def admit_training(model: nn.Module) -> None:
    """Let the model's quantizer, if it has one, say that the model can be trained."""
    quantizer: Any = model.__dict__.get(_QUANTIZER)
    kind: Any = type(quantizer)
    if derived_from(kind, "transformers", "HfQuantizer") and not hasattr(kind, "plain_class"):
        quantizer.__class__ = _trainable(kind)


def give_back_quantizer(model: nn.Module) -> None:
    """What it was before :func:`admit_training`."""
    quantizer: Any = model.__dict__.get(_QUANTIZER)
    if hasattr(quantizer, "plain_class"):
        quantizer.__class__ = quantizer.plain_class
