"""LoRAQuantised: what a vendor's quantised linear layer does with an adapter beside its weight."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..blocks import buffer_for, widened
from ..ops import lora_linears
from ..ops.autocast import autocast_off
from ..projection import DTYPES, Projection
from ..quant import SHARDED, PackedLayer, Vendor, vendor_of
from .adapted import LoRALayer


class LoRAQuantised(LoRALayer):
    """A vendor's class, which comes after this one, with an adapter.

    Class, tensors and state dict stay the vendor's; the layer is read as it is in every call, which
    raises ValueError with the reason if it can't be.
    """

    is_dense = False  # whether it is merged into a plain weight, which its class can't call

    @property
    def weight_name(self) -> str:
        return "weight" if self.is_dense else self.vendor.OWN

    @property
    def vendor(self) -> Vendor:
        vendor = vendor_of(self, self.plain_class)
        assert vendor is not None
        return vendor

    def packed(self) -> PackedLayer:
        """The weight as it is now.  Raises ValueError if it can't be read."""
        found = self.vendor.read(self)
        if not isinstance(found, str) and not found.is_whole:
            found = SHARDED
        if isinstance(found, str):
            raise ValueError(f"the {self.plain_class.__name__} can't be read: {found}")
        return found

    def projection(self, packed: PackedLayer | None = None) -> Projection:
        """What a call hands on, for a report; or with its weight, ``packed``, for that call."""
        weight: Any = (self.packed() if packed is None else packed).weight
        return Projection(weight, self.lora_A, self.lora_B, self.bias, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            if self.is_dense and not (self.training and torch.is_grad_enabled()):
                # bitsandbytes' own call in evaluation casts the bias, in place.
                bias = None if self.bias is None else self.bias.to(x.dtype)
                return linear(x, self.weight.to(x.dtype), bias)
            return super().forward(x)
        packed = self.packed()
        group = (self.projection(packed),)

        def run(x: Tensor) -> Tensor:
            return lora_linears(x, group, dropout=self.lora_dropout, training=self.training)[0]

        return packed.call(x, run)

    def _device(self) -> torch.device:
        return self.packed().weight.device

    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """weight + scaling · lora_B lora_A, computed in float32, block by block of rows."""
        weight = self.packed().weight
        merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        with torch.no_grad(), autocast_off(weight.device.type):
            left, right = self.lora_B.float(), self.lora_A.float()
            for rows, base in widened(weight, buffer_for(weight, torch.float32)):
                merged[rows] = torch.addmm(base, left[rows], right, alpha=self.scaling)
        return merged

    def usual_dtype(self) -> torch.dtype:
        """In which its calls compute, as far as the layer itself tells; else float32."""
        own, bias = getattr(self, self.vendor.OWN), self.bias
        said = self.packed().compute_dtype, own.dtype, None if bias is None else bias.dtype
        return next((dtype for dtype in said if dtype in DTYPES), torch.float32)

    def put_merged(self, weight: Tensor, keep_base: bool, requantise: bool) -> float:
        """Put the merged weight in the base's place, packed again or as it is.

        Returns ‖packed - merged‖ / ‖merged‖, 0 without packing.  Raises ValueError, and leaves the
        layer as it was, if it can't be packed, or holds NaN or infinity then.
        """
        vendor = self.vendor
        new = vendor.pack(self, weight) if requantise else nn.Parameter(weight, False)
        own = vendor.take(self)
        self._keep(own if keep_base else None)
        if requantise:
            vendor.put(self, new)
        else:
            setattr(self, vendor.OWN, None)
            self.weight = new
        self.is_dense, self.merged = not requantise, True
        distance = self._distance(weight) if requantise else 0.0
        if not math.isfinite(distance):  # packed by way of 16 bits, which have a smaller range
            self._keep(own)
            self.unmerge()
            raise ValueError(
                f"the merged weight doesn't fit into a {self.plain_class.__name__}: packed again "
                "it holds NaN or infinity; requantise=False leaves it plain"
            )
        return distance

    def unmerge(self) -> None:
        if not self.can_unmerge:
            raise ValueError("the layer isn't merged, or its base wasn't kept: nothing to restore")
        vendor = self.vendor
        if self.is_dense and vendor.OWN != "weight":
            del self.weight
        kept: Any = self._base_weight
        for name, value in self.__dict__.pop("_base_rest").items():
            setattr(kept, name, value)
        vendor.put(self, kept)
        self.__dict__["_base_weight"] = None
        self.is_dense = self.merged = False

    def _keep(self, own: nn.Parameter | None) -> None:
        """Keep the base's parameter; and what belongs to it, which deepcopy leaves out."""
        self.__dict__["_base_weight"] = own
        self.__dict__["_base_rest"] = dict(vars(own)) if type(own) is nn.Parameter else {}

    def detach_adapter(self) -> None:
        """Become the vendor's layer again, or ``nn.Linear`` if it is merged into a plain weight."""
        is_dense = self.__dict__.pop("is_dense", False)
        self.__dict__.pop("_base_rest", None)
        super().detach_adapter()
        if is_dense:
            object.__setattr__(self, "__class__", nn.Linear)
            dtype = self.weight.dtype
            bias = self.__dict__.pop("bias", self._parameters.get("bias"))  # HQQ's is no parameter
            if bias is not None and not (isinstance(bias, nn.Parameter) and bias.dtype == dtype):
                bias = nn.Parameter(bias.detach().to(dtype), bias.requires_grad)
            self.register_parameter("bias", bias)

    @property
    def is_left_out(self) -> bool:
        """Whether the vendor's class (HQQ's) saves and loads what it knows alone: no adapter."""
        return self.plain_class.state_dict is not nn.Module.state_dict

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = super().state_dict(*args, **kwargs)
        if self.is_left_out:
            into, prefix = kwargs.get("destination", found), kwargs.get("prefix", "")
            for name, own in self._parameters.items():
                if own is not None:
                    kept = own if kwargs.get("keep_vars") else own.detach()
                    into.setdefault(f"{prefix}{name}", kept)
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        found = {name: state_dict.get(f"{prefix}{name}") for name in ("lora_A", "lora_B")}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.is_left_out and not self.merged:
            for name, value in found.items():
                if value is not None:
                    getattr(self, name).data.copy_(value)

    def _distance(self, weight: Tensor) -> float:
        packed, total = self.packed().weight, weight.new_zeros(())
        for rows, some in widened(packed, buffer_for(packed, torch.float32)):
            total += (some - weight[rows]).square().sum()
        return (total.sqrt() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()

    def _apply(self, fn: Any, recurse: bool = True):
        kept: Any = self._base_weight
        self.__dict__["_base_weight"] = None
        try:
            super()._apply(fn, recurse)
            if kept is not None:
                with torch.no_grad():
                    kept = _moved(kept, fn)
        finally:
            self._keep(kept)
        return self


def _moved(kept: nn.Parameter, fn: Any) -> nn.Parameter:
    """A base's parameter and what belongs to it, which some of the vendors' classes move along."""
    found = fn(kept)
    moved = found if isinstance(found, nn.Parameter) else nn.Parameter(found, requires_grad=False)
    for name in vars(kept).keys() - vars(moved).keys():
        value = vars(kept)[name]
        setattr(moved, name, _moved(value, fn) if isinstance(value, nn.Parameter) else value)
    return moved
