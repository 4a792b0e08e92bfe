"""An adapter in PEFT's files, read layer by layer without its model, and written again."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers.adapted import scaling_of
from ..layers.experts import stacked
from ..layers.modules import called, some
from ..model import files
from ..model.adapter_config import as_trained, from_peft
from ..model.config import LoRAConfig, names_any, weight_of
from ..model.files import CONFIG, WEIGHTS
from ..model.tensors import name_of, pairs_of
from ..projection import Adapter

# Of an experts module's weights; PEFT nests an adapter for each, the last one outermost.
_IN_ORDER = ("gate_up_proj", "up_proj", "down_proj")


class Layer(NamedTuple):
    """lora_A [E · r, p] and lora_B [q, r · E] of a file; a linear layer is one expert."""

    keys: tuple[str, str]
    is_parameter: bool  # a weight of an experts module, which target_parameters names
    experts: int
    scale: float
    dtype: torch.dtype


class Stored(NamedTuple):
    """An adapter's folder: what its files say, with no tensor loaded."""

    path: Path
    settings: dict[str, Any]  # adapter_config.json, but for how the adapter began
    config: LoRAConfig
    layers: dict[str, Layer]
    others: list[str]  # keys of what trained in full

    def read(self, name: str) -> Adapter[Tensor]:
        """lora_a [E, r, p] and lora_b [E, q, r] in float64; ValueError for NaN and infinity."""
        layer = self.layers[name]
        tensors = files.read_tensors(self.path / WEIGHTS, layer.keys)
        lora_a, lora_b = (tensors[key].double() for key in layer.keys)
        if not (lora_a.isfinite().all() and lora_b.isfinite().all()):
            raise ValueError(f"{self.path / WEIGHTS} has NaN or infinity in {called(name)}")
        return stacked(lora_a, lora_b, layer.experts, layer.scale)

    def read_others(self) -> dict[str, Tensor]:
        return files.read_tensors(self.path / WEIGHTS, self.others)


def is_copy(key: str) -> bool:
    """Whether it is PEFT's copy of a tensor of the frozen base, beside an adapter of a head."""
    return key.endswith((".base_layer.weight", ".base_layer.bias"))


def flat(name: str, adapter: Adapter[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """PEFT's lora_A [E · r, p] and lora_B [q, r · E] of a stack [E, r, p] and [E, q, r].

    ValueError for numbers that the dtype can't hold.
    """
    lora_a, lora_b, _ = adapter
    lora_A = lora_a.reshape(-1, lora_a.shape[2])
    lora_B = lora_b.permute(1, 2, 0).reshape(lora_b.shape[1], -1)
    pair = lora_A.to(dtype).contiguous(), lora_B.to(dtype).contiguous()
    if not all(each.isfinite().all() for each in pair):
        raise ValueError(f"{called(name)} would have numbers that are too large for {dtype}")
    return pair


def open_adapter(folder: str | os.PathLike) -> Stored:
    """Read what is in the folder from its config and its file's header.

    Raises as ``load_adapter`` does, and ValueError for what is no lora_A and lora_B of a linear
    layer or of experts, or doesn't fit the config's rank.
    """
    path = files.check_folder(folder)
    files.check_files(path)
    settings, header = files.read_json(path / CONFIG), files.read_header(path / WEIGHTS)
    config = from_peft(settings, str(path / CONFIG))
    inside = [key for key in header if "lora_" in key]
    experts: set[str] = set()
    names: list[str] = []
    for module in dict.fromkeys(map(_module_of, inside)):
        weights = _weights_in(module, config)
        experts.update(weights)
        names += weights or [module]
    pairs = pairs_of(names, experts)
    unlike = set(inside) ^ {key for pair in pairs.values() for key in pair}
    if not inside:
        raise ValueError(f"{path / WEIGHTS} has no lora_A and no lora_B: it holds no adapter")
    if unlike:
        raise ValueError(
            f"{path / WEIGHTS} lacks, or has too many, {some(sorted(unlike))}: fastlora knows "
            "lora_A and lora_B of linear layers, and of experts' weights that target_parameters "
            "names (gate_up_proj or up_proj, and down_proj), not DoRA's magnitudes nor adapters of "
            "embeddings"
        )
    layers = {}
    for name, keys in pairs.items():
        (a, dtype), (b, other) = (header[key] for key in keys)
        r, wide = config.rank_of(name), torch.float32
        if not all(getattr(kind, "is_floating_point", False) for kind in (dtype, other)):
            raise ValueError(
                f"{path / WEIGHTS} has lora_A of {dtype} and lora_B of {other} of {called(name)}, "
                "which must be floating-point numbers"
            )
        fits = len(a) == len(b) == 2 and a[0] == b[1] and 0 not in (*a, *b)
        if not fits or a[0] % r or (a[0] != r and name not in experts):
            raise ValueError(
                f"{path / WEIGHTS} has lora_A {a} and lora_B {b} of {called(name)}, which {CONFIG} "
                f"gives rank {r}"
            )
        scale = scaling_of(config.alpha_of(name), r, config.use_rslora)
        if dtype == other and dtype.itemsize > 1:
            wide = dtype
        layers[name] = Layer(keys, name in experts, a[0] // r, scale, wide)
    others = [key for key in header if "lora_" not in key]
    return Stored(path, as_trained(settings), config, layers, others)


def _module_of(key: str) -> str:
    """The name of the module that the key's adapter belongs to."""
    parts = re.split(r"(?:^|\.)lora_", name_of(key), maxsplit=1)[0].split(".")
    while len(parts) > 1 and parts[-1] == "base_layer":
        parts.pop()
    return ".".join(parts)


def _weights_in(module: str, config: LoRAConfig) -> list[str]:
    """The names of this module's weights in target_parameters, in the order that modules have."""
    endings: Collection[str] = set()
    for wanted in config.target_parameters or ():
        owner, _, last = wanted.rpartition(".")
        if last != "weight" and names_any([owner or "experts"], module):
            endings = {*endings, last}
    if len(endings) > 1:  # nothing says how those of other names are nested
        endings = [last for last in _IN_ORDER if last in endings]
    return [f"{module}.{last}".lstrip(".") for last in endings]


def patterns(config: LoRAConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict:
    """PEFT's settings that give layers their ranks and alphas, by their whole names."""
    fields: dict[str, Any] = {}
    for default, field, values in (
        ("r", "rank_pattern", ranks),
        ("lora_alpha", "alpha_pattern", alphas),
    ):
        ((fields[default], _),) = Counter(values.values()).most_common(1)
        fields[field] = {
            "^" + re.escape(weight_of(name) if config.names_weight_of(name) else name): value
            for name, value in values.items()
            if value != fields[default]
        }
    return fields


def check_output(output: str | os.PathLike, inputs: Iterable[Path]) -> Path:
    """The folder to write to; a ValueError unless it is new, empty or another adapter's."""
    path = files.check_folder(output)
    if any(path.resolve() == each.resolve() for each in inputs):
        raise ValueError(f"output is {path}, which is read from: give another folder")
    if path.exists() and not path.is_dir():
        raise ValueError(f"output is {path}, which is a file: give a folder")
    inside = path.iterdir() if path.exists() else ()
    foreign = {each.name for each in inside if not files.is_scratch(each)} - {WEIGHTS, CONFIG}
    if foreign:
        raise ValueError(f"output is {path}, which has {some(sorted(foreign))} in it: give another")
    return path
