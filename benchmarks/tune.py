"""The best tiles for a launcher's call, and who multiplies: rows for kernels/plan.py."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as TooLateError
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch

from fastlora.kernels import one_launch_pays, one_pass_pays, target_of
from fastlora.kernels.config import Config, GemmConfig
from fastlora.kernels.defaults import candidates, default_config
from fastlora.kernels.launch import Launch, intercept, recorded
from fastlora.kernels.plan import Plan, Row
from fastlora.kernels.target import Target, use_target

from .cases import Case
from .clock import Clock, clock_for, timed, wait_for
from .forms import Form, Operands
from .judge import check_error, error
from .measure import describe, digits, ratios

_FINALISTS = 3


@dataclass(frozen=True)
class Search:
    """At most so many configs and seconds; rounds of every config, and of the best ones."""

    seconds: float = 15.0
    most: int = 400
    rounds: int = 5
    last: int = 15


DRY = Search(60.0, most=2, rounds=1, last=2)


def forms_of(case: Case, device: torch.device) -> list[Form]:
    """The calls of a layer or a group, base products first: they take most of the time."""
    M, K, r, n = case.M, case.K, case.r, len(case.outputs)
    shared = {"dtype": case.dtype, "adapter_dtype": case.adapter_dtype}
    group = shared | {"dropout": case.dropout}
    with use_target(target_of(device)), torch.device("meta"):
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


def compilers() -> ProcessPoolExecutor:
    """They compile into Triton's cache on disk, so that a crash there takes no timing along."""
    count = max(2, min(14, (os.cpu_count() or 4) - 2))
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"))


def tune(
    form: Form, device: torch.device, search: Search, pool: ProcessPoolExecutor | None,
    watch: Callable[[str], None], without: Sequence[str] = (),
) -> dict:  # fmt: skip
    """A row: the best config, its gain over the default, and for a base product the plan.

    A config that is wrong or raises has no time.  ``watch`` hears which one runs first, and
    ``without`` names those that ended the process before.
    """
    target, clock, operands = target_of(device), clock_for(device), Operands(form, device)
    default = default_config(form.kernel, target, form.call)
    if default is None:
        raise ValueError(f"no default config fits {form.id}")
    configs = [each for each in _listed(form, target, default) if str(each) not in without]
    configs, truth = configs[: search.most], operands.truth()
    times: dict[Config, float] = {}
    failures: dict[str, str] = {}
    for config, problem in _compiled(configs, form, target, search, pool):
        watch(str(config))
        try:
            if problem is not None:
                raise problem
            _check(operands, config, truth)
            times[config] = statistics.median(
                timed(clock, partial(operands.run, config)) for _ in range(search.rounds)
            )
        except Exception as reason:
            wait_for(device)  # if the device is lost, no other config can run
            failures[str(config)] = describe(reason)
    watch("finals")
    row = {
        "id": form.id, "table": "tune", "kernel": form.kernel, "candidates": len(configs),
        "tried": len(times), "wrong": len(failures), "failures": dict([*failures.items()][:5]),
        "default": str(default),
    }  # fmt: skip
    if times:
        finalists = sorted(times, key=times.__getitem__)[:_FINALISTS]
        row |= _finals(operands, target, clock, search, finalists, default, truth)
    return row


def _listed(form: Form, target: Target, default: Config) -> list[Config]:
    """The default and its neighbours first; no tiles that are far too small or too large."""

    def distance(config: Config) -> int:
        return sum(getattr(config, name) != getattr(default, name) for name in vars(default))

    def suits(config: Config) -> bool:
        if not isinstance(config, GemmConfig) or target.kind == "cpu":
            return True
        small = form.M >= 1024 and config.block_m * config.block_n < 128 * 64
        return not small and config.block_m <= max(64, 2 * form.M)

    found = [config for config in candidates(form.kernel, target, form.call) if suits(config)]
    return list(dict.fromkeys([default, *sorted(found, key=distance)]))


def _compiled(
    configs: list[Config], form: Form, target: Target, search: Search,
    pool: ProcessPoolExecutor | None,
) -> Iterator[tuple[Config, BaseException | None]]:  # fmt: skip
    """Each config as soon as it is compiled, until the search's time is over."""
    if pool is None:
        yield from ((config, None) for config in configs)
        return
    deadline = time.monotonic() + search.seconds
    futures = {pool.submit(compile_ahead, form, target, config): config for config in configs}
    try:
        for future in as_completed(futures, timeout=search.seconds):
            yield futures[future], future.exception()
            if time.monotonic() > deadline:
                return
    except TooLateError:
        return
    finally:
        for future in futures:
            future.cancel()


def compile_ahead(form: Form, target: Target, config: Config) -> None:
    """What this call would launch is compiled and not launched: its tensors are meta tensors."""
    with use_target(target), intercept(Launch.compile):
        Operands(form, "meta").run(config)


def _check(operands: Operands, config: Config, truth: list[torch.Tensor]) -> None:
    for tensor in operands.run(config):
        tensor.fill_(float("nan"))  # what no kernel writes shows
    found = operands.run(config)
    worst = max(error(got, want) for got, want in zip(found, truth, strict=True))
    check_error(worst, operands.form.dtype)


def _finals(
    operands: Operands, target: Target, clock: Clock, search: Search, finalists: list[Config],
    default: Config, truth: list[torch.Tensor],
) -> dict:  # fmt: skip
    """The best of all, the default and torch's product in turn, so that their ratios hold."""
    calls: dict[object, Callable[[], object]] = {
        config: partial(operands.run, config) for config in (*finalists, default)
    }
    if operands.form.kernel == "gemm_lowrank":
        check_error(error(operands.run_in_place(), truth[0]), operands.form.dtype)
        calls["in place"] = operands.run_in_place
    laps: dict[object, list[float]] = {key: [] for key in calls}
    for _ in range(search.last):
        for key, call in calls.items():
            laps[key].append(timed(clock, call))
    medians = {key: statistics.median(each) for key, each in laps.items()}
    best = min(finalists, key=medians.__getitem__)
    with recorded() as launches:
        operands.run(best)
    work = [launch.work() for launch in launches]
    moved = sum(each.loaded + each.stored for each in work)
    row = {
        "best": str(best), "seconds": {str(key): digits(each) for key, each in medians.items()},
        "default/best": ratios(laps[default], laps[best]),
        "tflops": digits(sum(each.flops for each in work) / medians[best] / 1e12),
        "gbs": digits(moved / medians[best] / 1e9),
    }  # fmt: skip
    if "in place" in laps:
        row["fused/in place"] = ratios(laps[best], laps["in place"])
        fused = row["fused/in place"][1] < 1.0
        call, depth = operands.form.call, sum(operands.form.depths)
        size = (call.m, call.n, depth, call.r, call.itemsize, call.masked, call.projections)
        row["plan"] = repr(Row(target.name, *size, Plan(True, best) if fused else Plan(False)))
    return row
