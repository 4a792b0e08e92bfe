"""How far a sweep is, in a file that is whole at any time; and the Ctrl-C that stops it."""

import io
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.files import write_whole
from ..projection import shown

FILE = "state.pt"


@dataclass
class State:
    """Of a sweep between two steps.

    ``settings`` are those that a later run must have, too, to go on.
    """

    settings: dict[str, Any]
    step: int = 0
    batches: int = 0
    alive: list[int] = field(default_factory=list)
    losses: list[list[tuple[int, float]]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    adapters: list[dict[str, Tensor]] = field(default_factory=list)
    optimizer: dict[str, Any] = field(default_factory=dict)
    random: list[Tensor] = field(default_factory=list)  # of the CPU, and of each GPU


def save(state: State, folder: Path) -> None:
    content = io.BytesIO()
    torch.save(vars(state), content)
    write_whole(folder, {FILE: content.getvalue()})


def load(folder: Path, settings: dict[str, Any]) -> State | None:
    """What an earlier run left, or None.

    Raises ValueError if it is another sweep's, or can't be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        found = State(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    for name, value in settings.items():
        if found.settings.get(name) != value:
            raise ValueError(
                f"{path} is of a sweep with {name} {shown(found.settings.get(name))}, not "
                f"{shown(value)}: give the same, another output_dir, or resume=False"
            )
    return found


def random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state(states: list[Tensor]) -> None:
    cpu, *gpus = states
    torch.set_rng_state(cpu)
    if len(gpus) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(gpus)


@contextmanager
def interruption() -> Iterator[threading.Event]:
    """Set by a first Ctrl-C, while a second one is Python's own; in the main thread alone."""
    event, mine = threading.Event(), threading.current_thread() is threading.main_thread()
    if not mine:
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
