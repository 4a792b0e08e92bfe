"""An adapter's two files: what is in them before anything is loaded, and writing them whole."""

import json
import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import kind_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLE = "adapter_model.bin"
# A folder of files that aren't whole as yet: this, the machine's name, and what makes it unique.
_SCRATCH, _HOST = ".fastlora-", re.sub(r"[^\w.]", "_", platform.node())[:64] + "-"
_OLD = 3600.0  # seconds without a change
_WHOLE_MODELS = ("config.json", "model.safetensors", "pytorch_model.bin")


# In the order in which safetensors puts them.
_DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.uint16: "U16", torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_TORCH_S = {name: dtype for dtype, name in _DTYPES.items()}


class Planned(NamedTuple):
    """A tensor of a file, before it is made or loaded."""

    shape: tuple[int, ...]
    dtype: Any  # torch's; or the file's name for one that torch hasn't


def check_folder(folder: str | os.PathLike) -> Path:
    """The path; a TypeError if it is none."""
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder is {kind_of(folder)}, but must be a path: a str or a pathlib.Path")
    return Path(folder)


def check_files(folder: Path) -> None:
    """Raise FileNotFoundError, with a guess at what is meant, unless both files are there."""
    missing = [folder / name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} doesn't exist: an adapter's folder holds {CONFIG} and {WEIGHTS}."
            f"{_hint(folder)}"
        )


def _hint(folder: Path) -> str:
    """What the folder is, if it is no adapter's."""
    if folder.is_file():
        return " Give the folder, not a file."
    if not folder.is_dir():
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", folder.as_posix()):
            return (
                " If this is a name on the Hugging Face hub, give what "
                f"huggingface_hub.snapshot_download({folder.as_posix()!r}) returns."
            )
        return ""
    if (folder / _PICKLE).is_file():
        return (
            f" The folder has {_PICKLE}, which is a pickle, and fastlora opens none. Convert it "
            f"with PEFT: PeftModel.from_pretrained(model, {str(folder)!r}).save_pretrained(…)."
        )
    adapters = (path.parent for path in folder.glob(f"*/{CONFIG}"))
    inside = sorted(path.name for path in adapters if not is_scratch(path))
    if inside:
        return f" The adapters are in its subfolders ({', '.join(inside[:5])}): give one of these."
    if any((folder / name).is_file() for name in _WHOLE_MODELS):
        return " The folder holds a whole model: load it with from_pretrained."
    return ""


def read_json(path: Path) -> Any:
    """The file's content; a ValueError if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be a config") from None


def read_header(path: Path) -> dict[str, Planned]:
    """What the safetensors file says that it holds; nothing is loaded.  ValueError if damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            facts = {k: (tuple(part.get_shape()), part.get_dtype()) for k, part in slices.items()}
            return {
                k: Planned(shape, _TORCH_S.get(name, name)) for k, (shape, name) in facts.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """What the safetensors file's header says beside its tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def size_of(tensors: Mapping[str, Planned]) -> int:
    """Bytes of the adapter's file that holds these, by key: its header, and what is in it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = list(_DTYPES), 0
    for key in sorted(tensors, key=lambda key: (places.index(tensors[key].dtype), key)):
        shape, dtype = tensors[key]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + (len(text) + 7) // 8 * 8 + end


def read_tensors(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of these keys, on the CPU.  ValueError if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_adapter(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's two files, whole."""
    from safetensors.torch import save

    text = json.dumps(settings, indent=2) + "\n"
    content = save(dict(tensors), metadata={"format": "pt"})
    write_whole(folder, {WEIGHTS: content, CONFIG: text.encode()})


def write_whole(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files so that each is the old or the new one, whole, if the process dies.

    What a process that died here before has left behind is deleted.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, but must be a folder: give another path")
    folder.mkdir(parents=True, exist_ok=True)
    with _writing(folder), tempfile.TemporaryDirectory(prefix=_SCRATCH + _HOST, dir=folder) as made:
        for name, content in files.items():
            with open(Path(made) / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(Path(made) / name, folder / name)


def is_scratch(path: Path) -> bool:
    """Whether it is a folder that ``write_whole`` made, in a process that writes now, or died."""
    return path.name.startswith(_SCRATCH) and path.is_dir() and not path.is_symlink()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Inside, no process takes what this one writes for a leftover; it deletes leftovers before.

    Whoever writes shares a lock of the folder, which ends with the process: who can have it alone
    is the only one.
    """
    try:
        import fcntl  # which Windows hasn't: there, leftovers stay

        place = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with suppress(OSError):  # somebody else writes, or the file system has no locks
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _delete_leftovers(folder)
        with suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_SH)
        yield
    finally:
        os.close(place)


def _delete_leftovers(folder: Path) -> None:
    """Of this machine; and of others, whose locks may not be seen here, if they are old."""
    for path in filter(is_scratch, list(folder.iterdir())):
        changed = [each.stat().st_mtime for each in (path, *path.iterdir())]
        if path.name.startswith(_SCRATCH + _HOST) or time.time() - max(changed) > _OLD:
            shutil.rmtree(path, ignore_errors=True)
