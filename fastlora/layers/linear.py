"""LoRALinear, the drop-in layer that needs no PEFT, and functions for models that have it."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..call.projection import Adapter, Base, Output
from ..common.text import shown
from ..common.values import check_settings, check_switches, suggests_arguments, warn_of
from ..ops.functional import linears
from ..ops.node import run_known_layer
from .classes import change_class
from .frozen import is_plain_linear, why_not_plain
from .guards import LinearRecord, Recorded, call_recorded
from .merging import add_product
from .module_parts import tensor_of
from .modules import REGEX_HINT, bypassed, called, check_model, name_test

Pair = tuple[nn.Parameter, nn.Parameter]  # lora_A, lora_B


@suggests_arguments
class LoRALinear(Recorded, nn.Linear):
    """y = x weightᵀ + bias + scaling · drop(x) lora_Aᵀ lora_Bᵀ.

    x is [..., in_features], y [..., out_features].

    It *is* an ``nn.Linear``: ``weight`` and ``bias`` stay where they were, frozen, so a base
    checkpoint loads before or after, and code that reads ``layer.weight`` goes on working.  It adds
    two parameters under loralib's names, ``lora_A`` [r, in_features] and ``lora_B`` [out_features,
    r].  A fresh layer is the identity change: lora_A is kaiming-uniform(a=√5) and lora_B zero,
    PEFT's default.  ``scaling`` is lora_alpha / r, or lora_alpha / √r with ``use_rslora`` (arXiv
    2312.03732).  ``lora_dropout`` in [0, 1) acts only on the adapter's input, in training.

    Nested tensors, the transforms of ``torch.func`` and forward-mode differentiation work as with
    ``nn.Linear``, by :func:`fastlora.lora_linear`, which every call goes to.

    Raises ValueError for a rank below 1 or a dropout outside [0, 1).  Warns of a lora_alpha of 0,
    and of a rank above both sizes.  A call raises the errors of :func:`fastlora.lora_linear`, and
    RuntimeError in training while the layer is merged.  Arguments that ``nn.Linear`` also has are
    passed on to it unchecked.
    """

    # The original weight of a merged layer.  In a tuple, so that it is no parameter of the module.
    _original: tuple[Any, ...] = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_settings(r, lora_alpha, lora_dropout, use_rslora)
        warn_of(lora_alpha, r, (out_features, in_features))
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        pair = new_adapter(self.weight, r, self.weight.dtype)
        self._attach(pair, lora_alpha, lora_dropout, use_rslora)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> "LoRALinear":
        """A LoRALinear that shares, and freezes, the weight and bias of ``linear``.

        The adapter has the weight's dtype.  Raises ValueError for any layer but a plain
        ``torch.nn.Linear`` with floating tensors.
        """
        check_settings(r, lora_alpha, lora_dropout, use_rslora)
        if reason := _why_not(linear):
            raise ValueError(f"the layer can't take an adapter: {reason}")
        warn_of(lora_alpha, r, tuple(linear.weight.shape))
        sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
        # On meta: no memory, and no random numbers.  The lines below replace all tensors.
        layer = cls(*sizes, bias=False, r=1, device="meta", dtype=dtype).train(linear.training)
        layer.weight, layer.bias = linear.weight, linear.bias
        pair = new_adapter(linear.weight, r, dtype)
        layer._attach(pair, lora_alpha, lora_dropout, use_rslora)
        return layer

    def _attach(self, pair: Pair, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> None:
        """Add lora_A and lora_B, and freeze weight and bias.  Checks nothing."""
        self.requires_grad_(False)
        self.lora_A, self.lora_B = pair
        self.r, self.lora_alpha, self.use_rslora = len(self.lora_A), lora_alpha, use_rslora
        self.lora_dropout = float(lora_dropout)
        self.scaling = scaling_of(lora_alpha, self.r, use_rslora)

    def forward(self, x: Tensor) -> Tensor:
        if self._original:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "this LoRALinear is merged, so its adapter would get no gradient: call "
                    "unmerge() before training, or eval() for inference"
                )
            return super().forward(x)
        y = call_recorded(self, x)
        # None would mean that the module's own forward must run, but this is that forward.
        assert y is not None
        return y

    def read(self) -> LinearRecord:
        """The record of a layer that isn't merged."""
        weight, bias, a, b = [tensor_of(self, n) for n in ("weight", "bias", "lora_A", "lora_B")]
        output = Output(Base(weight, bias), (Adapter(a, b, self.scaling),))
        return LinearRecord("", (output,), dropouts=(self.lora_dropout,))

    def run_new(self, x: Tensor, record: LinearRecord) -> tuple[Tensor, Any]:
        (y,), call = linears(x, record.outputs, record.dropouts[0], self.training)
        return y, None if call is None else partial(run_known_layer, call=call)

    @property
    def merged(self) -> bool:
        return bool(self._original)

    def merge(self) -> None:
        """Replace ``weight`` by weight + scaling · lora_B lora_A, rounded once.

        The original is kept until :meth:`unmerge`.  A merged layer doesn't change.  Raises
        ValueError if the merged weight has NaN or infinity; the layer is then unchanged.
        """
        if self.merged:
            return
        weight = add_product(self.weight, self.lora_B, self.lora_A, self.scaling)
        if not bool(weight.isfinite().all()):
            raise ValueError("the merged weight has NaN or infinity: the adapter is broken")
        self._original = (self.weight,)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def unmerge(self) -> None:
        """Put the original weight back: the same bits.  Without a merge, nothing changes."""
        if self._original:
            (self.weight,), self._original = self._original, ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for weight in self._original:  # .to() and .half() also change it
            weight.data = fn(weight.data)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        if self.merged and f"{prefix}weight" in state_dict:
            errors.append(f"{called(prefix[:-1])} is merged: call unmerge() before loading weights")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )
        # With ``strict``, torch raises for the keys in ``missing``, so this list changes in place.
        adapter = {f"{prefix}lora_A", f"{prefix}lora_B"}
        if adapter <= set(missing):  # a checkpoint of the base model
            missing[:] = [key for key in missing if key not in adapter]

    def extra_repr(self) -> str:
        settings = f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        return f"{super().extra_repr()}, {settings}" + (", merged" if self.merged else "")


def replace_linears(
    model: nn.Module,
    targets: str | Sequence[str],
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    autocast_adapter_dtype: bool = True,
) -> list[str]:
    """Make linear layers of the model :class:`LoRALinear`, in place; returns their names.

    ``targets``: a list of names or of their last parts; or a regular expression that must match the
    whole name, and selects only ``torch.nn.Linear`` layers.  The layers change class, so their
    identity, hooks and state-dict keys stay.  Afterwards only lora_A and lora_B require gradients.
    Adapters of 16-bit layers are float32, as in PEFT; ``autocast_adapter_dtype=False`` keeps the
    layer's dtype.

    Raises ValueError for invalid numbers, names that match nothing, and layers that can't take an
    adapter.  Such a layer isn't a plain ``torch.nn.Linear`` with floating tensors, or its parent
    reads its weight without calling it.  The model is then unchanged.
    ``fastlora.get_peft_model`` takes quantized layers and other classes.
    """
    check_model(model)
    check_settings(r, lora_alpha, lora_dropout, use_rslora)
    check_switches(autocast_adapter_dtype=autocast_adapter_dtype)
    named = {name: module for name, module in model.named_modules() if name}
    around, chosen = bypassed(model), dict[str, Any]()
    is_regex = isinstance(targets, str)
    if not targets:
        raise ValueError(f"targets is {shown(targets)}, but must name a layer")
    for target in [targets] if isinstance(targets, str) else targets:
        test = name_test(target if is_regex else [target])
        # A regex selects among linear layers.  A name in a list must be one, which _why_not checks.
        matched = [n for n, m in named.items() if test(n) and (is_plain_linear(m) or not is_regex)]
        if not matched:
            ends = {name.rpartition(".")[2] for name, m in named.items() if is_plain_linear(m)}
            fits = f"the ends of linear layers' names are {', '.join(sorted(ends)) or 'none'}"
            fits = f"{REGEX_HINT}; {fits}" if is_regex else fits
            raise ValueError(f"targets has {shown(target)}, which matches no layer: {fits}")
        chosen |= {name: named[name] for name in matched}
    for name, module in chosen.items():
        reason = _why_not(module)
        if name in around:
            reason = f"the {around[name]} around it reads its weight without calling it"
        if reason:
            raise ValueError(f"{name} can't take an adapter: {reason}")
    # All new tensors first: if memory runs out here, the model is unchanged.
    pairs = {}
    for module in chosen.values():
        keeps_dtype = module.weight.itemsize > 2 or not autocast_adapter_dtype
        dtype = module.weight.dtype if keeps_dtype else torch.float32
        pairs[module] = new_adapter(module.weight, r, dtype)
    model.requires_grad_(False)
    for module, pair in pairs.items():
        change_class(module, LoRALinear)
        module._attach(pair, lora_alpha, lora_dropout, use_rslora)
    return list(chosen)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The lora_A and lora_B of each :class:`LoRALinear` of the model, by their state-dict keys."""
    layers = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    # If the model itself is the layer, its name is empty.
    keys = {f"{name}.{part}".lstrip(".") for name in layers for part in ("lora_A", "lora_B")}
    return {key: value for key, value in model.state_dict().items() if key in keys}


def _why_not(linear: Any) -> str:
    """Why this module can't become a LoRALinear; "" if it can."""
    if isinstance(linear, LoRALinear):
        return "it has one already"
    reason = why_not_plain(linear)
    return reason and f"{reason} (fastlora.get_peft_model takes other linear layers)"


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def new_adapter(weight: Any, r: int, dtype: torch.dtype) -> Pair:
    """New lora_A (kaiming-uniform) and lora_B (zero) of this dtype for a weight [out, in]."""
    N, K = weight.shape
    options: Any = {"device": weight.device, "dtype": dtype}
    lora_a = nn.Parameter(torch.empty(r, K, **options))
    nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    return lora_a, nn.Parameter(torch.zeros(N, r, **options))
