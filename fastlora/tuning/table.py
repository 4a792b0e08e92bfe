"""The result of tuning: a line for each base product, and notes on the rest."""

from dataclasses import dataclass

from ..text import columns

_TITLES = ("rows x in x out", "default", "best", "ms", "/ default", "/ frozen", "/ PEFT")


@dataclass(frozen=True)
class Tuned:
    """One base product, of a forward (y) or a backward (dx).

    ``best``: the plan that runs from now on, with its tiles unless they are the default ones.
    ``default``: the plan without tuning.  Times are the device's, in seconds, of the whole forward
    or backward, adapter included.  ``frozen_seconds``: time of torch's product without an adapter.
    ``peft_seconds``: time of PEFT's layer.  None means not measured.
    """

    product: str
    default: str
    best: str
    seconds: float
    default_seconds: float | None = None
    frozen_seconds: float | None = None
    peft_seconds: float | None = None


@dataclass(frozen=True)
class Tuning:
    """A line for each product; prints as a table.  ``notes`` explain missing products.

    ``path``: the file that later processes read; "" if nothing was written.
    """

    device: str
    lines: tuple[Tuned, ...] = ()
    notes: tuple[str, ...] = ()
    path: str = ""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [_TITLES]
        for line in self.lines:
            others = (line.default_seconds, line.frozen_seconds, line.peft_seconds)
            ratios = ["–" if time is None else f"{line.seconds / time:.3f}" for time in others]
            rows.append(
                (line.product, line.default, line.best, f"{line.seconds * 1e3:.3f}", *ratios)
            )
        table = [f"on {self.device}", *columns(rows, left=3)] if self.lines else []
        where = [f"written to {self.path}"] if self.path else []
        return "\n".join([*table, *self.notes, *where])
