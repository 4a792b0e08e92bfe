"""An adapter's two files: reading their headers before loading, and writing them atomically."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.cache_folder import is_scratch, write_whole
from ..common.values import must

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of PEFT's keys
_LONGEST_KEY = 1000  # characters; keys of real models have some 100


_DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "F32": torch.float32,
    "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16,
    "U16": torch.uint16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Planned(NamedTuple):
    """Shape and dtype of a tensor in a file that isn't loaded or written yet."""

    shape: tuple[int, ...]
    dtype: Any  # a torch.dtype, or the file's name of a dtype that torch doesn't have


def check_folder(folder: str | os.PathLike) -> Path:
    """The folder as a Path.  Raises TypeError if it isn't a path."""
    is_path = isinstance(folder, str | os.PathLike)
    must(is_path, "folder", folder, "a path: a str or a pathlib.Path", TypeError)
    return Path(folder)


def check_files(folder: Path) -> None:
    """Raise FileNotFoundError unless both files exist; the message suggests the right folder."""
    missing = [folder / name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        adapters = (path.parent for path in folder.glob(f"*/{CONFIG}"))
        inside = sorted(path.name for path in adapters if not is_scratch(path))
        hint = f" Its subfolders {', '.join(inside[:5])} are adapters: give one of these."
        raise FileNotFoundError(
            f"{missing[0]} doesn't exist: give a folder that holds {CONFIG} and {WEIGHTS}. For a "
            "name on the Hugging Face hub, huggingface_hub.snapshot_download returns it. If the "
            "weights are a pickle, and fastlora doesn't open pickles, save them again with PEFT."
            f"{hint if inside else ''}"
        )


def read_json(path: Path) -> Any:
    """The file's content.  Raises ValueError if it isn't JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # also with a byte-order mark
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be a config") from None


def read_adapter(folder: str | os.PathLike) -> tuple[Path, dict[str, Any], dict[str, Planned]]:
    """An adapter's folder, its config and the header of its weights."""
    path = check_folder(folder)
    check_files(path)
    settings = read_json(path / CONFIG)
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise ValueError(f"{path / CONFIG} is not a PEFT config: it has no peft_type")
    return path, settings, read_header(path / WEIGHTS)


def read_config(model_config: Any) -> Any:
    """The content of a transformers config, of a config.json, or of the folder that holds it."""
    if hasattr(model_config, "to_dict"):
        return model_config.to_dict()
    is_path = isinstance(model_config, str | os.PathLike)
    what = "a transformers config, or a folder that has config.json"
    must(is_path, "model_config", model_config, what, TypeError)
    path = Path(model_config, "" if str(model_config).endswith(".json") else "config.json")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} doesn't exist: give the folder of the adapter's base model, or its "
            "config, such as AutoConfig.from_pretrained(name)"
        )
    return read_json(path)


def read_header(path: Path) -> dict[str, Planned]:
    """Shape and dtype of each tensor in a safetensors file, by key; no tensor is loaded.

    Raises ValueError if the file is damaged.
    """
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        # Some patterns take a time that grows with the square of a key's length.
        if len(longest := max(slices, key=len, default="")) > _LONGEST_KEY:
            raise ValueError(
                f"{path} is damaged: it has a key of {len(longest)} characters, "
                f"{longest[:50]}…, and no key may have more than {_LONGEST_KEY}"
            )
        facts = {k: (tuple(part.get_shape()), part.get_dtype()) for k, part in slices.items()}
        return {k: Planned(shape, _DTYPES.get(name, name)) for k, (shape, name) in facts.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the safetensors file's header."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open safetensors file.  Raises ValueError if it can't be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or not a safetensors file: {error}") from None


def name_of(key: str) -> str:
    """The parameter's name in the model, from its key in the file."""
    return key.removeprefix(PREFIX)


def read_tensors(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of these keys, on the CPU.  Raises ValueError if the file is damaged."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in keys}


def write_adapter(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's two files atomically."""
    from safetensors.torch import save

    text = json.dumps(settings, indent=2) + "\n"
    content = save(dict(tensors), metadata={"format": "pt"})
    write_whole(folder, {WEIGHTS: content, CONFIG: text.encode()})
