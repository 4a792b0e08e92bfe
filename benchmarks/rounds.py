"""Times taken in rounds, so that whatever disturbs the machine disturbs all contestants alike."""

import statistics
import time
from collections.abc import Callable

from .shapes import OVER_FROZEN, OVER_PEFT, OVER_SAME_DTYPE, PEFT_OVER_FROZEN, SAME_DTYPE

Step = Callable[[], dict[str, float]]  # runs once, and returns the seconds of each quantity

_RATIOS = {
    OVER_FROZEN: ("fastlora", "frozen"),
    PEFT_OVER_FROZEN: ("peft", "frozen"),
    OVER_PEFT: ("fastlora", "peft"),
    OVER_SAME_DTYPE: ("fastlora", SAME_DTYPE),
}
_LEAST_ROUNDS, _MOST_ROUNDS = 7, 300


class Rounds:
    """Runs a turn of every contestant a round, and keeps the times.

    A turn is a step that is not timed and then one that is, so that every timed step finds the
    caches and the heap as its own kind leaves them.  Without that, whoever comes after PEFT pays
    for what PEFT left: of two equal frozen layers the second took 0.85 of the first one's time
    (x [4096, 1024], weight [1024, 1024], bfloat16, 2 cores).

    pytest-benchmark drives the rounds: its ``pedantic`` calls the three ``run_`` methods as setup,
    target and teardown, so that its own statistics are of fastlora's steps in these very rounds.
    """

    def __init__(self, steps: dict[str, Step]) -> None:
        self.steps = steps
        self.times: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
        names = list(steps)
        subject = names.index("fastlora")
        self.before, self.after = names[:subject], names[subject + 1 :]

    def run_before(self) -> None:
        for name in self.before:
            self._turn(name)
        self.steps["fastlora"]()

    def run_fastlora(self) -> None:
        self.times["fastlora"].append(self.steps["fastlora"]())

    def run_after(self) -> None:
        for name in self.after:
            self._turn(name)

    def measure(self, benchmark, budget: float) -> None:
        """Warm up, then as many rounds as fit in ``budget`` seconds."""
        for _ in range(2):
            start = time.perf_counter()
            for step in self.steps.values():
                step()
            seconds = 2 * (time.perf_counter() - start)
        count = min(max(int(budget / seconds), _LEAST_ROUNDS), _MOST_ROUNDS)
        benchmark.pedantic(
            self.run_fastlora, setup=self.run_before, teardown=self.run_after, rounds=count
        )

    def _turn(self, name: str) -> None:
        self.steps[name]()
        self.times[name].append(self.steps[name]())

    def summary(self) -> dict:
        """Median seconds of each contestant; lower quartile, median and upper one of each ratio."""
        quantities = self.times["fastlora"][0]
        return {
            "rounds": len(self.times["fastlora"]),
            "seconds": {
                quantity: {
                    name: _round(statistics.median(time[quantity] for time in times))
                    for name, times in self.times.items()
                }
                for quantity in quantities
            },
            "ratios": {
                quantity: {
                    ratio: self._quartiles(quantity, above, below)
                    for ratio, (above, below) in _RATIOS.items()
                    if below in self.times
                }
                for quantity in quantities
            },
        }

    def _quartiles(self, quantity: str, above: str, below: str) -> list[float]:
        ratios = [
            first[quantity] / second[quantity]
            for first, second in zip(self.times[above], self.times[below], strict=True)
        ]
        return [_round(ratio) for ratio in statistics.quantiles(ratios, n=4, method="inclusive")]


def _round(value: float) -> float:
    """Five significant digits: no time here is known better."""
    return float(f"{value:.5g}")
