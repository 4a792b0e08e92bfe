"""Where a small call's time goes: ``python benchmarks/breakdown.py`` prints a Markdown table.

It explains the rows of ``make bench`` in which PEFT is faster.  Each part is timed alone, on one
thread, so the parts explain the whole and don't add up to it exactly.
"""

import statistics
import time
from collections.abc import Callable

import torch

import fastlora
from fastlora.backends import torch as backend
from fastlora.backends.dropout import DropoutMask, multiply_bits
from fastlora.ops.functional import draw_seed
from fastlora.projection import check_call, check_types

P = 0.1
SHAPES = ((8, 64), (1, 1024))  # M, K = N; r 16, float32


def microseconds(call: Callable[[], object], rounds: int = 2000) -> float:
    """The median of many calls."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def parts(m: int, k: int) -> dict[str, float]:
    """Microseconds of each part of forward and backward, without and with dropout."""
    x, dy, weight = torch.randn(m, k), torch.randn(m, k), torch.randn(k, k)
    projection = fastlora.Projection(weight, torch.randn(16, k), torch.randn(k, 16))
    group, seed = (projection,), draw_seed(1, x.device)
    mask = DropoutMask(seed, k, P)
    keep = mask.rows(0, m)
    h = torch.randn(m, 16)
    needs = (True, False, True, True, False)

    def backward(dropout: float):
        chosen = seed if dropout else None
        return backend.backward([dy], x, group, [h], needs, dropout=dropout, seed=chosen)

    calls = {
        "base product, forward": lambda: torch.nn.functional.linear(x, weight),
        "checks at the door": lambda: (check_types(x, group), check_call(x, group, P)),
        "backend forward, p 0": lambda: backend.forward(x, group, dropout=0.0, seed=None),
        "backend backward, p 0": lambda: backward(0.0),
        "backend forward, p 0.1": lambda: backend.forward(x, group, dropout=P, seed=seed),
        "backend backward, p 0.1": lambda: backward(P),
        "seed from torch's generator": lambda: draw_seed(1, x.device),
        "mask: keys": lambda: DropoutMask(seed, k, P),
        "mask: hash of all words": lambda: mask.rows(0, m),
        "mask: applied to x": lambda: multiply_bits(x, keep),
        "for comparison: F.dropout": lambda: torch.nn.functional.dropout(x, P),
    }
    with torch.no_grad():
        return {name: microseconds(call) for name, call in calls.items()}


def main() -> None:
    torch.set_num_threads(1)
    columns = [parts(m, k) for m, k in SHAPES]
    print("| µs | " + " | ".join(f"M {m}, K = N = {k}" for m, k in SHAPES) + " |")
    print("|---" * (len(SHAPES) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.1f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
