"""The selection of PEFT's tests: LoRA tests that run on a CPU and without the hub."""

import re

QUICK = (
    "test_custom_models.py",
    "test_target_parameters.py",
    "test_lora_variants.py",
    "test_tuners_utils.py",
    "test_low_level_api.py",
    "test_bdlora.py",
    "test_velora.py",
)

FILES = (
    *QUICK,
    "test_initialization.py",
    "test_mixed.py",
    "test_other.py",
    "test_mapping.py",
    "test_helpers.py",
    "test_integrations.py",
    "test_trainable_tokens.py",
    "test_lora_conversion.py",
    "test_lora_ga.py",
    "test_lora_intruders.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_riemannian_lora.py",
    "test_arrow.py",
    "test_xlora.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_stablediffusion.py",
    "test_torch_compile.py",
    "test_quantization.py",
    "test_common_gpu.py",
    "test_gpu_examples.py",
)

# Files for GPUs.  Their tests of packed weights no longer need a GPU, except some that name it.
# Others only round dense weights.
FOR_GPU = {"test_common_gpu.py", "test_gpu_examples.py"}
PACKED = re.compile(r"bnb|[48]bit|quantized", re.IGNORECASE)
NOT_ON_CPU = re.compile(r"multi_gpu|FSDP|LoftQ|PiSSA|bloomz|no_quantization")

LEFT_OUT = {
    "test_auto.py": "loads adapters of many kinds from the hub, but calls none",
    "test_config.py": "makes no layers",
    "test_gptqmodel.py": "needs gptqmodel and its checkpoints",
    "test_hub_features.py": "needs the hub",
    "test_lora_megatron.py": "needs megatron",
    "test_vision_models.py": "loads a picture from the hub; its only LoRA layers are convolutions",
}

TESTS_LEFT_OUT = {
    "test_quantization_backend_is_set_and_repr": "LoRA's layers have no such field",
    "test_4bit_dora_inference": "compares two models' logits to 1e-5, so rounding decides",
}

# A test belongs to another method if its class, name or parameters name one, and none names LoRA.
LORA = re.compile(r"(?<![A-Za-z])(Test)?(LoRA|Lora|lora|DoRA|Dora|dora)")
OTHERS = re.compile(
    r"[A-Za-z0-9]Config\b"
    r"|adalora|adamss|adaption_prompt|beft|boft|bone|c3a|cartridge|cpt|deft|delora|eft|fourierft"
    r"|frod|glora|gralora|hira|hra|ia3|lily|ln_?tuning|loha|lokr|miss(?!ing)|oft|osf|p_?tuning"
    r"|peanut|poly|prefix_?tuning|prompt|psoft|pvera|randlora|road|shadow|shira|supertuning"
    r"|tinylora|unilora|vblora|vera|waveft",
    re.IGNORECASE,
)


def is_chosen(test: str) -> bool:
    """Whether a test, by its id in pytest, is run."""
    file = test.partition("::")[0].rpartition("/")[2]
    name = test.partition("[")[0].rpartition("::")[2]
    wanted = name not in TESTS_LEFT_OUT and (file not in FOR_GPU or is_packed(test))
    return wanted and is_about_lora(test)


def is_packed(test: str) -> bool:
    """Whether a test, by its id in pytest, is about packed weights and runs on a CPU."""
    name = test.partition("::")[2]
    return bool(PACKED.search(name)) and not NOT_ON_CPU.search(name)


def is_about_lora(test: str) -> bool:
    """Whether a test, by its id in pytest, is about LoRA or about no particular method."""
    name = test.partition("::")[2]
    return bool(LORA.search(name)) or not OTHERS.search(name)
