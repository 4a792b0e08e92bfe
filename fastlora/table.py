"""Text in columns."""

from collections.abc import Iterable


def columns(rows: Iterable[tuple[str, ...]], left: int) -> list[str]:
    """A line for each row of cells: the first ``left`` columns flush left, the others right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if i < left else ">" for i in range(len(widths))]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]
