"""The cells: versions that are installed together.  This file needs only Python.

Not all versions are combined: each cell has a reason, its name.  The extremes are combined (all
oldest, all newest, and the oldest of each with the newest of the others).  Each Python has a cell
with all newest.  Each version between the extremes is in at least one cell.
"""

from typing import NamedTuple

# The Triton that each torch pins, oldest first.
TORCH = {
    "2.10.0": "3.6.0",
    "2.11.0": "3.6.0",
    "2.12.1": "3.7.1",
    "2.13.0": "3.7.1",
    "2.14.1": "3.8.0",
    "2.15.0": "3.9.0",
}
NEWEST = ""  # the newest version that pip finds


class Cell(NamedTuple):
    name: str
    python: str
    torch: str = NEWEST
    peft: str = NEWEST
    transformers: str = NEWEST
    numpy: str = NEWEST

    def requirements(self) -> list[str]:
        names = ("torch", "peft", "transformers", "numpy")
        return [f"{name}=={own}" for name in names if (own := getattr(self, name))]


OLDEST = Cell("oldest", "3.10", "2.10.0", "0.19.0", "4.57.1", "1.23.5")
CELLS = [
    OLDEST,
    Cell("newest", "3.14"),
    Cell("newest-3.13", "3.13"),
    Cell("newest-3.12", "3.12"),
    Cell("newest-3.11", "3.11"),
    Cell("newest-3.10", "3.10"),
    Cell("oldest-3.14", "3.14", *OLDEST[2:5]),  # its oldest numpy is 2.3
    Cell("oldest-torch", "3.13", torch=OLDEST.torch),
    Cell("oldest-peft", "3.12", peft=OLDEST.peft),
    Cell("oldest-transformers", "3.11", transformers=OLDEST.transformers),
    Cell("oldest-numpy", "3.10", numpy=OLDEST.numpy),
    Cell("newest-torch", "3.10", "", *OLDEST[3:]),
    Cell("torch-2.11", "3.11", "2.11.0", "0.19.1", "4.57.6"),
    Cell("torch-2.12", "3.12", "2.12.1", "0.20.0", "5.0.0", "1.26.4"),
    Cell("torch-2.13", "3.11", "2.13.0"),
    Cell("torch-2.14", "3.13", "2.14.1", "0.21.0", "5.12.1"),
]
