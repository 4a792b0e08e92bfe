"""Tiny mixture-of-experts models from transformers, and a few training steps."""

import pytest
import torch
import transformers
from packed import NEEDS_5
from torch import nn

VOCABULARY = 100
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}  # fmt: skip
_GROUPS = {"n_group": 1, "topk_group": 1}
_LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "first_k_dense_replace": 0, "num_key_value_heads": 4,
}  # fmt: skip
_HYBRID = {
    "layers_block_type": ["attention", "moe"], "n_routed_experts": 4,
    "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip
_GEMMA4 = {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "global_head_dim": 8,
    "hidden_size_per_layer_input": 0, "sliding_window": 16,
}  # fmt: skip
# Values: the class of the model, the settings of its config besides the sizes, and the name of the
# first product of its experts.
MODELS = {
    "qwen3": ("Qwen3Moe", {"num_experts": 4, "decoder_sparse_step": 1}, "gate_up_proj"),
    "mixtral": ("Mixtral", {"num_local_experts": 4}, "gate_up_proj"),
    "olmoe": ("Olmoe", {"num_experts": 4}, "gate_up_proj"),
    "deepseek": ("DeepseekV3", _LATENT | _GROUPS, "gate_up_proj"),
    # transposed weights, biases, its own activation
    "gpt-oss": ("GptOss", {"num_local_experts": 4}, "gate_up_proj"),
    "nemotron": ("NemotronH", _HYBRID | _GROUPS, "up_proj"),  # without a gate
    "gemma4": ("Gemma4", _GEMMA4, "gate_up_proj"),
}
_TEXT = ("Gemma4",)  # its config has other parts besides the text model
ROUTERS = ("mlp.gate.weight", "router.weight", "router.proj.weight")
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))


def base_model(name: str = "qwen3", implementation: str = "eager", **changes) -> nn.Module:
    pytest.importorskip("transformers.integrations.moe", reason=NEEDS_5)
    family, more, _ = MODELS[name]
    text = "Text" if family in _TEXT else ""
    config = getattr(transformers, f"{family}{text}Config")(**_SIZES | more | changes)
    kind = getattr(transformers, f"{family}ForCausalLM")
    return kind._from_config(config, experts_implementation=implementation)


def seeded_model(name: str = "qwen3") -> nn.Module:
    """The same model with the same weights in every call."""
    torch.manual_seed(3)
    return base_model(name)


def parts_of(name: str, weight: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """A value of a stacked weight, as values of gate and up, or of down: each [E, out, in]."""
    value = value.mT if name == "gpt-oss" else value  # gate and up alternate in its columns
    if weight == "down_proj":
        return {"down": value}
    both = (value[:, ::2], value[:, 1::2]) if name == "gpt-oss" else value.chunk(2, 1)
    return dict(zip(("gate", "up"), both, strict=True))


def parameters_of(name: str) -> list[str]:
    """The last parts of the names of the experts' weights."""
    return [f"experts.{MODELS[name][2]}", "experts.down_proj"]


def experts_of(model: nn.Module) -> nn.Module:
    """The outermost layer around the first experts."""
    return next(m for n, m in model.named_modules() if n.endswith("experts"))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model: nn.Module, steps: int = 1) -> list[torch.Tensor]:
    """Losses of all steps and the gradients of the last one.  Router weights also train."""
    for name, parameter in model.named_parameters():
        if name.endswith(ROUTERS):
            parameter.requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.SGD(trained, lr=0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return [*found, *[p.grad for p in trained if p.grad is not None]]
