"""Reads an experts module of transformers: its weights (dense or packed), layout and activation.

fastlora recognizes a module by its class's forward.  It must be the forward that transformers'
``use_experts_implementation`` makes, and run one of transformers' own functions.  PEFT's wrappers
of experts also use this file.

Every call reads the module again.  A linear layer caches its record instead (:mod:`.guards`), which
would save 3.4 % of a step's time here.  But the guard would have to compare state outside of
modules also: the model's config, and transformers' table of implementations.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..call.projection import AUTOCAST_DTYPES, DTYPES, Adapter, Output, is_plain
from ..common.other_packages import is_class
from ..formats import float8, gguf
from ..formats.float8 import SCALE
from ..formats.format import Quantized
from ..ops.dispatch import autocast_is_on
from ..ops.experts import Activate, lora_experts
from .module_parts import (
    activation_of,
    defined_in,
    is_hooked,
    plain_class_of,
    tensor_of,
    why_patched,
)

_INTERFACE = "transformers.integrations.moe"
# Attributes that transformers' decorator sets on a module of experts, in the tested versions.
_SETTINGS = {
    "config", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed",
    "_is_expert_parallel",
}  # fmt: skip
OTHER = "its gate or activation is unknown to fastlora, or is hooked or patched"
_WEIGHT = re.compile(r"(gate_up|up|down)_proj(_bias|_scale_inv|_activation_scale)?")
_FP8 = ("transformers.integrations.finegrained_fp8", "FP8Experts")
_OTHER_GATES = ("gate_softcap", "swiglu_alpha", "limit")  # if one is set, FP8Experts' gate differs
# Names for the number of experts of each token in configs of transformers.
PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
# Implementations (a config's _experts_implementation) that follow autocast.
_CAST_BY_AUTOCAST = (None, "eager", "batched_mm")


class PackedWeight(nn.Module):
    """A packed, frozen stack of weights [E, N, K] that replaces an experts module's parameter.

    Each tensor of the format is a buffer under the format's name for it.  The buffer holds its bits
    as uint8, so that casts of the model don't change them.
    """

    def __init__(self, weight: Quantized) -> None:
        super().__init__()
        self.format = weight.format
        self._dtypes = tuple(tensor.dtype for tensor in weight.tensors)
        for name, tensor in zip(weight.format.names, weight.tensors, strict=True):
            self.register_buffer(name, tensor.detach().contiguous().view(torch.uint8))

    @property
    def quantized(self) -> Quantized:
        """The stack as a tensor of its format; it shares the buffers' memory."""
        bits = [self._buffers[name] for name in self.format.names]
        tensors = [b.view(d) for b, d in zip(bits, self._dtypes, strict=True) if b is not None]
        return Quantized(self.format, tuple(tensors))

    # Always [E, N, K], also where the module stores dense weights transposed; the format's dtype.
    shape = property(lambda self: self.quantized.shape)
    dtype = property(lambda self: self.quantized.dtype)
    device = property(lambda self: self.quantized.device)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.format.label}"


class Experts(NamedTuple):
    """How a call of an experts module computes; or ``reason``, why fastlora can't run it."""

    reason: str
    names: tuple[str, str] = ("", "")  # the parameters that the first and second product multiply
    transposed: bool = False  # weights are [E, in, out]
    has_bias: bool = False
    activate: Activate = ""
    repeats: bool = True  # whether the backward may call the activation again
    autocasts: bool = True  # autocast casts x and the weights; else x is cast to the weights' dtype


def read_module(base: Any, kind: Any = None) -> Experts:
    """How a module's experts compute, or why fastlora can't run them.

    ``kind``: the class whose forward counts; by default the module's class without adapters and
    packed weights.  Hooks on the module don't matter here, because they run around the forward.
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
    # run: the function that computes a call in the end.
    run = forward
    # The forward under all decorators.  (FP8Experts' forward is decorated again for every layer.)
    while eager and hasattr(run, "__wrapped__"):
        run = run.__wrapped__
    if not eager:
        # The decorated forward looks its implementation up: experts_interface[name], with the name
        # from the module's config.  The table ``experts_interface`` is a closure cell of it.
        closure = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
        cell = closure.get("experts_interface")
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
    """(activate, repeats): the function between the two products; whether it may run again.

    ``activate`` is a name (``silu`` …) or a callable.  The backward calls a callable again, under
    autograd.  ``repeats`` says that this is correct: it draws no random numbers, doesn't write to
    its input, and has no parameters.  ``eager``: the class's own forward, or None if another
    implementation runs.  Returns None if the gate is unknown.
    """
    act: Any = getattr(base, "act_fn", None)
    if not base.has_gate:
        return None if act is None else (act, _is_plain_function(act))
    gate, on_instance = base._apply_gate, "_apply_gate" in base.__dict__
    function = None if on_instance else kind._apply_gate
    is_default = not on_instance and (
        defined_in(function) == _INTERFACE
        or (
            is_class(kind, *_FP8)
            and all(getattr(base, name, None) is None for name in _OTHER_GATES)
        )
    )
    # co_names: the globals and attributes that the forward's byte code uses.
    names = getattr(getattr(eager, "__code__", None), "co_names", ())
    if eager and not is_default and "_apply_gate" not in names:
        return None  # the class's forward computes its gate inline, without _apply_gate
    # The default gate is act(gate) ∘ up, which backends compute by the activation's name.
    known = activation_of(act) if is_default else ""
    if known:
        return known, True
    other_parameters = {n for n in base._parameters if not _WEIGHT.fullmatch(n)}
    repeats = not on_instance and _is_transformers(function) and not other_parameters
    return gate, repeats and (act is None or _is_plain_function(act))


def _is_plain_function(act: Any) -> bool:
    """Whether an activation depends only on its input, and doesn't write to it."""
    if not isinstance(act, nn.Module):
        return _is_transformers(act) or bool(activation_of(act))
    from_library = _is_transformers(type(act)) or type(act).__module__ == nn.ReLU.__module__
    return (
        from_library
        and type(act) is not nn.RReLU
        and not getattr(act, "inplace", False)
        and not any(map(is_hooked, act.modules()))
        and not any(True for _ in act.parameters())
    )


def needs_class(module: nn.Module) -> bool:
    """Whether the module must have fastlora's class, because its own class can't run its weights.

    True if a weight is a :class:`PackedWeight`, or is dense in a class for packed weights.
    """
    return bool(_packed_here(module)) or not all(_packed(module).values())


def packed_names(module: nn.Module) -> list[str]:
    """The names of the module's packed weights."""
    return [name for name, is_packed in _packed(module).items() if is_packed]


def _packed_here(module: nn.Module) -> list[str]:
    """The names of weights that fastlora packed."""
    return [name for name, part in module._modules.items() if isinstance(part, PackedWeight)]


def _packed(module: nn.Module) -> dict[str, bool]:
    """For each name, whether the weight is packed.

    It has the weights that fastlora packed.  In a class for packed weights (FP8Experts,
    GgufExperts), it has all weights, which may also be dense.
    """
    found = dict.fromkeys(_packed_here(module), True)
    names = [name.removesuffix(SCALE) for name in module._parameters if name.endswith(SCALE)]
    # The first condition is quick, and false for most modules.
    if "gate_up_type" in vars(module) and gguf.is_experts(plain_class_of(module)):
        names = [*read_module(module).names]
    for name in names:
        weight = getattr(module, name, None)
        if isinstance(weight, Tensor):
            # The codes of FP8 and GGUF have 1 byte; a dense weight has at least 2.
            found[name] = weight.element_size() == 1
    return found


def sort_weights(module: nn.Module) -> None:
    """Restore the order of the experts' parameters: first product, then second product.

    PEFT nests its wrappers of parameters in the order of ``_parameters``.
    """
    for name in read_module(module).names:
        if name in module._parameters:
            # A dict puts a key that was removed and set again last.
            module._parameters[name] = module._parameters.pop(name)


def weight_in(module: nn.Module, name: str) -> Any:
    """A weight as the module stores it: a tensor, or a packed stack [E, N, K].

    Raises ValueError if a packed weight can't be read.
    """
    packed = module._modules.get(name)
    if isinstance(packed, PackedWeight):
        return packed.quantized
    if not _packed(module).get(name):
        return tensor_of(module, name)
    is_gguf = gguf.is_experts(plain_class_of(module))
    weight = (gguf if is_gguf else float8).experts_weight(module, name)
    if isinstance(weight, str):
        raise ValueError(f"the {plain_class_of(module).__name__} can't be read: {weight}")
    return weight


def lies_transposed(module: nn.Module) -> bool:
    """Whether this module stores dense weights as [E, in, out]."""
    return bool(getattr(module, "is_transposed", False))


def stack_in(module: nn.Module, name: str) -> Any:
    """The weight as [E, out, in], also where the module stores dense weights as [E, in, out]."""
    weight = weight_in(module, name)
    return weight.mT if isinstance(weight, Tensor) and lies_transposed(module) else weight


def dense_weight(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """A packed weight as a new dense tensor of this dtype, in the module's layout."""
    dense = weight_in(module, name).dense(dtype)
    return dense.mT if lies_transposed(module) else dense


def experts_of_a_token(module: Any) -> int:
    """How many experts run for each token; 0 if the config doesn't say."""
    config = getattr(module, "config", None)
    numbers = [getattr(config, name, None) for name in PER_TOKEN]
    return next((number for number in numbers if type(number) is int), 0)


def stacked(
    lora_A: Tensor, lora_B: Tensor, experts: int, scale: float, reverse: bool = False
) -> Adapter[Tensor]:
    """The adapter of all experts, lora_a [E, r, in] and lora_b [E, out, r], as views of PEFT's.

    PEFT stores lora_A [E · r, p], with the expert as its slowest index, and lora_B [q, r · E], with
    the expert as its fastest.  Here in = p and out = q, or with ``reverse`` in = q and out = p.
    """
    a_stack = lora_A.view(experts, -1, lora_A.shape[1])  # [E, r, p]
    b_stack = lora_B.view(lora_B.shape[0], -1, experts).permute(2, 0, 1)  # [E, q, r]
    return Adapter(b_stack.mT, a_stack.mT, scale) if reverse else Adapter(a_stack, b_stack, scale)


def runs_in_a_node(args: tuple[Any, ...], outputs: Sequence[Output[Tensor]]) -> bool:
    """Whether ``lora_experts`` can run a call with these arguments.

    They must be x [tokens, in], index and weights [tokens, k], on one device with the experts'
    weights and in one dtype with the dense ones.
    """
    up, down = outputs
    weight, other = up.base.weight, down.base.weight
    if len(args) != 3 or not all(map(is_plain, args)):
        return False
    x, index, weights = args
    dtypes = {stack.dtype for stack in (weight, other) if isinstance(stack, Tensor)}
    if autocast_is_on(x.device.type):
        one_dtype = len(dtypes) < 2 and dtypes | {x.dtype} <= set(AUTOCAST_DTYPES)
    else:
        one_dtype = dtypes <= {x.dtype} and x.dtype in DTYPES
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
    """Run the call as one node, or step by step.  :func:`runs_in_a_node` must be true for it."""
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
    """Whether a compiler or a dispatch mode (selective checkpointing …) must see each operation."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _are_in(index: Tensor, experts: int) -> bool:
    """Whether every entry of ``index`` is the number of an expert.

    True without a check on a GPU, where reading the entries would wait for the device, and under a
    compiler or a mode.
    """
    if index.device.type != "cpu" or _is_watched():
        return True
    lowest, highest = index.aminmax()
    return bool(lowest >= 0) and bool(highest < experts)
