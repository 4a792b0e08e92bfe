"""What tuning found: a line for each base product, and what it couldn't measure."""

from dataclasses import asdict, dataclass
from typing import Any

from ..report import columns


@dataclass(frozen=True)
class Tuned:
    """A base product, a forward's (y) or a backward's (dx): ``best`` is the plan that runs now.

    ``default`` is what ran without tuning, with ``default_seconds``; ``tiles`` are those of a fused
    plan where they aren't the default ones.  The device's time is in seconds: of a forward or of a
    backward, with all that the adapter needs; ``frozen_seconds`` are those of torch's product
    alone, ``peft_seconds`` of PEFT's layer.  None is what wasn't measured.
    """

    product: str
    default: str
    best: str
    tiles: str
    seconds: float
    default_seconds: float | None = None
    frozen_seconds: float | None = None
    peft_seconds: float | None = None

    def over(self, others: float | None) -> str:
        return "–" if others is None else f"{self.seconds / others:.3f}"


@dataclass(frozen=True)
class Tuning:
    """A line for each product; prints as a table.  Without lines, ``notes`` say why.

    ``path`` is the file that the next process reads; "": nothing was written.
    """

    device: str
    lines: tuple[Tuned, ...] = ()
    notes: tuple[str, ...] = ()
    path: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For a program: plain numbers and texts."""
        return asdict(self)

    def __str__(self) -> str:
        titles = ("rows x in x out", "default", "best", "tiles", "ms")
        rows: list[tuple[str, ...]] = [(*titles, "/ default", "/ frozen", "/ PEFT")]
        for line in self.lines:
            others = (line.default_seconds, line.frozen_seconds, line.peft_seconds)
            cells = (line.product, line.default, line.best, line.tiles, f"{1e3 * line.seconds:.3f}")
            rows.append((*cells, *map(line.over, others)))
        table = [f"on {self.device}", *columns(rows, left=4)] if self.lines else []
        where = [f"written to {self.path}"] if self.path else []
        return "\n".join([*table, *self.notes, *where])
