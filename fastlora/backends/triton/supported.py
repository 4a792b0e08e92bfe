"""Which calls the Triton kernels cover.  Only this module imports the kernels."""

import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...call.projection import Adapter, Layout, Output, named_tensors, unflatten
from ...formats.format import product_of
from ...formats.rotated_int8 import LONGEST_SUM

try:
    from ...kernels import launchers as kernels  # it lives in kernels/
except ImportError as error:
    root = __package__.partition(".")[0]
    why = f"{error}. Repair or remove the package triton, or set FASTLORA_BACKEND=torch"
    if find_spec(f"{root}.kernels") is None:
        why = f"{__file__} is in a source tree. Run elsewhere, or run pip install --editable ."
    raise ImportError(f"{root}.kernels can't be imported: {why}") from error

_COVERED = (torch.float16, torch.bfloat16, torch.float32)
LONGEST = kernels.LONGEST
_MOST_EXPERTS = 2**16 - 2  # a grid's y axis has 2¹⁶ - 1; one is for rows without an expert
# Views such as z.conj().imag: kernels read memory, which doesn't contain the minus sign.
_NEGATED = "a tensor is a negated view, whose resolve_neg() the Triton kernels could take"
_said: set[str] = set()
_INTERNAL = tuple(
    str(Path(file).parent) for file in (Path(__file__).parents[1], kernels.__file__, torch.__file__)
)


def why_not(dtype: torch.dtype, device: torch.device, outputs: Sequence[Output[Tensor]]) -> str:
    """Why the kernels don't cover x with this dtype on this device; "" if they do."""
    target = kernels.target_of(device)
    if target is None:
        if device.type == "cpu":
            return "on a CPU the Triton kernels run only under TRITON_INTERPRET=1"
        return f"the Triton kernels don't run on {device}"
    for output in outputs:
        weight = output.base.weight
        # 3 dimensions: the stacked weights of experts, [E, N, K].
        if weight.dim() == 3 and weight.shape[0] > _MOST_EXPERTS:
            return f"the Triton kernels have no grid for more than {_MOST_EXPERTS} experts"
        if product_of(weight) == "int8":
            if weight.dim() == 3:
                return "the Triton kernels have no 8-bit products of experts"
            if not target.int8:
                return f"{device} multiplies no int8 in tensor cores"
            if max(weight.shape) > LONGEST_SUM:
                return f"the Triton kernels sum up to {LONGEST_SUM} products of 8 bits"
        for _, tensor in named_tensors(output):
            if tensor is None:
                continue
            if tensor.dtype not in _COVERED:
                return f"the Triton kernels don't have {tensor.dtype}"
            if tensor.is_neg():
                return _NEGATED
            if max(tensor.shape) > LONGEST:
                return f"the Triton kernels count to {LONGEST}, but a tensor is longer"
    if dtype == torch.float32 and not target.float32:
        return f"{target.name} multiplies no float32 in tensor cores"
    return "" if dtype in _COVERED else f"the Triton kernels don't have {dtype}"


def covers(tensors: Sequence[Any], layouts: Sequence[Layout], *settings: object) -> bool:
    """Whether the kernels cover a call with these tensors: x, the outputs' tensors, and others.

    If not, warn once for each reason (except an empty x).
    """
    x, *rest = tensors
    if len(x) == 0:
        return False
    reason = why_not(x.dtype, x.device, unflatten(rest, layouts))
    if not reason and any(tensor is not None and tensor.is_neg() for tensor in tensors):
        reason = _NEGATED
    if not reason and len(x) > LONGEST:
        reason = f"the Triton kernels count to {LONGEST}, but x has {len(x)} rows"
    if reason and reason not in _said:
        _said.add(reason)
        warnings.warn(f"this call runs on the torch backend: {reason}", stacklevel=user_level())
    return not reason


def user_level() -> int:
    """The caller's ``stacklevel`` for a warning at the first line outside of fastlora and torch."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        level, frame = level + 1, frame.f_back
    return level + 1


def precision_of(x: Tensor) -> str:
    """The precision of float32 products, "tf32" or "ieee"; 16-bit dtypes ignore it."""
    target = kernels.target_of(x.device) if x.dtype == torch.float32 else None
    if target is None or not target.tf32:
        return "ieee"
    # The newest of torch's switches.  It follows the older ones; their getters would raise if this
    # one was used.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def empty_gradients(adapter: Adapter[Tensor], need: Adapter[bool]) -> Adapter[Tensor | None]:
    """A tensor for each gradient that is needed, to be filled."""
    return Adapter(
        empty_like(adapter.lora_a) if need.lora_a else None,
        empty_like(adapter.lora_b) if need.lora_b else None,
    )
