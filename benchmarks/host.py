"""What a forward and a backward on a GPU cost the host, without a GPU: ``make bench ARGS=host``.

The Triton backend runs on tests/support/cuda_standin.py: layers of real sizes, for these decide
launches, and every call down to the driver, which launches nothing.  All else is tiny, on one
thread, so that only calls take time: PEFT's layer, base products, the others.

To the measured ``both`` comes a modeled one: on a GPU each of torch's kernels costs the host some
3 µs more.  What nobody adds: the look-up of device and stream, the driver's part of a launch.
"""

from dataclasses import replace

import cuda_standin
import torch

import fastlora
from fastlora.clock import HostClock

from .cases import Case
from .lineup import make_tensors, makers_for
from .measure import Step, in_turn, row_of, step_of, threads_for

TINY = ("peft", "frozen", "torch backend")
# The last is by the default plan; of a block it is PEFT's, optimized.
REAL = ("peft, optimized", "fused", "in place", "fastlora")


def measure(case: Case, seconds: float) -> dict:
    """A row.  ``kernels`` of a step: torch's, and Triton's."""
    clock, steps, kernels = HostClock(torch.device("cpu")), {}, {}
    # A group's layers, optimized, would really sum their large dx.
    real = REAL[1:] if len(case.outputs) > 1 and not case.is_block else REAL
    small = replace(case, M=2, K=8, outputs=(8,) * len(case.outputs), r=4, inner=8)
    with fastlora.use_backend("triton"), threads_for(case):
        for each, names in ((small, TINY), (case, real)):
            tensors, makers = make_tensors(each, clock.device), makers_for(each)
            for name in filter(makers.__contains__, names):
                contestant = makers[name](each, tensors, case.dropout)
                step = step_of(each, contestant, tensors, clock)
                with cuda_standin.counted() as launches:
                    step()
                products = cuda_standin.torch_kernels(step)
                kernels[name] = [products, launches.total]
                steps[name] = with_modeled(step, products)
        summary = in_turn(steps, seconds)
    return row_of(case, summary, kernels=kernels, failures={})


def with_modeled(step: Step, kernels: int) -> Step:
    def run() -> dict[str, float]:
        seconds = step()
        return seconds | {"modeled": seconds["both"] + 3e-6 * kernels}

    return run
