"""Steps as CUDA graphs, and the peak memory of a step; fastlora.common.clock has the clocks."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of this call; without a GPU, the call itself."""
    if not torch.cuda.is_available():
        return call
    call()  # compiles and allocates, which a capture can't do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """torch's peak allocation within a step, in bytes, without the allocations before the step.

    On a CPU, torch's profiler reports each allocation; allocations by libraries aren't included.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
