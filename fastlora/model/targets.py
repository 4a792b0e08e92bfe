"""Find the modules that a LoRAConfig targets, and explain why others can't be adapted.

These functions read names and classes, and change nothing.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..layers.adapted import LoRALayer
from ..layers.adapted_weight import Features, Pair, new_adapter, wide_dtype
from ..layers.expert_layer import why_not_experts
from ..layers.experts import PackedWeight, features_of, packed_names, parameter_names, weight_in
from ..layers.frozen import is_conv1d, is_router, matrix_of, why_not_base, why_not_class
from ..layers.int8 import Int8Linear
from ..layers.modules import called, embeddings_of, full_name, plain_name, some
from ..text import shown
from .config import LoRAConfig, compile_pattern, is_all_linear, is_inside, names_any

_HEADS_BY_TASK = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


class Target(NamedTuple):
    """A linear layer or a weight of an experts module that gets an adapter."""

    module: nn.Module
    parameter: str = ""  # the weight's name in an experts module; "" for a linear layer

    @property
    def weight(self) -> Any:
        """The weight [out, in], or a stack of all experts' weights; it may be packed."""
        return weight_in(self.module, self.parameter) if self.parameter else matrix_of(self.module)

    @property
    def features(self) -> Features:
        if self.parameter:
            return features_of(self.module, self.parameter)
        return Features(1, *self.weight.shape[::-1])

    def dtype(self, wide: bool = True) -> torch.dtype:
        """The dtype of its adapter: float32 or float64 if ``wide`` or beside a packed weight."""
        weight = self.weight
        return wide_dtype(weight) if wide or not isinstance(weight, Tensor) else weight.dtype

    def new_adapter(self, name: str, config: LoRAConfig, wide: bool = True) -> Pair:
        """New lora_A and lora_B for the target of this name."""
        numbers = config.rank_of(name), config.init_lora_weights, self.dtype(wide)
        return new_adapter(self.weight, *numbers, self.features)


Targets = dict[str, Target]  # by name: linear layers first, then weights of experts


def find_targets(
    model: nn.Module, config: LoRAConfig, saved: Collection[str], *, every_name: bool
) -> Targets:
    """The targets of ``config``; a layer with several names has the first one.

    ``saved``: names of modules that train in full; nothing inside them is a target.

    Raises ValueError if nothing matches, or if a target can't be a base or is at two places in the
    model.  With ``every_name`` it also raises if a name in ``target_modules`` matches nothing.
    """
    wanted = _target_test(model, config)
    excluded = name_test(config.exclude_modules or ())
    matched = {
        name: module
        for name, module in model.named_modules()
        if ((wanted(name) and not excluded(name)) or _weight_is_named(module, name, config))
        and not any(is_inside(name, outer) for outer in saved)
    }
    experts = _find_experts(model, config, matched, saved, every_name=every_name)
    if not (matched or experts):
        rest = " that isn't excluded or saved in full" if config.exclude_modules or saved else ""
        chosen = [n for n in ("target_parameters", "layers_to_transform") if getattr(config, n)]
        wish = [f"{name}={shown(getattr(config, name))}" for name in ("target_modules", *chosen)]
        written = "".join(config.target_modules or ()).lower()
        near = "" if re.sub(r"\W|_", "", written) != "alllinear" else ', but "all-linear" would'
        raise ValueError(f"{', '.join(wish)} matches no module{rest}{near}. {could_match(model)}")
    if every_name and isinstance(config.target_modules, tuple):
        names = [name for name, _ in model.named_modules()]
        for target in config.target_modules:
            if not any(map(name_test((target,)), names)):  # also a name that is excluded counts
                raise ValueError(
                    f"target_modules has {target!r}, which matches no module. {could_match(model)}"
                )
    # Everything matched; now refuse what can't be a base.
    around = bypassed(model)
    for name, module in matched.items():
        if reason := why_not_base(module):
            foreign = why_not_class(type(module)) and (
                is_like_linear(module) or _weight_is_named(module, name, config)
            )
            what_else = f". {USE_PEFT}" if foreign else ""
            raise ValueError(f"{called(name)} can't take an adapter: {reason}{what_else}")
        if is_router(module) and config.lora_dropout:
            raise ValueError(
                f"{name} is a router ({type(module).__name__}), whose adapter can't have dropout, "
                f"as in PEFT, but lora_dropout is {config.lora_dropout}: set it to 0, or exclude "
                "the router"
            )
        if name in around:
            raise ValueError(
                f"{name} can't take an adapter: the {around[name]} around it reads its weight "
                "without calling it, so the adapter would be skipped in evaluation"
            )
    targets = {name: Target(module) for name, module in matched.items()} | experts
    check_places(model, [target.module for target in targets.values()], saved)
    return targets


def _find_experts(
    model: nn.Module,
    config: LoRAConfig,
    layers: Mapping[str, nn.Module],
    saved: Collection[str],
    *,
    every_name: bool,
) -> Targets:
    """The weights of experts that ``target_parameters`` names, by name, in the model's order.

    ``layers``: the linear layers that ``config`` targets; ``target_parameters`` may also name their
    weights.  ``saved``: modules that train in full.  Raises ValueError for a parameter of any other
    module and if experts can't have adapters.  With ``every_name`` it also raises if a name matches
    nothing.
    """
    wanted = config.target_parameters or ()
    places = [
        (full_name(owner, parameter), owner, parameter)
        for owner, module in (model.named_modules() if wanted else ())
        for parameter in parameter_names(module)
    ]
    for ending in wanted if every_name else ():
        if not any(names_any((ending,), name) for name, *_ in places):
            raise ValueError(f"target_parameters has {ending!r}, which matches no parameter")
    # A named weight of a linear layer is a target already; all other weights must be experts'.
    by_module: dict[str, list[str]] = {}
    for name, owner, parameter in places:
        if not names_any(wanted, name) or any(is_inside(name, outer) for outer in saved):
            continue
        layer = layers.get(owner) if parameter == "weight" else None
        if layer is None:
            by_module.setdefault(owner, []).append(parameter)
        elif is_conv1d(type(layer)):
            raise ValueError(
                f"target_parameters names {name}, a Conv1D's weight [in, out], which PEFT would "
                "read as [out, in]: name the layer in target_modules"
            )
    targets = {}
    for owner, parameters in by_module.items():
        module = model.get_submodule(owner)
        if reason := why_not_experts(module, parameters):
            raise ValueError(
                f"target_parameters names {parameters[0]} of {called(owner)}, which can't take an "
                f"adapter: it isn't a linear layer's weight, and as experts {reason}"
            )
        for parameter in parameters:
            targets[full_name(owner, parameter)] = Target(module, parameter)
    return targets


def check_places(model: nn.Module, adapted: Iterable[nn.Module], saved: Collection[str]) -> None:
    """Raise ValueError if a module that is adapted or trains in full is at two places in the model.

    PEFT replaces the module only at the first place, and its files mean that.  A block around the
    module may be at several places, because PEFT's replacement is then at all of them.  ``saved``:
    names, as in :func:`find_targets`.
    """
    # All places of each module: its parents, and its full name under each.
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for outer, parent in model.named_modules():
        for key, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, full_name(outer, key)))
    # A module in full counts with everything inside it; places within it are one place.
    whole = [model.get_submodule(name) for name in saved]
    groups = [(module, {module}) for module in adapted]
    for top, inside in [*groups, *((module, set(module.modules())) for module in whole)]:
        for module in inside:
            names = [name for parent, name in places.get(module, ()) if parent not in inside]
            # The top module has one place outside of itself; modules inside it must have none.
            if len(names) > (module is top) and any(True for _ in module.parameters()):
                first = next(name for name, found in model.named_modules() if found is module)
                others = ", ".join(name for name in names if name != first)
                raise ValueError(
                    f"{first.replace('.base_layer', '')} and {others} are one "
                    f"{type(module).__name__}, which PEFT would adapt "
                    f"or train only at the first place, and its files can't mean more. Put a copy "
                    f"(copy.deepcopy) at {others}, or leave the module out"
                )


def _weight_is_named(module: nn.Module, name: str, config: LoRAConfig) -> bool:
    return "weight" in module._parameters and config.names_weight_of(name)


def warn_of_passed_over(
    model: nn.Module, config: LoRAConfig, targets: Targets, saved: Collection[str]
) -> None:
    """Warn of modules that PEFT's "all-linear" would adapt, and fastlora's doesn't."""
    if not is_all_linear(config.target_modules):
        return
    excluded = name_test(config.exclude_modules or ())
    done = {*saved}
    done |= {name.rpartition(".")[0] if t.parameter else name for name, t in targets.items()}

    def is_meant(name: str) -> bool:
        return not excluded(name) and not any(is_inside(name, outer) for outer in done)

    left_out = _obstacles(model, is_meant)
    experts = {name: module for name, module in expert_modules(model).items() if is_meant(name)}
    if experts:
        share = sum(map(numbers_in, experts.values())) / numbers_in(model)
        left_out.append(
            f"the parameters of experts and routers ({some(list(experts))}), which are {share:.0%} "
            "of the model's"
        )
    if left_out:
        warnings.warn(
            f"target_modules='all-linear' left out {'; '.join(left_out)}. {USE_PEFT} "
            "To silence this warning, put their names in exclude_modules.",
            stacklevel=4,
        )


def modules_to_save(
    model: nn.Module, config: LoRAConfig, *, every_name: bool
) -> dict[str, nn.Module]:
    """The modules that train in full, by name, with a classification task's head, as in PEFT.

    A name matches if it ends with the wanted one, so "norm" also matches input_layernorm.
    """
    asked = config.modules_to_save or ()
    names = (*asked, *_HEADS_BY_TASK.get(config.task_type or "", ()))
    modules = {n: module for n, module in model.named_modules() if n and n.endswith(names)}
    for wanted in asked if every_name else ():
        if not any(name.endswith(wanted) for name in modules):
            children = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"modules_to_save has {wanted!r}, which matches no module of the model "
                f"({children}, …)"
            )
    return modules


def trained_biases(model: nn.Module, bias: str, layers: Iterable[str]) -> list[str]:
    """The names of the biases that train with this ``LoRAConfig.bias`` and these adapted layers."""
    names = [plain_name(name) for name, _ in model.named_parameters()]
    names = [name for name in names if name.rpartition(".")[2] == "bias"]
    if bias == "lora_only":
        adapted = {full_name(name, "bias") for name in layers}
        return [name for name in names if name in adapted]
    return names if bias == "all" else []


def name_test(names: str | Sequence[str]) -> Callable[[str], bool]:
    """A predicate on names.

    ``names`` is a regular expression that must match the whole name, or a list of names or last
    parts.
    """
    if isinstance(names, str):
        pattern = compile_pattern(names)
        return lambda name: pattern.fullmatch(name) is not None
    return lambda name: names_any(names, name)


def _target_test(model: nn.Module, config: LoRAConfig) -> Callable[[str], bool]:
    targets = config.target_modules
    if isinstance(targets, str):
        return all_linear(model).__contains__ if is_all_linear(targets) else name_test(targets)
    if targets is None and config.target_parameters:
        return lambda name: False
    numbers = cast(Sequence[int] | None, config.layers_to_transform)
    # A layer's number is the first number in its name, as in PEFT.
    forms = [rf"(?:^|.*?\.){stack}\.(\d+)\." for stack in config.layers_pattern or ()]
    forms = forms or [r".*?\.[^.]*\.(\d+)\."]

    def in_layers(name: str) -> bool:
        if numbers is None:
            return True
        match = next(filter(None, (re.match(form, name) for form in forms)), None)
        return match is not None and int(match.group(1)) in numbers

    if targets is None:
        attention = _attention_projections(model)
        return lambda name: name in attention and in_layers(name)
    # A whole name matches in any layer, regardless of layers_to_transform, as in PEFT.
    return lambda name: name in targets or (names_any(targets, name) and in_layers(name))


def _attention_projections(model: nn.Module) -> set[str]:
    """The linear layers inside a transformers model's attention modules.

    An attention module is recognized by its class's name.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise ValueError(
            "target_modules is None, which means the attention projections of a transformers "
            f"model, but a {type(model).__name__} isn't one: name the layers. {could_match(model)}"
        )
    classes = {name: type(module).__name__.lower() for name, module in model.named_modules()}
    outers = [name for name, kind in classes.items() if name and "attention" in kind]
    return {n for n in all_linear(model) if any(is_inside(n, outer) for outer in outers)}


USE_PEFT = "For such layers, make the adapter with PEFT and call fastlora.optimize on its model."


def all_linear(model: nn.Module) -> set[str]:
    """Every linear layer that can be a base, adapted or not, except a transformers model's head."""
    head = embeddings_of(model, "output")
    return {
        name
        for name, module in model.named_modules()
        if module is not head
        and not is_router(module)
        and (isinstance(module, LoRALayer) or not why_not_base(module))
    } - bypassed(model).keys()


def bypassed(model: nn.Module) -> dict[str, str]:
    """Modules whose weights a fused torch.nn module reads without calling them, by name.

    The values are the class names of the fused modules.
    """
    return {
        full_name(outer, name): type(module).__name__
        for outer, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention)
        for name, _ in module.named_modules()
        if name
    }


def could_match(model: nn.Module) -> str:
    """A text that lists possible targets (last parts of names, with counts) and obstacles."""
    fitting = [name for name, module in model.named_modules() if not why_not_base(module)]
    names = Counter(name.rpartition(".")[2] for name in fitting)
    in_the_way = "; ".join(_obstacles(model))
    why = f" These can't be adapted: {in_the_way}. {USE_PEFT}" if in_the_way else ""
    if not names:
        return f"The model has no linear layer that could be adapted.{why}"
    listed = ", ".join(f"{name} ({count})" for name, count in names.most_common(20))
    return f"It could match: {listed}.{why}"


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of a mixture of experts that hold weights themselves, not in linear layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        and any(word in type(module).__name__.lower() for word in ("expert", "router"))
        and (packed_names(module) or any(p.ndim > 1 for p in module.parameters(recurse=False)))
    }


def numbers_in(model: nn.Module) -> int:
    """The number of parameters; a packed weight counts with its dense shape."""
    packed = [m.shape.numel() for m in model.modules() if isinstance(m, PackedWeight)]
    int8: list[Any] = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    packed += [layer.codes.numel() for layer in int8 if layer.codes is not None]
    return sum(packed) + sum(parameter.numel() for parameter in model.parameters())


def _obstacles(model: nn.Module, is_meant: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Texts on the linear layers that can't be adapted, one for each reason."""
    # Group by reason, so that a message names each reason once.
    head, around = embeddings_of(model, "output"), bypassed(model)
    reasons: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if module is head or isinstance(module, LoRALayer) or not is_meant(name):
            continue
        if is_like_linear(module) and (reason := why_not_base(module)):
            reasons.setdefault(reason, []).append(called(name))
        elif name in around and isinstance(module, nn.Linear):
            reason = f"the {around[name]} around it reads its weight without calling it"
            reasons.setdefault(reason, []).append(name)
    return [
        f"{len(names)} {'layer' if len(names) == 1 else 'layers'} ({some(names)}): {reason}"
        for reason, names in reasons.items()
    ]


def is_like_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer of any library, judged by its class or the class's name."""
    if isinstance(module, nn.Linear):
        return True
    kind = type(module)
    is_named = kind.__name__ == "Conv1D" or "linear" in kind.__name__.lower()
    return is_named and not kind.__module__.startswith("torch.nn.") and not any(module.children())
