"""Random calls of every kind; for each failure it prints a command that repeats the call.

    python -m tests.fuzz --seed S [--count N] [--seconds T] [--backend torch] [--only WORDS]
    python -m tests.fuzz --seed S --case I

``--only`` takes cases that have all of these words, such as "many bf16-f32 autocast".
``--backend``: torch; interpreter (Triton's); machine (tools/machine runs the code that Triton
compiles for sm_90).
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).parent
BACKENDS = ("torch", "interpreter", "machine")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run only this case")
    parser.add_argument("--count", type=int, help="the number of cases; 100 if no time is given")
    parser.add_argument("--seconds", type=float, help="stop after this many seconds")
    parser.add_argument("--backend", choices=BACKENDS, default="torch")
    parser.add_argument("--only", default="", metavar="WORDS")
    options = parser.parse_args(arguments)
    with prepared(options.backend) as (make, check):
        return run(options, make, check)


def run(options: argparse.Namespace, make: Callable, check: Callable) -> int:
    most = options.count or (None if options.seconds else 100)
    start, ran, missed, index = time.monotonic(), Counter(), Counter(), options.case or 0
    while True:
        case = make(options.seed, index, "torch" if options.backend == "torch" else "triton")
        if set(options.only.split()) <= set(case.words.split()):
            ran[case.kind] += 1
            if why := what_misses(check, case):
                missed[case.kind] += 1
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
    ended = f"{missed.total()} missed, {seconds:.0f} s, seed {options.seed}"
    print(f"{ran.total()} cases ({kinds}), {ended}")
    return 1 if missed else 0


def what_misses(check: Callable, case) -> str:
    """Run ``check(case)``: the reason for its failure in one line; "" if the case passes."""
    try:
        check(case)
    except AssertionError as error:
        return " ".join(str(error).split())[:300] or "AssertionError"
    except Exception as error:
        where, trace = "", error.__traceback__
        while trace:
            code = trace.tb_frame.f_code
            where = f"{Path(code.co_filename).name}:{trace.tb_lineno}"
            trace = trace.tb_next
        return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:300]}"
    return ""


@contextmanager
def prepared(backend: str) -> Iterator[tuple[Callable, Callable]]:
    """The functions that make a case and check it, for this backend."""
    if str(TESTS / "support") not in sys.path:
        sys.path.insert(0, str(TESTS / "support"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if backend == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
    if backend != "machine":
        from random_calls import Case, check

        yield Case, check
        return
    # marks asks for the interpreter, so it must come before tools.machine, which asks for none.
    import marks  # noqa: F401

    sys.path.append(str(TESTS.parent))
    from tools.machine import compiled

    compiled.use(90)
    from random_calls import Case, check

    from fastlora.kernels.launch import intercept
    from fastlora.kernels.target import TARGETS, use_target

    def launched(record) -> None:
        ran = compiled.run(record.kernel, record.grid, record.arguments, record.options)
        races = [finding for finding in ran.findings if finding.kind in compiled.RACES]
        assert not races, f"{record.name}: {races[0]}"

    with use_target(TARGETS["sm_90"]), intercept(launched):
        yield Case, check


if __name__ == "__main__":
    sys.exit(main())
