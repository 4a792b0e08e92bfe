"""Run calls of fastlora on the PTX that Triton compiles for them: ``make machine``.

    python -m tools.machine [--target sm_80 sm_90] [--quick] [--only "layer f32"] [--rows all]
    python -m tools.machine --quick --share 4    # each case on two of the eight cards
    python -m tools.machine --quick --target ci --triton ci  # each case on two cards

Each case prints one line: ok; MISS with the error, fault or races; skip if no tile fits the target;
unsupported if the PTX has an instruction that the machine doesn't know.  A case runs twice, with
its CTAs and warps in two orders, and the bits must be equal.  The first run launches step by step.
The second replays the captured call (before Triton 3.7 it also launches step by step).
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import triton

import fastlora
from fastlora.kernels import config, replay
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.plan import use_plan
from fastlora.ops import kinds

from . import driver, memory, revision, table, tritons
from .cases import Case, Results, case_of, names
from .driver import CARDS

MOST_ROWS = max(len(rows) for table in config.DEFAULTS.values() for rows in table.values())


@contextmanager
def only_row(target: str, i: int) -> Iterator[None]:
    """Reduce each table to its i-th configuration, or to its last if it has fewer."""
    before, row = dict(config.DEFAULTS), CARDS[target].name
    for key, of_kernel in before.items():
        if key[0] == row:
            rows = {name: (of_one[min(i, len(of_one) - 1)],) for name, of_one in of_kernel.items()}
            config.DEFAULTS[key] = rows
    _forget()
    try:
        yield
    finally:
        config.DEFAULTS.update(before)
        _forget()


def _forget() -> None:
    """Clear caches of calls that were resolved with other configurations."""
    config.chosen_config.cache_clear()
    replay.calls.clear()
    kinds.calls.clear()


def results(case: Case, session: driver.Session) -> Results:
    """Run the case in new memory full of NaN.  Order 0 launches step by step, others replay."""
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
    """Run a case in every order, and return its result as a record."""
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


def chosen(target: str, asked: argparse.Namespace) -> Iterator[str]:
    """The names of the target's cases: all requested cases, or the target's share of them.

    With ``--share N`` one card of each N runs a case; under another Triton other cards run it.
    ``--triton ci`` runs each case of a card under one of the two Tritons.
    """
    place, (turn, count) = asked.target.index(target), asked.turn
    for name in names(asked.quick):
        card = zlib.crc32(f"{triton.__version__} {name}".encode()) % asked.share
        has_words = {*asked.only.split()} <= {*re.split("[ /]", name), *name.split()}
        is_of_turn = zlib.crc32(f"{target} {name}".encode()) % count == turn
        if has_words and is_of_turn and card == place % asked.share:
            yield name


def run(target: str, asked: argparse.Namespace) -> list[dict]:
    """Run every case for one target in this process, and print each result at once."""
    driver.install(target, asked.processors)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # also fills new tensors with NaN
    rows = {"": [None], "all": range(MOST_ROWS)}.get(asked.rows) or [int(asked.rows)]
    found = []
    for i in rows:
        with nullcontext() if i is None else only_row(target, i):
            for name in chosen(target, asked):
                one = judged(case_of(name), asked) | {"target": target, "row": i}
                found.append(one)
                if not asked.misses or one["result"] not in ("ok", "skip"):
                    more = f" … and {len(one['said']) - 4} more" if len(one["said"]) > 4 else ""
                    said = "; ".join(one["said"][:4]) + more or f"{len(one['launches'])} launches"
                    row = "" if i is None else f" [row {i}]"
                    line = f"{one['result']:4} {one['seconds']:5.1f} s {target} {name}{row}: {said}"
                    print(line, flush=True)
    return found


def card_in_turn(commit: str) -> str:
    """The card that runs the quick cases beside sm_90: each commit's hash takes one."""
    others = [name for name in CARDS if name != "sm_90"]
    return others[int(commit, 16) % len(others)]


def _asked(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--target", nargs="+", default=[*CARDS], choices=[*CARDS, "ci"], metavar="NAME",
        help="these cards; ci: sm_90 and one other card, chosen by the commit")  # fmt: skip
    add("--quick", action="store_true", help="only the cases that together reach every branch")
    add("--rows", default="", help="the i-th configuration of each table, or all")
    add("--only", default="", help="cases whose names have all of these words")
    add("--share", type=int, default=1, metavar="N", help="one card of each N runs a case")
    add(
        "--processors",
        type=int,
        help="of the card; with few, a persistent program has several tiles",
    )
    add("--orders", type=int, default=2, help="the number of orders that each case runs in")
    add("--allow", default="", help="kinds of races that don't count as a miss: a,b")
    add("--misses", action="store_true", help="print only misses and the summary")
    add("--triton", nargs="*", metavar="X.Y.Z", help="these versions; ci: one of two for each case")
    add("--json", type=Path, help="write each case's record to this file")
    # The number of this Triton and how many there are: set by --triton ci.
    add("--turn", nargs=2, type=int, default=(0, 1), help=argparse.SUPPRESS)
    add("--save", action="store_true", help="write the counts to the table of benchmarks/README.md")
    asked = parser.parse_args(words)
    if "ci" in asked.target:
        asked.target = ["sm_90", card_in_turn(revision.commit())]
    if asked.share > len(asked.target):
        parser.error(f"--share {asked.share} of {len(asked.target)} cards would leave cases out")
    return asked


def main() -> None:
    asked = _asked()
    if asked.triton:
        versions, passed = tritons.versions(asked.triton), []
        for turn, version in enumerate(versions):
            turns = ["--turn", str(turn), str(len(versions))] if asked.triton == ["ci"] else []
            passed.append(tritons.run_under(version, [*sys.argv[1:], *turns]))
        sys.exit(not all(passed))
    if len(asked.target) == 1:
        found = run(asked.target[0], asked)
    else:  # a process compiles for one target, so each target gets a process
        memory.library()  # built here once, not in every process
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(os.cpu_count(), maxtasksperchild=1) as pool:
            parts = pool.map(partial(run, asked=asked), asked.target, chunksize=1)
        found = [one for part in parts for one in part]
    if asked.json:
        text = json.dumps({"triton": triton.__version__, "cases": found}, indent=1)
        asked.json.write_text(f"{text}\n", encoding="utf-8")
    if not found:
        sys.exit(f"no case has all the words of {asked.only!r}")
    cards = {
        name: Counter(one["result"] for one in found if one["target"] == name)
        for name in asked.target
    }
    sums = [f"{name}: {table.said(of)} of {of.total()} cases" for name, of in cards.items()]
    launches = sum(len(one["launches"]) for one in found)
    print(f"{'; '.join(sums)}; {launches} launches, Triton {triton.__version__}")
    if asked.save:
        table.add(_words(asked), triton.__version__, revision.commit(), cards)
    sys.exit(any(one["result"] not in ("ok", "skip") for one in found))


def _words(asked: argparse.Namespace) -> str:
    """The command-line words that chose the cases."""
    words = {"--quick": asked.quick, f"--share {asked.share}": asked.share > 1}
    words |= {
        f"--rows {asked.rows}": asked.rows,
        f"--processors {asked.processors}": asked.processors,
    }
    return " ".join(word for word, said in words.items() if said)
