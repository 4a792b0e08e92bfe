"""What holds for all trials of a sweep alike: how long, how fast, and who goes on."""

import math
from typing import NamedTuple

from ..projection import is_number, shown

_SCHEDULES = ("linear", "cosine", "constant")


class Options(NamedTuple):
    """What holds for all trials alike."""

    steps: int
    halving: bool
    eval_steps: int | None
    schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    seed: int

    def check(self, trials: int) -> None:
        """Raise ValueError for a number or a word that can't be meant, with so many trials."""
        for name in ("steps", "eval_steps", "warmup_steps", "seed"):
            value, least = getattr(self, name), int(name in ("steps", "eval_steps"))
            if type(value) is not int or not least <= value < 2**63:  # torch's limit of a seed
                raise ValueError(
                    f"{name} is {shown(value)}, but must be a whole number from {least} on"
                    " and below 2⁶³"
                )
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule is {shown(self.schedule)}, but must be in {_SCHEDULES}")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not is_number(value) or not value >= 0:
                raise ValueError(f"{name} is {shown(value)}, but must be a number of at least 0")
        if self.steps <= self._halvings(trials):
            raise ValueError(f"steps is {self.steps}, too few to halve {trials} trials to one")

    def rungs(self, trials: int) -> dict[int, int]:
        """After which step how many trials go on, at equal intervals."""
        halvings = self._halvings(trials)
        return {
            self.steps * (i + 1) // (halvings + 1): -(-trials // 2 ** (i + 1))
            for i in range(halvings)
        }

    def batches(self, trials: int) -> int:
        """How many of ``data`` so many trials take in all: those that are left share the rows."""
        stops, left, taken = self.rungs(trials), trials, 0
        for step in range(self.steps):
            taken += trials // left
            left = stops.get(step + 1, left)
        return taken

    def _halvings(self, trials: int) -> int:
        """Until one is left."""
        return (trials - 1).bit_length() if self.halving else 0

    def factor(self, step: int) -> float:
        """Of the learning rate in this step, the first being 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        rest = max(1, self.steps - self.warmup_steps)
        done = (step - self.warmup_steps) / rest
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1.0 if self.schedule == "constant" else 1 - done
