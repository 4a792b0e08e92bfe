"""A Trainer callback that waits for finetune.py before each step, so that two runs take turns."""

import sys
import time

import torch
from transformers import TrainerCallback


class Turns(TrainerCallback):
    """Waits before each step and after the last.  Records each step's start and duration.

    A step is forward, backward and optimizer, without evaluations.
    """

    def __init__(self, parent) -> None:
        self.parent = parent
        self.began, self.seconds = [], []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.on_train_end(args, state, control)
        self.began.append(now())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(now() - self.began[-1])

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Send the last loss, and wait."""
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        try:
            self.parent.send(losses[-1] if losses else None)
            self.parent.recv()
        except (EOFError, OSError):
            sys.exit("finetune.py has ended")


def now() -> float:
    """Seconds on a clock that all processes share."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.monotonic()
