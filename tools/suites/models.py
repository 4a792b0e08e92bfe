"""The tiny models that replace the models that tests load from the hub.

They have the architecture of the originals, but not the weights and rarely the sizes.  A test that
compares with stored numbers can't pass with them.
"""

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 1000
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Model:
    """A transformers class, its configuration's settings, its revisions' names, and its dtype."""

    architecture: str
    settings: dict[str, Any]
    revisions: tuple[str, ...] = ("main",)
    dtype: str = "float32"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of random weights, for one of the models."""

    base: str
    settings: dict[str, Any] = field(default_factory=dict)


def opt(**settings) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 5}
    return sizes | {"num_attention_heads": 4, "max_position_embeddings": 100} | settings


def llama(**settings) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2}
    return sizes | {"num_attention_heads": 4, "num_key_value_heads": 4} | settings


def experts(**settings) -> dict[str, Any]:
    return llama(num_local_experts=4, num_experts=4, num_experts_per_tok=2, **settings)


def bert(**settings) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5}
    return sizes | {"num_attention_heads": 4} | settings


def vision(**settings) -> dict[str, Any]:
    return bert(num_hidden_layers=2, image_size=28, patch_size=14, **settings)


def named(architectures: dict[str, dict[str, Any]], prefix: str) -> dict[str, Model]:
    """Models whose names on the hub end with their architectures."""
    return {f"{prefix}{name}": Model(name, settings) for name, settings in architectures.items()}


GPT2 = Model("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512})
LLAMA = Model("LlamaForCausalLM", llama())
BERT = Model("BertForSequenceClassification", bert())
T5 = Model(
    "T5ForConditionalGeneration",
    dict(d_model=32, d_ff=37, d_kv=8, num_layers=5, num_heads=4, decoder_start_token_id=0),
)
BLOOM = {"hidden_size": 32, "n_layer": 5, "n_head": 4}
BART = {"d_model": 16, "max_position_embeddings": 100} | {
    f"{half}_{size}": value
    for half in ("encoder", "decoder")
    for size, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 4))
}
RESNET = {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1]}
LLAVA = {
    "text_config": {"model_type": "llama", "vocab_size": VOCABULARY} | llama(head_dim=4),
    "vision_config": {"model_type": "clip_vision_model"} | vision(),
    "image_token_index": 5,
}
QWEN2_5_VL = {
    "text_config": {"vocab_size": VOCABULARY} | llama(),
    "vision_config": {"depth": 2, "num_heads": 2, "fullatt_block_indexes": [1]}
    | dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size"), 16),
}
MAMBA = {"ssm_state_size": 4, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2}
HYBRID = ["linear_attention", "full_attention", "mlp"]
NEMOTRON_H = llama(head_dim=4, layers_block_type=HYBRID, **MAMBA)
# Large weights, so that probabilities differ, because tests compare them to within a thousandth.
OPT_SIZES = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 64, "init_std": 0.1}
OPT_125M = Model("OPTForCausalLM", opt(**OPT_SIZES, num_hidden_layers=12))
OPT_LARGER = Model("OPTForCausalLM", opt(**OPT_SIZES))
WHISPER = {"d_model": 64, "num_mel_bins": 8, "decoder_start_token_id": 0} | {
    f"{half}_{size}": value
    for half in ("encoder", "decoder")
    for size, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}

PEFT, HUGGING_FACE, TRL = "peft-internal-testing/", "hf-internal-testing/", "trl-internal-testing/"

OF_PEFT = {
    "bert-base-uncased": BERT,
    "bigscience/bloomz-560m": Model("BloomForCausalLM", BLOOM),
    "facebook/opt-125m": OPT_125M,
    "facebook/opt-350m": OPT_LARGER,
    "facebook/opt-6.7b": OPT_LARGER,
    "google/flan-t5-base": T5,
    "google/flan-t5-small": T5,
    "gpt2": GPT2,
    "openai/whisper-large": Model("WhisperForConditionalGeneration", WHISPER),
    "t5-small": T5,
    "tiiuae/falcon-mamba-tiny-dev": Model(
        "FalconMambaForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    ),
    f"{HUGGING_FACE}Mixtral-tiny": Model("MixtralForCausalLM", experts()),
    f"{HUGGING_FACE}tiny-random-gpt2": GPT2,
    f"{PEFT}opt-125m": OPT_125M,
    f"{PEFT}tiny-clip-text-2": Model("CLIPTextModelWithProjection", bert(projection_dim=16)),
    f"{PEFT}tiny-dummy-qwen2": Model(
        "Qwen2ForCausalLM", llama(hidden_size=8, intermediate_size=16)
    ),
    f"{PEFT}tiny-random-BertModel": Model("BertModel", bert(), ("main", "v2.0.0")),
    f"{PEFT}tiny-random-T5ForConditionalGeneration": T5,
    f"{PEFT}tiny-random-T5ForConditionalGeneration-calibrated": T5,
    f"{PEFT}tiny-random-gpt2": GPT2,
    f"{PEFT}tiny-random-t5": T5,
    f"{TRL}tiny-LlamaForSequenceClassification-3.2": Model(
        "LlamaForSequenceClassification", llama()
    ),
    f"{TRL}tiny-NemotronHForCausalLM-nano": Model("NemotronHForCausalLM", NEMOTRON_H),
    f"{TRL}tiny-Qwen2ForCausalLM-2.5": Model("Qwen2ForCausalLM", llama()),
    f"{TRL}tiny-random-LlamaForCausalLM": LLAMA,
    **named(
        {
            "Gemma3ForCausalLM": llama(head_dim=8),
            "LlamaForCausalLM": llama(),
            "LlavaForConditionalGeneration": LLAVA,
            "MistralForCausalLM": llama(),
        },
        f"{HUGGING_FACE}tiny-random-",
    ),
    **named(
        {
            "BartForConditionalGeneration": BART,
            "BertForSequenceClassification": bert(),
            "BloomForCausalLM": BLOOM,
            "DebertaModel": bert(),
            "DebertaV2Model": bert(),
            "GPT2LMHeadModel": GPT2.settings,
            "GPTJForCausalLM": GPT2.settings | {"rotary_dim": 4},
            "GPTNeoXForCausalLM": bert(),
            "LlamaForCausalLM": llama(),
            "OPTForCausalLM": opt(),
            "ResNetForImageClassification": RESNET,
            "RobertaForSequenceClassification": bert(),
            "RobertaModel": bert(),
        },
        f"{PEFT}tiny-random-",
    ),
    **named(
        {
            "GptOssForCausalLM": experts(head_dim=8),
            "Llama4ForCausalLM": experts(head_dim=8, intermediate_size_mlp=32),
            "Qwen2_5_VLForConditionalGeneration": QWEN2_5_VL,
            "Qwen3MoeForCausalLM": experts(head_dim=8, moe_intermediate_size=16),
        },
        f"{TRL}tiny-",
    ),
}

# TRL's own sizes, because some tests count parameters.
QWEN2 = llama(hidden_size=8, intermediate_size=32, num_key_value_heads=2)
OF_TRL = {
    f"{TRL}tiny-{name}": Model(name.partition("-")[0], settings, dtype="bfloat16")
    for name, settings in {
        "GptOssForCausalLM": experts(head_dim=8),
        "LlamaForCausalLM-3.2": llama(),
        "Qwen2ForCausalLM-2.5": QWEN2,
        "Qwen2ForSequenceClassification-2.5": llama(num_labels=1),
        "Qwen3ForCausalLM": llama(head_dim=8),
        "Qwen3MoeForCausalLM": experts(head_dim=8, moe_intermediate_size=16),
        "T5ForConditionalGeneration": T5.settings,
    }.items()
}

CLIP = bert(num_hidden_layers=2, projection_dim=32, max_position_embeddings=100)
OF_DIFFUSERS = {
    f"{PEFT}tiny-clip-text-2": Model("CLIPTextModelWithProjection", CLIP),
    f"{HUGGING_FACE}tiny-random-clip": Model("CLIPTextModelWithProjection", CLIP),
    f"{HUGGING_FACE}tiny-random-t5": T5,
    f"{HUGGING_FACE}tiny-sd3-text_encoder": Model("CLIPTextModelWithProjection", CLIP),
    f"{HUGGING_FACE}tiny-sd3-text_encoder-2": Model("CLIPTextModelWithProjection", CLIP),
}

ADAPTERS = {
    "ybelkada/test-st-lora": Adapter("facebook/opt-350m"),
    f"{PEFT}opt-125m-dummy-lora": Adapter(f"{PEFT}opt-125m"),
    f"{PEFT}tiny-OPTForCausalLM-lora": Adapter(f"{PEFT}tiny-random-OPTForCausalLM"),
}

PIPELINES = (f"{HUGGING_FACE}tiny-sd-pipe",)
