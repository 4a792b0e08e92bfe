"""Rebuilds the exact bits of a 16-bit weight from a prediction of it, with few bits per weight.

A merge rounds weight + delta, so merged - delta, computed in float32, differs from the weight
mostly by less than two units in the last place.  Then the last two bits of the weight say which
number near the prediction it is.  Other weights are stored whole, with their places.  A trained
adapter needs 0.25 to 0.35 bytes for each weight; a copy needs 2.

Numbers are compared as the integers v = bits of float32 >> shift, which are exact for 16 bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..call.projection import is_plain
from ..common.row_blocks import slices

# Bits of float32's mantissa that the dtype lacks.
_SHIFTS = {torch.bfloat16: 16, torch.float16: 13}
# Elements of a block, so that temporaries stay in a core's cache.  A GPU would wait for launches.
_ON_CPU, _ON_OTHERS = 2**15, 2**24


class Corrections(NamedTuple):
    """The corrections of a weight of n elements, where m are far from their prediction."""

    bits: Tensor  # uint8 [⌈n / 4⌉]: the last two bits of four values v
    counts: Tensor  # int64 [⌈n / 2¹⁶⌉]: how many of the m are in each stretch of 2¹⁶ elements
    places: Tensor  # int16 [m]: the place in its stretch, minus 2¹⁵
    values: Tensor  # [m], in the weight's dtype
    total: Tensor  # int64 []: the sum of the weight's bits, to detect another prediction

    def rebuild(self, predicted: Tensor) -> Tensor:
        """The weight, flat.  ``predicted``: float32 [n], on any device.

        The prediction may differ by a quarter of a unit in the last place from the one that the
        corrections were made for.  Raises RuntimeError if it differs more.
        """
        bits, counts, places, values, total = (tensor.to(predicted.device) for tensor in self)
        shift = _SHIFTS[values.dtype]
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=bits.device)
        weight = torch.empty(predicted.shape, dtype=values.dtype, device=bits.device)
        for some in _blocks(predicted):
            four = bits[some.start // 4 : (some.stop + 3) // 4, None]
            last = (four >> shifts).flatten()[: some.stop - some.start]
            lowest = (predicted[some].view(torch.int32) >> shift).sub_(1)
            exact = lowest + (last - lowest).bitwise_and_(3)  # the one in lowest … lowest + 3
            weight[some] = (exact << shift).view(torch.float32)
        stretches = torch.arange(len(counts), dtype=torch.int64, device=bits.device)
        stretches = stretches.repeat_interleave(counts)
        # Summed from the left, in int64: places + 2¹⁵ would overflow int16.
        weight[stretches * 2**16 + places + 2**15] = values
        if not torch.equal(_total(weight), total):
            raise RuntimeError(
                "the weights before the merge can't be rebuilt, because merged weights, or their "
                "dtype, were changed: load the model again, and merge with keep='device'"
            )
        return weight


def corrections(weight: Tensor, predicted: Tensor) -> Corrections | None:
    """The corrections for a flat 16-bit weight and its prediction in float32.

    Returns None if the weight can't be rebuilt from them.
    """
    shift, parts, far = _SHIFTS[weight.dtype], [], []
    most = 7 << (shift - 2)  # 1.75 units; from 2 on, the last two bits are ambiguous
    for some in _blocks(weight):
        exact = weight[some].float().view(torch.int32)
        # The distance minus 1, because abs() leaves the smallest integer negative.
        distance = (exact - predicted[some].view(torch.int32)).abs_().sub_(1)
        far.append((distance >= most).nonzero().flatten() + some.start)
        last = (exact >> shift).to(torch.uint8).bitwise_and_(3)
        # Two bits of four values in a byte, the first value in the lowest bits.
        four = functional.pad(last, (0, -len(last) % 4)).view(-1, 4)
        parts.append(four[:, 0] | four[:, 1] << 2 | four[:, 2] << 4 | four[:, 3] << 6)
    index = torch.cat(far)
    counts = torch.bincount(index >> 16, minlength=1)
    places = ((index & (2**16 - 1)) - 2**15).short()
    made = Corrections(torch.cat(parts), counts, places, weight[index], _total(weight))
    try:
        rebuilt = made.rebuild(predicted)
    except RuntimeError:
        return None
    # As integers, because NaN != NaN, and -0.0 == 0.0.
    return made if torch.equal(rebuilt.view(torch.int16), weight.view(torch.int16)) else None


def has_corrections(weight: Tensor) -> bool:
    """Whether corrections can replace a copy of this weight."""
    fits = is_plain(weight) and weight.dtype in _SHIFTS and weight.numel() > 0
    return fits and weight.is_contiguous() and not weight.is_inference()


def _blocks(flat: Tensor) -> list[slice]:
    return list(slices(len(flat), _ON_CPU if flat.is_cpu else _ON_OTHERS))


def _total(weight: Tensor) -> Tensor:
    return weight.view(torch.int16).sum(dtype=torch.int64)
