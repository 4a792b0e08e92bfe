"""Calls of fastlora on the PTX that Triton compiles for them: ``make machine``.

    python -m tools.machine [--target sm_80 sm_90] [--quick] [--only "layer f32"] [--rows all]

A line a case: ok, or MISS with the error, the fault, the races; skip where no tile fits the target;
unsupported where the PTX has what the machine doesn't know.  Each runs twice: launch by launch, and
as a replay of the kept call (before Triton 3.7: launch by launch, too) with its CTAs and warps in
another order.  The bits must be equal.
"""

import argparse
import json
import multiprocessing
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import repeat
from pathlib import Path

import torch
import triton

import fastlora
from fastlora.kernels import config, kept
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.plan import use_plan
from fastlora.ops import kinds

from . import driver, memory
from .cases import Case, Results, case_of, names

TARGETS = ("sm_80", "sm_90")
MOST_ROWS = max(len(rows) for table in config.DEFAULTS.values() for rows in table.values())


@contextmanager
def only_row(target: str, i: int) -> Iterator[None]:
    """The i-th configuration of each table alone, or its last."""
    before = dict(config.DEFAULTS)
    for key, table in before.items():
        if key[0] == target:
            rows = {name: (of_one[min(i, len(of_one) - 1)],) for name, of_one in table.items()}
            config.DEFAULTS[key] = rows
    _forget()
    try:
        yield
    finally:
        config.DEFAULTS.update(before)
        _forget()


def _forget() -> None:
    """What was resolved with other configurations."""
    config.chosen_config.cache_clear()
    kept._calls.clear()
    kinds._known.clear()


def results(case: Case, session: driver.Session) -> Results:
    """Of new memory full of NaN.  Order 0 launches step by step, the others replay."""
    torch.manual_seed(sum(case.name.encode()))
    with ExitStack() as stack:
        if case.dtype == "tf32":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            stack.callback(setattr, torch.backends.cuda.matmul, "fp32_precision", "ieee")
        if case.plan is not None:
            stack.enter_context(use_plan(case.plan))
        stack.enter_context(fastlora.use_backend("triton"))
        stack.enter_context(nullcontext() if session.order else intercept(Launch.run))
        stack.enter_context(driver.use(session))
        return case.run()


def judged(case: Case, asked: argparse.Namespace) -> dict:
    """What there is to say about a case."""
    start, said, loaded = time.perf_counter(), [], len(driver.machines)
    sessions = [driver.Session(order, asked.allow) for order in range(asked.orders)]
    try:
        first, *others = [results(case, session) for session in sessions]
        result = "ok"
    except memory.Unsupported as error:
        result, said = "unsupported", [str(error)]
    except ValueError as error:  # a configuration that doesn't fit
        result, said = ("skip" if "can't run" in str(error) else "MISS"), [str(error)]
    except (AssertionError, RuntimeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        result, said = "MISS", [f"{type(error).__name__}: {error} ({place.name}:{place.lineno})"]
    launches = [[ran.name for ran in session.ran] for session in sessions]
    if result == "ok":
        said += [] if launches[0] else ["nothing was launched"]
        for found, its_launches in zip(others, launches[1:], strict=True):
            if its_launches != launches[0]:
                said.append(f"a replay launches {its_launches}, the call {launches[0]}")
            unlike = [name for name in first if not _are_same(first[name], found[name])]
            said += [f"other bits in another order: {', '.join(unlike)}"] if unlike else []
    said += [race for session in sessions for race in session.races]
    return {
        "case": case.name,
        "result": "MISS" if said and result == "ok" else result,
        "said": said,
        "launches": launches[0],
        "new_kernels": len(driver.machines) - loaded,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _are_same(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    bits = [each.detach().contiguous().view(-1).view(torch.uint8) for each in (one, two)]
    return torch.equal(*bits)


def run(target: str, asked: argparse.Namespace) -> list[dict]:
    """Every case for one target, in this process; it prints as it goes."""
    driver.install(target)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors are NaN
    rows = {"": [None], "all": range(MOST_ROWS)}.get(asked.rows) or [int(asked.rows)]
    found = []
    for i in rows:
        with nullcontext() if i is None else only_row(target, i):
            for name in names(asked.quick):
                if not {*asked.only.split()} <= {*re.split("[ /]", name), *name.split()}:
                    continue
                one = judged(case_of(name), asked) | {"target": target, "row": i}
                found.append(one)
                if not asked.misses or one["result"] not in ("ok", "skip"):
                    more = f" … and {len(one['said']) - 4} more" if len(one["said"]) > 4 else ""
                    said = "; ".join(one["said"][:4]) + more or f"{len(one['launches'])} launches"
                    row = "" if i is None else f" [row {i}]"
                    line = f"{one['result']:4} {one['seconds']:5.1f} s {target} {name}{row}: {said}"
                    print(line, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", default=TARGETS, choices=TARGETS, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="what reaches every way of a kernel")
    parser.add_argument("--rows", default="", help="the i-th configuration of each table, or all")
    parser.add_argument("--only", default="", help="cases whose names have all of these words")
    parser.add_argument("--orders", type=int, default=2, help="in how many orders each case runs")
    parser.add_argument("--allow", default="", help="kinds of races that are no miss: a,b")
    parser.add_argument("--misses", action="store_true", help="print these alone, and the sum")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if len(asked.target) == 1:
        found = run(asked.target[0], asked)
    else:  # Triton compiles for one in a process
        memory.library()  # built once
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(asked.target), spawn) as pool:
            found = [one for part in pool.map(run, asked.target, repeat(asked)) for one in part]
    if asked.json:
        text = json.dumps({"triton": triton.__version__, "cases": found}, indent=1)
        asked.json.write_text(f"{text}\n", encoding="utf-8")
    if not found:
        parser.error(f"no case has all the words of {asked.only!r}")
    sums = []
    for name in asked.target:
        counts = Counter(one["result"] for one in found if one["target"] == name)
        words = [f"{count} {result}" for result, count in counts.items()]
        sums.append(f"{name}: {', '.join(words)} of {counts.total()} cases")
    launches = sum(len(one["launches"]) for one in found)
    print(f"{'; '.join(sums)}; {launches} launches, Triton {triton.__version__}")
    sys.exit(any(one["result"] not in ("ok", "skip") for one in found))
