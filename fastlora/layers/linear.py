"""LoRALinear, and the classes of adapted layers for other kinds of linear layer."""

from typing import Any

import torch
from torch import Tensor, nn

from ..formats import vendor_of
from ..projection import Output
from ..settings import check_settings, suggests_arguments, warn_of
from . import frozen
from .adapted import LoRALayer, refuse_training, run_with
from .adapted_weight import new_adapter
from .classes import class_over, twin
from .frozen import is_conv1d, matrix_of, why_not_base, why_not_class
from .quantized import LoRAQuantized


@suggests_arguments
class LoRALinear(LoRALayer, nn.Linear):
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

    A layer has one adapter; use PEFT for several.  Raises ValueError for a rank below 1 or a
    dropout outside [0, 1).  Warns of a lora_alpha of 0, and of a rank above both sizes.  A call
    raises the errors of :func:`fastlora.lora_linear`.  Arguments that ``nn.Linear`` also has are
    passed on to it unchecked.
    """

    plain_class = nn.Linear

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
    ) -> Any:
        """A LoRALinear that shares, and freezes, ``linear``'s weight and bias.

        The adapter has the weight's dtype.  For a vendor's quantized layer (docs/quantized.md) the
        result is a layer of the vendor's class, with a float32 adapter.  Raises ValueError for any
        other layer.
        """
        check_settings(r, lora_alpha, lora_dropout, use_rslora)
        reason = why_not_base(linear)
        if reason or not isinstance(linear, nn.Linear):
            reason = reason or "it is no torch.nn.Linear: apply_lora adapts it in place"
            raise ValueError(f"the layer can't take an adapter: {reason}")
        adapter = new_adapter(matrix_of(linear), r)
        warn_of(lora_alpha, r, tuple(matrix_of(linear).shape))
        if vendor_of(linear) is not None:
            layer = twin(linear, adapted_class(type(linear), quantized=True))
        else:
            sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
            layer = cls(*sizes, bias=False, r=1, device="meta", dtype=dtype).train(linear.training)
            layer.weight, layer.bias = linear.weight, linear.bias
        layer.attach_adapter(adapter, lora_alpha, lora_dropout, use_rslora)
        return layer


class _LoRATransposed(LoRALayer):
    """An adapted Conv1D of transformers, whose weight is [in, out]."""

    shape: Any = property(lambda self: (self.nf, self.nx))

    def adapted_output(self) -> Output:
        return self.output_over(self.weight.t())

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.t(), self.lora_B.t()


class _LoRARouter(LoRALayer):
    """An adapted router of a mixture.

    Its own forward runs with weight + scaling · lora_B lora_A.  There is no dropout, as in PEFT.
    """

    why_not_fast = "a router's own forward runs, with weight + scaling · lora_B lora_A"

    shape: Any = property(lambda self: tuple(self.weight.shape))

    def forward(self, *args: Any, **named: Any) -> Any:
        run = super(LoRALayer, self).forward
        if self.merged:
            refuse_training(self)
            return run(*args, **named)
        return run_with(self, {"weight": self.adapted_sum()}, run, args, named)


def adapted_class(kind: type[nn.Module], quantized: bool = False) -> type[LoRALayer]:
    """The class of an adapted layer for a base of class ``kind``.

    ``quantized``: the base is a vendor's layer, whose class may be torch's nn.Linear.
    """
    if quantized:
        return class_over(LoRAQuantized, kind)
    if kind in (nn.Linear, frozen.Linear):
        return LoRALinear
    if is_conv1d(kind):
        return class_over(_LoRATransposed, kind)
    return class_over(_LoRARouter if why_not_class(kind) else LoRALinear, kind)
