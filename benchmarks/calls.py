"""A launcher's calls, judged and timed in turn: what they reach, which tiles and plan to choose."""

import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastlora.kernels import target_of
from fastlora.kernels.config import Config, candidates, default_config
from fastlora.kernels.launch import Launch, intercept, recorded
from fastlora.kernels.plan import Plan, Row
from fastlora.kernels.target import Target, use_target

from .clock import clock_for, timed, wait_for
from .forms import Form, Operands
from .judge import checked
from .measure import digits
from .tree import last_error

_SECONDS, _MOST = 15.0, 400  # of compiling for tuning; configs
_ROUNDS = 9


def products(forms: Sequence[Form], device: torch.device, pool: Executor | None) -> dict:
    """TFLOP/s of a y's base product over several depths, by whoever multiplies.

    ``mm`` writes its output, ``addmm`` adds to what is there.  No Triton product without an adapter
    is among them: "main loop" is what more depth costs the fused one, and the others.
    """
    calls, truths, work, ours = {}, {}, {}, ("fused", "in place", "in place, adapter last")
    for form in forms:
        operands = Operands(form, device)
        (p,), (q,), out, [k] = operands.ps, operands.qs, operands.out, form.depths
        runs = (operands.run, operands.run_in_place, partial(operands.run_in_place, False))
        calls |= {f"{name} k{k}": run for name, run in zip(ours, runs, strict=True)}
        truths |= dict.fromkeys(calls.keys() - work, operands.truth())
        calls |= {f"mm k{k}": partial(torch.mm, p, q, out=out)}
        calls |= {f"addmm k{k}": partial(torch.addmm, out, p, q, out=out)}
        work |= dict.fromkeys(calls.keys() - work, 2 * form.M * form.columns * k)
    row = _row("products", f"y m{form.M} n{form.columns}", calls, truths, work, device)
    low, *_, high = sorted(form.depths[0] for form in forms)
    for name in (*ours, "mm", "addmm"):
        ends, seconds = (f"{name} k{low}", f"{name} k{high}"), row["seconds"]
        if seconds.keys() >= set(ends):
            more = (work[ends[1]] - work[ends[0]]) / (seconds[ends[1]] - seconds[ends[0]])
            row["rates"][f"{name}, main loop"] = digits(more / 1e12)
    return row


def launches(form: Form, device: torch.device, pool: Executor | None) -> dict:
    """GB/s of what waits for memory, beside a copy's.  ``form`` says rows, columns and rank."""
    forms = [replace(form, name=name) for name in ("h", "dA", "dB,dh", "y+")]
    forms += [replace(form, name=name, dropout=0.1) for name in ("h", "dA", "dx+")]
    operands = {each.id: Operands(each, device) for each in forms}
    source = operands[form.id].v
    calls: dict[str, Callable] = {"copy": partial(torch.empty_like(source).copy_, source)}
    calls |= {name: partial(each.run, add=False) for name, each in operands.items()}
    truths = {name: each.truth() for name, each in operands.items()}
    work = {"copy": 2 * source.nbytes}
    return _row("launches", f"m{form.M} n{form.columns}", calls, truths, work, device)


def tune(form: Form, device: torch.device, pool: Executor | None) -> dict:
    """The best config beside the default, and of a base product the row for the plans.

    ``pool`` compiles into Triton's cache on disk, so that a crash there takes no timing along;
    without one, two configs are tried.
    """
    target, operands = target_of(device), Operands(form, device)
    default = default_config(form.kernel, target, form.call)
    configs = _listed(form, target, default)[: _MOST if pool else 2]
    tried = {
        str(each): each for each in (_compiled(configs, form, target, pool) if pool else configs)
    }
    calls: dict[str, Callable] = {name: partial(operands.run, each) for name, each in tried.items()}
    base_product, work = form.kernel == "gemm_lowrank", {}
    if base_product:
        calls["in place"] = operands.run_in_place
        work = dict.fromkeys(calls, 2 * form.M * form.columns * sum(form.depths))
    truths = dict.fromkeys(calls, operands.truth())
    row = _row("tune", form.id, calls, truths, work, device)
    seconds = row["seconds"]
    best = min(tried.keys() & seconds, key=seconds.__getitem__)
    row |= {"tried": len(tried), "default": str(default), "best": best}
    if base_product:
        fused = seconds[best] < seconds["in place"]
        plan = Plan(True, tried[best]) if fused else Plan(False)
        call, depth = form.call, sum(form.depths)
        size = (call.m, call.n, depth, call.r, call.itemsize, call.masked, call.projections)
        row["plan"] = repr(Row(target.name, *size, plan, form.name.startswith("dx")))
    kept = {best, str(default), "in place", *sorted(seconds, key=seconds.__getitem__)[:5]}
    for key in ("seconds", "rates"):
        row[key] = {name: value for name, value in row[key].items() if name in kept}
    row["failures"] = dict([*row["failures"].items()][:5])
    return row


def _row(
    table: str, name: str, calls: dict[str, Callable], truths: dict[str, list[Tensor]],
    work: dict[str, int], device: torch.device,
) -> dict:  # fmt: skip
    """Medians of rounds, and what is done in a second: ``work``, else bytes that a call states.

    A call that is wrong or raises has no time; the reason is in ``failures``.
    """
    failures, clock = {}, clock_for(device)
    laps: dict[str, list[float]] = {}
    for each, call in calls.items():
        print(f"{table} {name}: {each}", file=sys.stderr)  # the last words of a process that dies
        try:
            if each in truths:
                for tensor in call():
                    tensor.fill_(float("nan"))  # what no kernel writes shows
                checked(zip(call(), truths[each], strict=True), torch.bfloat16)
            work[each] = work.get(each) or _stated(call)
            laps[each] = []
        except Exception:
            failures[each] = last_error()
            wait_for(device)  # if the device is lost, nobody else can run
    for _ in range(_ROUNDS):
        for each, found in laps.items():
            found.append(timed(clock, calls[each]))
    seconds = {each: digits(statistics.median(found)) for each, found in laps.items()}
    rates = {each: digits(work[each] / seconds[each] / 1e12) for each in seconds}
    return {"table": table, "id": name, "seconds": seconds, "rates": rates, "failures": failures}


def _stated(call: Callable[[], object]) -> int:
    """Bytes of all launches of a call; it runs."""
    with recorded() as records:
        call()
    return sum(work.loaded + work.stored for work in (record.work() for record in records))


def _listed(form: Form, target: Target, default: Config) -> list[Config]:
    """The default and its neighbours first; no tiles that are far too large."""

    def distance(config: Config) -> int:
        return sum(getattr(config, name) != getattr(default, name) for name in vars(default))

    found = sorted(candidates(form.kernel, target, form.call), key=distance)
    suited = [each for each in found if getattr(each, "block_m", 0) <= max(64, 2 * form.M)]
    return list(dict.fromkeys([default, *suited]))


def _compiled(configs: list[Config], form: Form, target: Target, pool: Executor) -> list[Config]:
    """Those that are compiled when the time is over."""
    futures = [pool.submit(_compile, form, target, config) for config in configs]
    done, late = wait(futures, timeout=_SECONDS)
    for future in late:
        future.cancel()
    pairs = zip(configs, futures, strict=True)
    return [config for config, each in pairs if each in done and each.exception() is None]


def _compile(form: Form, target: Target, config: Config) -> None:
    """What this call would launch is compiled and not launched: its tensors are meta tensors."""
    with use_target(target), intercept(Launch.compile):
        Operands(form, "meta").run(config)
