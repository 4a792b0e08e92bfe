"""GGUF files of tiny random models, with the names of llama.cpp."""

from pathlib import Path

import torch
from trainer_runs import VOCABULARY

WIDTH, INNER = 64, 96


def write_model(folder: Path, arch: str, kind: str = "Q8_0") -> None:
    """Write a random model of this architecture, "llama" or "lfm2", to ``model.gguf``.

    Its linear layers are quantized, but for the head.
    """
    import gguf

    torch.manual_seed(1)
    sizes = {
        "context_length": 64, "embedding_length": WIDTH, "feed_forward_length": INNER,
        "block_count": 2, "head_count": 4, "head_count_kv": [2, 2] if arch == "lfm2" else 2,
        "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4,
        "token_list": [f"w{i}" for i in range(VOCABULARY)],
    }  # fmt: skip
    shapes = {
        "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH),
        "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
    }  # fmt: skip
    whole = {"token_embd": (VOCABULARY, WIDTH)}
    if arch == "lfm2":
        sizes["shortconv_l_cache"] = 3
        shapes |= {"attn_q_norm": (WIDTH // 4,), "attn_k_norm": (WIDTH // 4,)}
        whole["token_embd_norm"] = (WIDTH,)
    else:
        whole |= {"output_norm": (WIDTH,), "output": (VOCABULARY, WIDTH)}
    writer = gguf.GGUFWriter(folder / "model.gguf", arch)
    for name, size in sizes.items():
        getattr(writer, f"add_{name}")(size)
    blocks = {f"blk.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()}
    for name, shape in (whole | blocks).items():
        own = gguf.GGMLQuantizationType[kind if len(shape) == 2 and name in blocks else "F32"]
        tensor = torch.randn(shape) * 0.1 + ("norm" in name)
        packed = gguf.quantize(tensor.numpy(), own)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=own)
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
