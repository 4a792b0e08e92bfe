"""Each launch of a fused step timed alone, beside torch.mm of the base product it holds."""

import statistics

import torch

from fastlora.kernels.launch import Launch, intercept

from ..shapes import Case
from .candidates import Candidate, make_inputs
from .cases import DECODE
from .timing import Clock, digits, whole


def launches_of(case: Case, device: torch.device, candidate: Candidate) -> list[tuple[str, Launch]]:
    """("forward" or "backward", launch), in order; the records hold real tensors and can run."""
    inputs = make_inputs(case, device, 0)
    contestant = candidate.contestant(case, inputs, case.dropout)
    found: list[Launch] = []

    def note(record: Launch) -> None:
        found.append(record)
        record.run()

    with candidate.context(), intercept(note):
        if case.M <= DECODE:
            with torch.no_grad():
                contestant.outputs(inputs.x)
            forward = len(found)
        else:
            ys = contestant.outputs(inputs.x)
            forward = len(found)
            torch.autograd.grad(ys, [inputs.x, *contestant.adapter], inputs.dys)
    return [("forward" if i < forward else "backward", each) for i, each in enumerate(found)]


def measure(
    case: Case, clock: Clock, device: torch.device, candidate: Candidate, ceilings: dict, times: int
) -> dict:
    """A row of all launches.  ``ceilings``: flops and bytes a second that this device reached."""
    rows = []
    for direction, record in launches_of(case, device, candidate):
        work = record.work()
        seconds = _median(clock, record.run, times)
        moved = work.loaded + work.stored
        row = {
            "direction": direction,
            "kernel": record.name,
            "seconds": seconds,
            "flops": work.flops,
            "bytes": moved,
            "loaded_by_tiles": work.loaded_by_tiles,
            "grid": list(record.grid),
            "warps": record.warps,
            "stages": record.stages,
            "tflops": digits(work.flops / seconds / 1e12),
            "gbs": digits(moved / seconds / 1e9),
        }
        if ceilings:
            floor = max(work.flops / ceilings["flops"], moved / ceilings["bytes"])
            row["share_of_floor"] = digits(floor / seconds)
        depths = record.arguments.get("K")
        if record.name == "gemm_lowrank" and depths:
            row["mm_seconds"] = _mm_seconds(record, sum(depths), clock, device, times)
        rows.append(row)
    return {"id": case.id, "table": "gpu-launches", "launches": rows}


def _mm_seconds(record: Launch, depth: int, clock: Clock, device: torch.device, times: int):
    """The base product by torch, in the layout that the launch reads."""
    rows, columns = record.arguments["M"], record.arguments["N"]
    p = torch.randn(rows, depth, device=device).to(torch.bfloat16)
    q = torch.randn(columns, depth, device=device).to(torch.bfloat16).T
    if not record.arguments["Q_TRANSPOSED"]:
        q = q.contiguous()
    out = torch.empty(rows, columns, device=device, dtype=torch.bfloat16)
    return _median(clock, lambda: torch.mm(p, q, out=out), times)


def _median(clock: Clock, call, times: int) -> float:
    step = whole(call)
    clock.time(step)
    return digits(statistics.median(clock.time(step, flush=True)[0] for _ in range(times)))
