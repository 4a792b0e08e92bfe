"""LoRAQuantized: a vendor's quantized linear layer with an adapter beside its weight."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..backends import Call
from ..formats import SHARDED, PackedLayer, Vendor, vendor_of
from ..formats.packing import packing_error
from ..projection import DTYPES, Output
from .adapted import LoRALayer
from .classes import change_class
from .guards import Record
from .merging import add_product


class LoRAQuantized(LoRALayer):
    """A mixin for quantized layers: :func:`class_over` derives from this class and the vendor's.

    The vendor's tensors and state dict don't change.  A call reads the layer's current tensors, and
    raises ValueError with the reason if fastlora can't read them.
    """

    is_dense = False  # whether it is merged into a plain weight, which the vendor can't use

    @property
    def vendor(self) -> Vendor:
        vendor = vendor_of(self._bases.get("weight") or self, self.plain_class)
        assert vendor is not None
        return vendor

    @property
    def weight_name(self) -> str:
        return "weight" if self.is_dense else self.vendor.PARTS[0]

    def read(self) -> Record:
        packed = self.vendor.read(self)
        if isinstance(packed, str) or not packed.is_whole:
            return Record(packed if isinstance(packed, str) else SHARDED)
        return Record("", (self.output_over(packed.weight),), (self.lora_dropout,), (packed,))

    def packed(self, record: Record | None = None) -> PackedLayer:
        """The weight of this record, by default the current one.

        Raises ValueError if it can't be read.
        """
        record = record or self.read()
        (packed,) = record.packed
        if packed is None:
            raise ValueError(f"the {self.plain_class.__name__} can't be read: {record.reason}")
        return packed

    def adapted_output(self) -> Output:
        return self.output_over(self.packed().weight)

    def run_merged(self, x: Tensor) -> Tensor:
        if not self.is_dense:
            return super().run_merged(x)
        # The bias may not have x's dtype: bitsandbytes' forward in evaluation casts it in place.
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.weight.to(x.dtype), bias)

    def run(self, x: Tensor, record: Record) -> tuple[Tensor, Call | None]:
        run = super().run
        return self.packed(record).run(x, lambda x: run(x, record))

    def _device(self) -> torch.device:
        return self.packed().weight.device

    def merged_weight(self, around: torch.dtype | None = None) -> Tensor:
        """As in the base class.

        Without ``around``, the result has the layer's compute dtype, or the dtype of its tensors.
        """
        packed = self.packed()
        weight: Any = packed.weight
        beside = [t.dtype for t in (getattr(self, self.weight_name), self.bias) if t is not None]
        said = (around, packed.compute_dtype, *beside)
        dtype = next((dtype for dtype in said if dtype in DTYPES), weight.dtype)
        merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        return add_product(weight, *self._factors(), self.scaling, merged)

    def use_merged(self, weight: Tensor, keep_base: bool = True, requantize: bool = True) -> float:
        """As in the base class.

        Raises ValueError if the merged weight can't be packed; the layer doesn't change then.
        """
        vendor, distance = self.vendor, 0.0
        if not requantize and hasattr(self.plain_class, "weight"):  # a read-only property
            raise ValueError("GPTQ-Model's layer has no place for a merged weight")
        original = self._kept()
        try:
            if requantize:
                vendor.pack(self, weight)
                distance = packing_error(weight, self.packed().weight)
            else:
                setattr(self, vendor.PARTS[0], None)
                self.weight = nn.Parameter(weight, requires_grad=False)
            if not math.isfinite(distance):  # vendors pack via 16 bits, which may overflow
                raise ValueError(
                    f"the merged weight doesn't fit into a {self.plain_class.__name__}: packed "
                    "again it holds NaN or infinity; requantize=False leaves it plain"
                )
        except BaseException:
            self._restore(original)
            raise
        self.is_dense, self._bases["weight"] = not requantize, original if keep_base else None
        return distance

    def _kept(self) -> Any:
        """A layer of the vendor's class that holds this layer's packed weight and nothing else."""
        original: Any = object.__new__(self.plain_class)
        nn.Module.__init__(original)
        for name in self.vendor.PARTS:
            if name in self._buffers:
                original.register_buffer(name, self._buffers[name])
            elif hasattr(self, name):
                setattr(original, name, getattr(self, name))
        return original

    def put_back(self, name: str) -> None:
        self.__dict__.pop("is_dense", None)
        self._restore(self._bases.pop(name))

    def _restore(self, original: nn.Module) -> None:
        """Take the packed weight from a layer that :meth:`_kept` made."""
        if "weight" not in original._parameters:
            self._parameters.pop("weight", None)
        vendor = vendor_of(original, self.plain_class)
        for name in () if vendor is None else vendor.PARTS:
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))

    def detach_adapter(self) -> None:
        """Become the vendor's layer again, or ``nn.Linear`` if it is merged into a plain weight."""
        is_dense = self.__dict__.pop("is_dense", False)
        vendor = vendor_of(self._bases.get("weight") or self, self.plain_class)
        super().detach_adapter()
        if is_dense:
            for name in () if vendor is None else vendor.PARTS:
                if name != "weight" and hasattr(self, name):
                    delattr(self, name)
            change_class(self, nn.Linear)
            dtype = self.weight.dtype
            bias = self.bias
            self.__dict__.pop("bias", None)  # HQQ's is an attribute
            self._buffers.pop("bias", None)  # AWQ's is a buffer
            if bias is not None and not (isinstance(bias, nn.Parameter) and bias.dtype == dtype):
                bias = nn.Parameter(bias.detach().to(dtype), bias.requires_grad)
            self.register_parameter("bias", bias)

    @property
    def is_left_out(self) -> bool:
        """Whether the vendor's class (HQQ's) saves and loads only its own tensors, no adapter."""
        return self.plain_class.state_dict is not nn.Module.state_dict

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        if self.is_left_out:
            into, prefix = kwargs.get("destination", state), kwargs.get("prefix", "")
            for name, parameter in self._parameters.items():
                if parameter is not None:
                    tensor = parameter if kwargs.get("keep_vars") else parameter.detach()
                    into.setdefault(f"{prefix}{name}", tensor)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        pair = {name: state_dict.get(f"{prefix}{name}") for name in ("lora_A", "lora_B")}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.is_left_out and not self.merged:
            for name, value in pair.items():
                if value is not None:
                    getattr(self, name).data.copy_(value)
