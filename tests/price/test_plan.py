"""The price list: what it counts against what apply_lora makes, and that nothing is left behind."""

import copy
import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
import transformers
import vendor_layers
from moe_models import IDS, base_model, experts_of, parameters_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from vendor_layers import quantised

import fastlora
from fastlora.__main__ import main
from fastlora.price.load import plan_of
from fastlora.price.measure import Step, frozen


class Net(nn.Module):
    """Two layers with something in between that keeps its input."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.last = nn.Linear(24, 40, dtype=dtype), nn.Linear(40, 8, dtype=dtype)

    def forward(self, x):
        return self.last(self.first(x).sin())


def tiny_config(layers: int = 4) -> transformers.PretrainedConfig:
    return transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tiny_config().save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_those_of_apply_lora(tmp_path, dtype):
    net = Net(dtype)
    for price in fastlora.plan(net, [3, 16], rounds=0).prices:
        model = fastlora.apply_lora(
            copy.deepcopy(net), fastlora.LoRAConfig(r=price.r, target_modules="all-linear")
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        assert price.parameters == sum(p.numel() for p in trained)
        assert price.bytes == sum(p.numel() * p.element_size() for p in trained)
        fastlora.save_adapter(model, tmp_path / str(price.r))
        file = tmp_path / str(price.r) / "adapter_model.safetensors"
        assert file.stat().st_size == price.file_bytes


TRAINED = {
    "modules": {"modules_to_save": ["lm_head", "ln_f"]},
    "biases": {"bias": "all"},
    "own biases": {"bias": "lora_only", "target_modules": ["c_attn"], "rank_pattern": {"0": 3}},
    "both": {"bias": "all", "modules_to_save": ["wte", "ln_1"], "use_rslora": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_what_trains_in_full_is_counted(name, dtype, tmp_path):
    sizes = {"vocab_size": 65, "n_positions": 16, "n_embd": 24, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).to(dtype)
    config = fastlora.LoRAConfig(**{"target_modules": "all-linear", "r": 5} | TRAINED[name])
    (price,) = fastlora.plan(model, [5], config=config, rounds=0).prices
    fastlora.apply_lora(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert price.parameters == sum(p.numel() for p in trained)
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [each[key] for each in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    tensors = [*trained, *(p.grad for p in trained), *moments]
    assert price.training_bytes == sum(tensor.nbytes for tensor in tensors)
    fastlora.save_adapter(model, tmp_path)
    assert price.file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_flops_of_what_trains_in_full_are_those_of_its_gradient():
    plain, full = (
        fastlora.plan(
            Net(),
            [4],
            config=fastlora.LoRAConfig(target_modules=["first"], modules_to_save=saved),
            rounds=0,
        ).prices[0]
        for saved in (None, ["last"])
    )
    assert full.flops - plain.flops == 2 * 40 * 8


def test_a_tied_head_that_trains_is_tied_again():
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(1))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = fastlora.LoRAConfig(target_modules="all-linear", modules_to_save=["lm_head"])
    fastlora.plan(model, [2], config=config, rounds=1)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_dense_model_of_a_quantised_config_says_so(tmp_path):
    config = tiny_config(1)
    config.save_pretrained(tmp_path / "dense")
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    found = plan_of(str(tmp_path), [2], rounds=0)
    assert "quantised (bitsandbytes), and it is dense here" in str(found)
    assert found.prices == plan_of(str(tmp_path / "dense"), [2], rounds=0).prices


def test_flops_are_those_that_torch_counts():
    """Of the frozen layers, and of the textbook's products beside them."""
    net, x = Net(), torch.randn(10, 24, requires_grad=True)
    found = fastlora.plan(net, [4], rounds=0)

    def counted(run: Callable) -> int:
        with FlopCounterMode(display=False) as counter:
            run().sum().backward()
        return counter.get_total_flops() // 10

    def adapted() -> torch.Tensor:
        y = x
        for layer in (net.first, net.last):
            a = torch.randn(4, layer.in_features, requires_grad=True)
            b = torch.randn(layer.out_features, 4, requires_grad=True)
            y = fastlora.reference.lora_linear(y, layer.weight, a, b)
        return y

    with frozen(net, x):
        alone = counted(lambda: net(x))
        assert found.frozen.flops == alone
        assert found.prices[0].flops == counted(adapted) - alone


def test_patterns_and_targets_hold():
    config = fastlora.LoRAConfig(target_modules=["first"], rank_pattern={"first": 2})
    found = fastlora.plan(Net(), [8, 64], config=config, rounds=0)
    assert (found.layers, [price.parameters for price in found.prices]) == (1, [128, 128])


def test_kept_bytes_of_an_adapter():
    net, x = Net(), torch.randn(2, 5, 24)
    found = fastlora.plan(net, [4], batch=x, rounds=1)
    assert found.batch == "2 x 5 tokens"
    # sin keeps its input, the loss its factors; the layers keep their inputs, and h.
    assert found.frozen.kept_bytes == 4 * (40 + 8)
    assert found.prices[0].kept_bytes == 4 * (24 + 4 + 40 + 40 + 4 + 8)
    low, middle, high = found.prices[0].step
    assert 0 < low <= middle <= high


def test_everything_is_as_it_was():
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(1))
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.eval()
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    torch.manual_seed(3)

    def state() -> tuple:
        return (
            [type(m) for m in model.modules()],
            [m.training for m in model.modules()],
            [(n, p.requires_grad, id(p), p.grad is None) for n, p in model.named_parameters()],
            [len(m._forward_hooks) for m in model.modules()],
            torch.get_rng_state().tolist(),
        )

    before, values = state(), copy.deepcopy(model.state_dict())
    lines = []
    found = fastlora.plan(model, [2], rounds=2, progress=lines.append)
    assert state() == before
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    assert lines == ["kept bytes", "round 1 of 2", "round 2 of 2"]
    assert found.batch == "1 x 256 tokens"
    assert "step / frozen's" in str(found)

    with pytest.raises(ValueError, match="input_ids"):
        fastlora.plan(model, [2], batch={"no such": torch.ones(1, 2)}, rounds=1)
    assert state() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": []}, "ranks is"),
        ({"ranks": [0]}, "ranks is"),
        ({"ranks": [True]}, "ranks is"),
        ({"ranks": "8"}, "ranks is"),
        ({"rounds": -1}, "rounds is"),
        ({}, "batch is None, and Net has no config.vocab_size"),
        ({"batch": torch.zeros(())}, "must hold a tensor"),
        ({"batch": {"x": 3}}, "must hold a tensor"),
    ],
)
def test_what_cannot_be_meant(arguments, message):
    with pytest.raises(ValueError, match=message):
        fastlora.plan(Net(), **arguments)


def test_a_progress_that_is_no_function_is_refused_before_anything_runs():
    with pytest.raises(TypeError, match="progress is True, but must be a function"):
        fastlora.plan(Net(), [2], batch=torch.ones(2, 24), progress=True)


def test_models_that_have_adapters_or_nothing_to_run_on():
    with pytest.raises(ValueError, match="on meta"):
        fastlora.plan(Net().to("meta"), [2], batch=torch.ones(2, 24, device="meta"))
    with (
        pytest.raises(ValueError, match="nothing to differentiate"),
        frozen(Net(), torch.ones(1).long()),
    ):
        pass
    net = fastlora.apply_lora(Net(), fastlora.LoRAConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="first has an adapter already"):
        fastlora.plan(net)


def test_a_packed_weight_counts_too():
    found = fastlora.plan(nn.Sequential(quantised("gguf-q8_0", 256, 96)), [2], rounds=0)
    assert found.frozen.flops == 4 * 256 * 96
    assert found.prices[0].bytes == 4 * found.prices[0].parameters == 4 * 2 * (256 + 96)


def test_the_batch_gets_no_gradient():
    x = torch.randn(2, 24, requires_grad=True)
    fastlora.plan(Net(), [2], batch=x, rounds=1)
    assert x.grad is None


def test_a_model_of_few_positions_gets_as_many_tokens():
    config = transformers.GPT2Config(vocab_size=8, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    found = fastlora.plan(transformers.GPT2LMHeadModel(config), [2], rounds=1)
    assert found.batch == "1 x 16 tokens"


def test_an_encoder_decoder_is_refused(tmp_path, capsys):
    transformers.BartConfig(vocab_size=8).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path), "--rounds", "0"])
    assert "it has an encoder and a decoder" in capsys.readouterr().err


def test_a_step_has_new_gradients():
    net, x = Net(), torch.randn(2, 24)
    step = Step(net, x)
    assert step.seconds() > 0
    first = net.first.weight.grad.clone()
    step.seconds()
    assert torch.equal(net.first.weight.grad, first)


def test_command_of_a_folder(folder, capsys):
    assert main(["plan", folder, "--r", "2,4", "--rounds", "1", "--layers", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [price["r"] for price in found["prices"]] == [2, 4]
    assert found["layers"] == 4 * 7
    assert found["notes"] == ["the time and what is kept: of the first 2 of 4 layers, and the head"]
    assert found["frozen"]["seconds"] > 0

    assert main(["plan", f"{folder}/config.json", "--rounds", "0"]) == 0
    text = capsys.readouterr().out
    assert "nothing was measured" in text
    assert [line.split()[0] for line in text.splitlines()[-4:]] == ["8", "16", "64", "256"]


def test_command_with_experts(tmp_path, capsys):
    base_model().config.save_pretrained(tmp_path)
    names = "experts.gate_up_proj,experts.down_proj"
    command = ["plan", str(tmp_path), "--r", "2", "--rounds", "0", "--json"]
    layers = []
    for more in ([], ["--target-parameters", names]):
        main([*command, *more])
        layers.append(json.loads(capsys.readouterr().out)["layers"])
    assert layers[1] == layers[0] + 2 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "neither a folder nor a file"),
        (["{folder}", "--r", "8,x"], "'x' is no rank"),
        (["{folder}", "--r", ""], "'' is no rank"),
        ([__file__], "can't be made a causal language model"),
    ],
)
def test_a_command_that_fails_says_so_in_a_line(folder, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *(argument.format(folder=folder) for argument in arguments)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "llama4"])
def test_experts_have_a_price(name):
    """Llama 4 runs all experts for each token, and the others two of four."""
    model, used = base_model(name), 4 if name == "llama4" else 2
    config = fastlora.LoRAConfig(target_parameters=parameters_of(name))
    classes = [type(module) for module in model.modules()]
    batch = {"input_ids": IDS, "labels": IDS}
    found = fastlora.plan(model, [3], config=config, batch=batch, rounds=1)
    assert [type(module) for module in model.modules()] == classes
    (price,) = found.prices
    assert price.step[0] > 0
    assert price.flops == 6 * price.parameters * used // 4
    fastlora.apply_lora(model, dataclasses.replace(config, r=3))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert price.parameters == sum(p.numel() for p in trained)
    assert price.bytes == sum(p.nbytes for p in trained)
    assert found.layers == 2 * len([n for n, _ in model.named_modules() if n.endswith("experts")])


def test_frozen_flops_of_experts_are_those_that_torch_counts():
    experts, x = experts_of(base_model()), torch.randn(6, 32, requires_grad=True)
    experts.requires_grad_(False)
    index = torch.stack([torch.randperm(4)[:2] for _ in x])
    found = fastlora.plan(
        experts, [2], config=fastlora.LoRAConfig(target_parameters=["down_proj"]), rounds=0
    )
    with FlopCounterMode(display=False) as counter:
        experts(x, index, torch.rand(6, 2)).sum().backward()
    assert found.frozen.flops == counter.get_total_flops() // 6


@pytest.mark.parametrize("kind", ["nf4", "gguf-q4_k", "torchao-int8"])
def test_a_packed_weight_has_as_many_parameters_as_the_layer_has_weights(kind):
    if kind == "nf4":
        bnb_layers = pytest.importorskip("bnb_layers")
        layer, weights = bnb_layers.quantised("nf4", 256, 96), 256 * 96
    else:
        layer, weights = vendor_layers.quantised(kind, 256, 96), 256 * 96
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(96, 8))
    found = fastlora.plan(model, [4], batch=torch.randn(64, 256), rounds=1)
    assert found.frozen.parameters == weights + 96 + 97 * 8
    assert found.frozen.flops == 4 * (weights + 96 * 8)
    assert (found.layers, found.prices[0].parameters) == (2, 4 * (256 + 96 + 96 + 8))
