"""The passes over a block of logits: each row's cross-entropy, and its gradient in their place.

:mod:`.loss` has the formulas.
"""

import torch
from torch import Tensor

from .products import SCRATCH
from .protocol import LossSettings

# Bytes of float32 that the passes over a block of z see on a CPU.  2 MiB stay in the L2 cache: the
# passes take 0.2 of their time with 128 MiB.
_BLOCK = 2**21


def row_loss(
    z: Tensor,
    target: Tensor,
    losses: Tensor,
    settings: LossSettings,
    upstream: Tensor | None,
    gradient: bool,
) -> None:
    """Fill the row losses by torch's operations, in blocks of rows that stay in the L2 cache."""
    step = max(1, _BLOCK // (z.shape[1] * losses.element_size()) if z.is_cpu else len(z))
    for first in range(0, len(z), step):
        rows = slice(first, first + step)
        row_upstream = None if upstream is None else upstream[rows, None]
        _block_loss(z[rows], target[rows, None], losses[rows], settings, row_upstream, gradient)


def _block_loss(
    z: Tensor,
    target: Tensor,
    losses: Tensor,
    settings: LossSettings,
    upstream: Tensor | None,
    gradient: bool,
) -> None:
    smoothing, softcap, logit_scale, z_loss = settings
    if z.is_cpu:
        logits = SCRATCH.take("logits", z.shape[0], z.shape[1], losses.dtype).copy_(z)
    else:
        logits = z.to(losses.dtype, copy=True)
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    logprob = torch.log_softmax(logits, -1)  # [rows, V]
    of_target = logprob.gather(1, target)  # [rows, 1]
    loss = -of_target
    if smoothing:
        loss = (1.0 - smoothing) * loss - smoothing * logprob.mean(-1, keepdim=True)
    if z_loss:
        lse = logits.amax(-1, keepdim=True) - logprob.amax(-1, keepdim=True)
        loss = loss + z_loss * lse.square()
    losses.copy_(loss.squeeze(1))
    if not gradient:
        return
    g = logprob.exp_()
    if z_loss:
        g.mul_(1.0 + 2.0 * z_loss * lse)
    if smoothing:
        g.sub_(smoothing / z.shape[1])
    g.scatter_add_(1, target, g.new_full(target.shape, smoothing - 1.0))
    if softcap is not None:  # tanh' = 1 - tanh²
        g.mul_(logits.div_(softcap).square_().neg_().add_(1.0))
    if logit_scale != 1.0:
        g.mul_(logit_scale)
    if upstream is not None:
        g.mul_(upstream)
    z.copy_(g)
