"""Fingerprints of a sweep's base, held-out data and data.

A resumed sweep compares them, so that it can't silently continue with other inputs.
"""

import math
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import PackedLayer, quantized_weight, vendor_of
from ..layers.experts import PackedWeight
from ..layers.modules import some

# By name of a tensor or batch: a digest of its bits, or values that are compared up to rounding.
Fingerprint = dict[str, str | list[float]]
FIRST = 8  # how many batches of the data are compared
_ELEMENTS = 1000  # a digest reads at least this many elements of a larger weight
_ROUNDING = 2**-7  # relative tolerance
_SEEDED = " (what a loader draws must come from torch)"
_WHAT = {
    "base": ("is of another model, whose base weights differ", ""),
    "eval_data": ("had other held-out data (eval_data)", _SEEDED),
    "data": ("had other data", _SEEDED),
}


def of_batch(batch: Mapping[str, Tensor]) -> str:
    """A digest of all tensors of a batch and their names."""
    words = [f"{name} {_digest(batch[name], all_of_it=True)}" for name in sorted(batch)]
    return blake2b(" ".join(words).encode(), digest_size=8).hexdigest()


def of_batches(batches: Iterable[Mapping[str, Tensor]]) -> Fingerprint:
    return {f"batch {number}": of_batch(batch) for number, batch in enumerate(batches, 1)}


@torch.no_grad()
def of_base(model: nn.Module) -> Fingerprint:
    """A digest of some elements of each weight.

    For a vendor's packed layer it holds the values of a row instead, because a call may rearrange
    the packed bits.  For a weight on meta or of a tensor subclass (sharded), only the shape and
    dtype count.
    """
    digests: Fingerprint = {}
    for name, module in model.named_modules():
        vendor = vendor_of(module)
        tensors: Mapping[str, Tensor | None] = module._parameters
        if isinstance(module, PackedWeight):
            tensors = module._buffers
        for parameter, tensor in tensors.items():
            if tensor is not None and parameter not in (vendor.PARTS if vendor else ()):
                digests[f"{name}.{parameter}".lstrip(".")] = _digest(tensor)
        if vendor:
            digests[f"{name}.weight".lstrip(".")] = _some_of_a_row(module)
    return digests


def check_same(
    before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint], path: Path
) -> None:
    """Raise ValueError if a part differs from the sweep in ``path``; the message names it.

    For data, only batches that both runs have read are compared.  An empty ``before`` passes.
    """
    # Data may be read further in one run than in the other; other parts must match completely.
    for part, new in now.items() if before else ():
        old, (what, hint) = before[part], _WHAT[part]
        names = [n for n in {**old, **new} if part != "data" or (n in old and n in new)]
        unlike = [name for name in names if not _alike(old.get(name), new.get(name))]
        if unlike:
            raise ValueError(
                f"the sweep to resume, {path}, {what}, in {some(unlike)}: give the same{hint}, "
                "another output_dir, or replace=True in place of resume"
            )


def _alike(one: Any, other: Any) -> bool:
    if not (isinstance(one, list) and isinstance(other, list)):
        return one == other
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=_ROUNDING) for a, b in zip(one, other, strict=True)
    )


def _digest(tensor: Tensor, all_of_it: bool = False) -> str:
    """A digest of the shape, the dtype, and all elements or an evenly spaced sample."""
    digest = blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=8)
    if all_of_it or (type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta):
        flat = tensor.detach().flatten()
        if not all_of_it:  # the step is odd, so that a sample isn't a single column of a weight
            flat = flat[:: (len(flat) // _ELEMENTS - 1) | 1] if len(flat) > _ELEMENTS else flat
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _some_of_a_row(layer: nn.Module) -> list[float]:
    """A vendor layer's shape and dequantized values of its middle row; [] if it can't be read."""
    # Reading needs grad mode where an earlier call in evaluation has rearranged the packed weight.
    with torch.enable_grad():
        packed = quantized_weight(layer)
    if not isinstance(packed, PackedLayer) or not packed.is_whole:
        return []
    if packed.weight.device.type == "meta":
        return []
    rows, columns = packed.weight.shape
    out = torch.empty(1, columns, dtype=torch.float32, device=packed.weight.device)
    row = packed.weight.read(rows // 2, out)[0].nan_to_num()
    return [float(rows), float(columns), *row[:: columns // 32 or 1].tolist()]
