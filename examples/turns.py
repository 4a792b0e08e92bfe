"""Training in turns: a step when finetune.py says so."""

import sys
import time
from multiprocessing.connection import Connection

import torch
from transformers import TrainerCallback


class Turns(TrainerCallback):
    """Waits before each step, and after the last; knows when each step began and how long it took.

    A step is forward, backward and optimizer, without evaluations.
    """

    def __init__(self, parent: Connection) -> None:
        self.parent = parent
        self.began: list[float] = []
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._wait(state)
        self.began.append(self._now(args.device))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(self._now(args.device) - self.began[-1])

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._wait(state)

    def _wait(self, state) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        try:
            self.parent.send(losses[-1] if losses else None)
            self.parent.recv()
        except (EOFError, OSError):
            sys.exit("finetune.py has ended")

    def _now(self, device: torch.device) -> float:
        """Seconds on a clock that all processes share."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()
