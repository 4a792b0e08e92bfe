"""The records of an estimate, and the part of it that is counted from shapes."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..call.projection import is_plain
from ..common.text import columns
from ..formats import PackedLayer, quantized_weight
from ..formats.float8 import SCALE
from ..layers.experts_module import packed_names, weight_in
from ..layers.frozen import matrix_of, why_not_class
from ..layers.module_parts import plain_class_of
from ..peft.targets import find_targets


@dataclass(frozen=True)
class RankCost:
    """The cost of an adapter of rank ``r``, including biases and modules that train in full.

    * ``parameters``: the number of trainable parameters;
    * ``bytes``: their size;
    * ``kept_bytes``: bytes per token that a forward saves for the backward, without parameters;
    * ``step``: time of forward and backward divided by the frozen model's in the same round: the
      median.

    If nothing was measured, ``kept_bytes`` and ``step`` are None.
    """

    r: int
    parameters: int
    bytes: int
    kept_bytes: float | None = None
    step: float | None = None

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's two moments of each parameter."""
        return 2 * self.bytes

    @property
    def training_bytes(self) -> int:
        """Bytes of the parameters, their gradients and AdamW's moments."""
        return 2 * self.bytes + self.optimizer_bytes


@dataclass(frozen=True)
class FrozenCosts:
    """The costs of the model without adapters.

    * ``parameters``: their number; a packed weight counts with its dense shape;
    * ``kept_bytes``: bytes per token that a forward saves for the backward;
    * ``seconds``: the median time of forward and backward;
    * ``bytes``: memory of parameters and buffers; a packed weight counts with its packed size.
    """

    parameters: int
    kept_bytes: float | None = None
    seconds: float | None = None
    bytes: int = 0


@dataclass(frozen=True)
class Estimate:
    """The cost of each rank for one model.  Prints as a table.

    ``layers``: how many would be adapted.  ``batch``: the shape of the measured batch.  ``notes``:
    remarks below the table.
    """

    model: str
    layers: int
    frozen: FrozenCosts
    rank_costs: tuple[RankCost, ...]
    device: str = ""
    batch: str = ""
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The record as plain dicts, numbers and texts."""
        return asdict(self)

    def __str__(self) -> str:
        frozen, measured = self.frozen, "counted: rounds=5 also measures time and kept memory"
        if frozen.seconds is not None:
            measured = (
                f"{self.batch} on {self.device}; forward and backward of the frozen model take "
                f"{frozen.seconds:.3g} s"
            )
        lines = [
            f"{self.model}: {frozen.parameters:,} parameters, {self.layers} layers to adapt",
            measured,
            "",
            *columns(self._rows(), left=1),
            *self.notes,
        ]
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """The lines of the table: a title, the frozen model's cell, and a cell for each rank."""
        frozen, costs = self.frozen, self.rank_costs

        def row(title: str, of_frozen: str, cell: Callable[[RankCost], str]) -> tuple[str, ...]:
            return title, of_frozen, *map(cell, costs)

        yield row("", "frozen", lambda cost: f"r {cost.r}")
        yield row("trainable", "", lambda cost: f"{cost.parameters:,}")
        yield row("% of base", "", lambda cost: f"{100 * cost.parameters / frozen.parameters:.2f}")
        yield row("file, MiB", "", lambda cost: _mib(cost.bytes))
        if frozen.seconds is not None:
            yield row("step / frozen's", "1", lambda cost: f"{cost.step:.2f}")
        yield row("weights, MiB", _mib(frozen.bytes), lambda cost: _mib(cost.bytes))
        yield row("gradients, MiB", "", lambda cost: _mib(cost.bytes))
        yield row("AdamW's moments, MiB", "", lambda cost: _mib(cost.optimizer_bytes))
        if frozen.kept_bytes is not None:
            kept = _kib(frozen.kept_bytes)
            yield row("kept a token, KiB", kept, lambda cost: _kib(cost.kept_bytes))


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f}"


def _kib(size: float | None) -> str:
    return f"{(size or 0) / 1024:.0f}"


def count_frozen(model: nn.Module) -> FrozenCosts:
    """The number of the model's parameters, and their memory."""
    # By id, so that entries of packed tensors can be replaced by their dense sizes below.
    sizes: dict[Any, int] = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for layer, weight in _matrices(model.modules()):
        if not isinstance(weight, Tensor):  # packed tensors have other numbers of elements
            for name in layer._parameters.keys() - {"bias"}:
                sizes.pop(id(layer._parameters[name]), None)
            sizes[id(layer)] = math.prod(weight.shape)
    # Packed experts: replace the packed tensors and their scales by the dense shape.
    for module in model.modules():
        for name in packed_names(module):
            for parameter in (name, f"{name}{SCALE}"):
                sizes.pop(id(module._parameters.get(parameter)), None)
            sizes[id(module), name] = math.prod(weight_in(module, name).shape)
    return FrozenCosts(sum(sizes.values()), bytes=_resident_bytes(model))


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and the tensors inside vendors' packed weights."""
    weights = [weight for _, weight in _matrices(model.modules())]
    packed = [
        each for weight in weights if not isinstance(weight, Tensor) for each in weight.tensors
    ]
    return [*model.parameters(), *model.buffers(), *packed]


def _resident_bytes(model: nn.Module) -> int:
    """Bytes of the storages of all tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors_of(model) if is_plain(tensor)]
    # By the storage's own address, so that tied tensors and views count once.
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def count_adapter(model: nn.Module, config: Any) -> tuple[int, RankCost]:
    """The number of layers and experts' weights that ``config`` targets, and their counted cost.

    Raises ValueError if the config matches nothing in the model.
    """
    targets = find_targets(model, config)
    ends = tuple(config.modules_to_save or ())
    saved = {module for name, module in model.named_modules() if ends and name.endswith(ends)}
    trained = {id(p): p for module in saved for p in module.parameters()}
    # PEFT's "lora_only" trains the biases of adapted layers, "all" trains every bias.
    if config.bias != "none":
        layers = {f"{name}.bias" for name in targets}
        named = [(name, p) for name, p in model.named_parameters() if name.endswith("bias")]
        trained |= {id(p): p for name, p in named if config.bias == "all" or name in layers}
    count = sum(p.numel() for p in trained.values())
    size = sum(p.nbytes for p in trained.values())
    for target in targets.values():
        # target.shapes: lora_A's and lora_B's.
        elements = sum(map(math.prod, target.shapes))
        count += elements
        size += target.dtype.itemsize * elements
    return len(targets), RankCost(config.r, count, size)


def _matrices(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, Any]]:
    """Every linear layer and its weight, which may be packed."""
    for module in modules:
        kind = plain_class_of(module)  # an adapted layer has another class
        packed = isinstance(quantized_weight(module, kind), PackedLayer)
        if packed or not why_not_class(type(module)):
            yield module, matrix_of(module, kind)
