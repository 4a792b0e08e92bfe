"""Functions of torch that give a number for each row of lazy logits, without computing the logits.

``gather`` then ``logsumexp`` is how TRL's ``selective_log_softmax`` computes float32
log-probabilities; Σ exp(logp) · logp is its entropy.  A handler is described in
:mod:`.logits_functions`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formats.format import Quantized
from ..ops.row_values import loss_and_target_logit, reduced
from .logits import HANDLERS, STEPS, LazyLogits
from . import logits_functions as lf

def gather(lazy, dim, index):
    recipe, settings = lazy.recipe, lazy.recipe.settings()
    if recipe.is_logprob:
        return lf._gather(lazy, dim, index)
    if not lf._is_last(lazy, dim) or settings is None or isinstance(recipe.head.output.base.weight, Quantized):
        return NotImplemented
    if not isinstance(index, Tensor) or index.shape != (*lazy.shape[:-1], 1) or index.dtype != torch.int64:
        return NotImplemented
    lazy.call.check()
    with lf.autocast_off(lazy.device.type):
        head = recipe.head if lazy.requires_grad else recipe.of_tensors(Tensor.detach).head
        loss, z = loss_and_target_logit(head, index.squeeze(-1), settings)
    s = z.to(recipe.dtype)
    for name, *number in recipe.steps:
        s = STEPS[name](s, *number)
    lazy.recipe = recipe._replace(lse=loss.to(s.dtype)+s)
    return s.unsqueeze(-1)
