"""Read and write an adapter in PEFT's files layer by layer, without its model."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.projection import Adapter
from ..layers.experts_module import stacked
from ..layers.linear import scaling_of
from ..layers.modules import called, some
from ..packing import files
from ..packing.files import CONFIG, WEIGHTS, name_of
from .config import AdapterConfig, as_trained, from_peft, pairs_of

_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


class Layer(NamedTuple):
    """lora_A [E · r, p] and lora_B [q, r · E] in a file; a linear layer counts as one expert."""

    keys: tuple[str, str]
    is_parameter: bool  # a weight of an experts module, which target_parameters names
    experts: int
    scale: float
    dtype: torch.dtype


class Stored(NamedTuple):
    """An adapter's folder, read from its config and headers; no tensor is loaded."""

    path: Path
    settings: dict[str, Any]  # adapter_config.json without the initialization's settings
    config: AdapterConfig
    layers: dict[str, Layer]
    others: list[str]  # keys of other tensors

    @property
    def trained(self) -> list[str]:
        """Keys of tensors that trained in full; PEFT also saves an adapted head's frozen ones."""
        copies = (".base_layer.weight", ".base_layer.bias")
        return [key for key in self.others if not key.endswith(copies)]

    def read(self, name: str) -> Adapter[Tensor]:
        """Read lora_a [E, r, p] and lora_b [E, q, r] as float64.

        Raises ValueError for NaN and infinity.
        """
        layer = self.layers[name]
        tensors = files.read_tensors(self.path / WEIGHTS, layer.keys)
        lora_a, lora_b = (tensors[key].double() for key in layer.keys)
        if not (lora_a.isfinite().all() and lora_b.isfinite().all()):
            raise ValueError(f"{self.path / WEIGHTS} has NaN or infinity in {called(name)}")
        return stacked(lora_a, lora_b, layer.experts, layer.scale)

    def read_others(self) -> dict[str, Tensor]:
        return files.read_tensors(self.path / WEIGHTS, self.others)


def flat(name: str, adapter: Adapter[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """PEFT's lora_A [E · r, p] and lora_B [q, r · E] from a stack [E, r, p] and [E, q, r].

    Raises ValueError if a value is too large for the dtype.
    """
    lora_a, lora_b, _ = adapter
    lora_A = lora_a.reshape(-1, lora_a.shape[2])
    lora_B = lora_b.permute(1, 2, 0).reshape(lora_b.shape[1], -1)
    pair = lora_A.to(dtype).contiguous(), lora_B.to(dtype).contiguous()
    if not all(tensor.isfinite().all() for tensor in pair):
        raise ValueError(f"{called(name)} would have numbers that are too large for {dtype}")
    return pair


def open_adapter(folder: str | os.PathLike) -> Stored:
    """Read an adapter's config and the header of its weights.

    Raises the errors of ``load_adapter`` for a folder.  Raises ValueError if a tensor isn't a
    lora_A or lora_B of a linear layer or of experts, or doesn't fit the config's rank.
    """
    path, settings, header = files.read_adapter(folder)
    config = from_peft(settings, str(path / CONFIG))
    inside = [key for key in header if "lora_" in key]
    experts: set[str] = set()
    names: list[str] = []
    for module in dict.fromkeys(map(_module_of, inside)):
        weights = config.weights_in(module)
        experts.update(weights)
        # The adapted weights of an experts module, or a linear layer.
        names += weights or [module]
    pairs = pairs_of(names, experts)
    # Keys of the file that no pair has, and keys of pairs that the file lacks.
    unlike = set(inside) ^ {key for pair in pairs.values() for key in pair}
    if not inside:
        raise ValueError(f"{path / WEIGHTS} has no lora_A and no lora_B: it holds no adapter")
    if unlike:
        raise ValueError(
            f"{path / WEIGHTS} has missing or unsupported keys, {some(sorted(unlike))}: fastlora "
            "reads lora_A and lora_B of linear layers, and of experts' weights that "
            "target_parameters names (gate_up_proj or up_proj, and down_proj); it reads neither "
            "DoRA's magnitudes nor adapters of embeddings"
        )
    layers = {}
    for name, keys in pairs.items():
        (a, dtype), (b, other) = (header[key] for key in keys)
        r = config.rank_of(name)
        # Linear: lora_A [r, in], lora_B [out, r].  A stack of E experts has E · r in place of r.
        fits = {dtype, other} <= _DTYPES and len(a) == len(b) == 2 and 0 not in (*a, *b)
        if not fits or a[0] != b[1] or a[0] % r or (a[0] != r and name not in experts):
            raise ValueError(
                f"{path / WEIGHTS} has lora_A {a} of {dtype} and lora_B {b} of {other} for "
                f"{called(name)}, but {CONFIG} says that its rank is {r}: they must be "
                f"floating-point, [{r}, in] and [out, {r}]; convolutions aren't supported"
            )
        scale = scaling_of(config.alpha_of(name), r, config.use_rslora)
        kept = dtype if dtype == other else torch.float32
        layers[name] = Layer(keys, name in experts, a[0] // r, scale, kept)
    others = [key for key in header if "lora_" not in key]
    return Stored(path, as_trained(settings), config, layers, others)


def _module_of(key: str) -> str:
    """The name of the module that this key's adapter belongs to."""
    return re.split(r"(?:(?:^|\.)base_layer)*(?:^|\.)lora_", name_of(key), maxsplit=1)[0]


def patterns(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict:
    """PEFT's r, lora_alpha and patterns that give these layers their ranks and alphas.

    The most common value becomes the default, and every other layer gets an anchored pattern.
    """
    fields: dict[str, Any] = {}
    for default, field, values in (
        ("r", "rank_pattern", ranks),
        ("lora_alpha", "alpha_pattern", alphas),
    ):
        ((fields[default], _),) = Counter(values.values()).most_common(1)
        fields[field] = {
            # PEFT matches (.*\.)?(pattern)$: with "^" it isn't the end of another name.
            f"^{re.escape(name)}": value
            for name, value in values.items()
            if value != fields[default]
        }
    return fields


def check_output(output: str | os.PathLike, inputs: Iterable[Path]) -> Path:
    """The folder to write to.  Raises ValueError unless it is new, empty or another adapter's."""
    path = files.check_folder(output)
    if any(path.resolve() == folder.resolve() for folder in inputs):
        raise ValueError(f"output is {path}, which is also an input: give another folder")
    if path.exists() and not path.is_dir():
        raise ValueError(f"output is {path}, which is a file: give a folder")
    inside = path.iterdir() if path.exists() else ()
    foreign = {file.name for file in inside if not files.is_scratch(file)} - {WEIGHTS, CONFIG}
    if foreign:
        raise ValueError(f"output is {path}, which has {some(sorted(foreign))} in it: give another")
    return path
