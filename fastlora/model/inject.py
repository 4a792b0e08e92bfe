"""Model surgery: linear layers take adapters in place, and are plain again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from ..foreign import DDP, FSDP, FULLY_SHARDED
from ..formats import bitsandbytes, vendor_of
from ..layers import mlp
from ..layers.adapted import Adapted
from ..layers.expert_layer import LoRAExperts
from ..layers.experts import packed_names
from ..layers.frozen import give_back_frozen, take_frozen
from ..layers.linear import adapted_class
from ..layers.members import class_over, plain_class_of
from ..layers.modules import called, ids_outside, inside_of, lora_layers, some, unwrap
from ..projection import check_switch
from .adapter_config import as_config
from .config import LoRAConfig, kind_of
from .declare import admit_training, give_back_quantizer
from .loading import watch_loading
from .targets import (
    check_places,
    find_targets,
    modules_to_save,
    numbers_in,
    trained_biases,
    warn_of_passed_over,
)

RECORD = "_fastlora"


@dataclass(frozen=True)
class Injection:
    """What apply_lora did to a model; kept in the model's ``__dict__`` as ``_fastlora``."""

    config: LoRAConfig
    layers: tuple[str, ...]  # names of the adapted layers, and of experts' weights
    saved_modules: tuple[str, ...]  # names of the modules that train in full
    trained_before: frozenset[str]  # names of the parameters that required gradients before
    untied: tuple["Untied", ...]
    loading: RemovableHandle  # of what watches load_state_dict
    has_embeddings: bool = False  # a file brought other embeddings than the base model's


class Untied(NamedTuple):
    """A tied parameter of a module that trains in full, and the copy that took its place there."""

    module: nn.Module
    name: str
    original: nn.Parameter
    copy: nn.Parameter


def apply_lora(
    model: nn.Module,
    config: LoRAConfig,
    *,
    autocast_adapter_dtype: bool = True,
    frozen: bool = True,
    blocks: bool = True,
) -> nn.Module:
    """Give every layer that ``config`` targets an adapter, freeze the rest, return the model.

    ``config`` may be a ``peft.LoraConfig``, too.

    ``torch.nn.Linear`` becomes :class:`fastlora.LoRALinear`; a subclass with the same forward, and
    transformers' ``FalconLinear`` and ``Conv1D``, a class that is a LoRA layer and what it was; so
    do vendors' quantized layers (docs/quantized.md).
    The layers change class in place: their identity, hooks, names and state-dict keys stay, and two
    keys are added to each, ``lora_A`` and ``lora_B``.  Only adapters, and what ``config.bias`` and
    ``config.modules_to_save`` name, require gradients afterwards.  Adapters of a float16 or
    bfloat16 layer are float32, as PEFT makes them; ``autocast_adapter_dtype=False`` keeps the
    layer's dtype.  An experts module whose weights are in ``config.target_parameters`` becomes a
    :class:`LoRAExperts` in the same way (docs/experts.md).

    On a CPU that multiplies 16 bits slowly, every other frozen ``torch.nn.Linear`` of 16 bits (the
    head …) becomes fast as well, with nothing else changed; ``frozen=False`` leaves them alone.
    :func:`remove_lora` gives them back.

    Gated MLPs of transformers' models become blocks, which keep less for the backward
    (docs/blocks.md); ``blocks=False`` leaves them alone.  :func:`remove_lora` gives them back.

    Raises ValueError, and leaves the model as it was: for a model that has adapters already, a
    target that matches nothing (the message lists what could), a target that can't be a base
    (docs/model.md), or a field of PEFT's config that fastlora hasn't; and TypeError for what is no
    model or no config.  Warns of what ``"all-linear"`` left out: experts' parameters, linear layers
    of other classes.
    """
    check_model(model)
    check_switch("autocast_adapter_dtype", autocast_adapter_dtype)
    check_switch("frozen", frozen)
    check_switch("blocks", blocks)
    config = as_config(config)
    check_plain(unwrap(model))
    fast: Any = {"frozen": frozen, "blocks": blocks}
    inject(model, config, every_name=True, wide_adapters=autocast_adapter_dtype, **fast)
    return model


def check_model(model: nn.Module) -> None:
    """Raise TypeError unless this is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {kind_of(model)}, but must be a torch.nn.Module")


def check_plain(model: nn.Module) -> None:
    """Raise ValueError if a layer has an adapter, fastlora's or PEFT's."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted) and module.adapter_names():
            raise ValueError(
                f"{called(name)} has an adapter already: call fastlora.remove_lora(model) first"
            )
        if hasattr(module, "lora_A"):
            raise ValueError(
                f"{called(name)} has a PEFT adapter: merge it or unload it with PEFT first"
            )


def inject(
    model: nn.Module,
    config: LoRAConfig,
    *,
    every_name: bool = False,
    wide_adapters: bool = True,
    frozen: bool = True,
    blocks: bool = True,
) -> Injection:
    """apply_lora, for a config from a file too, whose names need not all occur in this model."""
    held, model = inside_of(model, FULLY_SHARDED, FSDP, DDP), unwrap(model)
    saved = modules_to_save(model, config, every_name=every_name)
    targets = find_targets(model, config, saved, every_name=every_name)
    for name, target in targets.items():
        if target.module in held:
            raise ValueError(
                f"{called(name)} can't take an adapter: FSDP or DDP has it already, and would "
                "leave the adapter out: call apply_lora first"
            )
    for name, module in saved.items():
        if any(packed_names(each) or vendor_of(each) for each in module.modules()):
            raise ValueError(f"{name} can't train in full: it has packed weights")
        for key, value in module.state_dict().items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} can't be saved: its {key} is a {type(value).__name__}")
    for name, parameter in _named(model):
        if is_lazy(parameter):  # and torch can't freeze it
            raise ValueError(f"{name} has no shape as yet: call the model once before")
    trained_before = frozenset(name for name, parameter in _named(model) if parameter.requires_grad)
    made = {}
    for name, target in targets.items():
        kind, quantized = type(target.module), not isinstance(target.weight, Tensor)
        if target.parameter:
            over: Any = class_over(LoRAExperts, plain_class_of(target.module))
        else:
            over = adapted_class(kind, quantized)
        adapter = target.new_adapter(name, config, wide_adapters)
        made[name] = over, adapter, config.alpha_of(name)
    untied = _copies_of_tied(model, saved)
    if every_name:
        warn_of_passed_over(model, config, targets, saved)
    # Nothing has changed so far, and nothing below can fail.
    for place in untied:
        setattr(place.module, place.name, place.copy)
    model.requires_grad_(False)
    for name, target in targets.items():
        target.module.__class__, adapter, alpha = made[name]
        settings = alpha, config.lora_dropout, config.use_rslora
        stacked = [target.parameter] if target.parameter else []
        cast(Any, target.module).attach_adapter(adapter, *settings, *stacked)
    for module in saved.values():
        module.requires_grad_(True)
    for name in trained_biases(model, config.bias, targets):
        model.get_parameter(name).requires_grad_(True)
    for module in model.modules():
        if not isinstance(module, Adapted):
            bitsandbytes.keep_gradients(module)
    admit_training(model)
    names = tuple(targets), tuple(saved)
    injection = Injection(config, *names, trained_before, untied, watch_loading(model))
    model.__dict__[RECORD] = injection
    if frozen:
        take_frozen(model.modules())
    if blocks:
        mlp.take(model.modules(), mlp.GatedMLP)
    return injection


def remove_lora(model: nn.Module) -> nn.Module:
    """Make every LoRA layer plain again, of its old class, in place, and return the same model.

    A merged layer keeps its merged weight (merge, then remove, is PEFT's ``merge_and_unload``); the
    others keep the base's.  Frozen layers that were made fast are torch's again.  What trained
    before apply_lora trains again.  Modules that trained in full keep what they learned.  A model
    without adapters comes back as it is.  Raises ValueError, and changes nothing, where an adapted
    weight was parametrized (``torch.nn.utils``).
    """
    check_model(model)
    inner = unwrap(model)
    layers = list(lora_layers(inner))
    for name, layer in layers:
        layer.check_weight(called(name))
    for module in {layer.adapted_module: None for _, layer in layers}:
        module.detach_adapter()
    give_back_frozen(inner.modules())
    mlp.give_back(inner.modules())
    for module in inner.modules():  # parts of a model may have been adapted one by one
        injection = module.__dict__.pop(RECORD, None)
        if injection is not None:
            injection.loading.remove()
            give_back_quantizer(module)
            for inside in module.modules():
                bitsandbytes.repack_again(inside)
            for name, parameter in _named(module):
                parameter.requires_grad_(name in injection.trained_before)
    return model


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under each of its names: a tied one comes more than once."""
    return model.named_parameters(remove_duplicate=False)


def _copies_of_tied(model: nn.Module, saved: dict[str, nn.Module]) -> tuple[Untied, ...]:
    """A copy of each parameter that a module which trains in full shares with one that doesn't."""
    inside = [module for outer in saved.values() for module in outer.modules()]
    outside = ids_outside(model, set(inside))
    copies: dict[int, nn.Parameter] = {}
    untied = []
    for module in inside:
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in outside:
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone())
                untied.append(Untied(module, name, parameter, copies[id(parameter)]))
    return tuple(untied)


def untie(model: nn.Module, name: str) -> None:
    """Give the parameter of this name, which others share, memory of its own."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    shared = module._parameters[last]
    assert shared is not None
    setattr(module, last, nn.Parameter(shared.detach().clone(), shared.requires_grad))


def undo_injection(model: nn.Module) -> None:
    """Take back what apply_lora did just now: what it untied is tied again, too."""
    for place in model.__dict__[RECORD].untied:
        setattr(place.module, place.name, place.original)
    remove_lora(model)


def injection_of(model: nn.Module) -> Injection | None:
    """What apply_lora did to this model, if it did."""
    return unwrap(model).__dict__.get(RECORD)


def check_injection(model: nn.Module, injection: Injection) -> None:
    """Raise ValueError unless the model has the very adapters that apply_lora made, once each."""
    now = dict(lora_layers(model))
    if now.keys() != set(injection.layers):
        changed = sorted(now.keys() ^ set(injection.layers))
        raise ValueError(
            f"the model's adapters are not those that apply_lora made: {some(changed)} came or "
            "went since; call fastlora.remove_lora(model) and start again"
        )
    check_places(model, [one.adapted_module for one in now.values()], injection.saved_modules)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train, of how many, in PEFT's words."""
    check_model(model)
    total = numbers_in(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(
        f"trainable params: {trained:,d} || all params: {total:,d} "
        f"|| trainable%: {100 * trained / max(total, 1):.4f}"
    )
