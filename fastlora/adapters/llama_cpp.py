"""An adapter in llama.cpp's format: GGUF, by the names of the ``gguf`` package."""

import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..layers.modules import some
from ..model.files import check_folder, read_json, write_whole
from ..projection import shown
from .stored import Stored, is_copy, open_adapter

# What gguf calls the models whose weights llama.cpp's converter renames, and stacks, but for:
_NAMES = {
    "arcee": "ARCEE", "cohere": "COMMAND_R", "cohere2": "COHERE2", "gemma": "GEMMA",
    "gemma2": "GEMMA2", "gemma3_text": "GEMMA3", "gpt_oss": "GPT_OSS", "granite": "GRANITE",
    "llama": "LLAMA", "mistral": "LLAMA", "mixtral": "LLAMA", "olmo": "OLMO", "olmo2": "OLMO2",
    "olmo3": "OLMO2", "olmoe": "OLMOE", "phi": "PHI2", "phi3": "PHI3", "qwen2": "QWEN2",
    "qwen2_moe": "QWEN2MOE", "qwen3": "QWEN3", "qwen3_moe": "QWEN3MOE", "seed_oss": "SEED_OSS",
    "smollm3": "SMOLLM3", "starcoder2": "STARCODER2",
}  # fmt: skip
# q and k, whose halves of a head it interleaves, as its rotary embedding takes them,
_INTERLEAVED = {"arcee", "granite", "llama", "mistral", "mixtral", "olmo", "smollm3"}
# of so many heads of k, where a file of such a model leaves them out; of others as many as of q;
_KEY_VALUE_HEADS = {"mistral": 8, "mixtral": 8, "smollm3": 4}
# and gate and up, which it takes apart: halves of gate_up_proj, here every other row.
_ALTERNATING = {"gpt_oss"}
_DTYPES = ("f32", "f16", "q8_0")


def export_gguf(
    folder: str | os.PathLike,
    path: str | os.PathLike,
    *,
    model_config: Any,
    dtype: str = "f32",
) -> None:
    """Write the adapter in ``folder``, in PEFT's files, as the GGUF file that llama.cpp loads.

    ``model_config``: the base model's, of transformers', or a folder that has it.  ``dtype``:
    "f32", "f16", or "q8_0", where matrices whose rows are no multiple of 32 numbers, as lora_B's
    are below rank 32, are f16.  The file has one alpha: a layer's own scale, by patterns or rsLoRA,
    is folded into its lora_B.

    Raises what :func:`fastlora.resize_adapter` raises for a folder, ImportError without the gguf
    package, and ValueError for what llama.cpp can't hold, by name: DoRA, trained biases,
    modules_to_save, embeddings, a tied head; for models that it, or fastlora, knows no names of;
    for an adapter of another model than ``model_config``'s, as far as its files tell; and for
    numbers that the dtype can't hold.  The file is written whole or not at all, and over no
    model's.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("export_gguf needs gguf: pip install 'fastlora-kernels[gguf]'") from error
    place = check_folder(path)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {shown(dtype)}, but must be one of {', '.join(_DTYPES)}")
    if place.exists() and not (place.is_file() and _is_adapter(place)):
        raise ValueError(f"path is {place}, which is there, and no adapter's GGUF: give another")
    config = _config_of(model_config)
    stored = open_adapter(folder)
    _check_base(stored, config["model_type"])
    # PEFT copies the frozen weight of an adapted head.
    if foreign := [key for key in stored.others if not is_copy(key)]:
        raise ValueError(
            f"{stored.path} has {some(foreign)}: llama.cpp's adapters have no trained biases, "
            "modules_to_save or embeddings"
        )
    kind = getattr(gguf.MODEL_ARCH, _NAMES[config["model_type"]])
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[dtype]
    alpha = stored.config.lora_alpha
    if abs(alpha) < 1e-30:  # 0 in float32, which llama.cpp takes for a scale of 1
        alpha = 1.0
    tied = config.get("tie_word_embeddings", True)  # what transformers leaves out if it is so
    with tempfile.TemporaryDirectory(prefix="fastlora-") as scratch:
        file = Path(scratch) / "adapter"
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[kind])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(gguf.LlamaFileType[file_type])
        for name, layer in stored.layers.items():
            lora_a, lora_b, scale = stored.read(name)
            if not layer.is_parameter:
                _check_place(name, (lora_a.shape[2], lora_b.shape[1]), config)
            lora_b = lora_b * (scale * lora_b.shape[2] / alpha)
            for part, part_of_b in _parts(name, lora_b, config).items():
                to = names.get_name(f"{part}.weight", try_suffixes=(".weight",))
                if to is None or (part == "lm_head" and tied):
                    raise ValueError(
                        f"llama.cpp has no weight of its own for {part} of {config['model_type']}: "
                        "leave it out of target_modules"
                    )
                for tensor, end in ((lora_a, "a"), (part_of_b, "b")):
                    value = tensor if layer.is_parameter else tensor[0]
                    _add(writer, f"{to}.lora_{end}", value, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_whole(place.parent, {place.name: file.read_bytes()})


def _is_adapter(path: Path) -> bool:
    """Whether the file is empty or one of ours, not a model that may be somebody's only copy."""
    with open(path, "rb") as file:
        start = file.read(4096)
    return not start or (start[:4] == b"GGUF" and b"adapter.type" in start)


def _config_of(model_config: Any) -> Mapping[str, Any]:
    """As a dict; ValueError for a model that can't be exported."""
    if isinstance(model_config, str | os.PathLike):
        path = Path(model_config) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} doesn't exist: give the folder of the adapter's base model or its config: "
                "AutoConfig.from_pretrained(name), of a name on the Hugging Face hub"
            )
        config = read_json(path)
    elif hasattr(model_config, "to_dict"):
        config = model_config.to_dict()
    else:
        raise TypeError(
            f"model_config is {shown(model_config)}, but must be a config of transformers', or a "
            "folder that has config.json"
        )
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if str(kind) not in _NAMES:
        raise ValueError(
            f"the model's type is {shown(kind)}, and fastlora exports adapters of "
            f"{', '.join(_NAMES)}"
        )
    heads = _KEY_VALUE_HEADS.get(str(kind), config.get("num_attention_heads"))
    full = {**config, "num_key_value_heads": config.get("num_key_value_heads") or heads}
    for field in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        if type(full.get(field)) is not int or not 0 < full[field] < 10_000:
            raise ValueError(f"the model's config has {field} {shown(full.get(field))}")
    return full


def _check_base(stored: Stored, kind: str) -> None:
    """Raise ValueError if the adapter names a base that is here, and of another kind."""
    name = stored.settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return
    theirs: Any = None
    with suppress(OSError, ValueError, AttributeError):  # it isn't here, or no config
        theirs = read_json(Path(name, "config.json")).get("model_type")
    if isinstance(theirs, str) and theirs in _NAMES and theirs != kind:
        raise ValueError(
            f"{stored.path} is an adapter of {name}, whose type is {shown(theirs)}, and "
            f"model_config's is {shown(kind)}: give its base model's"
        )


def _check_place(name: str, features: tuple[int, int], config: Mapping[str, Any]) -> None:
    """Raise ValueError for a linear layer that a model of this config hasn't, or of other sizes."""
    hidden, head = config.get("hidden_size"), config.get("head_dim")
    number, last = re.search(r"\blayers\.(\d+)\.", name), name.rpartition(".")[2]
    wrong = number is not None and int(number[1]) >= config["num_hidden_layers"]
    if type(hidden) is int:
        takes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), hidden)
        gives = {"o_proj": hidden, "down_proj": hidden}
        if type(head) is int:  # a file may leave out what its class knows, and heads of keys too
            queries = head * config["num_attention_heads"]
            takes["o_proj"] = gives["q_proj"] = queries
        fits = takes.get(last, features[0]), gives.get(last, features[1])
        wrong = wrong or features != fits
    if wrong:
        raise ValueError(
            f"the adapter's {name} takes {features[0]} features and gives {features[1]}, and a "
            f"model of model_config, with {config['num_hidden_layers']} layers, has no such layer: "
            "give the config of the adapter's base model"
        )


def _parts(name: str, lora_b: Tensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """lora_b [E, q, r] for each of llama.cpp's weights, by what transformers would call that."""
    kind, (module, _, last) = config["model_type"], name.rpartition(".")
    if last == "gate_up_proj" and module.endswith("experts"):
        step, half = (2, None) if kind in _ALTERNATING else (1, lora_b.shape[1] // 2)
        gate, up = lora_b[:, :half:step], lora_b[:, half or 1 :: step]
        return {f"{module}.gate_proj": gate, f"{module}.up_proj": up}
    if kind in _INTERLEAVED and last in ("q_proj", "k_proj"):
        heads = config["num_attention_heads" if last == "q_proj" else "num_key_value_heads"]
        if lora_b.shape[1] % (2 * heads):
            raise ValueError(f"{name} has {lora_b.shape[1]} features, which are no {heads} heads")
        lora_b = lora_b.unflatten(1, (heads, 2, -1)).transpose(2, 3).flatten(1, 3)
    return {name: lora_b}


def _add(writer: Any, name: str, tensor: Tensor, dtype: str) -> None:
    """Put a tensor into the file; ValueError if its dtype can't hold a number of it."""
    from gguf import GGMLQuantizationType, quants

    kind = "f16" if dtype == "q8_0" and tensor.shape[-1] % 32 else dtype
    # The scale of a block of q8_0 is an f16, too.
    limit = {"f32": 3.4e38, "f16": 65504, "q8_0": 127 * 65504}[kind]
    if tensor.abs().max() >= limit:
        raise ValueError(f"{name} has numbers that are too large for {dtype}: export it as f32")
    raw = GGMLQuantizationType[kind.upper()]
    writer.add_tensor(name, quants.quantize(tensor.float().numpy(), raw), raw_dtype=raw)
