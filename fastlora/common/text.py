"""Text for people: values in messages, tables in columns, a progress bar."""

from collections.abc import Iterable, Sequence


def shown(value: object) -> str:
    """The value's repr for a message, on one line and shortened."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of more than 4300 digits, a class with a faulty __repr__ …
        return f"of type {type(value).__name__}"
    return text if len(text) < 100 else f"{text[:80]}…"


def columns(rows: Iterable[tuple[str, ...]], left: int) -> list[str]:
    """A line for each row of cells: the first ``left`` columns flush left, the others right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if i < left else ">" for i in range(len(widths))]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]


def bar(items: Sequence, what: str, unit: str) -> Iterable:
    """The items behind a progress bar, if tqdm is installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, unit=unit, leave=False)
