"""What of a model could take an adapter, what can't and why, for "all-linear" and for messages."""

from collections import Counter
from collections.abc import Callable

from torch import nn

from ..layers.adapted import LoRALayer
from ..layers.frozen import is_router, why_not_base
from ..layers.modules import called, some

USE_PEFT = "For such layers, make the adapter with PEFT and call fastlora.optimize on its model."


def all_linear(model: nn.Module) -> set[str]:
    """Every linear layer that can be a base, adapted or not, but a transformers model's head."""
    head = _output_head(model)
    return {
        name
        for name, module in model.named_modules()
        if module is not head
        and not is_router(module)
        and (isinstance(module, LoRALayer) or not why_not_base(module))
    } - bypassed(model).keys()


def bypassed(model: nn.Module) -> dict[str, str]:
    """The modules whose weights a fused torch.nn module reads itself, and that module's class."""
    return {
        f"{outer}.{name}" if outer else name: type(module).__name__
        for outer, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention)
        for name, _ in module.named_modules()
        if name
    }


def could_match(model: nn.Module) -> str:
    """The last parts of all names that could be targets, with their counts, and what can't be."""
    names = Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if not why_not_base(module)
    )
    in_the_way = "; ".join(_obstacles(model))
    why = f" In the way: {in_the_way}. {USE_PEFT}" if in_the_way else ""
    if not names:
        return f"The model has no linear layer that could be adapted.{why}"
    listed = ", ".join(f"{name} ({count})" for name, count in names.most_common(20))
    return f"It could match: {listed}.{why}"


def passed_over(model: nn.Module, is_meant: Callable[[str], bool]) -> str:
    """What "all-linear" leaves out of the names that are meant, though PEFT's takes it; or ""."""
    parts = _obstacles(model, is_meant)
    experts = {name: module for name, module in expert_modules(model).items() if is_meant(name)}
    if experts:
        total = sum(parameter.numel() for parameter in model.parameters())
        held = sum(p.numel() for module in experts.values() for p in module.parameters())
        parts.append(
            f"the parameters of experts and routers ({some(list(experts))}), which are "
            f"{held / total:.0%} of the model's"
        )
    return "; ".join(parts)


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of a mixture of experts with weights of their own, which no linear layer holds."""
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        and any(word in type(module).__name__.lower() for word in ("expert", "router"))
        and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    }


def _obstacles(model: nn.Module, is_meant: Callable[[str], bool] = lambda name: True) -> list[str]:
    """The linear layers that can't be adapted, by reason."""
    head, around = _output_head(model), bypassed(model)
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
    """A linear layer of any library's, by its class or its name."""
    if isinstance(module, nn.Linear):
        return True
    kind = type(module)
    is_named = kind.__name__ == "Conv1D" or "linear" in kind.__name__.lower()
    return is_named and not kind.__module__.startswith("torch.nn.") and not any(module.children())


def _output_head(model: nn.Module) -> nn.Module | None:
    output_embeddings = getattr(model, "get_output_embeddings", None)
    return output_embeddings() if callable(output_embeddings) else None
