"""What a forward and a backward on a GPU cost the host, without a GPU: ``make bench ARGS=host``.

The Triton backend runs on tests/support/cuda_standin.py: layers of real sizes, since these decide
what is launched, and every call down to the driver, which launches nothing.  All else is tiny and
on one thread, so that Python, autograd and torch's dispatch are what takes time: PEFT's layer (with
adapters in x's dtype: it casts nothing), the frozen layer, the torch backend, base products.

No time is added for what isn't there.  On a GPU each of torch's kernels costs the host 2 to 3 µs
more than this CPU's, the Triton backend looks up device and stream, and the driver has its part of
a launch.  Nothing is judged, since nothing runs.
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
REAL = ("fused", "in place", "peft, optimized", "fastlora")  # the last: by the default plan


def measure(case: Case, run: Callable[[Rounds], None]) -> dict:
    """A row.  ``kernels`` of a step: torch's of the tiny layers, Triton's of the real ones."""
    clock, steps, kernels = HostClock(torch.device("cpu")), {}, {}
    small = replace(case, M=2, K=8, outputs=(8,) * len(case.outputs), r=4, dtype=F32)
    with fastlora.use_backend("triton"), threads_for(case):
        for each, names in ((small, TINY), (case, REAL)):
            tensors = make_tensors(each, clock.device)
            for name in names:
                contestant = makers_for(each)[name](each, tensors, case.dropout)
                step = steps[name] = step_of(each, contestant, tensors, clock)
                with cuda_standin.counted() as counted, cuda_standin.TorchKernels() as by_torch:
                    step()
                kernels[name] = by_torch.count if each is small else counted.launches.total()
        rounds = Rounds(steps)
        run(rounds)
    return row_of(case, rounds.summary(), kernels=kernels, failures={})
