"""Model surgery: linear layers take adapters in place, and are plain again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..foreign import DDP, FSDP, FULLY_SHARDED
from ..layers import mlp
from ..layers.adapted import LoRALayer, new_adapter, wide_dtype
from ..layers.classes import class_over
from ..layers.expert_layer import Adaptation, ExpertsWeight, LoRAExperts, new_experts_adapter
from ..layers.frozen import give_back_frozen, matrix_of, take_frozen
from ..layers.linear import adapted_class
from ..layers.modules import called, inside_of, lora_layers, some, unwrap
from ..layers.packed import plain_class_of
from ..projection import check_switch
from .adapter_config import as_config
from .config import LoRAConfig, kind_of
from .targets import (
    Targets,
    check_places,
    find_targets,
    modules_to_save,
    trained_biases,
    warn_of_passed_over,
)

_RECORD = "_fastlora"


@dataclass(frozen=True)
class Injection:
    """What apply_lora did to a model; kept in the model's ``__dict__`` as ``_fastlora``."""

    config: LoRAConfig
    layers: tuple[str, ...]  # names of the adapted layers, and of experts' weights
    saved_modules: tuple[str, ...]  # names of the modules that train in full
    trained_before: frozenset[str]  # names of the parameters that required gradients before
    untied: tuple["Untied", ...]
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
    do vendors' quantised layers (docs/quantised.md).
    The layers change class in place: their identity, hooks, names and state-dict keys stay, and two
    keys are added to each, ``lora_A`` and ``lora_B``.  Only adapters, and what ``config.bias`` and
    ``config.modules_to_save`` name, require gradients afterwards.  Adapters of a float16 or
    bfloat16 layer are float32, as PEFT makes them; ``autocast_adapter_dtype=False`` keeps the
    layer's dtype.  An experts module whose weights are in ``config.target_parameters`` becomes a
    :class:`LoRAExperts` in the same way (docs/blocks.md).

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
    config, inner = as_config(config), unwrap(model)
    check_plain(inner)
    _inject(model, config, every_name=True, wide_adapters=autocast_adapter_dtype)
    if frozen:
        take_frozen(inner.modules())
    if blocks:
        mlp.take(inner.modules(), mlp.GatedMLP)
    return model


def check_model(model: nn.Module) -> None:
    """Raise TypeError unless this is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {kind_of(model)}, but must be a torch.nn.Module")


def check_plain(model: nn.Module) -> None:
    """Raise ValueError if a layer has an adapter, fastlora's or PEFT's."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer | LoRAExperts):
            raise ValueError(
                f"{called(name)} has an adapter already: call fastlora.remove_lora(model) first"
            )
        if hasattr(module, "lora_A"):
            raise ValueError(
                f"{called(name)} has a PEFT adapter: merge it or unload it with PEFT first"
            )


def inject_known(model: nn.Module, config: LoRAConfig) -> Injection:
    """apply_lora for a config from a file, whose target names need not all occur in this model."""
    injection = _inject(model, config, every_name=False, wide_adapters=True)
    take_frozen(model.modules())
    mlp.take(model.modules(), mlp.GatedMLP)
    return injection


def _inject(
    model: nn.Module, config: LoRAConfig, *, every_name: bool, wide_adapters: bool
) -> Injection:
    held, model = inside_of(model, FULLY_SHARDED, FSDP, DDP), unwrap(model)
    saved = modules_to_save(model, config, every_name=every_name)
    targets = find_targets(model, config, saved, every_name=every_name)
    for name, layer in (targets.layers | {n: e.module for n, e in targets.experts.items()}).items():
        if layer in held:
            raise ValueError(
                f"{called(name)} can't take an adapter: FSDP or DDP has it already, and would "
                "leave the adapter out: call apply_lora first"
            )
    for name, module in saved.items():
        for key, value in module.state_dict().items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} can't be saved: its {key} is a {type(value).__name__}")
    for name, parameter in _named(model):
        if is_lazy(parameter):  # and torch can't freeze it
            raise ValueError(f"{name} has no shape as yet: call the model once before")
    trained_before = frozenset(name for name, parameter in _named(model) if parameter.requires_grad)
    adapters = {}
    for name, layer in targets.layers.items():
        weight = matrix_of(layer)
        quantised = not isinstance(weight, Tensor)
        dtype = wide_dtype(weight) if quantised or wide_adapters else weight.dtype
        adapter = new_adapter(weight, config.rank_of(name), config.init_lora_weights, dtype)
        adapters[name] = (adapted_class(type(layer), quantised), adapter, config.alpha_of(name))
    of_experts = _experts_adapters(targets, config, wide_adapters)
    untied = _copies_of_tied(model, saved)
    if every_name:
        warn_of_passed_over(model, config, targets, saved)
    # Nothing has changed so far, and nothing below can fail.
    for place in untied:
        setattr(place.module, place.name, place.copy)
    model.requires_grad_(False)
    for name, layer in targets.layers.items():
        layer.__class__, adapter, alpha = adapters[name]
        cast(LoRALayer, layer).attach_adapter(
            adapter, alpha, config.lora_dropout, config.use_rslora
        )
    for experts, kind, its_adapters in of_experts:
        experts.__class__ = kind
        cast(LoRAExperts, experts).attach_adapters(its_adapters, config.lora_dropout)
    for module in saved.values():
        module.requires_grad_(True)
    names = (*targets.layers, *targets.experts)
    for name in trained_biases(model, config.bias, names):
        model.get_parameter(name).requires_grad_(True)
    injection = Injection(config, names, tuple(saved), trained_before, untied)
    record_injection(model, injection)
    return injection


_Adapters = dict[str, tuple[nn.Parameter, nn.Parameter, Adaptation]]


def _experts_adapters(
    targets: Targets, config: LoRAConfig, wide: bool
) -> list[tuple[nn.Module, type[LoRAExperts], _Adapters]]:
    """Of each experts module its class with adapters, and the adapters of its weights."""
    made: dict[nn.Module, _Adapters] = {}
    for name, target in targets.experts.items():
        module, parameter = target
        wide_here = wide or not isinstance(target.weight, Tensor)
        dtype, r = (
            wide_dtype(target.weight) if wide_here else target.weight.dtype,
            config.rank_of(name),
        )
        adapter = new_experts_adapter(module, parameter, r, config.init_lora_weights, dtype)
        numbers = target.features, r, config.alpha_of(name), config.use_rslora
        made.setdefault(module, {})[parameter] = (*adapter, Adaptation(*numbers))
    return [
        (m, class_over(LoRAExperts, plain_class_of(m)), adapters) for m, adapters in made.items()
    ]


def remove_lora(model: nn.Module) -> nn.Module:
    """Make every LoRA layer plain again, of its old class, in place, and return the same model.

    A merged layer keeps its merged weight (merge, then remove, is PEFT's ``merge_and_unload``); the
    others keep the base's.  Frozen layers that were made fast are torch's again.  What trained
    before apply_lora trains again.  Modules that trained in full keep what they learned.  A model
    without adapters comes back as it is.  Raises ValueError, and changes nothing, where an adapted
    weight was parametrised (``torch.nn.utils``).
    """
    check_model(model)
    inner = unwrap(model)
    layers = list(lora_layers(inner))
    for name, layer in layers:
        layer.check_weight(called(name))
    for _, layer in layers:
        if isinstance(layer, LoRALayer):
            layer.detach_adapter()
    for experts in [m for m in inner.modules() if isinstance(m, LoRAExperts)]:
        experts.detach_adapters()
    give_back_frozen(inner.modules())
    mlp.give_back(inner.modules())
    for module in inner.modules():  # parts of a model may have been adapted one by one
        injection = module.__dict__.pop(_RECORD, None)
        if injection is not None:
            for name, parameter in _named(module):
                parameter.requires_grad_(name in injection.trained_before)
    return model


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under each of its names: a tied one comes more than once."""
    return model.named_parameters(remove_duplicate=False)


def _copies_of_tied(model: nn.Module, saved: dict[str, nn.Module]) -> tuple[Untied, ...]:
    """A copy of each parameter that a module which trains in full shares with one that doesn't."""
    inside = [module for outer in saved.values() for module in outer.modules()]
    inside_set = set(inside)  # modules are hashed by identity
    outside = {
        id(parameter)
        for module in model.modules()
        if module not in inside_set
        for parameter in module.parameters(recurse=False)
    }
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
    for place in model.__dict__[_RECORD].untied:
        setattr(place.module, place.name, place.original)
    remove_lora(model)


def injection_of(model: nn.Module) -> Injection | None:
    """What apply_lora did to this model, if it did."""
    return unwrap(model).__dict__.get(_RECORD)


def record_injection(model: nn.Module, injection: Injection) -> None:
    """Keep what was done to this model, with the model."""
    model.__dict__[_RECORD] = injection


def check_injection(model: nn.Module, injection: Injection) -> None:
    """Raise ValueError unless the model has the very adapters that apply_lora made, once each."""
    now = dict(lora_layers(model))
    if now.keys() != set(injection.layers):
        changed = sorted(now.keys() ^ set(injection.layers))
        raise ValueError(
            f"the model's adapters are not those that apply_lora made: {some(changed)} came or "
            "went since; call fastlora.remove_lora(model) and start again"
        )
    modules = {n: one.experts if isinstance(one, ExpertsWeight) else one for n, one in now.items()}
    check_places(model, modules, injection.saved_modules)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train, of how many, in PEFT's words."""
    check_model(model)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(n for n, _ in counts), sum(n for n, trains in counts if trains)
    print(
        f"trainable params: {trained:,d} || all params: {total:,d} "
        f"|| trainable%: {100 * trained / max(total, 1):.4f}"
    )
