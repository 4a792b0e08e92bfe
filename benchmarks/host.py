"""The host's time of a forward and a backward on a GPU, without a GPU: ``make bench ARGS=host``.

The Triton backend runs on tests/support/cuda_standin.py: layers have real sizes, because sizes
decide launches, and each launch runs down to the driver, which launches nothing.  PEFT's layer,
the base products and all other contestants are tiny and run on one thread, so that only calls
take time.

``both`` is the measured CPU time of forward and backward, without the driver's time for launches.
``modeled`` is ``both`` plus ``LAUNCH`` for each launch of torch or Triton.
"""

import time
from dataclasses import replace

import cuda_standin
import torch

import fastlora
from fastlora.common.clock import HostClock

from .cases import Case
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
    with fastlora.use_backend("triton"), threads_for(case):
        for each, names in ((small, TINY), (case, REAL)):
            tensors, makers = make_tensors(each, clock.device), makers_for(each)
            for name in filter(makers.__contains__, names):
                contestant = makers[name](each, tensors, case.dropout)
                step = step_of(each, contestant, tensors, clock)
                with cuda_standin.counted() as launches:
                    step()
                kernels[name] = [cuda_standin.torch_kernels(step), launches.total]
                steps[name] = with_modeled(step, sum(kernels[name]))
        summary = in_turn(steps, seconds)
    return row_of(case, summary, kernels=kernels, failures={})


def with_modeled(step: Step, launches: int) -> Step:
    def run() -> dict[str, float]:
        seconds = step()
        return seconds | {"modeled": seconds["both"] + LAUNCH * launches}

    return run
