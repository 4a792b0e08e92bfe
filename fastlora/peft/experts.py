"""What PEFT's LoRA on the experts of a mixture becomes: the same layers with another forward.

PEFT has a ParamWrapper for each adapted parameter of an experts module, one around the other.  It
adds scale · lora_B lora_A of every expert to the weights in every call.  Here the outermost one's
ordinary call is one node (``ops.experts``) that never makes that product.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import Tensor, nn

from ..activation import activation_of
from ..base import why_not_tensor
from ..hooks import is_hooked
from ..ops.autocast import autocast_is_on
from ..ops.experts import Activate, lora_experts
from ..projection import Adapter, Base, Output, is_plain
from .moment import why_not_now
from .reading import active_adapters, why_not_adapter, why_not_scale
from .versions import is_newer

_INTERFACE = "transformers.integrations.moe"
_SETTINGS = {
    "config", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed",
    "_is_expert_parallel",
}  # fmt: skip
_PARAMETERS = {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"}
_UNTESTED = is_newer()  # asked once: it takes as long as a small op


class ExpertsReading(NamedTuple):
    """An experts module with its adapters as a call finds it; or ``reason``: the call is PEFT's."""

    reason: str
    outputs: tuple[Output[Tensor], ...] = ()  # the first product's and the second's
    activate: Activate = ""


class ParamWrapper(PeftParamWrapper):
    """PEFT's wrapper of an experts module's parameter; the outermost one's call is one node.

    It has PEFT's name, which PEFT asks for, and no state of its own.  Calls that
    :func:`read_experts` doesn't allow, and those of an inner one, are PEFT's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 2 and not kwargs and not why_not_now():
            reading = read_experts(self)
            if reading.outputs and _takes(x, *args, reading.outputs[0].base.weight):
                up, down = reading.outputs
                return lora_experts(x, *args, up, down, reading.activate)
        return super().forward(x, *args, **kwargs)


def wrappers_in(layer: nn.Module) -> Iterator[PeftParamWrapper]:
    """This one and those inside of it."""
    while isinstance(layer, PeftParamWrapper):
        yield layer
        layer = layer._modules["base_layer"]


def read_experts(outermost: PeftParamWrapper, gathers: bool = False) -> ExpertsReading:
    """Read the layers around an experts module, from the outermost one on.

    ``gathers``: the call will find plain tensors where FSDP has sharded ones between calls.
    """
    wrappers = {layer.parameter_name: layer for layer in wrappers_in(outermost)}
    *_, innermost = wrappers.values()
    base = innermost._modules["base_layer"]
    reason = _why_not_experts(base)
    if reason:
        return ExpertsReading(reason)
    names = ["gate_up_proj" if base.has_gate else "up_proj", "down_proj"]
    if wrappers.keys() != set(names):
        found, expected = ", ".join(wrappers), " and ".join(names)
        return ExpertsReading(f"its adapters are on {found}, and not on {expected}")
    activate = _activation(base)
    if not activate:
        return ExpertsReading("its gate or activation is none that fastlora knows, or is hooked")
    outputs: list[Output[Tensor]] = []
    for name in names:
        layer = wrappers[name]
        reason = _why_not_wrapper(layer, layer is outermost)
        output = reason or _read_output(layer, base, gathers)
        if isinstance(output, str):
            return ExpertsReading(f"its {name}: {output}")
        outputs.append(output)
    return ExpertsReading("", tuple(outputs), activate)


def _why_not_experts(base: Any) -> str:
    """Why this module isn't one of those whose forward is known; "" if it is."""
    forward: Any = type(base).forward
    decorated = getattr(forward, "__globals__", {}).get("__name__") == _INTERFACE
    if not (decorated and hasattr(forward, "__wrapped__")):
        return "its forward isn't that of transformers' use_experts_implementation"
    if not base.__dict__.keys() >= _SETTINGS:
        return "experts are PEFT's where this version of transformers isn't a tested one"
    if not _is_transformers(_implementation(base)):
        return "its forward, or its experts implementation, isn't one of transformers' own"
    if type(base).__call__ is not nn.Module.__call__ or is_hooked(base):
        return "a hook watches, or something replaces, the calls of its experts"
    if "parametrizations" in base._modules:
        return "its experts are parametrised"
    if base.has_post_expert_norm:
        return "its experts have a norm behind them"
    if base._is_expert_parallel:
        return "its experts are on several devices (expert parallel)"
    if _UNTESTED:
        return "experts are PEFT's where this version of PEFT isn't a tested one"
    return ""


def _implementation(base: Any) -> Any:
    """The function that runs these experts: what the class says (eager), or a registered one."""
    forward: Any = type(base).forward
    name = getattr(base.config, "_experts_implementation", None)
    if name in (None, "eager"):
        return forward.__wrapped__
    inside = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    cell = inside.get("experts_interface")
    return None if cell is None else cell.cell_contents.get(name)


def _is_transformers(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("transformers.")


def _activation(base: Any) -> Activate:
    """How these experts make the second product's input of the first's; "" if it isn't known.

    What isn't known by name is run again in the backward, and followed by autograd from the first
    product's result on: so it mustn't draw numbers, write into its input, or have parameters.
    """
    act: Any = getattr(base, "act_fn", None)
    if not base.has_gate:
        return act if _is_plain_function(act) else ""
    gate = base._apply_gate
    function: Any = getattr(gate, "__func__", None)
    if "_apply_gate" in base.__dict__ or not _is_transformers(function):
        return ""
    is_default = function.__module__ == _INTERFACE
    eager = _implementation(base) is type(base).forward.__wrapped__
    if eager and not is_default and "_apply_gate" not in _names_in(type(base).forward.__wrapped__):
        return ""  # its class's forward has another one
    if is_default and activation_of(act):
        return activation_of(act)
    others = base._parameters.keys() - _PARAMETERS
    return gate if not others and (act is None or _is_plain_function(act)) else ""


def _names_in(function: Any) -> tuple[str, ...]:
    return getattr(getattr(function, "__code__", None), "co_names", ())


def _is_plain_function(act: Any) -> bool:
    """Whether an activation is a function of its input alone, and leaves that as it is."""
    if not isinstance(act, nn.Module):
        return _is_transformers(act) or bool(activation_of(act))
    known = _is_transformers(type(act)) or type(act).__module__ == nn.ReLU.__module__
    return (
        known
        and type(act).__call__ is nn.Module.__call__
        and type(act) is not nn.RReLU
        and not getattr(act, "inplace", False)
        and not any(map(is_hooked, act.modules()))
        and not any(True for _ in act.parameters())
    )


def _why_not_wrapper(layer: PeftParamWrapper, is_outermost: bool) -> str:
    if not is_outermost and is_hooked(layer):
        return "a hook watches, or something replaces, its calls"
    if layer.disable_adapters or layer.merged:
        return "its adapter is merged or disabled"
    if len(active_adapters(layer)) != 1:
        return "it has no active adapter, or several"
    if layer.lora_variant:
        return "its adapter is no plain LoRA"
    if layer.num_experts < 2 or not hasattr(layer, "_did_swap_in_out_features"):
        return "it has one expert alone, or is of an older PEFT"
    return ""


def _read_output(layer: PeftParamWrapper, base: Any, gathers: bool) -> Output[Tensor] | str:
    """The layer's weights and adapters, stacked; or why they aren't covered."""
    name, (adapter,) = layer.parameter_name, active_adapters(layer)
    weight = base._parameters.get(name)
    bias = base._parameters.get(f"{name}_bias") if base.has_bias else None
    if weight is None or (base.has_bias and bias is None):
        return "its weight or bias is no parameter"
    lora_a, lora_b = layer.lora_A[adapter], layer.lora_B[adapter]
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return "its lora_A or lora_B is no torch.nn.Linear"
    if lora_a.bias is not None or lora_b.bias is not None:
        return "its lora_A or lora_B has a bias"
    down, up = lora_a._parameters.get("weight"), lora_b._parameters.get("weight")
    for tensor, ndim in ((weight, 3), (bias, 2), (down, 2), (up, 2)):
        reason = "" if tensor is None else why_not_tensor(tensor, ndim, gathers)
        if reason:
            return f"one of its tensors {reason}"
    for linear, part in ((lora_a, down), (lora_b, up)):
        reason = why_not_adapter(linear, "its adapter", part, weight, gathers)
        if reason:
            return reason
    scale = layer.scaling[adapter]
    reason = why_not_scale(scale)
    if reason or isinstance(scale, Tensor):
        return reason or "its scaling is a tensor"
    experts = layer.num_experts
    transposed = not layer._did_swap_in_out_features  # then it is [experts, in, out]
    if gathers:
        return Output(Base(weight, bias), (Adapter(down, up, scale),))
    shape = (experts, layer.in_features, layer.out_features)
    if not transposed:
        shape = (experts, layer.out_features, layer.in_features)
    if weight.shape != shape or transposed != base.is_transposed:
        return f"its weight has shape {tuple(weight.shape)}"
    if bias is not None and bias.shape != (experts, layer.out_features):
        return f"its bias has shape {tuple(bias.shape)}"
    ranks = len(down)  # of all experts together
    fits = (down.shape[1], *up.shape) == (layer.in_features, layer.out_features, ranks)
    if not fits or ranks % experts or not ranks:
        return f"its adapter has shapes {tuple(down.shape)} and {tuple(up.shape)}"
    return Output(
        Base(weight.mT if transposed else weight, bias),
        (
            Adapter(
                down.view(experts, -1, layer.in_features),
                up.view(layer.out_features, -1, experts).permute(2, 0, 1),
                scale,
            ),
        ),
    )


def _takes(x: Any, index: Any, weights: Any, weight: Tensor) -> bool:
    """Whether these are what an experts module is ordinarily called with."""
    if not all(map(is_plain, (x, index, weights))):
        return False
    return (
        x.dim() == index.dim() == weights.dim() == 2
        and x.shape[0] == index.shape[0] > 0
        and index.shape == weights.shape
        and x.shape[1] == weight.shape[2]
        and x.dtype == weight.dtype
        and x.device == index.device == weights.device == weight.device
        and weights.is_floating_point()
        and index.dtype in (torch.int32, torch.int64)
        and not autocast_is_on(x.device.type)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and _are_in(index, len(weight))
    )


def _are_in(index: Tensor, experts: int) -> bool:
    """Whether all are numbers of experts; on a GPU nobody looks, since that would wait for it."""
    if index.device.type != "cpu":
        return True
    least, most = index.aminmax()
    return bool(least >= 0) and bool(most < experts)
