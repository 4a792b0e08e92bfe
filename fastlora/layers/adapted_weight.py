"""AdaptedWeight: one frozen weight with its adapter, for merging, saving and reports.

And :func:`scaling_of` and :func:`new_adapter`, which every kind of adapted weight shares.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.dispatch import autocast_off
from ..projection import Output
from ..text import shown
from .members import tensor_of
from .merging import add_product

Pair = tuple[nn.Parameter, nn.Parameter]  # lora_A, lora_B
# The end of errors about a tensor on the meta device.
UNLOADED = (
    "without numbers: load it, or take accelerate's offload away first "
    "(accelerate.hooks.remove_hook_from_submodules(model))"
)


class Features(NamedTuple):
    """A weight's sizes in PEFT's terms: lora_A is [experts · r, p], lora_B [q, r · experts].

    A linear layer has one expert, with p = in_features and q = out_features.
    """

    experts: int
    p: int
    q: int

    def shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of lora_A, where the expert is the slowest index, and lora_B (the fastest)."""
        return (self.experts * r, self.p), (self.q, r * self.experts)


class AdaptedWeight:
    """A frozen weight and its adapter: the interface for merging, saving and reports.

    Subclasses are a linear layer itself, and one weight of an experts module.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    scaling: float
    weight: Any
    plain_class: type[nn.Module]  # its module's class without adapters
    why_not_fast: Any = ""  # the reason if no node runs its calls
    adapted_module: Any  # the module that owns the weight; a linear layer is its own
    adapted_name = "weight"  # the weight's name in that module
    adapted_features: Any  # Features
    weight_name: Any = "weight"  # the name of the tensor that stores it, packed or not

    @property
    def shape(self) -> tuple[int, int]:
        """out_features, in_features."""
        return self.adapted_features.q, self.adapted_features.p

    def adapted_output(self) -> Output:
        """The weight, bias and adapter of a call, for reports.

        Raises ValueError if the weight can't be read.
        """
        raise NotImplementedError

    def check_weight(self, name: str) -> None:
        """Raise ValueError unless the weight is a parameter, which can be replaced."""
        raise NotImplementedError

    def merged_weight(self, around: torch.dtype | None = None) -> Tensor:
        """weight + scaling · lora_B lora_A, rounded once, one expert at a time.

        ``around``: the model's dtype, if it has one; the result for a packed weight gets it.
        """
        return add_product(self.weight, *self._factors(), self.scaling)

    @property
    def adapted_parameters(self) -> int:
        """How many parameters of the base the adapter changes, in all experts."""
        return math.prod(self.adapted_features)

    @property
    def adapter_pair(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B."""
        lora_a, lora_b = self.pair_names()
        return tensor_of(self.adapted_module, lora_a), tensor_of(self.adapted_module, lora_b)

    def pair_names(self) -> tuple[str, str]:
        """The names of lora_A and lora_B in the module."""
        return "lora_A", "lora_B"

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Two matrices whose product has the layout of the stored weight: lora_B and lora_A here.

        They change places where the weight is stored transposed.
        """
        return self.adapter_pair[1], self.adapter_pair[0]

    def adapted_sum(self, dtype: torch.dtype | None = None) -> Tensor:
        """weight + scaling · lora_B lora_A of all experts, computed under autograd.

        It has the weight's dtype, or ``dtype`` if the weight is packed.
        """
        weight = self._dense(dtype)
        left, right = (factor.to(weight.dtype) for factor in self._factors())
        with autocast_off(weight.device.type):
            add = torch.addmm if weight.dim() == 2 else torch.baddbmm
            return add(weight, left, right, alpha=self.scaling)

    def _dense(self, dtype: torch.dtype | None) -> Tensor:
        return self.weight

    def _device(self) -> torch.device:
        return self.weight.device

    def check_adapter(self, name: str) -> None:
        """Raise ValueError unless lora_A and lora_B have the weight's shape, and its device.

        torch adds a meta tensor, which has no numbers, to any other without an error.
        """
        device = self._device()
        if device.type == "meta":
            raise ValueError(f"{name} can't be merged: its weight is on meta, {UNLOADED}")
        labels, shapes = self.pair_names(), self.adapted_features.shapes(self.r)
        for label, shape in zip(labels, shapes, strict=True):
            tensor: Any = getattr(self.adapted_module, label, None)
            if not isinstance(tensor, Tensor):
                reason = f"is {shown(tensor)}, but must be a tensor {list(shape)}"
            elif tensor.shape != shape:
                reason = f"has shape {tuple(tensor.shape)}, but must be {list(shape)}"
            elif tensor.device != device:
                reason = f"is on {tensor.device}, but the weight is on {device}: move it there"
            else:
                continue
            raise ValueError(f"{name} can't be merged: its {label} {reason}")

    def use_merged(self, weight: Tensor, keep_base: bool = True, requantize: bool = True) -> float:
        """Replace the weight by ``weight``; with ``keep_base``, :meth:`unmerge` can undo it.

        ``requantize``: if the weight was packed, pack the merged one also.  Returns the relative
        error of that packing, 0 for a dense weight.
        """
        module, name = self.adapted_module, self.adapted_name
        module._bases[name] = getattr(module, name) if keep_base else None
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
        return 0.0

    def unmerge(self) -> None:
        """Put the original weight back: the same bits, and tied again if it was tied."""
        if not self.can_unmerge:
            raise ValueError("the layer isn't merged, or its base wasn't kept: nothing to restore")
        self.adapted_module.put_back(self.adapted_name)

    @property
    def merged(self) -> bool:
        return self.adapted_name in self.adapted_module._bases

    @property
    def can_unmerge(self) -> bool:
        """Whether it is merged and its base was kept."""
        return self.adapted_module._bases.get(self.adapted_name) is not None


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def wide_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of an adapter of at least 32 bits for this weight, which may be packed."""
    if not isinstance(weight, Tensor) or weight.element_size() < 4:
        return torch.float32
    return weight.dtype


def new_adapter(
    weight: Tensor,
    r: int,
    init_lora_weights: bool | str = True,
    dtype: torch.dtype | None = None,
    features: Features | None = None,
) -> Pair:
    """New lora_A and lora_B for a weight [out, in], or for a weight of these ``features``.

    They have the weight's dtype, or ``dtype``.  ``init_lora_weights``: True (lora_A
    kaiming-uniform, lora_B zero, so that outputs don't change), "gaussian" (lora_A from N(0, 1/r²),
    lora_B zero), or False (lora_B also random).
    """
    shapes = (features or Features(1, *weight.shape[::-1])).shapes(r)
    how: Any = {"device": weight.device, "dtype": dtype or weight.dtype}
    lora_a, lora_b = (nn.Parameter(torch.empty(shape, **how)) for shape in shapes)
    if init_lora_weights == "gaussian":
        nn.init.normal_(lora_a, std=1 / r)
    else:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    if init_lora_weights is False:
        nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_b)
    return lora_a, lora_b
