"""Random calls of every kind; for each failure it prints a command that repeats the call.

    python -m tests.fuzz --seed S [--count N] [--seconds T] [--backend interpreter] [--only WORDS]
    python -m tests.fuzz --seed S --case I

``--only`` takes cases that have all of these words, such as "many bf16-f32 autocast".
``--backend``: torch, or interpreter (Triton's).  In the machine, ``tests/ops/test_numbers.py`` runs
such calls (FASTLORA_MACHINE).
"""

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

SUPPORT = str(Path(__file__).with_name("support"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run only this case")
    parser.add_argument("--count", type=int, help="the number of cases; 100 if no time is given")
    parser.add_argument("--seconds", type=float, help="stop after this many seconds")
    parser.add_argument("--backend", choices=("torch", "interpreter"), default="torch")
    parser.add_argument("--only", default="", metavar="WORDS")
    options = parser.parse_args(arguments)
    sys.path += [] if SUPPORT in sys.path else [SUPPORT]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from random_calls import Case, check

    most = options.count or (None if options.seconds else 100)
    start, ran, missed, index = time.monotonic(), Counter(), 0, options.case or 0
    while True:
        case = Case(options.seed, index, "torch" if options.backend == "torch" else "triton")
        if set(options.only.split()) <= set(case.words.split()):
            ran[case.kind] += 1
            if why := what_misses(check, case):
                missed += 1
                backend = "" if options.backend == "torch" else f" --backend {options.backend}"
                line = f"python -m tests.fuzz --seed {options.seed} --case {index}{backend}"
                print(f"{line}  # {case.words}: {why}", flush=True)
        index += 1
        if index == 10_000 and not ran:
            sys.exit(
                f"none of {index} cases has the words {options.only!r}: see a miss's line for some"
            )
        late = options.seconds and time.monotonic() - start > options.seconds
        if late or options.case is not None or ran.total() == most:
            break
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(ran.items()))
    seconds = time.monotonic() - start
    print(f"{ran.total()} cases ({kinds}), {missed} missed, {seconds:.0f} s, seed {options.seed}")
    return 1 if missed else 0


def what_misses(check: Callable, case) -> str:
    """Run ``check(case)``: the reason for its failure in one line; "" if the case passes."""
    try:
        check(case)
    except AssertionError as error:
        return " ".join(str(error).split())[:300] or "AssertionError"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:300]}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
