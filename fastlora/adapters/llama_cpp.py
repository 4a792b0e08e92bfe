"""Export an adapter to GGUF, llama.cpp's format, with the tensor names of the ``gguf`` package."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.other_packages import optional
from ..common.text import shown
from ..common.values import must
from ..layers.modules import some
from ..packing.files import check_folder, read_config, write_whole
from .stored import open_adapter

# transformers' model types, and gguf's names for them.  For these models llama.cpp's converter only
# renames weights and stacks experts, with the exceptions in the next three tables.
_NAMES = {
    "arcee": "ARCEE", "cohere": "COMMAND_R", "cohere2": "COHERE2", "gemma": "GEMMA",
    "gemma2": "GEMMA2", "gemma3_text": "GEMMA3", "gpt_oss": "GPT_OSS", "granite": "GRANITE",
    "llama": "LLAMA", "mistral": "LLAMA", "mixtral": "LLAMA", "olmo": "OLMO", "olmo2": "OLMO2",
    "olmo3": "OLMO2", "olmoe": "OLMOE", "phi": "PHI2", "phi3": "PHI3", "qwen2": "QWEN2",
    "qwen2_moe": "QWEN2MOE", "qwen3": "QWEN3", "qwen3_moe": "QWEN3MOE", "seed_oss": "SEED_OSS",
    "smollm3": "SMOLLM3", "starcoder2": "STARCODER2",
}  # fmt: skip
# It interleaves the two halves of each head of q and k, as its rotary embedding expects.
_INTERLEAVED = {"arcee", "granite", "llama", "mistral", "mixtral", "olmo", "smollm3"}
# The number of heads of k if the config leaves it out; other models have as many as of q.
_KEY_VALUE_HEADS = {"mistral": 8, "mixtral": 8, "smollm3": 4}
# It splits gate_up_proj into gate and up.  They are its halves; in these models, alternating rows.
_ALTERNATING = {"gpt_oss"}
_DTYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}  # and their file types


def export_gguf(
    folder: str | os.PathLike, path: str | os.PathLike, *, model_config: Any, dtype: str = "f32"
) -> None:
    """Convert the adapter in ``folder`` (PEFT's files) to a GGUF file that llama.cpp loads.

    ``model_config``: the base model's transformers config, or a folder that holds it.  ``dtype``:
    "f32", "f16" or "q8_0".  With "q8_0", matrices whose row length is not a multiple of 32 are f16;
    lora_B below rank 32 is one.  The file has a single alpha, so each layer's scale (from patterns
    or rsLoRA) is folded into its lora_B.

    Raises the errors of :func:`fastlora.resize_adapter` for a folder, and ImportError without the
    gguf package.  Raises ValueError for tensors that llama.cpp's adapters can't hold (DoRA, trained
    biases, modules_to_save, embeddings, a tied head), an unsupported model type, and values too
    large for the dtype.  llama.cpp itself checks that the adapter fits its model.  The file is
    written atomically.  An existing file is only overwritten if it is an adapter.
    """
    gguf = optional("gguf", "export_gguf needs gguf", "gguf")
    place = check_folder(path)
    must(dtype in _DTYPES, "dtype", dtype, f"one of {', '.join(_DTYPES)}")
    if place.exists() and not (place.is_file() and _is_adapter(place)):
        raise ValueError(f"path is {place}, which isn't an adapter's GGUF file: give another")
    config = _config_of(model_config)
    stored = open_adapter(folder)
    if stored.trained:
        raise ValueError(
            f"{stored.path} has {some(stored.trained)}, but llama.cpp's adapters can't hold "
            "trained biases, modules_to_save or embeddings: merge it, and convert the model"
        )
    kind = getattr(gguf.MODEL_ARCH, _NAMES[config["model_type"]])
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    alpha = stored.config.lora_alpha
    if abs(alpha) < 1e-30:  # llama.cpp would read an alpha of 0 as a scale of 1
        alpha = 1.0
    tied = config.get("tie_word_embeddings", True)  # transformers leaves out True, the default
    with tempfile.TemporaryDirectory(prefix="fastlora-") as scratch:
        file = Path(scratch) / "adapter"
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[kind])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(gguf.LlamaFileType[_DTYPES[dtype]])
        for name, layer in stored.layers.items():
            lora_a, lora_b, scale = stored.read(name)
            lora_b = lora_b * (scale * lora_b.shape[2] / alpha)  # llama.cpp's scale is alpha / r
            for part, part_of_b in parts_of(name, lora_b, config).items():
                to = names.get_name(f"{part}.weight", try_suffixes=(".weight",))
                if to is None or (part == "lm_head" and tied):
                    raise ValueError(
                        f"llama.cpp has no separate weight for {part} of {config['model_type']}: "
                        "train an adapter without it in target_modules"
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
    """Whether the file is empty or an adapter's GGUF file, and not, for example, a model."""
    with open(path, "rb") as file:
        start = file.read(4096)
    return not start or (start[:4] == b"GGUF" and b"adapter.type" in start)


def _config_of(model_config: Any) -> Mapping[str, Any]:
    """The model's config as a dict.  Raises ValueError for an unsupported model."""
    config = read_config(model_config)
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if str(kind) not in _NAMES:
        raise ValueError(
            f"the model's type is {shown(kind)}, but fastlora can export adapters only of "
            f"{', '.join(_NAMES)}"
        )
    heads = _KEY_VALUE_HEADS.get(str(kind), config.get("num_attention_heads"))
    return {**config, "num_key_value_heads": config.get("num_key_value_heads") or heads}


def parts_of(name: str, lora_b: Tensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """lora_b [E, q, r], divided among llama.cpp's weights, by their names in transformers."""
    kind, (module, _, last) = config["model_type"], name.rpartition(".")
    if last == "gate_up_proj" and module.endswith("experts"):
        step, half = (2, None) if kind in _ALTERNATING else (1, lora_b.shape[1] // 2)
        gate, up = lora_b[:, :half:step], lora_b[:, half or 1 :: step]
        return {f"{module}.gate_proj": gate, f"{module}.up_proj": up}
    if kind in _INTERLEAVED and last in ("q_proj", "k_proj"):
        heads = config["num_attention_heads" if last == "q_proj" else "num_key_value_heads"]
        if lora_b.shape[1] % (2 * heads):
            raise ValueError(
                f"{name} has {lora_b.shape[1]} out features, which must be a multiple of "
                f"{2 * heads} for {heads} heads: give the config of the adapter's base model"
            )
        lora_b = lora_b.unflatten(1, (heads, 2, -1)).transpose(2, 3).flatten(1, 3)
    return {name: lora_b}


def _add(writer: Any, name: str, tensor: Tensor, dtype: str) -> None:
    """Add a tensor to the file.  Raises ValueError if a value is too large for the dtype."""
    from gguf import GGMLQuantizationType, quants

    kind = "f16" if dtype == "q8_0" and tensor.shape[-1] % 32 else dtype
    # A block of q8_0 has 8-bit integers up to 127 and an f16 scale.
    limit = {"f32": 3.4e38, "f16": 65504, "q8_0": 127 * 65504}[kind]
    if tensor.abs().max() >= limit:
        raise ValueError(f"{name} has numbers that are too large for {dtype}: export it as f32")
    raw = GGMLQuantizationType[kind.upper()]
    writer.add_tensor(name, quants.quantize(tensor.float().numpy(), raw), raw_dtype=raw)
