"""The best tiles for a launcher's call, and who multiplies: rows for kernels/plan.py."""

import statistics
import sys
from concurrent.futures import Executor, wait
from dataclasses import replace
from functools import partial

import torch

from fastlora.kernels import one_launch_pays, one_pass_pays, target_of
from fastlora.kernels.config import Config, candidates, default_config
from fastlora.kernels.launch import Launch, intercept, recorded
from fastlora.kernels.plan import Plan, Row
from fastlora.kernels.target import TARGETS, Target, use_target

from .cases import Case
from .clock import Clock, clock_for, timed, wait_for
from .forms import Form, Operands
from .judge import checked
from .measure import digits, ratios
from .tree import last_error

_SECONDS = 15.0  # of compiling
_MOST, _ROUNDS = 400, 5  # configs that are tried, and how often
_FINALISTS, _LAST = 3, 15


def forms_of(case: Case, device: torch.device) -> list[Form]:
    """The calls of a layer or a group, base products first: they take most of the time."""
    M, K, r, n = case.M, case.K, case.r, len(case.outputs)
    shared = {"dtype": case.dtype, "adapter_dtype": case.adapter_dtype}
    group = shared | {"dropout": case.dropout}
    with use_target(target_of(device) or TARGETS["interpreter"]), torch.device("meta"):
        x, dy = (torch.empty(M, columns, dtype=case.dtype) for columns in (K, case.outputs[0]))
        one_pass = one_pass_pays(dy, torch.empty(case.outputs[0], r), "ieee")
    y = "y,h" if case.decodes and one_launch_pays(x, r) else "y"
    ys = [Form(y, M, N, (r,), (K,), **shared) for N in dict.fromkeys(case.outputs)]
    h = Form("h", M, K, (r,) * n, **group)
    if case.decodes:
        return [*ys, h]
    dx = Form("dx", M, K, (r,) * n, case.outputs, **group)
    d_b = Form("dB,dh" if one_pass else "dB", M, case.outputs[0], (r,), **shared)
    return [*ys, dx, d_b, replace(h, name="dA"), h]


def tune(form: Form, device: torch.device, pool: Executor | None) -> dict:
    """A row: the best config, its gain over the default, and for a base product the plan.

    A config that is wrong or raises has no time.  ``pool`` compiles into Triton's cache on disk,
    so that a crash there takes no timing along; without one, two configs are tried, once.
    """
    target, clock, operands = target_of(device), clock_for(device), Operands(form, device)
    default = default_config(form.kernel, target, form.call)
    if default is None:
        raise ValueError(f"no default config fits {form.id}")
    configs = _listed(form, target, default)[: _MOST if pool else 2]
    rounds, truth = _ROUNDS if pool else 1, operands.truth()
    times: dict[Config, float] = {}
    failures: dict[str, str] = {}
    for config in _compiled(configs, form, target, pool) if pool else configs:
        print(f"{form.id}: {config}", file=sys.stderr)  # the last words of a process that dies
        try:
            for tensor in operands.run(config):
                tensor.fill_(float("nan"))  # what no kernel writes shows
            checked(zip(operands.run(config), truth, strict=True), form.dtype)
            laps = [timed(clock, partial(operands.run, config)) for _ in range(rounds)]
            times[config] = statistics.median(laps)
        except Exception:
            failures[str(config)] = last_error()
            wait_for(device)  # if the device is lost, no other config can run
    row = {
        "id": form.id, "table": "tune", "kernel": form.kernel, "candidates": len(configs),
        "tried": len(times), "wrong": len(failures), "failures": dict([*failures.items()][:5]),
        "default": str(default),
    }  # fmt: skip
    if times:
        finalists = sorted(times, key=times.__getitem__)[:_FINALISTS]
        if form.kernel == "gemm_lowrank":
            checked([(operands.run_in_place(), truth[0])], form.dtype)
        row |= _finals(operands, target, clock, _LAST if pool else 2, finalists, default)
    return row


def _listed(form: Form, target: Target, default: Config) -> list[Config]:
    """The default and its neighbours first; no tiles that are far too large."""

    def distance(config: Config) -> int:
        return sum(getattr(config, name) != getattr(default, name) for name in vars(default))

    found = sorted(candidates(form.kernel, target, form.call), key=distance)
    suited = [each for each in found if getattr(each, "block_m", 0) <= max(64, 2 * form.M)]
    return list(dict.fromkeys([default, *suited]))


def _compiled(configs: list[Config], form: Form, target: Target, pool: Executor) -> list[Config]:
    """Those that are compiled when the time is over."""
    futures = [pool.submit(compile_ahead, form, target, config) for config in configs]
    done, late = wait(futures, timeout=_SECONDS)
    for future in late:
        future.cancel()
    pairs = zip(configs, futures, strict=True)
    return [config for config, each in pairs if each in done and each.exception() is None]


def compile_ahead(form: Form, target: Target, config: Config) -> None:
    """What this call would launch is compiled and not launched: its tensors are meta tensors."""
    with use_target(target), intercept(Launch.compile):
        Operands(form, "meta").run(config)


def _finals(
    operands: Operands, target: Target, clock: Clock, rounds: int, finalists: list[Config],
    default: Config,
) -> dict:  # fmt: skip
    """The best of all, the default and torch's product in turn, so that their ratios hold."""
    form = operands.form
    calls = {str(config): partial(operands.run, config) for config in (*finalists, default)}
    if form.kernel == "gemm_lowrank":
        calls["in place"] = operands.run_in_place
    laps: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            laps[name].append(timed(clock, call))
    seconds = {name: digits(statistics.median(each)) for name, each in laps.items()}
    best = min(finalists, key=lambda config: seconds[str(config)])
    with recorded() as launches:
        operands.run(best)
    work = [launch.work() for launch in launches]
    row = {
        "best": str(best), "seconds": seconds,
        "default/best": ratios(laps[str(default)], laps[str(best)]),
        "tflops": digits(sum(each.flops for each in work) / seconds[str(best)] / 1e12),
        "gbs": digits(sum(each.loaded + each.stored for each in work) / seconds[str(best)] / 1e9),
    }  # fmt: skip
    if "in place" in laps:
        row["fused/in place"] = ratios(laps[str(best)], laps["in place"])
        plan = Plan(True, best) if row["fused/in place"][1] < 1.0 else Plan(False)
        call, depth = form.call, sum(form.depths)
        size = (call.m, call.n, depth, call.r, call.itemsize, call.masked, call.projections)
        row["plan"] = repr(Row(target.name, *size, plan, form.name.startswith("dx")))
    return row
