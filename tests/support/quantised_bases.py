"""Tiny Llamas, quantised by transformers' from_pretrained itself; what isn't here is skipped.

Two of its quantisers refuse a CPU at the door, and run there: these two doors are held open.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from models import tiny_llama
from packed import NEEDS_5
from torch import nn

WIDTH, INNER, VOCABULARY = 64, 96, 20
_SIZES = {"hidden_size": WIDTH, "intermediate_size": INNER, "vocab_size": VOCABULARY}
_OLD = transformers.__version__.startswith("4.")
_QUANTISERS = "transformers.quantizers.quantizer"


def _bitsandbytes(folder: Path, **settings) -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    return _load(folder, transformers.BitsAndBytesConfig(**settings))


def _torchao(folder: Path, name: str, **settings) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao isn't installed")
    if "group" in settings:
        settings["granularity"] = quantization.PerGroup(settings.pop("group"))
    config = getattr(quantization, f"{name}Config")(**settings)
    return _load(folder, transformers.TorchAoConfig(config))


def _hqq(folder: Path) -> nn.Module:
    pytest.importorskip("hqq", reason="HQQ isn't installed")
    try:
        return _load(folder, transformers.HqqConfig(nbits=4, group_size=32), device_map=None)
    except NotImplementedError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")


def _float8(folder: Path) -> nn.Module:
    if _OLD:
        pytest.skip(f"transformers {transformers.__version__} makes FP8 on a GPU alone")
    door = f"{_QUANTISERS}_finegrained_fp8.is_torch_xpu_available"
    with mock.patch(door, return_value=True):
        return _load(folder, transformers.FineGrainedFP8Config(weight_block_size=(32, 32)))


def _gguf(folder: Path, packed: bool) -> nn.Module:
    """LFM2, whose blocks transformers keeps; or Llama, which it makes dense."""
    pytest.importorskip("gguf", reason="gguf isn't installed")
    module = pytest.importorskip(f"{_QUANTISERS}_gguf", reason=NEEDS_5)
    _write_gguf(folder, "lfm2" if packed else "llama")
    kernel = SimpleNamespace(supports=lambda kind: True)  # which no tensor on a CPU comes to
    with mock.patch.object(module, "get_gguf_kernel", return_value=kernel):
        config = transformers.GgufConfig(dequantize=False)
        return _load(folder, config, gguf_file="model.gguf", attn_implementation="eager")


def _load(folder: Path, config, device_map="cpu", **settings) -> nn.Module:
    settings |= {"dtype": torch.float32, "device_map": device_map, "quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)


def _write_gguf(folder: Path, arch: str) -> None:
    """A model of this architecture, its linear layers in Q8_0."""
    import gguf

    torch.manual_seed(1)
    writer = gguf.GGUFWriter(folder / "model.gguf", arch)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 2] if arch == "lfm2" else 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_token_list([f"w{i}" for i in range(VOCABULARY)])
    if arch == "lfm2":
        writer.add_shortconv_l_cache(3)
    shapes = {
        "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH),
        "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
    }  # fmt: skip
    whole = {"token_embd": (VOCABULARY, WIDTH)}
    if arch == "lfm2":
        shapes |= {"attn_q_norm": (WIDTH // 4,), "attn_k_norm": (WIDTH // 4,)}
        whole["token_embd_norm"] = (WIDTH,)
    else:
        whole |= {"output_norm": (WIDTH,), "output": (VOCABULARY, WIDTH)}
    blocks = {f"blk.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()}
    for name, shape in (whole | blocks).items():
        values = (torch.randn(shape) * 0.1 + ("norm" in name)).numpy()
        kind = gguf.GGMLQuantizationType.Q8_0
        if len(shape) == 2 and name in blocks:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()


_FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_MAKERS = {
    "nf4": partial(_bitsandbytes, **_FOUR, bnb_4bit_compute_dtype=torch.float32),
    "nf4-nested": partial(_bitsandbytes, **_FOUR, bnb_4bit_use_double_quant=True),
    "int8": partial(_bitsandbytes, load_in_8bit=True, llm_int8_threshold=0.0),
    "torchao-int8": partial(_torchao, name="Int8WeightOnly"),
    "torchao-int4": partial(_torchao, name="IntxWeightOnly", weight_dtype=torch.int4, group=32),
    "torchao-float8": partial(_torchao, name="Float8WeightOnly"),
    "hqq": _hqq,
    "float8": _float8,
    "gguf": partial(_gguf, packed=True),
    "gguf-made-dense": partial(_gguf, packed=False),
}
KINDS = list(_MAKERS)
UNSAVED = [kind for kind in KINDS if "gguf" in kind or (_OLD and "torchao-int" in kind)]


def quantised_base(kind: str, folder: Path) -> nn.Module:
    """The same one from the same folder, which is filled when it is empty."""
    if not (folder / "config.json").exists():
        torch.manual_seed(1)
        tiny_llama(**_SIZES).save_pretrained(folder)
    return _MAKERS[kind](folder)
