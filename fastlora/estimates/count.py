"""The cost list, a line for each rank; and what of it is counted, from shapes alone."""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..formats import PackedLayer, quantized_weight
from ..formats.float8 import SCALE
from ..layers.experts import PER_TOKEN, experts_of_a_token, packed_names, read_module, weight_in
from ..layers.frozen import matrix_of, why_not_class
from ..model.config import LoRAConfig
from ..model.files import Planned, size_of
from ..model.targets import find_targets, modules_to_save
from ..model.tensors import (
    AUTO,
    embedding_tensors,
    full_tensors,
    must_save_embeddings,
    planned_adapters,
)
from ..projection import is_plain
from ..report import columns

_MIB, _GIB = 2**20, 2**30
# A parameter, its gradient and AdamW's two moments are kept while training.
_COPIES_IN_TRAINING = 4


@dataclass(frozen=True)
class RankCost:
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

    ``bytes`` are what its parameters and buffers take, packed ones as they are.

    ``flops`` are those of its linear layers for a token, and of the experts that it goes to:
    forward, and backward to the input alone.
    """

    parameters: int
    flops: int
    kept_bytes: float | None = None
    seconds: float | None = None
    bytes: int = 0


@dataclass(frozen=True)
class Estimate:
    """The cost of each rank for one model.  Prints as a table.

    ``layers`` is how many would be adapted, ``batch`` the shape of what was measured, ``notes``
    what a reader should know of the numbers.
    """

    model: str
    layers: int
    frozen: FrozenCosts
    rank_costs: tuple[RankCost, ...]
    device: str = ""
    batch: str = ""
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For a program: plain numbers and texts."""
        return asdict(self)

    def __str__(self) -> str:
        frozen, measured = self.frozen, "nothing was measured"
        if frozen.seconds is not None and frozen.kept_bytes is not None:
            measured = (
                f"frozen, {self.batch} on {self.device}: forward and backward "
                f"{frozen.seconds:.3g} s, keeps {frozen.kept_bytes / 1024:.0f} KiB a token"
            )
        lines = [
            f"{self.model}: {frozen.parameters:,} parameters, {self.layers} layers to adapt, "
            f"weights {frozen.bytes / _GIB:.2f} GiB",
            measured,
            "",
            *columns([_TITLES, *map(self._cells, self.rank_costs)], left=0),
            *self.notes,
        ]
        return "\n".join(lines)

    def _cells(self, cost: RankCost) -> tuple[str, ...]:
        per_token = "–" if cost.kept_bytes is None else f"{cost.kept_bytes / 1024:.0f}"
        step = "–"
        if cost.step is not None:
            low, middle, high = cost.step
            step = f"{middle:.2f} ({low:.2f}–{high:.2f})"
        return (
            f"{cost.r}",
            f"{cost.parameters:,}",
            f"{100 * cost.parameters / self.frozen.parameters:.2f}",
            f"{cost.file_bytes / _MIB:.1f}",
            f"{cost.training_bytes / _MIB:.1f}",
            f"{100 * cost.flops / self.frozen.flops:.1f}",
            per_token,
            step,
        )


_TITLES = (
    "r", "trainable", "% of base", "file, MiB", "+ gradient, AdamW, MiB", "extra FLOPs, %",
    "kept a token, KiB", "step / frozen's",
)  # fmt: skip


def count_frozen(model: nn.Module) -> FrozenCosts:
    """The model's parameters, and the FLOPs of its linear layers, and of a token's experts."""
    sizes: dict[Any, int] = {id(each): each.numel() for each in model.parameters()}
    for layer, weight in _matrices(model.modules()):
        if not isinstance(weight, Tensor):  # what it is packed in has other numbers of elements
            for name in layer._parameters.keys() - {"bias"}:
                sizes.pop(id(layer._parameters[name]), None)
            sizes[id(layer)] = math.prod(weight.shape)
    for module in model.modules():
        for name in packed_names(module):
            for parameter in (name, f"{name}{SCALE}"):
                sizes.pop(id(module._parameters.get(parameter)), None)
            sizes[id(module), name] = math.prod(weight_in(module, name).shape)
    flops = 4 * _of_a_token(set(model.modules()))
    return FrozenCosts(sum(sizes.values()), flops, bytes=_resident_bytes(model))


def _resident_bytes(model: nn.Module) -> int:
    """Of all memory that the model's tensors lie in, and a vendor's beside its parameters."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if is_plain(tensor)]
    for _, weight in _matrices(model.modules()):
        if not isinstance(weight, Tensor):
            tensors += weight.tensors
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def count_adapter(model: nn.Module, config: LoRAConfig) -> tuple[int, RankCost]:
    """How many layers and experts' weights ``config`` targets, and what it trains, counted.

    Raises what :func:`fastlora.apply_lora` raises for a config that doesn't fit the model, and
    ValueError for experts of whom nothing says how many a token goes to.
    """
    saved = modules_to_save(model, config, every_name=True)
    targets = find_targets(model, config, saved, every_name=True)
    names = targets.keys()
    adapters = planned_adapters(targets, config)
    full = full_tensors(model, config.bias, saved, names)
    # A multiplication and an addition for each element, in three products of either matrix: h and
    # y; dh and the adapter's part of dx; both gradients.  What trains in full has its gradient.
    flops = 2 * _of_a_token({part for module in saved.values() for part in module.modules()})
    for name, target in targets.items():
        used = experts_of_a_token(target.module) if target.parameter else 1
        if not used:
            raise ValueError(
                f"{name} has no cost: its config doesn't say how many experts a token goes to "
                f"({PER_TOKEN[0]})"
            )
        flops += 2 * 3 * used * config.rank_of(name) * (target.features.p + target.features.q)
    trained = {id(each): each for each in full.values() if isinstance(each, nn.Parameter)}
    parts = [*adapters.values(), *map(_planned, trained.values())]
    saved_whole = full
    if must_save_embeddings(model, AUTO):
        saved_whole = full | embedding_tensors(model, saved, names)
    file = adapters | {key: _planned(tensor) for key, tensor in saved_whole.items()}
    counts = [math.prod(part.shape) for part in parts]
    size = sum(part.dtype.itemsize * count for part, count in zip(parts, counts, strict=True))
    return len(names), RankCost(config.r, sum(counts), size, flops, size_of(file))


def _planned(tensor: Tensor) -> Planned:
    return Planned(tuple(tensor.shape), tensor.dtype)


def _of_a_token(modules: Collection[nn.Module]) -> int:
    """The weights of linear layers that a token is multiplied with, and those of its experts."""
    weights = sum(math.prod(weight.shape) for _, weight in _matrices(modules))
    for module in modules:
        read = read_module(module)
        used = 0 if read.reason else experts_of_a_token(module)
        for name in read.names if used else ():
            weights += used * math.prod(weight_in(module, name).shape[1:])
    return weights


def _matrices(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, Tensor]]:
    """Every linear layer, and its weight, which may be packed."""
    for module in modules:
        packed = isinstance(quantized_weight(module), PackedLayer)
        if packed or not why_not_class(type(module)):
            yield module, matrix_of(module)
