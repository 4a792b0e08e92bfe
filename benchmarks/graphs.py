"""Steps as CUDA graphs, and memory's peak in one; clocks are fastlora's (``fastlora/clock.py``)."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of this call; without a GPU the call itself."""
    if not torch.cuda.is_available():
        return call
    call()  # compiles and allocates what a capture can't
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch has allocated at the worst moment of a step, beyond those before it.

    On a CPU its profiler tells of each; what libraries allocate by themselves isn't among them.
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
