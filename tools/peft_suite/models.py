"""Which tiny models stand in for those that PEFT's tests load from the hub.

They share an architecture with their namesakes, not the weights and hardly ever the sizes: a test
that compares with stored numbers can't pass with them.
"""

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 1000


@dataclass(frozen=True)
class Model:
    """A transformers class, the settings of its configuration, and its revisions' names."""

    architecture: str
    settings: dict[str, Any]
    revisions: tuple[str, ...] = ("main",)


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


GPT2 = Model("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512})
LLAMA = Model("LlamaForCausalLM", llama())
GEMMA3 = Model("Gemma3ForCausalLM", llama(head_dim=8))
T5 = Model(
    "T5ForConditionalGeneration",
    {
        "d_model": 32,
        "d_ff": 37,
        "d_kv": 8,
        "num_layers": 5,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
)
BART = Model(
    "BartForConditionalGeneration",
    {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 4,
        "decoder_ffn_dim": 4,
        "max_position_embeddings": 100,
    },
)
RESNET = Model(
    "ResNetForImageClassification",
    {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1]},
)
LLAVA = Model(
    "LlavaForConditionalGeneration",
    {
        "text_config": {"model_type": "llama", "vocab_size": VOCABULARY} | llama(head_dim=4),
        "vision_config": {"model_type": "clip_vision_model"} | vision(),
        "image_token_index": 5,
    },
)
QWEN2_5_VL = Model(
    "Qwen2_5_VLForConditionalGeneration",
    {
        "text_config": {"vocab_size": VOCABULARY} | llama(),
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [1],
        },
    },
)
NEMOTRON_H = Model(
    "NemotronHForCausalLM",
    llama(
        head_dim=4,
        layers_block_type=["linear_attention", "full_attention", "mlp"],
        ssm_state_size=4,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=2,
    ),
)

MODELS = {
    "bert-base-uncased": Model("BertForSequenceClassification", bert()),
    "google/flan-t5-small": T5,
    "gpt2": GPT2,
    "hf-internal-testing/Mixtral-tiny": Model("MixtralForCausalLM", experts()),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": GEMMA3,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": LLAMA,
    "hf-internal-testing/tiny-random-LlavaForConditionalGeneration": LLAVA,
    "hf-internal-testing/tiny-random-MistralForCausalLM": Model("MistralForCausalLM", llama()),
    "hf-internal-testing/tiny-random-gpt2": GPT2,
    "peft-internal-testing/opt-125m": Model(
        "OPTForCausalLM",
        opt(hidden_size=64, word_embed_proj_dim=64, ffn_dim=64, num_hidden_layers=12),
    ),
    "peft-internal-testing/tiny-clip-text-2": Model(
        "CLIPTextModelWithProjection", bert(projection_dim=16)
    ),
    "peft-internal-testing/tiny-dummy-qwen2": Model(
        "Qwen2ForCausalLM", llama(hidden_size=8, intermediate_size=16)
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": BART,
    "peft-internal-testing/tiny-random-BertForSequenceClassification": Model(
        "BertForSequenceClassification", bert()
    ),
    "peft-internal-testing/tiny-random-BertModel": Model("BertModel", bert(), ("main", "v2.0.0")),
    "peft-internal-testing/tiny-random-BloomForCausalLM": Model(
        "BloomForCausalLM", {"hidden_size": 32, "n_layer": 5, "n_head": 4}
    ),
    "peft-internal-testing/tiny-random-DebertaModel": Model("DebertaModel", bert()),
    "peft-internal-testing/tiny-random-DebertaV2Model": Model("DebertaV2Model", bert()),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": GPT2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": Model(
        "GPTJForCausalLM", GPT2.settings | {"rotary_dim": 4}
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": Model("GPTNeoXForCausalLM", bert()),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": LLAMA,
    "peft-internal-testing/tiny-random-OPTForCausalLM": Model("OPTForCausalLM", opt()),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": RESNET,
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": Model(
        "RobertaForSequenceClassification", bert()
    ),
    "peft-internal-testing/tiny-random-RobertaModel": Model("RobertaModel", bert()),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": T5,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": T5,
    "peft-internal-testing/tiny-random-gpt2": GPT2,
    "peft-internal-testing/tiny-random-t5": T5,
    "tiiuae/falcon-mamba-tiny-dev": Model(
        "FalconMambaForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": Model("GptOssForCausalLM", experts(head_dim=8)),
    "trl-internal-testing/tiny-Llama4ForCausalLM": Model(
        "Llama4ForCausalLM", experts(head_dim=8, intermediate_size_mlp=32)
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": Model(
        "LlamaForSequenceClassification", llama()
    ),
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": NEMOTRON_H,
    "trl-internal-testing/tiny-Qwen2_5_VLForConditionalGeneration": QWEN2_5_VL,
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": Model(
        "Qwen3MoeForCausalLM", experts(head_dim=8, moe_intermediate_size=16)
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": LLAMA,
}

ADAPTERS = {
    "peft-internal-testing/opt-125m-dummy-lora": Adapter("peft-internal-testing/opt-125m"),
    "peft-internal-testing/tiny-OPTForCausalLM-lora": Adapter(
        "peft-internal-testing/tiny-random-OPTForCausalLM"
    ),
}

PIPELINES = {"hf-internal-testing/tiny-sd-pipe"}
