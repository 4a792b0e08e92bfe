"""What tuning found: a line for each base product, and what it couldn't measure."""

from dataclasses import dataclass

from ..report import columns

_TITLES = ("rows x in x out", "default", "best", "ms", "/ default", "/ frozen", "/ PEFT")


@dataclass(frozen=True)
class Tuned:
    """A base product, a forward's (y) or a backward's (dx): ``best`` is the plan that runs now.

    It names its tiles, where they aren't the default ones.  ``default`` is what ran without tuning.
    Times are the device's, in seconds: of a forward or of a backward, with all that the adapter
    needs; ``frozen_seconds`` are those of torch's product alone, ``peft_seconds`` of PEFT's layer.
    None is what wasn't measured.
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
    """A line for each product; prints as a table.  Without lines, ``notes`` say why.

    ``path`` is the file that later processes read; "": nothing was written.
    """

    device: str
    lines: tuple[Tuned, ...] = ()
    notes: tuple[str, ...] = ()
    path: str = ""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [_TITLES]
        for line in self.lines:
            others = (line.default_seconds, line.frozen_seconds, line.peft_seconds)
            ratios = ["–" if each is None else f"{line.seconds / each:.3f}" for each in others]
            rows.append(
                (line.product, line.default, line.best, f"{line.seconds * 1e3:.3f}", *ratios)
            )
        table = [f"on {self.device}", *columns(rows, left=3)] if self.lines else []
        where = [f"written to {self.path}"] if self.path else []
        return "\n".join([*table, *self.notes, *where])
