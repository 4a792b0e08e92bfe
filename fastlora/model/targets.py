"""Which modules of a model a LoRAConfig means.  It reads names and classes; it changes nothing."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from torch import nn

from ..layer import LoRALinear, check_base, why_not_base
from .config import LoRAConfig

ALL_LINEAR = "all-linear"
_HEADS_BY_TASK = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


def find_targets(
    model: nn.Module, config: LoRAConfig, saved: Collection[str], *, every_name: bool
) -> dict[str, nn.Linear]:
    """The layers that ``config`` targets, by name; one with several names comes under the first.

    ``saved`` are the names of modules that train in full: nothing inside them is a target.

    Raises ValueError if nothing matches, if a target is no plain ``nn.Linear``, or, with
    ``every_name``, if one of ``target_modules``' names matches nothing; each message lists what
    could be meant.
    """
    wanted = _target_test(model, config)
    excluded = name_test(config.exclude_modules or ())
    matched = {
        name: module
        for name, module in model.named_modules()
        if wanted(name) and not excluded(name) and not any(_inside(name, outer) for outer in saved)
    }
    if not matched:
        rest = " that isn't excluded or saved in full" if config.exclude_modules or saved else ""
        raise ValueError(
            f"target_modules={config.target_modules!r} matches no module{rest}. "
            f"{_could_match(model)}"
        )
    if every_name and isinstance(config.target_modules, tuple):
        names = [name for name, _ in model.named_modules()]
        for target in config.target_modules:
            if not any(map(name_test((target,)), names)):
                raise ValueError(
                    f"target_modules has {target!r}, which matches no module. {_could_match(model)}"
                )
    bypassed = _bypassed(model)
    for name, module in matched.items():
        check_base(module, name or "the model")
        if name in bypassed:
            raise ValueError(
                f"{name} can't take an adapter: the {bypassed[name]} around it reads its weight "
                "without calling it, so the adapter would be skipped in evaluation"
            )
    return matched


def modules_to_save(
    model: nn.Module, config: LoRAConfig, *, every_name: bool
) -> dict[str, nn.Module]:
    """The modules that train in full, by name; a classification task's head is one, as in PEFT."""
    names = [*(config.modules_to_save or ()), *_HEADS_BY_TASK.get(config.task_type or "", ())]
    meant = name_test(names)
    found = {name: module for name, module in model.named_modules() if name and meant(name)}
    for wanted in (config.modules_to_save or ()) if every_name else ():
        if not any(map(name_test((wanted,)), found)):
            children = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"modules_to_save has {wanted!r}, which matches no module of the model "
                f"({children}, …)"
            )
    return found


def name_test(names: str | Sequence[str]) -> Callable[[str], bool]:
    """A test of names: a regular expression for the whole, or a list of names or last parts."""
    if isinstance(names, str):
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise ValueError(
                f"{names!r} is no regular expression ({error}): give a list for plain names"
            ) from None
        return lambda name: pattern.fullmatch(name) is not None
    return lambda name: any(name == wanted or name.endswith(f".{wanted}") for wanted in names)


def _target_test(model: nn.Module, config: LoRAConfig) -> Callable[[str], bool]:
    if config.target_modules is None:
        return _attention_projections(model).__contains__
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        return _all_linear(model).__contains__
    return name_test(config.target_modules)


def _all_linear(model: nn.Module) -> set[str]:
    """Every plain linear layer, adapted ones included, but a transformers model's output head."""
    output_embeddings = getattr(model, "get_output_embeddings", None)
    head = output_embeddings() if callable(output_embeddings) else None
    return {
        name
        for name, module in model.named_modules()
        if module is not head and (isinstance(module, LoRALinear) or not why_not_base(module))
    } - _bypassed(model).keys()


def _attention_projections(model: nn.Module) -> set[str]:
    """The linear layers inside a transformers model's attention modules, known by their class."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise ValueError(
            "target_modules is None, which means the attention projections of a transformers "
            f"model, and a {type(model).__name__} is none: name the layers. {_could_match(model)}"
        )
    linear = _all_linear(model)
    inside = [
        name
        for name, module in model.named_modules()
        if name and "attention" in type(module).__name__.lower()
    ]
    return {name for name in linear if any(_inside(name, outer) for outer in inside)}


def _bypassed(model: nn.Module) -> dict[str, str]:
    """The modules whose weights a fused torch.nn module reads itself, and that module's class."""
    return {
        f"{outer}.{name}" if outer else name: type(module).__name__
        for outer, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention)
        for name, _ in module.named_modules()
        if name
    }


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _could_match(model: nn.Module) -> str:
    """The last parts of all names that could be targets, with their counts."""
    names = Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if not why_not_base(module)
    )
    if not names:
        reasons = Counter(
            why_not_base(module) for module in model.modules() if isinstance(module, nn.Linear)
        )
        why = f": {reasons.most_common(1)[0][0]}" if reasons else ""
        return f"The model has no torch.nn.Linear that could be adapted{why}."
    return (
        "It could match: "
        + ", ".join(f"{name} ({count})" for name, count in names.most_common(20))
        + "."
    )
