"""A model with packed weights in its linear layers: NF4, or the blocks of a GGUF file.

The embeddings, and the head that shares their weight, stay dense.
"""

from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType as Kind
from options import stop
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.gguf.dequant import GGML_BLOCK
from transformers.integrations.gguf.utils import GgufLinear


def quantize_to_nf4(model: PreTrainedModel) -> PreTrainedModel:
    """Replace a dense model's layers one by one by bitsandbytes' layers with nested absmax."""
    from bitsandbytes.nn import Linear4bit

    for name, linear in linear_layers(model).items():
        layer = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None,
            compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta",
        )  # fmt: skip
        # Otherwise some CPUs repack the weight in an evaluation, and it stays repacked.
        layer.support_avx512bf16_for_cpu = False
        kind = type(layer.weight)
        layer.weight = kind(linear.weight.data, False, quant_type="nf4", module=layer)
        layer.bias = linear.bias
        model.set_submodule(name, layer.to(linear.weight.device))  # this quantizes
    model.is_loaded_in_4bit = True  # PEFT reads it
    return model


def model_of_gguf(run: SimpleNamespace) -> PreTrainedModel:
    """A model with the blocks of the GGUF in its folder, and with the folder's dense parameters.

    transformers' loader would dequantize the blocks on a CPU.  Here these layers never have a dense
    weight.
    """
    reader = gguf.GGUFReader(gguf_of(run.model))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with no_init_weights():
        config = AutoConfig.from_pretrained(run.model)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, run.dtype))
    model.tie_weights()
    arch = reader.fields["general.architecture"].contents()
    names = names_in_gguf(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, linear in linear_layers(model).items():
        tensor = tensors[names.get_name(name) + ".weight"]
        blocks = tensor.data
        if arch == "llama" and (count := heads.get(name.rpartition(".")[2])):
            blocks = rows_in_halves(blocks, count)
        model.set_submodule(name, packed_layer(linear, blocks, tensor.tensor_type))
    dense = dict(model.named_parameters())
    with safe_open(Path(run.model, "model.safetensors"), "pt") as file:
        for name in dense.keys() - packed_names(model):
            dense[name].data.copy_(file.get_tensor(name))
    return model.eval()


def rows_in_halves(rows: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Reorder the rows of a Llama's q or k for transformers.

    RoPE rotates pairs of rows.  A GGUF has the two rows of a pair side by side; transformers has
    them half a head apart.  A block lies within a row, so blocks don't change.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def packed_layer(linear: nn.Linear, blocks, kind: Kind) -> GgufLinear:
    blocks = blocks.copy()  # a reader's array is the file itself
    if kind == Kind.Q5_0:  # transformers' layer can't hold it
        blocks, kind = as_q8_0(torch.from_numpy(blocks)), Kind.Q8_0
    if kind not in GGML_BLOCK:
        stop(f"--quantized: transformers' GgufLinear can't hold {kind.name}")
    layer = GgufLinear(linear.in_features, linear.out_features, int(kind), linear.bias is not None)
    layer.weight.data = torch.as_tensor(blocks)
    layer.bias = linear.bias
    return layer


def as_q8_0(blocks: Tensor) -> Tensor:
    """Blocks of Q5_0 as Q8_0, with exactly the same numbers.

    A block of Q5_0 has a float16 scale and 32 numbers of 5 bits; Q8_0 has bytes instead.
    """
    rows = blocks.shape[0]
    scale, high, low = blocks.reshape(rows, -1, 22).split([2, 4, 16], dim=-1)
    low = torch.cat([low & 15, low >> 4], dim=-1)
    high = (high.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)
    numbers = (low | high << 4).view(torch.int8) - 16
    return torch.cat([scale, numbers.view(torch.uint8)], dim=-1).reshape(rows, -1)


def names_in_gguf(name: str, layers: int) -> gguf.TensorNameMap:
    [arch] = [arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name]
    return gguf.get_tensor_name_map(arch, layers)


def gguf_of(folder: str) -> Path | None:
    return next(Path(folder).glob("*.gguf"), None)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    return {k: each for k, each in modules.items() if type(each) is nn.Linear and each is not head}


def packed_names(model: nn.Module) -> set[str]:
    modules = model.named_modules()
    return {f"{name}.weight" for name, each in modules if isinstance(each, GgufLinear)}
