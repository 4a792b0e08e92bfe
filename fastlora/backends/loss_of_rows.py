"""Each row's cross-entropy, and its gradient written over the logits, by torch's operations.

:mod:`.loss` has the formulas.
"""

import torch

from ..common.row_blocks import slices
from .products import Scratch
from .protocol import LossRows

SCRATCH = Scratch()
# Bytes of a block of z in float32 on a CPU.  2 MiB stay in the L2 cache, so the operations take
# 0.2 × the time that they take on a block of 128 MiB.
_BLOCK = 2**21


def row_loss(rows: LossRows) -> None:
    """See :meth:`Backend.row_loss`; computed block by block, so that each stays in the L2 cache."""
    z, count = rows.z, len(rows.z)
    step = _BLOCK // (z.shape[1] * rows.losses.element_size()) if z.is_cpu else count
    for some in slices(count, step):
        _block_loss(rows.part(some))


def _block_loss(rows: LossRows) -> None:
    z, target, losses, (smoothing, softcap, logit_scale, z_loss), upstream, gradient = rows
    target = target.unsqueeze(1)  # [rows, 1]
    if z.is_cpu:
        logits = SCRATCH.take("logits", z.shape[0], z.shape[1], losses.dtype).copy_(z)
    else:
        logits = z.to(losses.dtype, copy=True)
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    logprob = torch.log_softmax(logits, -1)  # [rows, V]
    loss = -logprob.gather(1, target)  # [rows, 1]
    if smoothing:
        loss = (1.0 - smoothing) * loss - smoothing * logprob.mean(-1, keepdim=True)
    if z_loss:
        # logprob = s - lse, also for the largest s of a row.
        lse = logits.amax(-1, keepdim=True) - logprob.amax(-1, keepdim=True)
        loss = loss + z_loss * lse.square()
    losses.copy_(loss.squeeze(1))
    if not gradient:
        return
    # d loss / d s = p · (1 + 2 z_loss · lse) - smoothing / V - (1 - smoothing) · onehot(target)
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
        g.mul_(upstream.unsqueeze(1))
    z.copy_(g)
