"""LoRALinear: an ``nn.Linear`` with a low-rank adapter beside its frozen weight."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .blocks import rows_at_a_time
from .ops import lora_linears
from .ops.autocast import autocast_off
from .projection import Projection, check_settings, is_plain

# Of weights: those of FSDP2, and of shapes without data, become plain tensors by themselves.
_KINDS = ("DTensor", "FakeTensor")


class LoRALinear(nn.Linear):
    """y = x weightᵀ + bias + scaling · drop(x) lora_Aᵀ lora_Bᵀ.

    x is [..., in_features], y [..., out_features].

    It *is* an ``nn.Linear``: ``weight`` and ``bias`` stay where they were, frozen, so a base
    checkpoint loads before or after, and code that reads ``layer.weight`` goes on working.  It adds
    two parameters under loralib's names, ``lora_A`` [r, in_features] and ``lora_B`` [out_features,
    r].  A fresh layer is the identity change: lora_A is kaiming-uniform(a=√5) and lora_B zero,
    PEFT's default.  ``scaling`` is lora_alpha / r, or lora_alpha / √r with ``use_rslora`` (arXiv
    2312.03732).  ``lora_dropout`` in [0, 1) acts on the adapter's input alone, in training.

    Nested tensors, the transforms of ``torch.func`` and forward-mode differentiation work as with
    ``nn.Linear``, by :func:`fastlora.lora_linear`, which every call goes to.

    One adapter a layer; many adapters at once are PEFT's job.  Raises ValueError for a rank below 1
    or a dropout outside [0, 1), and what :func:`fastlora.lora_linear` raises when called.  The
    arguments that ``nn.Linear`` has too are its own, and so are their errors.
    """

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
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.attach_adapter(new_adapter(self.weight, r), lora_alpha, lora_dropout, use_rslora)

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
        """A LoRALinear that shares, and freezes, ``linear``'s weight and bias.

        The adapter has the weight's dtype.  Raises ValueError for all but a plain nn.Linear.
        """
        check_settings(r, lora_alpha, lora_dropout, use_rslora)
        check_base(linear)
        adapter = new_adapter(linear.weight, r)
        layer = cls(
            linear.in_features,
            linear.out_features,
            False,
            r=1,
            device="meta",
            dtype=linear.weight.dtype,
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.attach_adapter(adapter, lora_alpha, lora_dropout, use_rslora)
        return layer.train(linear.training)

    def attach_adapter(
        self,
        adapter: tuple[nn.Parameter, nn.Parameter],
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
    ) -> None:
        """Take lora_A and lora_B, freeze weight and bias, and start unmerged.  Checks nothing."""
        self.requires_grad_(False)
        self.lora_A, self.lora_B = adapter
        self.r, self.lora_alpha, self.use_rslora = len(self.lora_A), lora_alpha, use_rslora
        self.lora_dropout = float(lora_dropout)
        self.scaling = lora_alpha / (math.sqrt(self.r) if use_rslora else self.r)
        self.merged = False
        # While merged, the original Parameter: in __dict__ it stays out of the state dict.
        self.__dict__["_base_weight"] = None

    def detach_adapter(self) -> None:
        """Become a plain ``nn.Linear`` in place, with the merged weight if the layer is merged."""
        del self.lora_A, self.lora_B
        del self.r, self.lora_alpha, self.use_rslora, self.lora_dropout, self.scaling
        del self.merged, self._base_weight
        object.__setattr__(self, "__class__", nn.Linear)

    def reset_lora_parameters(self) -> None:
        """Make the adapter the identity change again."""
        _initialise(self.lora_A, self.lora_B, True)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "this LoRALinear is merged, so its adapter would get no gradient: call "
                    "fastlora.unmerge_lora(model) before training, or model.eval() for inference"
                )
            return linear(x, self.weight, self.bias)
        group = (self.projection(),)
        return lora_linears(x, group, dropout=self.lora_dropout, training=self.training)[0]

    def projection(self) -> Projection:
        """What the layer's call hands to :func:`fastlora.lora_linears`."""
        return Projection(self.weight, self.lora_A, self.lora_B, self.bias, self.scaling)

    def merged_weight(self) -> Tensor:
        """weight + scaling · lora_B lora_A in weight's dtype, computed in float32 or wider.

        Block by block of rows, so that no wide copy of the whole weight is made.
        """
        merged = torch.empty_like(self.weight, requires_grad=False)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.no_grad(), autocast_off(self.weight.device.type):
            lora_a, rows = self.lora_A.to(wide), rows_at_a_time(self.weight)
            for first in range(0, len(merged), rows):
                some = slice(first, first + rows)
                base, lora_b = self.weight[some].to(wide), self.lora_B[some].to(wide)
                merged[some] = torch.addmm(base, lora_b, lora_a, alpha=self.scaling)
        return merged

    def check_weight(self, name: str) -> None:
        """Raise ValueError unless the weight is a parameter of the layer, which can be replaced."""
        reason = _why_weight_is_fixed(self)
        if reason:
            raise ValueError(f"{name} can't be merged or removed: {reason}")

    def use_merged(self, weight: Tensor, keep_base: bool = True) -> None:
        """Put the merged weight in the base's place, and keep that aside for :meth:`unmerge`."""
        self.__dict__["_base_weight"] = self.weight if keep_base else None
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.merged = True

    def unmerge(self) -> None:
        """Put the original Parameter back: the same bits, and tied again if it was tied."""
        if not self.can_unmerge:
            raise ValueError("the layer isn't merged, or its base wasn't kept: nothing to restore")
        self.weight, self.__dict__["_base_weight"] = self.__dict__["_base_weight"], None
        self.merged = False

    @property
    def can_unmerge(self) -> bool:
        """Whether the layer is merged and its base was kept."""
        return self._base_weight is not None

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self._base_weight is not None:  # .to(), .cuda() and .half() reach what is kept aside
            self._base_weight.data = fn(self._base_weight.data)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        if self.merged and f"{prefix}weight" in state_dict:
            errors.append(
                f"{prefix[:-1]} is merged: call fastlora.unmerge_lora(model) before loading weights"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )
        adapter = [f"{prefix}lora_A", f"{prefix}lora_B"]
        if all(key in missing for key in adapter):
            # A checkpoint of the base, which knows no adapter.
            missing[:] = [key for key in missing if key not in adapter]

    def extra_repr(self) -> str:
        settings = f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        return f"{super().extra_repr()}, {settings}" + (", merged" if self.merged else "")


def new_adapter(
    weight: Tensor, r: int, init_lora_weights: bool | str = True, dtype: torch.dtype | None = None
) -> tuple[nn.Parameter, nn.Parameter]:
    """A fresh lora_A [r, in] and lora_B [out, r] for this weight, in its dtype or ``dtype``."""
    out_features, in_features = weight.shape
    dtype = weight.dtype if dtype is None else dtype
    lora_a = nn.Parameter(torch.empty(r, in_features, device=weight.device, dtype=dtype))
    lora_b = nn.Parameter(torch.empty(out_features, r, device=weight.device, dtype=dtype))
    _initialise(lora_a, lora_b, init_lora_weights)
    return lora_a, lora_b


def _initialise(lora_a: Tensor, lora_b: Tensor, init_lora_weights: bool | str) -> None:
    """True: the identity change.  "gaussian": lora_A from N(0, 1/r²).  False: lora_B random too."""
    if init_lora_weights == "gaussian":
        nn.init.normal_(lora_a, std=1 / len(lora_a))
    else:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    if init_lora_weights is False:
        nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_b)


def become_lora_linear(linear: nn.Linear) -> LoRALinear:
    """The same object as a LoRALinear, which still lacks its adapter: attach_adapter comes next."""
    linear.__class__ = LoRALinear
    return cast(LoRALinear, linear)


def check_base(linear: nn.Module, name: str = "the layer") -> None:
    """Raise ValueError unless this is a plain nn.Linear whose forward can be replaced."""
    reason = why_not_base(linear)
    if reason:
        raise ValueError(f"{name} can't take an adapter: {reason}")


def why_not_base(linear: nn.Module) -> str:
    """Why this module can't become a LoRALinear; "" if it can."""
    if isinstance(linear, LoRALinear):
        return "it already has one (fastlora.remove_lora takes it away)"
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}, and only torch.nn.Linear itself is supported"
    if "forward" in linear.__dict__:
        return "its forward was replaced on the instance (an accelerate hook?): remove that first"
    kind = type(linear.weight)
    if not is_plain(linear.weight) and kind.__name__ not in _KINDS:
        return (
            f"its weight is of class {kind.__name__} (quantised?): only plain tensors are supported"
        )
    if not linear.weight.dtype.is_floating_point:
        return f"its weight has dtype {linear.weight.dtype}, and only floating dtypes are supported"
    return _why_weight_is_fixed(linear)


def _why_weight_is_fixed(linear: nn.Linear) -> str:
    """Why the weight can't be replaced by another Parameter; "" if it can."""
    if "weight" in linear._parameters:
        return ""
    return "its weight is computed (weight_norm, pruning, a parametrisation): make that permanent"
