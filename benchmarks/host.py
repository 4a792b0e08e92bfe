"""The host's time of a forward and a backward on a GPU, without a GPU: ``make bench ARGS=host``.

The Triton backend runs on tests/support/cuda_standin.py: layers have real sizes, because sizes
decide launches, and each launch runs down to the driver, which launches nothing.  PEFT's layer,
the base products and all other contestants are tiny and run on one thread, so that only calls
take time.  The row "trainer-step" is a step of transformers' Trainer: a Llama of 32 tiny layers.

``both`` is the measured CPU time of forward and backward, without the driver's time for launches.
``modeled`` is ``both`` plus ``LAUNCH`` for each launch of torch or Triton.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import cuda_standin
import torch

import fastlora
from fastlora.common.clock import HostClock, timed

from .blocks import TARGETS
from .cases import Case
from .contestants import lora_config
from .lineup import make_tensors, makers_for
from .measure import Step, in_turn, row_of, step_of, threads_for

LAUNCH = 3e-6  # seconds of the driver's part of a launch: assumed, not measured
TINY = ("peft", "frozen", "torch backend")  # contestants with tiny layers
REAL = ("fused", "in place", "fastlora")  # with layers of real sizes; "fastlora": default plan


def measure(case: Case, seconds: float) -> dict:
    """A row of results.  ``kernels`` counts the launches of a step: torch's, and Triton's."""
    clock = HostClock(torch.device("cpu"), time.process_time)
    steps: dict[str, Step] = {}
    kernels: dict[str, list[int]] = {}
    small = replace(case, M=2, K=8, outputs=(8,) * len(case.outputs), r=4, inner=8)

    def add(name: str, step: Step) -> None:
        with cuda_standin.counted() as launches:
            step()
        kernels[name] = [cuda_standin.torch_kernels(step), launches.total]
        steps[name] = with_modeled(step, sum(kernels[name]))

    with fastlora.use_backend("triton"), threads_for(case):
        if case.block == "step":
            for name in ("peft", "fastlora"):
                call = trainer_step(case, optimized=name == "fastlora")
                add(name, lambda call=call: {"both": timed(clock, call)})
        else:
            for each, names in ((small, TINY), (case, REAL)):
                tensors, makers = make_tensors(each, clock.device), makers_for(each)
                for name in filter(makers.__contains__, names):
                    contestant = makers[name](each, tensors, case.dropout)
                    add(name, step_of(each, contestant, tensors, clock))
        summary = in_turn(steps, seconds)
    return row_of(case, summary, kernels=kernels, failures={})


def trainer_step(case: Case, optimized: bool) -> Callable[[], None]:
    """The calls of Trainer's loop for one batch."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        hidden_size=case.K, intermediate_size=case.inner, num_hidden_layers=case.layers,
        num_attention_heads=4, vocab_size=99,
    )  # fmt: skip
    adapters = lora_config(case, case.dropout, **TARGETS["step"])
    model = get_peft_model(LlamaForCausalLM(config).to(case.dtype), adapters)
    if optimized:
        fastlora.optimize(model, strict=True)
    settings = TrainingArguments(tempfile.gettempdir(), use_cpu=True, report_to=[])
    trainer = Trainer(model, settings)
    trainer.current_gradient_accumulation_steps = 1  # set by the loop
    optimizer = trainer.accelerator.prepare(trainer.create_optimizer())
    ids = torch.zeros(2, case.M // 2, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}

    def step() -> None:
        trainer.training_step(model, batch)
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        trainer.floating_point_ops(batch)

    return step


def with_modeled(step: Step, launches: int) -> Step:
    def run() -> dict[str, float]:
        seconds = step()
        return seconds | {"modeled": seconds["both"] + LAUNCH * launches}

    return run
