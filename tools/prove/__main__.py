"""Proves the kernels' accesses for all sizes: ``python -m tools.prove [KERNEL …] [OPTION …]``.

    (nothing)     every kernel in every mode, and the lemmas about two functions that they call
    --faults      plants faults, and deletes each mask of each kernel: all must be found
    --launches    compares the launches of the machine's cases with the stated ones
    --all         all of this

Exits with 1 if something isn't proved, or a fault isn't found.
"""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

os.environ["TRITON_INTERPRET"] = "1"  # the sources of kernels need no GPU


def main(words: list[str]) -> int:
    from . import contracts, faults, launches, modes

    kernels = [word for word in words if word in modes.MODES] or [*modes.MODES]
    parts = {word for word in words if word.startswith("--")}
    if "--all" in parts:
        parts = {"", "--faults", "--launches"}
    tasks: list[tuple[Callable, tuple]] = []
    if not parts or "" in parts:
        tasks += [(modes.lines_of, (lemma, {})) for lemma in contracts.LEMMAS]
        tasks += [(modes.lines_of, (k, mode)) for k in kernels for mode in modes.MODES[k]]
    if "--faults" in parts:
        tasks += [(faults.lines_of, (each,)) for each in faults.all_of(kernels)]
    if "--launches" in parts:
        tasks += [(launches.lines_of, ())]
    begin, bad = time.monotonic(), 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for future in [pool.submit(function, *arguments) for function, arguments in tasks]:
            wrong, text = future.result()
            bad += wrong
            print(text, flush=True)
    print(f"{len(tasks)} parts, {bad} with failures, {time.monotonic() - begin:.0f} s")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
