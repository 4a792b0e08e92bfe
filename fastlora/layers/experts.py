"""An experts module of transformers': its weights, dense or packed, stored how; what it computes.

A module is known by its class's forward: that of ``use_experts_implementation``, which runs one of
transformers' own functions.  All else about it is read once for every call, since it may change.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..foreign import is_class
from ..formats import float8, gguf
from ..formats.float8 import SCALE
from ..formats.format import Quantized
from ..ops.dispatch import autocast_is_on
from ..ops.experts import Activate, lora_experts
from ..projection import AUTOCAST_DTYPES, DTYPES, Adapter, Output, is_plain
from .adapted import Features
from .members import (
    activation_of,
    defined_in,
    is_hooked,
    plain_class_of,
    tensor_of,
    why_patched,
)

_INTERFACE = "transformers.integrations.moe"
_SETTINGS = {
    "config", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed",
    "_is_expert_parallel",
}  # fmt: skip
OTHER = "its gate or activation is none that fastlora knows, or is hooked or patched"
ADDED = "_lora_"  # in the names of parameters that aren't the module's own
_WEIGHT = re.compile(r"(gate_up|up|down)_proj(_bias|_scale_inv|_activation_scale)?")
_FP8 = ("transformers.integrations.finegrained_fp8", "FP8Experts")
_DOWN = "down_proj"  # the last of the weights in every class of experts
_OTHER_GATES = ("gate_softcap", "swiglu_alpha", "limit")  # what its gate depends on
# What configs of transformers' call the number of experts that a token goes to.
PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
_CAST_BY_AUTOCAST = (None, "eager", "batched_mm")


class PackedWeight(nn.Module):
    """A stack [E, N, K] in the place of an experts module's parameter: packed, and never trained.

    Its buffers are named as the format's tensors are, and hold their bits as uint8: casts of the
    model leave them alone.
    """

    def __init__(self, weight: Quantized) -> None:
        super().__init__()
        self.format = weight.format
        self._dtypes = tuple(tensor.dtype for tensor in weight.tensors)
        for name, tensor in zip(weight.format.names, weight.tensors, strict=True):
            self.register_buffer(name, tensor.detach().contiguous().view(torch.uint8))

    @property
    def quantized(self) -> Quantized:
        """The stack, of the same memory."""
        bits = [self._buffers[name] for name in self.format.names]
        tensors = [b.view(d) for b, d in zip(bits, self._dtypes, strict=True) if b is not None]
        return Quantized(self.format, tuple(tensors))

    # [E, N, K], whichever way a dense weight would lie in this module; the format's dtype.
    shape = property(lambda self: self.quantized.shape)
    dtype = property(lambda self: self.quantized.dtype)
    device = property(lambda self: self.quantized.device)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.format.label}"


class Experts(NamedTuple):
    """How a call of an experts module computes; or ``reason``, why that isn't known."""

    reason: str
    names: tuple[str, str] = ("", "")  # of the first product's weight and of the second's
    transposed: bool = False  # weights are [E, in, out]
    has_bias: bool = False
    activate: Activate = ""
    repeats: bool = True  # the activation may run again in the backward
    autocasts: bool = True  # autocast casts x and the weights; else x is cast to the weights' dtype


def read_module(base: Any, kind: Any = None) -> Experts:
    """How a module's experts compute; or why that isn't known.  Hooks on it are its own.

    ``kind``: the class whose forward it is; else that without adapters, and with dense weights.
    """
    kind = kind or plain_class_of(base)
    forward = kind.forward
    decorated = defined_in(forward) == _INTERFACE
    if not (decorated and hasattr(forward, "__wrapped__")):
        if gguf.is_experts(kind) and not why_patched(kind):
            known = activation_of(base.act_fn)
            return Experts("" if known else OTHER, ("gate_up_proj", "down_proj"), activate=known)
        return Experts("its forward isn't that of transformers' use_experts_implementation")
    if not base.__dict__.keys() >= _SETTINGS:
        return Experts("experts of this version of transformers are not among the tested ones")
    name = getattr(base.config, "_experts_implementation", None)
    eager = name in (None, "eager")
    run = forward
    while eager and hasattr(run, "__wrapped__"):  # FP8Experts' is decorated anew for every layer
        run = run.__wrapped__
    if not eager:  # what is registered for an implementation of this name
        inside = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
        cell = inside.get("experts_interface")
        run = None if cell is None else cell.cell_contents.get(name)
    if not _is_transformers(run):
        return Experts("its forward, or its experts implementation, isn't one of transformers' own")
    if base.has_post_expert_norm:
        return Experts("its experts have a norm behind them")
    if base._is_expert_parallel:
        return Experts("its experts are on several devices (expert parallel)")
    gate = _gate_of(base, kind, run if eager else None)
    if gate is None:
        return Experts(OTHER)
    activate, repeats = gate
    names = "gate_up_proj" if base.has_gate else "up_proj", "down_proj"
    layout = base.is_transposed, base.has_bias
    return Experts("", names, *layout, activate, repeats, name in _CAST_BY_AUTOCAST)


def _is_transformers(thing: Any) -> bool:
    home = defined_in(thing) or str(getattr(thing, "__module__", ""))
    return home.startswith("transformers.")


def _gate_of(base: Any, kind: Any, eager: Any) -> tuple[Activate, bool] | None:
    """How these experts make the second product's input of the first's, and whether it repeats.

    ``eager``: the class's own forward, if that runs; None if it has a gate that isn't known.  What
    isn't known by name may run again, followed by autograd from the first product's result on, if
    it draws no numbers, doesn't write into its input, and has no parameters.
    """
    act: Any = getattr(base, "act_fn", None)
    if not base.has_gate:
        return None if act is None else (act, _is_plain_function(act))
    gate, is_own = base._apply_gate, "_apply_gate" in base.__dict__
    function = None if is_own else kind._apply_gate
    is_default = not is_own and (
        defined_in(function) == _INTERFACE
        or (
            is_class(kind, *_FP8)
            and all(getattr(base, name, None) is None for name in _OTHER_GATES)
        )
    )
    names = getattr(getattr(eager, "__code__", None), "co_names", ())
    if eager and not is_default and "_apply_gate" not in names:
        return None  # its class's forward has another one
    known = activation_of(act) if is_default else ""
    if known:
        return known, True
    others = {n for n in base._parameters if not _WEIGHT.fullmatch(n) and ADDED not in n}
    repeats = not is_own and _is_transformers(function) and not others
    return gate, repeats and (act is None or _is_plain_function(act))


def _is_plain_function(act: Any) -> bool:
    """Whether an activation is a function of its input alone, and leaves that as it is."""
    if not isinstance(act, nn.Module):
        return _is_transformers(act) or bool(activation_of(act))
    known = _is_transformers(type(act)) or type(act).__module__ == nn.ReLU.__module__
    return (
        known
        and type(act) is not nn.RReLU
        and not getattr(act, "inplace", False)
        and not any(map(is_hooked, act.modules()))
        and not any(True for _ in act.parameters())
    )


def needs_class(module: nn.Module) -> bool:
    """Whether the plain class couldn't run it: a weight is a :class:`PackedWeight`, or a dense one
    in a class for float8."""
    return bool(_held(module) or {*_scaled(module)} - {*packed_names(module)})


def packed_names(module: nn.Module) -> list[str]:
    """Of the module's weights that are packed."""
    codes = [name for name in _scaled(module) if tensor_of(module, name).element_size() == 1]
    return _held(module) + codes


def _held(module: nn.Module) -> list[str]:
    return [name for name, each in module._modules.items() if isinstance(each, PackedWeight)]


def _scaled(module: nn.Module) -> list[str]:
    """Of the weights that came packed: FP8Experts', with scales beside, and GgufExperts'."""
    ends = [name.removesuffix(SCALE) for name in module._parameters if name.endswith(SCALE)]
    if gguf.is_experts(plain_class_of(module)):
        ends = [*read_module(module).names]
    return [name for name in ends if isinstance(getattr(module, name, None), Tensor)]


def parameter_names(module: nn.Module) -> list[str]:
    """What a module has for parameters, packed ones among them; weights of experts in the order of
    their class."""
    return sorted([*_held(module), *module._parameters], key=_DOWN.__eq__)


def weight_in(module: nn.Module, name: str) -> Any:
    """A weight as it lies: a tensor, or packed [E, N, K].

    Raises ValueError for a packed one that can't be read.
    """
    held = module._modules.get(name)
    if isinstance(held, PackedWeight):
        return held.quantized
    weight = tensor_of(module, name)
    if name not in _scaled(module) or weight.element_size() > 1:
        return weight
    is_gguf = gguf.is_experts(plain_class_of(module))
    weight = (gguf if is_gguf else float8).experts_weight(module, name)
    if isinstance(weight, str):
        raise ValueError(f"the {plain_class_of(module).__name__} can't be read: {weight}")
    return weight


def lies_transposed(module: nn.Module) -> bool:
    """Whether a dense weight is [E, in, out] to this module."""
    return bool(getattr(module, "is_transposed", False))


def stack_in(module: nn.Module, name: str) -> Any:
    """:func:`weight_in` as [E, out, in], whichever way a dense one lies in this module."""
    weight = weight_in(module, name)
    return weight.mT if isinstance(weight, Tensor) and lies_transposed(module) else weight


def dense_weight(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """A packed weight in this dtype, new, as it would lie in this module."""
    made = weight_in(module, name).dense(dtype)
    return made.mT if lies_transposed(module) else made


def features_of(module: nn.Module, name: str) -> Features:
    """Of the weight of this name."""
    experts, q, p = stack_in(module, name).shape
    return Features(experts, p, q)


def experts_of_a_token(module: Any) -> int:
    """How many run for each token; 0 where nothing says so."""
    config = getattr(module, "config", None)
    numbers = [getattr(config, name, None) for name in PER_TOKEN]
    return next((number for number in numbers if type(number) is int), 0)


def stacked(
    lora_A: Tensor, lora_B: Tensor, experts: int, scale: float, reverse: bool = False
) -> Adapter[Tensor]:
    """PEFT's lora_A [E · r, p] and lora_B [q, r · E], the expert its fastest index, as views.

    lora_a [E, r, in] and lora_b [E, out, r]: in is p, and out is q, or with ``reverse`` the other
    way round.
    """
    thin = lora_A.view(experts, -1, lora_A.shape[1])  # [E, r, p]
    wide = lora_B.view(lora_B.shape[0], -1, experts).permute(2, 0, 1)  # [E, q, r]
    return Adapter(wide.mT, thin.mT, scale) if reverse else Adapter(thin, wide, scale)


def takes(args: tuple[Any, ...], outputs: Sequence[Output[Tensor]]) -> bool:
    """Whether these are x, index and weights that fit the two outputs, all in one dtype."""
    weight, other = (output.base.weight for output in outputs)
    if len(args) != 3 or not all(map(is_plain, args)):
        return False
    x, index, weights = args
    dense = {each.dtype for each in (weight, other) if isinstance(each, Tensor)}
    if autocast_is_on(x.device.type):
        one_dtype = len(dense) < 2 and dense | {x.dtype} <= set(AUTOCAST_DTYPES)
    else:
        one_dtype = dense <= {x.dtype} and x.dtype in DTYPES
    return (
        one_dtype
        and x.device == index.device == weights.device == weight.device == other.device
        and x.dim() == index.dim() == 2
        and x.shape[1] == weight.shape[2]
        and 0 < x.shape[0] == index.shape[0]
        and index.shape == weights.shape
        and weights.is_floating_point()
        and index.dtype in (torch.int32, torch.int64)
        and _are_in(index, weight.shape[0])
    )


def run_experts(
    args: tuple[Tensor, ...],
    experts: Experts,
    up: Output[Tensor],
    down: Output[Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """The call with these arguments, which :func:`takes` them."""
    x, index, weights = args
    return lora_experts(
        x,
        index,
        weights,
        up,
        down,
        experts.activate,
        dropout=dropout,
        one_node=experts.repeats and not _is_watched(),
        autocasts=experts.autocasts,
    )


def _is_watched() -> bool:
    """Whether something is to see the operations: a compiler, selective checkpointing …"""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _are_in(index: Tensor, experts: int) -> bool:
    """Whether all are numbers of experts; on a GPU, or watched or compiled, nobody looks."""
    if index.device.type != "cpu" or _is_watched():
        return True
    least, most = index.aminmax()
    return bool(least >= 0) and bool(most < experts)
