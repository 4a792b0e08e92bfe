"""The cross-entropy of each row of logits, and its gradient, which overwrites the logits."""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .common import cast
from .config import LONGEST
from .launch import Launch, Work, launch, size_of, stated

# A program computes one row with 512 threads.  Each thread has 8 columns of a block: one load of
# 16 bytes, if z has 16 bits.  With so many threads for a row, few rows run at a time, and the L2
# cache may still hold a row when its second pass begins.
_BLOCK, _WARPS = 4096, 16


def _work_of(arguments: Mapping[str, Any]) -> Work:
    z, written = arguments["z"], arguments["z"] if arguments["GRADIENT"] else None
    loaded = size_of(z, arguments["target"], arguments["upstream"])
    again = size_of(z[:, :1], written)  # the target's logit, and the second pass
    # The FLOPs are an estimate.
    return Work(15 * z.numel(), loaded, size_of(arguments["losses"], written), loaded + again)


@triton.jit(launch_metadata=stated(_work_of))
def row_loss_kernel(
    z, target, upstream, losses,
    V, row_stride,
    logit_scale, softcap, smoothing, z_loss,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LOSS = (1 - smoothing) (lse - s_t) + smoothing (lse - mean s) + z_loss lse²; Z = dLOSS / dZ.

    Z [M, V]; TARGET, UPSTREAM and LOSSES [M].  s [V] is a row of Z after scale and softcap
    (:func:`_logits`), lse = log Σ exp s, and t is the row's TARGET.  If GRADIENT, Z is overwritten
    with its gradient, times the row's UPSTREAM, unless that is None.  If t isn't a column, the
    row's results are NaN.
    """
    i_row = tl.program_id(0).to(tl.int64)  # a matrix may have over 2³¹ elements
    z += i_row * row_stride
    i_target = tl.load(target + i_row)
    is_column = (i_target >= 0) & (i_target < V)
    # Loaded before the reductions, because another warp may overwrite this logit in pass 2.
    of_target = _logits(tl.load(z + i_target, mask=is_column, other=0.0), logit_scale, softcap)[0]
    # Pass 1: for each of the BLOCK columns of a step, over the steps so far: the largest s,
    # Σ exp(s - largest) and Σ s, in float32.
    b_largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    b_total = tl.zeros((BLOCK,), tl.float32)
    for i_column in range(0, V, BLOCK):
        o_column = i_column + tl.arange(0, BLOCK)
        b_z = tl.load(z + o_column, mask=o_column < V, other=0.0)  # [BLOCK]
        b_s = _logits(b_z, logit_scale, softcap)[0]
        b_total += tl.where(o_column < V, b_s, 0.0)
        b_s = tl.where(o_column < V, b_s, float("-inf"))
        b_new = tl.maximum(b_largest, b_s)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf would be NaN
        b_sum = b_sum * tl.exp(b_largest - b_shift) + tl.exp(b_s - b_shift)  # NaN stays NaN
        b_largest = b_new
    largest = tl.where(is_column, tl.max(b_largest, 0), float("nan"))
    total = tl.sum(b_sum * tl.exp(b_largest - largest), 0)  # Σ exp(s - largest)
    lse = largest + tl.log(total)
    # Not lse - s_t: if ``largest`` is large, lse = largest + log(total) has lost digits of the log.
    loss = tl.log(total) + (1.0 - smoothing) * (largest - of_target) + z_loss * lse * lse
    # The mean of s is -inf if -inf masks a part of the vocabulary.  Without smoothing, 0 · -inf
    # would be NaN.
    loss += tl.where(smoothing == 0.0, 0.0, smoothing * (largest - tl.sum(b_total, 0) / V))
    tl.store(losses + i_row, loss)
    if GRADIENT:  # pass 2.  The reductions are barriers, so all warps have ended pass 1.
        factor = logit_scale
        if upstream is not None:
            factor *= tl.load(upstream + i_row)
        for i_column in range(0, V, BLOCK):
            o_column = i_column + tl.arange(0, BLOCK)
            b_z = tl.load(z + o_column, mask=o_column < V, other=0.0)  # [BLOCK]
            b_s, b_slope = _logits(b_z, logit_scale, softcap)
            b_g = tl.exp(b_s - largest) * ((1.0 + 2.0 * z_loss * lse) / total) - smoothing / V
            b_g = (b_g - tl.where(o_column == i_target, 1.0 - smoothing, 0.0)) * b_slope * factor
            tl.store(z + o_column, cast(b_g, z.dtype.element_ty), mask=o_column < V)


@triton.jit
def _logits(b_z, logit_scale, softcap):
    """Returns s and ds/du: s = u, or softcap · tanh(u / softcap), where u = logit_scale · z."""
    b_s, b_slope = b_z.to(tl.float32) * logit_scale, 1.0
    if softcap is not None:
        b_u = b_s / softcap
        b_uu = b_u * b_u
        b_q = 2.0 / (1.0 + tl.exp(2.0 * tl.abs(b_u)))  # 1 - tanh |u|
        # 1 - q loses digits if u is small.  Then the series of tanh is used.
        b_series = 0.13333333 + b_uu * (-0.053968254 + b_uu * 0.021869488)
        b_series = b_u + b_u * b_uu * (-0.33333333 + b_uu * b_series)
        b_s = softcap * tl.where(b_uu < 0.09, b_series, tl.where(b_u < 0.0, b_q - 1.0, 1.0 - b_q))
        b_slope = b_q * (2.0 - b_q)  # 1 - tanh², accurate also for a large u
    return b_s, b_slope


def row_loss(
    z: Tensor, target: Tensor, losses: Tensor, settings: tuple[float, float | None, float, float],
    upstream: Tensor | None, gradient: bool,
) -> None:  # fmt: skip
    """Fill ``losses`` float32 [M] for logits z [M, V] and classes ``target`` int64 [M].

    With ``gradient``, z becomes the gradient of each row's loss, times ``upstream`` [M], if given.
    The gradient is computed in float32 and rounded once.  z has 16 or 32 bits; its columns have
    stride 1, its rows any stride.  ``settings``: label smoothing, softcap or None, logit scale,
    z_loss.
    """
    assert z.shape[1] <= LONGEST
    smoothing, softcap, logit_scale, z_loss = settings
    arguments: dict[str, Any] = {
        "z": z, "target": target, "upstream": upstream if gradient else None, "losses": losses,
        "V": z.shape[1], "row_stride": z.stride(0), "GRADIENT": gradient, "BLOCK": _BLOCK,
        "logit_scale": float(logit_scale), "softcap": None if softcap is None else float(softcap),
        "smoothing": float(smoothing), "z_loss": float(z_loss),
    }  # fmt: skip
    launch(Launch(row_loss_kernel, (len(z),), arguments, warps=_WARPS, stages=1, work_of=_work_of))
