"""PEFT's LoRA on the experts of transformers' models, with and without fastlora."""

import copy
import pickle

import peft
import pytest
import torch
import transformers
from memory import saved_bytes
from peft_models import VOCABULARY, adapted, assert_runs_the_same, counted_calls, optimized
from torch import nn

import fastlora

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
# The class of a model, what its config takes besides the sizes, and how it calls the first product.
MODELS = {
    "qwen3": ("Qwen3Moe", {"num_experts": 4, "decoder_sparse_step": 1}, "gate_up_proj"),
    "mixtral": ("Mixtral", {"num_local_experts": 4}, "gate_up_proj"),
    "olmoe": ("Olmoe", {"num_experts": 4}, "gate_up_proj"),
    "deepseek": ("DeepseekV3", _LATENT | _GROUPS, "gate_up_proj"),
    "gpt-oss": ("GptOss", {"num_local_experts": 4}, "gate_up_proj"),  # transposed, bias, own gate
    "nemotron": ("NemotronH", _HYBRID | _GROUPS, "up_proj"),  # without a gate
}
_TARGETS = ("target_modules", "target_parameters")
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))


def base_model(name: str, implementation: str = "eager", **changes) -> nn.Module:
    family, more, _ = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**_SIZES | more | changes)
    kind = getattr(transformers, f"{family}ForCausalLM")
    return kind._from_config(config, experts_implementation=implementation)


def model_of(name: str = "qwen3", implementation: str = "eager", **settings) -> nn.Module:
    first = MODELS[name][2]
    targets = {
        "target_modules": ["q_proj"],
        "target_parameters": [f"experts.{first}", "experts.down_proj"],
    }
    return adapted(base_model(name, implementation), **targets | settings)


def experts_of(model: nn.Module) -> nn.Module:
    """The outermost layer around the first experts."""
    return next(m for n, m in model.named_modules() if n.endswith("experts"))


def train(model: nn.Module, steps: int = 1) -> list[torch.Tensor]:
    """Losses and the last gradients; router weights train as well."""
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "router.weight")):
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


def fast_calls(model: nn.Module, run=train) -> int:
    """How many calls of experts run fast, twice each, and of ordinary layers."""
    with counted_calls() as calls:
        run(model)
    return len(calls)


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_peft_s(name):
    theirs = model_of(name).double()
    ours = optimized(theirs)
    fast = sum(layer.fast for layer in fastlora.coverage(ours).layers)
    assert fast == len(fastlora.coverage(ours).layers)
    # NemotronH's routing is in float32
    tolerance = 1e-6 if name == "nemotron" else 1e-11
    assert_runs_the_same(train, theirs, ours, fast=fast, tolerance=tolerance)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_ten_steps(implementation):
    theirs = model_of("qwen3", implementation)
    run = lambda model: train(model, 10)  # noqa: E731
    assert_runs_the_same(run, theirs, fast=60, tolerance=2e-4)


def test_generation():
    theirs = model_of("mixtral")

    def generate(model):
        return model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)

    assert torch.equal(generate(theirs), generate(optimized(theirs)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    theirs = model_of().double().train()
    theirs.enable_input_require_grads()
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    ours = optimized(theirs)
    expected = train(theirs)
    ours.gradient_checkpointing_enable(**settings)
    for found, wanted in zip(train(ours), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_less_is_kept_than_peft_keeps():
    theirs = model_of()
    ours = optimized(theirs)
    ours_kept, theirs_kept = (
        sum(saved_bytes(lambda m=m: m(input_ids=IDS).logits, m.parameters()).values())
        for m in (ours, theirs)
    )
    assert ours_kept < 0.7 * theirs_kept


def merge(model):
    model.merge_adapter()


def disable(model):
    model.base_model.disable_adapter_layers()


def add_another(model):
    targets = {k: getattr(model.peft_config["default"], k) for k in _TARGETS}
    model.add_adapter("other", peft.LoraConfig(r=2, **targets))
    model.base_model.set_adapter(["default", "other"])


def hook_the_experts(model):
    experts_of(model).get_base_layer().register_forward_hook(lambda *_: None)


def hook_an_inner_layer(model):
    experts_of(model).base_layer.register_forward_pre_hook(lambda *_: None)


def hook_lora_a(model):
    experts_of(model).lora_A["default"].register_forward_hook(lambda *_: None)


def replace_the_forward(model):
    experts = experts_of(model).get_base_layer()
    experts.forward = type(experts).forward.__get__(experts)
    experts.forward = lambda *args: type(experts).forward(experts, *args)


def replace_the_gate(model):
    experts = experts_of(model).get_base_layer()
    experts._apply_gate = lambda pre: pre.chunk(2, dim=-1)[1]


CHANGES = [
    merge, disable, add_another, hook_the_experts, hook_an_inner_layer, hook_lora_a,
    replace_the_forward, replace_the_gate,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_peft_is_asked_for(change):
    """A change of the model is noticed by the next call, and said by the report."""
    theirs = model_of()
    ours = optimized(theirs.double())
    before = fast_calls(ours, lambda model: model(input_ids=IDS))
    for model in (theirs, ours):
        change(model)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    assert fast_calls(ours, lambda model: model(input_ids=IDS)) < before
    if change not in (merge, disable):
        report = fastlora.coverage(ours)
        reasons = [layer.reason for layer in report.eager if "experts" in layer.name]
        assert len(reasons) >= 2
        assert all(reasons)


@pytest.mark.parametrize("target", ["experts.down_proj", "experts.gate_up_proj"])
def test_one_adapted_parameter_is_peft_s(target):
    ours = optimized(model_of(target_parameters=[target]))
    report = fastlora.coverage(ours)
    (reason,) = {layer.reason for layer in report.eager}
    assert reason == f"its adapters are on {target[8:]}, and not on gate_up_proj and down_proj"


def test_autocast_is_peft_s():
    theirs = model_of()
    ours = optimized(theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16), counted_calls() as calls:
        found, expected = (model(input_ids=IDS).logits for model in (ours, theirs))
    assert len(calls) == 2  # of q_proj
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_files_and_merging_are_peft_s(tmp_path):
    theirs = model_of()
    ours = optimized(theirs)
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base_model("qwen3"), tmp_path)
    for name, tensor in peft.get_peft_model_state_dict(again).items():
        assert torch.equal(tensor, peft.get_peft_model_state_dict(theirs)[name])
    merged = copy.deepcopy(theirs).merge_and_unload()
    assert torch.equal(
        optimized(theirs).merge_and_unload()(input_ids=IDS).logits, merged(input_ids=IDS).logits
    )


def test_restore_and_copies():
    theirs = model_of()
    classes = [type(module) for module in theirs.modules()]
    ours = optimized(theirs)
    again = pickle.loads(pickle.dumps(ours))
    assert fast_calls(again) == fast_calls(copy.deepcopy(ours)) == 6
    fastlora.restore(ours)
    assert [type(module) for module in ours.modules()] == classes
    assert fast_calls(ours) == 0


def test_adapters_of_float32_beside_16_bits():
    """As PEFT's, which rounds the factors to the weight's dtype first."""
    theirs = model_of().bfloat16()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    ours = optimized(theirs)
    with counted_calls() as calls:
        found = ours(input_ids=IDS).logits
    assert len(calls) == 6
    expected = theirs(input_ids=IDS).logits
    assert (found - expected).norm() < 0.03 * expected.norm()
