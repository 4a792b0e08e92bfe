"""Keeps a transformers model's attributes and config in step with its packed weights.

transformers and other libraries read from them which layers are quantized, and save_pretrained
writes the config.  Packing, merging and unmerging change which layers are packed.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

from ..common.other_packages import derived_from
from ..formats import Vendor, rotated_int8, vendor_of
from ..layers.experts_module import PackedWeight, packed_names, read_module
from ..layers.int8 import Int8Linear
from ..layers.modules import plain_name

_RECORD = "_fastlora_declared"
# save_pretrained renames and splits tensors by these rules.
_CONVERSIONS = "_weight_conversions"
QUANTIZER = "hf_quantizer"
_ATTRIBUTES = (
    QUANTIZER, "quantization_method", "is_quantized", "is_loaded_in_4bit",
    "is_loaded_in_8bit", _CONVERSIONS,
)  # fmt: skip
# The quantization_config of a model with weights packed by fastlora.  It has no quant_method, so
# from_pretrained refuses the checkpoint; otherwise it would initialize these weights randomly.
_OURS = {"packed_by": "fastlora", "load_with": "fastlora.load_packed(model, folder)"}
# The config's field that names dense modules, by quant_method; otherwise "modules_to_not_convert".
_SKIPPED = {"bitsandbytes": "llm_int8_skip_modules", "hqq": "skip_modules"}


class _Declared(NamedTuple):
    """A model's declarations about its quantized layers."""

    attributes: dict[str, Any]  # the attributes of the model that transformers sets, by name
    config: Any  # its quantization_config, or None


@contextmanager
def declared(model: nn.Module, linears: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Update the declarations of transformers models if the code inside packs or unpacks weights.

    ``linears``: linear layers that the code inside packs.

    * If no weight is packed afterwards, the quantizer and its config are removed.
    * If layers of a quantizer remain, its config names the dense layers.
    * If weights are packed by fastlora, save_pretrained keeps the model's parameter names, which
      ``load_packed`` and ``load_state_dict`` read, and config.json makes ``from_pretrained``
      refuse.
    """
    outers, before = list(_pretrained(model)), [*_packed(model).values()]
    # Everything that may fail is done here, before anything changes.
    declarations = {outer: _declaration(outer, next(iter(linears), None)) for outer in outers}
    yield
    changed = [*_packed(model).values()] != before
    for outer, said in declarations.items():
        # transformers reads a GGUF file into a dense model on a CPU, but leaves its quantizer.
        if changed or (said.config is not None and _method_of(said.config) == "gguf"):
            outer.__dict__[_RECORD] = said
            _declare(outer, said)


def other_vendor(model: nn.Module, vendor: Vendor | None) -> bool:
    """Whether a transformers model has layers of another vendor; its config can name only one."""
    modules = [module for outer in _pretrained(model) for module in outer.modules()]
    return any(is_vendors(module) and vendor_of(module) is not vendor for module in modules)


def is_vendors(module: nn.Module) -> bool:
    """Whether it is a vendor's packed linear layer, and not fastlora's own."""
    # A layer with an adapter has another class; its plain class is the vendor's.
    vendor = vendor_of(module, getattr(module, "plain_class", None))
    return vendor not in (None, rotated_int8)


def _declaration(outer: Any, linear: nn.Module | None) -> _Declared:
    """The model's declaration before its first change here, which unmerging restores.

    ``linear``: a layer that fastlora packs; for it, a declaration without a quantizer gets one.
    """
    said = outer.__dict__.get(_RECORD)
    if said is None:
        attributes = {name: outer.__dict__[name] for name in _ATTRIBUTES if name in outer.__dict__}
        quantized = getattr(outer.config, "quantization_config", None)
        said = _Declared(attributes, quantized if QUANTIZER in attributes else None)
    if linear is None or said.config is not None:
        return said
    theirs: Any = import_module("transformers")
    if type(linear) is nn.Linear:
        quantization: Any = import_module("torchao.quantization")
        config = theirs.TorchAoConfig(quantization.Float8WeightOnlyConfig())
    else:
        how: Any = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        config = theirs.BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=outer.dtype)
    # save_pretrained can write torchao's tensors only through the quantizer.
    make: Any = import_module("transformers.quantizers.auto").AutoHfQuantizer.from_config
    return _Declared(said.attributes | {QUANTIZER: make(config)}, config)


def _declare(outer: Any, said: _Declared) -> None:
    """Set the model's attributes and config according to its packed weights.

    All other attributes of a quantizer are removed.
    """
    attributes, config = dict(said.attributes), said.config
    packed = _packed(outer).values()
    ours = [isinstance(module, PackedWeight | Int8Linear) for module in packed]
    if all(ours):  # no vendor's layer is left
        # With a quantizer, the conversions were its own, and don't fit a dense checkpoint.
        keeps = {_CONVERSIONS} & attributes.keys() if QUANTIZER not in attributes else set()
        attributes, config = {name: attributes[name] for name in keeps}, None
    elif config is not None:
        config = _without(config, outer)
        attributes[QUANTIZER] = copy(attributes[QUANTIZER])
        attributes[QUANTIZER].quantization_config = config
    if any(ours):
        attributes[_CONVERSIONS], config = [], dict(_OURS)
    for name in _ATTRIBUTES:
        outer.__dict__.pop(name, None)
    outer.__dict__.update(attributes)
    if config is not None:
        outer.config.quantization_config = config
    else:  # transformers 4 also sets the second, and can't write a config that has only that one
        for name in ("quantization_config", "_pre_quantization_dtype"):
            outer.config.__dict__.pop(name, None)
    for module in outer.modules():
        about: Any = getattr(module, "config", None)
        if hasattr(about, "_is_quantized"):
            about._is_quantized = bool(attributes.get("is_quantized"))


def _pretrained(model: nn.Module) -> Iterator[Any]:
    """The outermost transformers models in this model."""
    inside = set[nn.Module]()
    for module in model.modules():
        known = derived_from(type(module), "transformers.modeling_utils", "PreTrainedModel")
        if known and module not in inside:
            inside |= set(module.modules())
            yield module


def _packed(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with packed weights: fastlora's, vendors' linear layers and vendors' experts."""
    modules = {}
    for name, module in model.named_modules():
        vendor = vendor_of(module, getattr(module, "plain_class", None))
        is_theirs = vendor is not None and not getattr(module, "is_dense", False)
        is_experts = any(weight in module._parameters for weight in packed_names(module))
        if isinstance(module, PackedWeight) or is_theirs or is_experts:
            modules[plain_name(name)] = module
    return modules


def _without(config: Any, outer: nn.Module) -> Any:
    """A copy of the quantization_config that names the modules which are dense now.

    A list of names replaces the quantizer's default, the output head, so the head is named if it is
    dense.
    """
    packed = _packed(outer)
    dense = {
        plain_name(name)
        for name, module in outer.named_modules()
        if isinstance(module, nn.Linear) or not (read_module(module).reason or not name)
    }
    key = _SKIPPED.get(_method_of(config), "modules_to_not_convert")
    config = copy(config)  # another model may share the object
    setattr(config, key, sorted({*(getattr(config, key, None) or ()), *dense} - packed.keys()))
    return config


def _method_of(config: Any) -> str:
    return getattr(config.quant_method, "value", config.quant_method)
