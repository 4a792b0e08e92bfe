"""The price list: a line for each rank."""

from dataclasses import asdict, dataclass
from typing import Any

from ..table import columns

_MIB = 2**20
# A parameter, its gradient and AdamW's two moments are kept while training.
_COPIES_IN_TRAINING = 4


@dataclass(frozen=True)
class Price:
    """What an adapter of rank ``r`` costs, with the biases and modules that train in full.

    * ``parameters``: how many train;
    * ``bytes``: of these parameters;
    * ``flops``: for a token, forward and backward, beside the frozen model's;
    * ``file_bytes``: the size of ``adapter_model.safetensors``;
    * ``kept_bytes``: for a token, what a forward keeps until the backward, without parameters;
    * ``step``: the time of forward and backward over the frozen model's, lower quartile, median
      and upper quartile of measurements in pairs.

    ``kept_bytes`` and ``step`` are None where nothing was measured.
    """

    r: int
    parameters: int
    bytes: int
    flops: int
    file_bytes: int
    kept_bytes: float | None = None
    step: tuple[float, float, float] | None = None

    @property
    def training_bytes(self) -> int:
        """Of the parameters, their gradients and AdamW's two moments."""
        return _COPIES_IN_TRAINING * self.bytes


@dataclass(frozen=True)
class FrozenCosts:
    """The same model without adapters: its ``parameters``, and what was measured of it.

    ``flops`` are those of its linear layers for a token, and of the experts that it goes to:
    forward, and backward to the input alone.
    """

    parameters: int
    flops: int
    kept_bytes: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """The price of each rank for one model.  Prints as a table.

    ``layers`` is how many would be adapted, ``batch`` the shape of what was measured, ``notes``
    what a reader should know of the numbers.
    """

    model: str
    layers: int
    frozen: FrozenCosts
    prices: tuple[Price, ...]
    device: str = ""
    batch: str = ""
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For a program: plain numbers and texts."""
        return asdict(self)

    def __str__(self) -> str:
        frozen = self.frozen
        lines = [
            f"{self.model}: {frozen.parameters:,} parameters, {self.layers} layers to adapt",
            *self._measured(),
            "",
            *columns([_TITLES, *map(self._cells, self.prices)], left=0),
            *self.notes,
        ]
        return "\n".join(lines)

    def _measured(self) -> list[str]:
        frozen = self.frozen
        if frozen.seconds is None or frozen.kept_bytes is None:
            return ["nothing was measured"]
        return [
            f"frozen, {self.batch} on {self.device}: forward and backward {frozen.seconds:.3g} s, "
            f"keeps {frozen.kept_bytes / 1024:.0f} KiB a token"
        ]

    def _cells(self, price: Price) -> tuple[str, ...]:
        kept = "–" if price.kept_bytes is None else f"{price.kept_bytes / 1024:.0f}"
        step = "–"
        if price.step is not None:
            low, middle, high = price.step
            step = f"{middle:.2f} ({low:.2f}–{high:.2f})"
        return (
            f"{price.r}",
            f"{price.parameters:,}",
            f"{100 * price.parameters / self.frozen.parameters:.2f}",
            f"{price.file_bytes / _MIB:.1f}",
            f"{price.training_bytes / _MIB:.1f}",
            f"{100 * price.flops / self.frozen.flops:.1f}",
            kept,
            step,
        )


_TITLES = (
    "r",
    "trainable",
    "% of base",
    "file, MiB",
    "+ gradient, AdamW, MiB",
    "extra FLOPs, %",
    "kept a token, KiB",
    "step / frozen's",
)
