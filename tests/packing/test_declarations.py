"""Files of transformers models whose weights are packed, or were packed and are dense now.

Each model is saved as users save it and loaded again: the logits are equal, or an error says what
to do.
"""

import json
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from models import refused, tiny_llama
from moe_models import IDS, base_model, parameters_of
from packed_experts import SIZES, bits_of, fp8_model
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from trainer_runs import STEPS, stopped_and_resumed
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, Trainer
from transformers.quantizers.auto import AutoHfQuantizer
from vendor_layers import BITSANDBYTES

import fastlora
from fastlora.formats import quantized_weight
from fastlora.layers.experts_module import packed_names

WIDE = SIZES | {"hidden_size": 64, "head_dim": 16}  # whole blocks of bitsandbytes, also on a CPU
needs_bitsandbytes = pytest.mark.skipif(not BITSANDBYTES, reason="bitsandbytes isn't installed")
PACKED = [
    *[(name, kind) for name in ("gpt-oss", "mixtral", "qwen3") for kind in ("mxfp4", "nvfp4")],
    ("mixtral", "fp8"),
    pytest.param("qwen3", "nf4", marks=needs_bitsandbytes),
]
# Each model and each kind once.
once = pytest.mark.parametrize(("name", "kind"), [PACKED[0], PACKED[3], *PACKED[6:]])
LINEAR = ("gpt-oss", "int8")  # packs linear layers, which have biases


def logits(model: nn.Module) -> torch.Tensor:
    """The logits in training mode; an evaluation call of bitsandbytes may repack its weight."""
    with torch.no_grad():
        return model.train()(input_ids=IDS).logits


def mixture(name: str, kind: str, modules: list[str] | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = base_model(name, **WIDE).requires_grad_(False)
    fastlora.pack(model, kind, modules)
    return model


def adapted(model: nn.Module, name: str, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    names = {"target_modules": ["q_proj"], "target_parameters": parameters_of(name)}
    return fastlora.get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **names))


def empty(folder: Path) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def config_of(folder: Path) -> dict | None:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


@pytest.mark.parametrize(("name", "kind"), [*PACKED, LINEAR])
def test_load_packed_reads_what_save_pretrained_writes(name, kind, tmp_path):
    model = mixture(name, kind)
    expected, bits = logits(model), bits_of(model)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with pytest.raises(ValueError, match="no `quant_method`"):  # no model with random experts
        AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = empty(tmp_path)
    report = fastlora.load_packed(loaded, tmp_path)
    assert sum(weight.after for weight in report.weights) == sum(map(len, bits.values()))
    # The bits of torch's products with dense experts may depend on the weight's address.
    exact = {} if (name, kind) == LINEAR else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(loaded), expected, **exact)
    assert all(torch.equal(one, bits[key]) for key, one in bits_of(loaded).items())
    loaded.save_pretrained(tmp_path / "again")
    for again in (empty(tmp_path / "again"), loaded):
        fastlora.load_packed(again, tmp_path / "again")
        torch.testing.assert_close(logits(again), expected, **exact)


@once
def test_a_trainer_s_checkpoint_is_resumed_and_read(name, kind, tmp_path):
    make = lambda seed: adapted(mixture(name, kind), name, seed)  # noqa: E731
    resumed, whole = (run.model for run in stopped_and_resumed(make, tmp_path, Trainer))
    assert torch.equal(logits(resumed), logits(whole))
    loaded = fastlora.load_adapter(mixture(name, kind), tmp_path / f"whole/checkpoint-{STEPS}")
    assert torch.equal(logits(loaded), logits(whole))


def test_load_packed_reads_files_of_other_save_functions(tmp_path):
    model = mixture("mixtral", "nvfp4")
    expected = logits(model)
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "accelerate")
    model.config.save_pretrained(tmp_path / "accelerate")
    for folder in ("given", "accelerate"):
        loaded = empty(tmp_path / folder)
        fastlora.load_packed(loaded, tmp_path / folder)
        assert torch.equal(logits(loaded), expected)


@once
def test_a_fully_merged_model_saves_a_dense_checkpoint(name, kind, tmp_path):
    model = adapted(mixture(name, kind), name).merge_and_unload()
    model.save_pretrained(tmp_path / "dense")
    assert config_of(tmp_path / "dense") is None
    base_model(name, **WIDE).save_pretrained(tmp_path / "plain")
    keys = [load_file(tmp_path / f / "model.safetensors").keys() for f in ("plain", "dense")]
    assert keys[0] == keys[1]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(found), logits(model))


def test_an_unloaded_model_saves_the_packed_checkpoint(tmp_path):
    model = mixture("mixtral", "mxfp4")
    expected = logits(model)
    adapted(model, "mixtral").unload().save_pretrained(tmp_path)
    loaded = empty(tmp_path)
    fastlora.load_packed(loaded, tmp_path)
    assert torch.equal(logits(loaded), expected)


def test_a_partly_merged_model_needs_load_packed(tmp_path):
    model = mixture("mixtral", "mxfp4")
    config = LoraConfig(target_parameters=["down_proj"], init_lora_weights=False)
    model = fastlora.get_peft_model(model, config).merge_and_unload()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no `quant_method`"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = empty(tmp_path)
    assert len(fastlora.load_packed(loaded, tmp_path).weights) == 2
    assert torch.equal(logits(loaded), logits(model))


VENDORS = {"nf4": "bitsandbytes", "fp8": "torchao"}
with_vendors = pytest.mark.parametrize("kind", VENDORS)


@with_vendors
def test_from_pretrained_loads_packed_linear_layers(kind, tmp_path):
    pytest.importorskip(VENDORS[kind])
    model = mixture("qwen3", kind, ["q_proj", "lm_head"])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    torch.testing.assert_close(logits(found), expected)


@with_vendors
def test_load_packed_loads_packed_linear_layers_beside_packed_experts(kind, tmp_path):
    pytest.importorskip(VENDORS[kind])
    model = mixture("mixtral", kind, ["q_proj", "experts"])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no `quant_method`"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = empty(tmp_path)
    assert len(fastlora.load_packed(loaded, tmp_path).weights) == 6
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path)
    config = LoraConfig(target_parameters=parameters_of("mixtral"))
    loaded = fastlora.get_peft_model(loaded, config).merge_and_unload()
    loaded.save_pretrained(tmp_path / "linear")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "linear", device_map="cpu")
    torch.testing.assert_close(logits(found), expected)


def test_layers_of_two_vendors_are_refused():
    [pytest.importorskip(vendor) for vendor in VENDORS.values()]
    model = mixture("qwen3", "nf4", ["q_proj"])
    with refused(model, "another vendor's packed layers, and its quantization_config"):
        fastlora.pack(model, "fp8", ["k_proj"])


# Models that from_pretrained quantized.


QUANTIZED = {  # the arguments of bitsandbytes' config, or the name of torchao's
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "torchao-int8": "Int8WeightOnlyConfig",
    "torchao-float8": "Float8WeightOnlyConfig",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    tiny_llama(hidden_size=128, intermediate_size=256, vocab_size=100).save_pretrained(folder)
    return folder


def quantized(kind: str, dense: Path, targets: str | list[str], dtype=torch.float32) -> nn.Module:
    if "torchao" in kind:
        quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
        how = transformers.TorchAoConfig(getattr(quantization, QUANTIZED[kind])())
    else:
        pytest.importorskip("bitsandbytes")
        how = BitsAndBytesConfig(**QUANTIZED[kind])
    settings = {"quantization_config": how, "device_map": "cpu", "dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(dense, **settings)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    return fastlora.get_peft_model(model, config)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_quantization_config_stays_where_merged_weights_are_quantized_again(
    kind, dense, tmp_path
):
    model = quantized(kind, dense, "all-linear")
    base = model.get_base_model()
    said = base.hf_quantizer, base.config.quantization_config, base.quantization_method
    model = model.merge_and_unload()
    assert (model.hf_quantizer, model.config.quantization_config, model.quantization_method) == said
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    torch.testing.assert_close(logits(found), logits(model))


def float8_model() -> nn.Module:
    """A model in the form that from_pretrained gives on a GPU."""
    model = fp8_model(linears=True)
    config = transformers.FineGrainedFP8Config(weight_block_size=(16, 16))
    model.hf_quantizer = AutoHfQuantizer.from_config(config)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.config.quantization_config = config
    return model


PARTS = {
    "all": {"target_modules": r".*_proj", "target_parameters": parameters_of("qwen3")},
    "layers": {"target_modules": ["q_proj"]},
    "experts": {"target_parameters": [f"0.mlp.{name}" for name in parameters_of("qwen3")]},
}


@pytest.mark.parametrize("part", PARTS)
def test_float8_layers_and_experts_that_are_dense_load_so(part, tmp_path):
    config = LoraConfig(r=2, init_lora_weights=False, **PARTS[part])
    model = fastlora.get_peft_model(float8_model(), config).merge_and_unload()
    model.save_pretrained(tmp_path)
    assert (config_of(tmp_path) is None) == (part == "all")
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, own in found.named_parameters():
        outer, _, last = name.rpartition(".")
        layer = quantized_weight(model.get_submodule(outer))
        # packed experts must be read by transformers
        if layer is not None or last not in packed_names(model.get_submodule(outer)):
            expected = model.get_parameter(name) if layer is None else layer.weight.dense(own.dtype)
            torch.testing.assert_close(own, expected)
