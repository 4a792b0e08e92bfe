"""Load packed weights from a checkpoint without making them dense: ``fastlora.load_packed``.

gpt-oss-20b takes 12.8 GiB this way, and 39 GiB dense (docs/experts.md).
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..call.projection import DTYPES
from ..formats.format import Quantized
from ..formats.microscaled import MXFP4
from ..layers.classes import twin
from ..layers.experts_module import PackedWeight, read_module, stack_in, weight_in
from ..layers.frozen import matrix_of
from ..layers.modules import called, check_model, check_plain, full_name, is_inside, some, unwrap
from ..layers.packed_experts import why_not_experts
from .files import Planned, check_folder, read_header, read_json, read_tensors
from .linears import PARTS, packed_linears, read_linear
from .pack_weights import Packed, PackReport, install, packed_on_meta

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_BLOCKS, _SCALES = "_blocks", "_scales"  # suffixes of a weight's name in gpt-oss' files
# Suffixes of a weight's name that only one of fastlora's kinds has, and that kind.
_KINDS = {".absmax": "nf4", ".tensor_scale": "nvfp4", ".weight": "fp8", ".codes": "int8"}


class _Stored(NamedTuple):
    """A tensor of the checkpoint: its file, and its shape and dtype from the header."""

    path: Path
    planned: Planned

    def read(self, key: str) -> Tensor:
        return read_tensors(self.path, (key,))[key]


class _Stack(NamedTuple):
    """A weight of experts that is packed in the checkpoint."""

    module: nn.Module
    parameter: str
    shapes: dict[str, tuple[int, ...]]  # the uint8 shape of each of its tensors in the file, by key
    weight: Quantized  # on meta; it has the format, shapes and dtypes

    def read(self, stored: Mapping[str, _Stored]) -> Quantized:
        tensors, device = [], _home(weight_in(self.module, self.parameter))
        for key, like in zip(self.shapes, self.weight.tensors, strict=True):
            # uint8 in the file's shape: view the bytes in the format's dtype and shape.
            bits = stored[key].read(key).to(device, copy=True)
            tensors.append(bits.flatten().view(like.dtype).view(like.shape))
        return Quantized(self.weight.format, tuple(tensors))


def load_packed(model: nn.Module, folder: str | os.PathLike) -> PackReport:
    """Load a checkpoint with packed weights into a model, on meta or elsewhere, without unpacking.

    ``folder`` holds ``model.safetensors``, or several files and an index.  There are two kinds:

    * a gpt-oss checkpoint of OpenAI or transformers, where weights of experts are NAME_blocks
      [E, N, K / 32, 16] and NAME_scales [E, N, K / 32], uint8;
    * a checkpoint that ``save_pretrained`` or a Trainer wrote of a model whose weights
      :func:`fastlora.pack` had packed.

    Packed weights become packed weights of the model's experts modules, and packed linear layers
    become packed linear layers; none is made dense.  Every other tensor is cast to the dtype of the
    model's tensor.  Tensors on meta are loaded to the CPU.  Buffers on meta that checkpoints don't
    hold, such as a rotary embedding's, are initialized by the model's ``_init_weights``.

        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        print(fastlora.load_packed(model, folder))

    Returns a report of the packed weights and the bytes that were read.  Raises FileNotFoundError
    for a folder without a checkpoint, and TypeError if ``model`` is not a module or ``folder`` not
    a path.  Raises ValueError for a damaged file, missing or extra keys, other shapes or dtypes, a
    checkpoint without packed weights, a model with adapters, values too large for a float16 model,
    and a buffer that ``_init_weights`` doesn't initialize.  After an error the model is unchanged.
    """
    check_model(model)
    path, model = check_folder(folder), unwrap(model)
    check_plain(model)
    stored = _stored_in(path)
    stacks, linears = _stacks(model, stored), packed_linears(model, stored)
    if not (stacks or linears):
        raise ValueError(
            f"{path} has no packed weights of this model, neither MXFP4 (…{_BLOCKS}, …{_SCALES}) "
            "nor packed by fastlora.pack: load other checkpoints with from_pretrained"
        )
    wanted = _fitting(model, stored, stacks, linears, path)
    buffers = _missing_buffers(model)
    # Read all files before the first module changes.
    values = dict[int, Tensor]()
    packed: Packed = {n: (s.module, s.parameter, s.read(stored)) for n, s in stacks.items()}
    for name, keys in linears.items():
        linear: Any = model.get_submodule(name)
        tensors = {key: stored[key].read(key) for key in keys}
        layer = read_linear(name, linear, tensors, stored[keys[0]].path, _home(matrix_of(linear)))
        packed[name] = linear, "", layer
    for key, tensor in wanted.items():
        value = stored[key].read(key).to(_home(tensor), tensor.dtype, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        values[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    records = install(model, packed, compares=False)
    # Nothing below can fail.  Values are looked up by the old tensor's id, so ties stay.
    for store, name, value in buffers:
        store[name] = value
    for each in model.modules():
        for store in cast(Any, (each._parameters, each._buffers)):
            for name, old in store.items():
                # One on meta can't take data of a CPU: replace it.  Others stay the same objects.
                if id(old) in values and old.is_meta:
                    store[name] = values[id(old)]
                elif id(old) in values:
                    old.data = values[id(old)].data
    files, others = {one.path for one in stored.values()}, sum(v.nbytes for v in values.values())
    return PackReport(records, others, (f"read from {len(files)} files in {path}",))


def _stored_in(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the checkpoint, by key; only headers are read."""
    names = {_WHOLE}
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if not names or any(Path(name).name != name for name in names):  # no path out of the folder
            raise ValueError(f"{folder / _INDEX} has no weight_map of keys to names of files")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder / missing[0]} doesn't exist: give a checkpoint's folder, which has {_WHOLE}, "
            f"or {_INDEX} and its files, such as huggingface_hub.snapshot_download returns"
        )
    return {
        key: _Stored(folder / name, planned)
        for name in sorted(names)
        for key, planned in read_header(folder / name).items()
    }


def _stacks(model: nn.Module, stored: Mapping[str, _Stored]) -> dict[str, _Stack]:
    """The weights of experts that are packed in the checkpoint, by name."""
    stacks = {}
    for outer, module in model.named_modules():
        names = read_module(module).names
        for parameter in names:
            name = full_name(outer, parameter)
            # The ends of keys after the weight's name: gpt-oss' "_blocks", fastlora's ".absmax" ….
            ends = {key.removeprefix(name) for key in stored if parameter and key.startswith(name)}
            is_gpt_oss = not ends.isdisjoint((_BLOCKS, _SCALES))
            if not is_gpt_oss and not any(end.startswith(".") for end in ends):
                continue
            if reason := why_not_experts(module, names):
                raise ValueError(f"{name} can't be packed: {reason}")
            kind = next((kind for end, kind in _KINDS.items() if end in ends), "mxfp4")
            try:
                weight = packed_on_meta(stack_in(module, parameter).shape, kind)
            except ValueError as error:
                raise ValueError(f"{name} can't be {kind}: {error}") from None
            bits = dict(PackedWeight(weight).named_buffers())
            shapes = {f"{name}.{part}": tuple(tensor.shape) for part, tensor in bits.items()}
            if is_gpt_oss:  # its blocks have 32 values, two in a byte
                blocks, scales = shapes.values()
                # [E, N, K / 2] -> [E, N, K / 32, 16]
                rows = (*blocks[:2], scales[2], MXFP4.block // 2)
                shapes = {name + _BLOCKS: rows, name + _SCALES: scales}
            stacks[name] = _Stack(module, parameter, shapes, weight)
    return stacks


def _fitting(
    model: nn.Module,
    stored: Mapping[str, _Stored],
    stacks: Mapping[str, _Stack],
    linears: Mapping[str, list[str]],
    path: Path,
) -> dict[str, Tensor]:
    """The model's tensors that are dense in the checkpoint, by key.

    Raises ValueError unless the checkpoint holds exactly the model's tensors.
    """
    packed = {*stacks, *[name + part for name in linears for part in PARTS]}
    state = {
        key: tensor
        for key, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and not any(is_inside(key, name) for name in packed)
    }
    expected: dict[str, tuple] = {k: (tuple(each.shape), each.dtype) for k, each in state.items()}
    expected |= {k: (s, torch.uint8) for one in stacks.values() for k, s in one.shapes.items()}
    # A packed linear layer fits itself here, and is checked when it is read.
    expected |= {key: tuple(stored[key].planned) for keys in linears.values() for key in keys}
    there = {id(tensor) for key, tensor in state.items() if key in stored}  # one key of tied ones
    missing = [k for k in expected if k not in stored and id(state.get(k)) not in there]
    extra = [key for key in stored if key not in expected]
    check_keys(path, missing, extra)
    for key, one in stored.items():
        shape, dtype = expected[key]
        if one.planned.shape != shape:
            raise ValueError(
                f"{path} has {key} of shape {one.planned.shape}, but the model's is {shape}"
            )
        # Floating tensors are cast, so their dtype may be another; integers must have the same one.
        if one.planned.dtype not in (DTYPES if dtype in DTYPES else (dtype,)):
            raise ValueError(f"{path} has {key} of {one.planned.dtype}, but the model's is {dtype}")
    return {key: tensor for key, tensor in state.items() if key in stored}


def _missing_buffers(model: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Values for nonpersistent buffers on meta, which no checkpoint holds, and their places.

    The model's ``_init_weights`` fills a copy of the module on the CPU.  The copy starts with
    NaN or another marker, so a buffer that wasn't filled is noticed.
    """
    buffers: list[tuple[dict[str, Any], str, Tensor]] = []
    for name, module in model.named_modules():
        of_module = {n: module._buffers.get(n) for n in module._non_persistent_buffers_set}
        lost = {n: b for n, b in of_module.items() if b is not None and b.is_meta}
        if not lost:
            continue
        copied = twin(module, type(module))
        # On meta, so that _init_weights doesn't write to the model's parameters.
        for n, parameter in module._parameters.items():
            copied._parameters[n] = None if parameter is None else parameter.to("meta")
        for n, b in lost.items():
            copied._buffers[n] = torch.full_like(b, _unmade(b), device="cpu")
        getattr(model, "_init_weights", lambda module: None)(copied)
        for n in lost:
            value = copied._buffers[n]
            if bool((value.isnan() | (value == _unmade(value))).any()):
                raise ValueError(
                    f"{called(name)}'s {n} is on meta, checkpoints don't hold it, and the model's "
                    "_init_weights doesn't initialize it: build the model on the CPU"
                )
            buffers.append((module._buffers, n, value))
    return buffers


def _unmade(buffer: Tensor) -> float:
    """The marker of a buffer that isn't initialized yet."""
    if buffer.is_floating_point():
        return torch.nan
    # A bool has no third value, so False counts as not initialized.
    return 0 if buffer.dtype == torch.bool else torch.iinfo(buffer.dtype).min


def _home(tensor: Tensor | Quantized) -> torch.device:
    """The device for the loaded value of this tensor: its own, or the CPU for meta."""
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def check_keys(path: str | os.PathLike, missing: Sequence[str], extra: Sequence[str]) -> None:
    """Raise ValueError if the files lack some of a model's tensors, or have others."""
    faults = [f"it lacks {some(missing)}, which the model has"] if missing else []
    faults += [f"it has {some(extra)}, which the model lacks"] if extra else []
    if faults:
        raise ValueError(f"{path} doesn't fit the model: {'; '.join(faults)}")
