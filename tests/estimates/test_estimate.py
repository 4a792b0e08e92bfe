"""fastlora.estimate: its counts agree with PEFT, and it leaves the model unchanged."""

import copy
import dataclasses
import gc

import peft
import pytest
import torch
import transformers
from models import around_values, tiny_llama
from moe_models import IDS, base_model, parameters_of
from torch import nn
from torch.profiler import ProfilerActivity, profile
from vendor_layers import BITSANDBYTES, quantized

import fastlora


class Net(nn.Module):
    """Two layers, and between them a function that saves its input."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(24, 40), nn.Linear(40, 8)

    def forward(self, x):
        return self.last(self.first(x).sin())


def tiny_gpt2() -> nn.Module:
    sizes = {"vocab_size": 65, "n_positions": 16, "n_embd": 24, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


TRAINED = {
    "adapters": {},
    "modules": {"modules_to_save": ["lm_head", "ln_f"]},
    "own biases": {"bias": "lora_only", "target_modules": ["c_attn"], "rank_pattern": {"0": 3}},
    "all": {"bias": "all", "modules_to_save": ["wte", "ln_1"], "use_rslora": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_counts_match_peft_s_parameters_and_adamw_s(name, dtype):
    model = tiny_gpt2().to(dtype)
    config = peft.LoraConfig(**{"target_modules": "all-linear", "r": 5} | TRAINED[name])
    (cost,) = fastlora.estimate(model, [5], config=config).rank_costs
    model = fastlora.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert cost.parameters == sum(p.numel() for p in trained)
    assert cost.bytes == sum(p.nbytes for p in trained)
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [each[key] for each in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert cost.optimizer_bytes == sum(tensor.nbytes for tensor in moments)
    tensors = [*trained, *(p.grad for p in trained), *moments]
    assert cost.training_bytes == sum(tensor.nbytes for tensor in tensors)


def test_patterns_and_targets_hold():
    config = peft.LoraConfig(target_modules=["first"], rank_pattern={"first": 2})
    found = fastlora.estimate(Net(), [8, 64], config=config)
    assert (found.layers, [cost.parameters for cost in found.rank_costs]) == (1, [128, 128])


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_experts_have_a_price(name):
    model = base_model(name)
    config = peft.LoraConfig(target_parameters=parameters_of(name))
    classes = [type(module) for module in model.modules()]
    batch = {"input_ids": IDS, "labels": IDS}
    found = fastlora.estimate(model, [3], config=config, batch=batch, rounds=1)
    assert [type(module) for module in model.modules()] == classes
    (cost,) = found.rank_costs
    assert cost.step > 0
    fastlora.get_peft_model(model, dataclasses.replace(config, r=3))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert cost.parameters == sum(p.numel() for p in trained)
    assert found.layers == 2 * len([n for n, _ in model.named_modules() if n.endswith("experts")])


@pytest.mark.parametrize("kind", ["nf4", "gguf-q4_k", "torchao-int8"])
def test_a_packed_weight_has_as_many_parameters_as_the_layer_has_weights(kind):
    weights = 256 * 96
    model = nn.Sequential(quantized(kind, 256, 96), nn.Tanh(), nn.Linear(96, 8))
    found = fastlora.estimate(model, [4])
    assert found.frozen.parameters == weights + 96 + 97 * 8
    assert (found.layers, found.rank_costs[0].parameters) == (2, 4 * (256 + 96 + 96 + 8))
    assert found.rank_costs[0].bytes == 4 * found.rank_costs[0].parameters


def test_a_model_on_meta_is_counted():
    expected = fastlora.estimate(tiny_llama(), [2])
    with torch.device("meta"):
        found = fastlora.estimate(tiny_llama(), [2])
    assert found.rank_costs == expected.rank_costs
    assert "counted: " in str(found)


def test_kept_bytes_of_an_adapter():
    net, x = Net(), torch.randn(2, 5, 24, requires_grad=True)
    found = fastlora.estimate(net, [4], batch=x, rounds=1)
    assert found.batch == "2 x 5 tokens"
    # sin saves its input, the loss its factors; the layers save their inputs and h.
    assert found.frozen.kept_bytes == 4 * (40 + 8)
    assert found.rank_costs[0].kept_bytes == 4 * (24 + 4 + 40 + 40 + 4 + 8)
    assert found.rank_costs[0].step > 0
    assert x.grad is None


@pytest.mark.parametrize("kind", [*BITSANDBYTES, "hqq", "torchao-int8", "gptq"])
def test_kept_bytes_have_no_bytes_of_a_packed_weight(kind):
    packed, dense = quantized(kind, 256, 96), nn.Linear(256, 96)
    packed.bias = dense.bias = None  # HQQ's bias is no parameter
    found, expected = (
        fastlora.estimate(
            nn.Sequential(layer, nn.Tanh(), nn.LayerNorm(96)),
            [4],
            batch=torch.randn(2, 256),
            rounds=1,
        )
        for layer in (packed, dense)
    )
    assert found.rank_costs[0].kept_bytes == expected.rank_costs[0].kept_bytes


def growth(model: nn.Module, batch: dict) -> int:
    """The bytes that a forward allocates and that are still in use while its loss is."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = model(**batch).loss
        gc.collect()
    assert loss.requires_grad
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("loss", [False, True])
def test_kept_bytes_are_the_growth_of_a_forward(loss, dropout):
    ids = torch.randint(0, 256, (2, 64))
    model = tiny_llama(num_hidden_layers=4, vocab_size=256).train()
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
    found = fastlora.estimate(model, [4], config=config, batch=batch, rounds=1, loss=loss)
    fastlora.get_peft_model(model, config, loss=loss)
    growth(model, batch)  # the first call makes records of the modules
    expected = ids.numel() * found.rank_costs[0].kept_bytes
    assert growth(model, batch) == pytest.approx(expected, rel=0.02)


def test_without_rounds_it_only_counts(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(type(model), "forward", None)  # a call would be an error
    found = fastlora.estimate(model, [8])
    assert found.rank_costs[0].step is None
    assert "step / frozen" not in str(found)


def test_the_model_is_unchanged():
    model = tiny_llama(num_hidden_layers=1).train()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.eval()
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    torch.manual_seed(3)
    before, values = around_values(model), copy.deepcopy(model.state_dict())
    config = peft.LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"])
    found = fastlora.estimate(model, [2], config=config, rounds=2)
    assert around_values(model) == before  # the head is tied again
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    assert found.batch == "1 x 256 tokens"
    assert "step / frozen's" in str(found)

    with pytest.raises(ValueError, match="input_ids"):
        fastlora.estimate(model, [2], batch={"no such": torch.ones(1, 2)}, rounds=1)
    assert around_values(model) == before


META = {"ranks": [2], "batch": torch.ones(2, 24, device="meta"), "rounds": 1}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ranks": []}, ValueError, "ranks is"),
        ({"ranks": [0]}, ValueError, "ranks is"),
        ({"rounds": -1}, ValueError, "rounds is"),
        ({"rounds": 1}, ValueError, "batch is None, but Net has no config.vocab_size"),
        ({"batch": torch.zeros(()), "rounds": 1}, ValueError, "must hold a tensor"),
        ({"batch": torch.ones(1).long(), "rounds": 1}, ValueError, "nothing to differentiate"),
        ({"model": Net().to("meta"), **META}, ValueError, "on meta"),
        (
            {"model": peft.get_peft_model(Net(), peft.LoraConfig(target_modules="all-linear"))},
            ValueError, "first has an adapter already",
        ),
    ],
)  # fmt: skip
def test_invalid_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fastlora.estimate(**{"model": Net()} | arguments)
