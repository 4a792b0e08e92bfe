"""The result of tuning: a line for each base product, and notes on the rest."""

from dataclasses import dataclass

from ..text import columns

_TITLES = ("rows x in x out", "default", "best", "ms", "/ default")


@dataclass(frozen=True)
class Tuned:
    """One base product, of a forward (y) or a backward (dx).

    ``best``: the plan that runs from now on, with its tiles unless they are the default ones.
    ``default``: the plan without tuning.  Times are the device's, in seconds, of the whole forward
    or backward, adapter included.  None means that the default plan doesn't run.
    """

    product: str
    default: str
    best: str
    seconds: float
    default_seconds: float | None = None


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
            before, ms = line.default_seconds, f"{line.seconds * 1e3:.3f}"
            ratio = "–" if before is None else f"{line.seconds / before:.3f}"
            rows.append((line.product, line.default, line.best, ms, ratio))
        table = [f"on {self.device}", *columns(rows, left=3)] if self.lines else []
        where = [f"written to {self.path}"] if self.path else []
        return "\n".join([*table, *self.notes, *where])
