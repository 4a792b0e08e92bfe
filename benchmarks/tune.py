"""The best tiles for a launcher's call, and who multiplies: rows for kernels/plan.py."""

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from fastlora.kernels.config import Call, Config, GemmConfig
from fastlora.kernels.defaults import candidates, default_config
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.plan import Plan, Row
from fastlora.kernels.target import Target, use_target

from ..oracle import TOLERANCE, error
from ..shapes import Case
from .jobs import Job, make_job
from .journal import check_device, describe
from .timing import Clock, digits, quartiles, whole

_SLOW = 1.2  # of the best so far: dropped after a few runs


class Compilers:
    """Processes that compile into Triton's cache on disk: a crash there takes no timing along."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._start()

    def submit(self, *call) -> Future:
        try:
            return self._executor.submit(*call)
        except BrokenProcessPool:
            self._start()
            return self._executor.submit(*call)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        """Wait until they have imported what they need: it would count as compiling."""
        self._executor = ProcessPoolExecutor(self.processes, mp_context=get_context("spawn"))
        wait([self._executor.submit(_touch_device) for _ in range(self.processes)])


def _touch_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.init()


@dataclass(frozen=True)
class Search:
    """``seconds`` for one call; ``most`` configs; ``pool`` compiles ahead, if there is one.

    Each config runs ``few`` times, those that are not slow ``more`` times, and the best ``last``.
    """

    seconds: float
    most: int
    pool: Compilers | None = None
    banned: frozenset[str] = frozenset()
    few: int = 3
    more: int = 5
    last: int = 15


def compile_ahead(target: Target, case: Case, form: str, config: Config | None) -> None:
    """What this call would launch is compiled and not launched: its tensors are meta tensors."""
    with use_target(target), intercept(Launch.compile):
        make_job(case, form, torch.device("meta")).run(config)


def tune(
    case: Case,
    form: str,
    job: Job,
    target: Target,
    clock: Clock,
    search: Search,
    watch: Callable[[str | None], None] = lambda config: None,
) -> dict:
    """A row: the best config, its gain over the default, and for a base product the plan.

    ``watch`` hears which config runs for the first time.
    """
    default = default_config(job.kernel, target, job.call)
    if default is None:
        raise ValueError(f"no default config fits {job.name}")
    configs = [default, *sorted(_plausible(job, target, default), key=lambda c: _rank(c, default))]
    configs = [config for config in configs if str(config) not in search.banned][: search.most]
    expected, tolerance = job.expected(), TOLERANCE[case.dtype]
    times: dict[Config, float] = {}
    failures: dict[str, str] = {}
    for config, reason in _compiled(configs, target, case, form, search):
        try:
            if reason is not None:
                raise reason
            watch(str(config))
            _check(job, config, expected, tolerance)
            best = min(times.values(), default=float("inf"))
            times[config] = _time(job, config, clock, best, search)
        except Exception as failure:
            check_device()
            failures[str(config)] = describe(failure)
    watch(None)
    row = {
        "id": job.name, "table": "gpu-tuning", "kernel": job.kernel, "candidates": len(configs),
        "tried": len(times), "wrong_or_failed": len(failures),
        "failures": dict(list(failures.items())[:5]), "default": str(default),
    }  # fmt: skip
    if not times:
        return row
    finalists = sorted(times, key=times.__getitem__)[:3]
    calls = {str(config): _caller(job, config) for config in finalists}
    if default in times:
        calls[str(default)] = _caller(job, default)
    if job.in_place is not None:
        worst = error(job.in_place(), expected[0])
        if worst <= tolerance:
            calls["in place"] = job.in_place
        else:
            row["failures"]["in place"] = f"{worst:.2g} from the oracle, beyond {tolerance:.2g}"
    laps = _in_turn(calls, clock, search.last)
    medians = {name: statistics.median(each) for name, each in laps.items()}
    best = min(finalists, key=lambda config: medians[str(config)])
    row |= {"best": str(best), "seconds": {name: digits(each) for name, each in medians.items()}}
    if default in times:
        row["default/best"] = _ratio(laps[str(default)], laps[str(best)])
    if "in place" in laps:
        row["fused/in place"] = _ratio(laps[str(best)], laps["in place"])
        row["plan"] = repr(_plan_row(job, target, best, row["fused/in place"][1] < 1.0))
    return row


def _plausible(job: Job, target: Target, default: Config) -> list[Config]:
    """Without tiles that are far too small or too large for the call."""
    return [
        config
        for config in candidates(job.kernel, target, job.call)
        if config != default and (target.kind == "cpu" or _suits(config, job.call))
    ]


def _suits(config: Config, call: Call) -> bool:
    if isinstance(config, GemmConfig):
        small = call.m >= 1024 and config.block_m * config.block_n < 128 * 64
        return not small and config.block_m <= max(64, 2 * call.m)
    return True


def _rank(config: Config, default: Config) -> int:
    """How many fields differ from the default: neighbours come first."""
    return sum(getattr(config, name) != getattr(default, name) for name in vars(default))


def _compiled(
    configs: list[Config], target: Target, case: Case, form: str, search: Search
) -> Iterator[tuple[Config, Exception | None]]:
    """Each config as soon as it is compiled, until the search's time is over."""
    deadline = time.monotonic() + search.seconds
    if search.pool is None:
        for config in configs:
            yield config, None
            if time.monotonic() > deadline:
                return
        return
    futures = {
        search.pool.submit(compile_ahead, target, case, form, config): config for config in configs
    }
    try:
        for future in as_completed(futures, timeout=search.seconds):
            yield futures[future], future.exception()
    except TimeoutError:
        return
    finally:
        for future in futures:
            future.cancel()


def _check(job: Job, config: Config, expected, tolerance: float) -> None:
    found = job.run(config)
    for tensor in found:
        tensor.fill_(float("nan"))  # what no kernel writes shows
    found = job.run(config)
    worst = max(error(got, want) for got, want in zip(found, expected, strict=True))
    if not worst <= tolerance:
        raise AssertionError(f"{worst:.2g} from the oracle, beyond {tolerance:.2g}")


def _time(job: Job, config: Config, clock: Clock, best: float, search: Search) -> float:
    step = whole(_caller(job, config))
    times = [clock.time(step, flush=True)[0] for _ in range(search.few)]
    if statistics.median(times) <= _SLOW * best:
        times += [clock.time(step, flush=True)[0] for _ in range(search.more)]
    return statistics.median(times)


def _caller(job: Job, config: Config):
    return lambda: job.run(config)


def _in_turn(calls: dict, clock: Clock, rounds: int) -> dict[str, list[float]]:
    laps: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            laps[name].append(clock.time(whole(call), flush=True)[0])
    return laps


def _ratio(above: list[float], below: list[float]) -> list[float]:
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


def _plan_row(job: Job, target: Target, best: GemmConfig, fused: bool) -> Row:
    call = job.call
    return Row(
        target.name, call.m, call.n, job.depth, call.r, call.itemsize, call.masked,
        call.projections, Plan(True, best) if fused else Plan(False),
    )  # fmt: skip
