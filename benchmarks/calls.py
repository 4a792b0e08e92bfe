"""Times a launcher's call with several configs, and torch's operations; verifies each first."""

import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from dataclasses import asdict
from functools import partial

import torch

from fastlora.clock import clock_for, medians, wait_for
from fastlora.kernels import target_of
from fastlora.kernels.config import Config, candidates, default_config
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.plan import Plan, Row
from fastlora.kernels.target import Target, use_target

from .forms import Form, Operands
from .judge import checked
from .measure import digits
from .tree import last_error

_SECONDS, _ROUNDS = 15.0, 9  # seconds for compiling; rounds of timing
_KEPT = 5  # the most configs, and the most failures, that a result's row has


def reached(form: Form, device: torch.device, most: int = 1, pool: Executor | None = None) -> dict:
    """A row: the default tiles, or the best of ``most``; for a base product, a row of plans.

    A base product is compared with in place, in both orders, and with torch's product, which
    writes (mm) or adds (addmm).  Other calls are compared with a copy.  ``rates`` are the FLOPs of
    the base product, or else bytes, in 10¹² a second.  ``pool`` compiles in other processes, so
    that a crash there doesn't end the timing.
    """
    target, operands, stated = target_of(device), Operands(form, device), []
    default = default_config(form.kernel, target, form.call)
    listed = candidates(form.kernel, target, form.call)[:most]
    found = {str(config): config for config in listed}
    if pool:
        ended = ahead(pool, _SECONDS, _compile, [(form, target, each) for each in found.values()])
        found = {str(config): config for (*_, config), why in ended.items() if not why}
    ours = {name: partial(operands.run, config) for name, config in found.items()}
    if form.depths:
        out, p, q = operands.out, operands.ps[0], operands.qs[0]
        ours["in place"] = operands.run_in_place
        ours["in place, adapter last"] = partial(operands.run_in_place, adapter_first=False)
        theirs = {"mm": partial(torch.mm, p, q, out=out)}
        theirs["addmm"] = partial(torch.addmm, out, p, q, out=out)
        work = dict.fromkeys(ours | theirs, 2 * form.M * form.columns * sum(form.depths))
    else:
        source = torch.randn(form.M, form.columns, device=device).to(form.dtype)
        theirs = {"copy": partial(torch.empty_like(source).copy_, source)}
        with intercept(lambda launch: stated.append(launch.work())):
            operands.run(default)
        work = dict.fromkeys(ours, sum(each.loaded + each.stored for each in stated))
        work["copy"] = 2 * source.nbytes
    seconds, failures = _timed(operands, ours, theirs)
    best = min(found.keys() & seconds, key=seconds.__getitem__, default="none ran")
    kept = {*sorted(seconds, key=seconds.__getitem__)[:_KEPT], best, str(default)}
    kept = [name for name in seconds if name in kept or name not in found]
    row = {
        "table": "calls", "id": form.id, "seconds": {name: seconds[name] for name in kept},
        "rates": {name: digits(work[name] / seconds[name] / 1e12) for name in kept},
        "tried": len(found), "failures": dict([*failures.items()][:_KEPT]),
        "default": str(default), "best": best,
    }  # fmt: skip
    if form.depths:
        fused = seconds.get(best, math.inf) < seconds.get("in place", math.inf)
        plan = Plan(True, found[best]) if fused else Plan(False)
        call, depth = form.call, sum(form.depths)
        size = (call.m, call.n, depth, call.r, call.itemsize, call.masked, call.projections)
        row["plan"] = asdict(Row(target.device, *size, plan, form.name.startswith("dx")))
    return row


def _timed(operands: Operands, ours: dict[str, Callable], theirs: dict[str, Callable]) -> tuple:
    """The median time of each correct call, and the reason against each other one."""
    form, device, truth = operands.form, operands.device, operands.truth()
    clock, calls, failures = clock_for(device), dict(theirs), {}
    for name, call in ours.items():
        print(f"{form.id}: {name}", file=sys.stderr)  # for the log, if the process dies
        try:
            for tensor in call():
                tensor.fill_(float("nan"))  # shows elements that no kernel writes
            checked(zip(call(), truth, strict=True), form.dtype)
            calls[name] = call
        except Exception:
            failures[name] = last_error()
            wait_for(device)  # raises if the device is lost, and ends the run
    seconds = medians(clock, calls, _ROUNDS if device.type == "cuda" else 1)
    return {name: digits(each) for name, each in seconds.items()}, failures


def _compile(form: Form, target: Target, config: Config) -> None:
    """Compile the launches of this call without running them: its tensors are meta tensors."""
    with use_target(target), intercept(Launch.compile):
        Operands(form, "meta").run(config)


def ahead(pool: Executor | None, seconds: float, compiles: Callable, asked: Sequence) -> dict:
    """The error of each argument, or "", if its ``compiles`` ended in time."""
    futures = {pool.submit(compiles, *each): each for each in asked} if pool else {}
    done, late = wait(futures, timeout=seconds)
    for future in late:
        future.cancel()
    return {futures[each]: repr(each.exception()) if each.exception() else "" for each in done}
