"""What a forward and a backward on a GPU cost the host, without a GPU: ``make bench ARGS=host``.

The Triton backend runs on tests/support/cuda_standin.py: layers of real sizes, for these decide
launches, and every call down to the driver, which launches nothing.  All else is tiny, on one
thread, so that only calls take time: PEFT's layer (it casts nothing), base products, the others.

No time is added for what isn't there.  On a GPU each of torch's kernels costs the host 2 to 3 µs
more (three of dropout's are one there), the Triton backend looks up device and stream, and the
driver has its part of a launch.  Nothing is judged, since nothing runs.
"""

from collections.abc import Callable
from dataclasses import replace

import cuda_standin
import torch

import fastlora

from .cases import F32, Case
from .clock import HostClock
from .contestants import make_tensors, makers_for
from .measure import Rounds, row_of, step_of, threads_for

TINY = ("peft", "frozen", "torch backend")
# The last is by the default plan.  Optimized layers of one x would really sum their large dx.
REAL = ("peft, optimized", "fused", "in place", "fastlora")


def measure(case: Case, run: Callable[[Rounds], None]) -> dict:
    """A row.  ``kernels`` of a step: torch's of the tiny layers, Triton's of the real ones."""
    clock, steps, kernels = HostClock(torch.device("cpu")), {}, {}
    small = replace(case, M=2, K=8, outputs=(8,) * len(case.outputs), r=4, dtype=F32)
    with fastlora.use_backend("triton"), threads_for(case):
        for each, names in ((small, TINY), (case, REAL[len(case.outputs) > 1 :])):
            counting = cuda_standin.TorchKernels if each is small else cuda_standin.counted
            tensors = make_tensors(each, clock.device)
            for name in names:
                contestant = makers_for(each)[name](each, tensors, case.dropout)
                steps[name] = step_of(each, contestant, tensors, clock)
                with counting() as found:
                    steps[name]()
                kernels[name] = found.total
        rounds = Rounds(steps)
        run(rounds)
    del kernels["torch backend"]  # counting sees its op alone
    return row_of(case, rounds.summary(), kernels=kernels, failures={})
