"""torch.optim and activation checkpointing with optimised models."""

from functools import partial

import pytest
import torch
from judge import saved_bytes
from peft_llama import DATA, LAYERS, NOT_REENTRANT, REENTRANT, ROUNDING, gradients, llama, trained
from peft_models import assert_runs_the_same, assert_same, optimized
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from fastlora.peft.baseline import shared_masks

# Keeps what attention gives, as TRL's selective checkpointing does.
SELECTIVE = {
    "use_reentrant": False,
    "context_fn": partial(
        create_selective_checkpoint_contexts,
        [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default],
    ),
}
CHECKPOINTING = {"reentrant": REENTRANT, "not-reentrant": NOT_REENTRANT, "selective": SELECTIVE}


def kept(model: nn.Module) -> int:
    """Bytes that wait for the backward of the loss in training, but parameters."""
    return sum(saved_bytes(lambda: model.train()(**DATA).loss, model.parameters()).values())


@pytest.mark.parametrize("how", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointed_blocks_run_fast_twice_and_keep_less(how):
    theirs = llama(use_dora=how is REENTRANT)
    ours, plain = optimized(theirs), optimized(theirs)
    for model in (theirs, ours):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    got = assert_runs_the_same(gradients, theirs, ours, fast=2 * LAYERS, tolerance=ROUNDING)
    assert_same(got, gradients(plain), 0.0)  # the same masks again
    assert kept(ours) < 0.5 * kept(plain)
    assert kept(ours) == kept(theirs)


def test_an_optimizer_s_step_inside_of_backward():
    """Parameters change while the layers below wait for their backward."""

    def run(model):
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in trained(model).values()}

        def step(parameter):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in optimizers:
            parameter.register_post_accumulate_grad_hook(step)
        torch.manual_seed(7)
        with shared_masks(model.train()):
            for _ in range(3):
                model(**DATA).loss.backward()
        return {name: p.detach() for name, p in trained(model).items()}

    assert_runs_the_same(run, llama(), fast=3 * LAYERS, tolerance=ROUNDING)
