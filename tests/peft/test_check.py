"""check(model, batch) compares PEFT's forward with the fast one on the user's own batch."""

import math
import random
from dataclasses import replace

import numpy
import peft
import pytest
import torch
from accelerate import Accelerator
from marks import pairwise
from models import Mlp, tiny_llama
from moe_models import base_model as moe
from moe_models import parameters_of
from peft_models import BATCH, adapted, bert, opt, qwen3
from torch import nn

import fastlora
from fastlora.backends import formula
from fastlora.doctor.model_check import Difference
from fastlora.layers.batch import loss_and_outputs
from fastlora.ops import node
from fastlora.peft import baseline
from fastlora.peft import layer as fast_linear
from fastlora.peft import read as reading

MLP = ("gate", "up", "down")


def llama(dtype=torch.float32, **settings) -> peft.PeftModel:
    return adapted(tiny_llama(dtype), target_modules="all-linear", **settings).train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.2}, {"use_dora": True}], ids=str)
def test_a_model_passes(settings):
    found = fastlora.check(llama(**settings), batch())
    assert found
    assert 0 < found.largest.relative < 1e-4
    # A gated MLP is judged with its three layers, but under DoRA.
    assert len(found.layers) == (14 if "use_dora" in settings else 10)
    assert all(found.layers)
    assert len(found.gradients) == 14 * (3 if "use_dora" in settings else 2)
    text = str(found)
    assert text.startswith("fastlora (14 of 14 layers fast) and PEFT: the same within rounding")
    assert "14 of 14 fast layers judged, all right" in text


class Balanced(Mlp):
    """Adds a constant to its output, so that the random loss is 0 but for rounding."""

    shift = 0.0

    def forward(self, x):
        return super().forward(x) + self.shift


def test_a_random_loss_near_zero_is_no_difference():
    model, x = adapted(Balanced(), target_modules=["up", "down"]), torch.randn(3, 8)
    with torch.no_grad():
        y = model(x)
        loss, coefficients = torch.func.vjp(lambda y: loss_and_outputs(y)[0], y)
        (coefficients,) = coefficients(torch.ones(()))
        model.base_model.model.shift = -coefficients * loss / coefficients.square().sum()
        assert abs(loss_and_outputs(model(x))[0]) < 1e-5
    found = fastlora.check(model, x)
    assert found
    assert found.loss.relative < 1e-5


class Idle(Mlp):
    """Also calls its layer without rows, like an expert that gets no token."""

    def forward(self, x):
        return super().forward(x) + self.up(x[:0]).sum()


def test_a_call_without_rows_is_not_judged():
    found = fastlora.check(adapted(Idle(), target_modules=["up"]), torch.randn(3, 8))
    assert "1 of 1 fast layers judged, all right" in str(found)


class Reader(Mlp):
    """Reads a layer's weight without calling the layer, like transformers' Mamba its dt_proj."""

    def forward(self, x):
        return torch.relu(self.up(x)) @ self.down.weight.T


def test_a_layer_that_nothing_calls_is_named():
    found = fastlora.check(adapted(Reader(), target_modules=["up", "down"]), torch.randn(3, 8))
    assert found
    assert "1 not judged: base_model.model.down: " in str(found)
    assert "not judged" not in str(fastlora.check(llama(), batch()))


def broken(run, part):
    """The fast forward with an error in its output, or only in the gradient of lora_a or lora_b."""

    def wrong(x, reading):
        if part == "output":
            return run(x, reading)[0] * 1.01, None
        (adapter,) = reading.output.adapters
        tensor = getattr(adapter, part)
        faulty = adapter._replace(**{part: tensor * 1.5 - 0.5 * tensor.detach()})
        output = reading.output._replace(adapters=(faulty,))
        return run(x, replace(reading, outputs=(output,)))[0], None

    return wrong


@pytest.mark.parametrize("part", ["output", "lora_b"])
def test_a_wrong_number_is_found(monkeypatch, part):
    monkeypatch.setattr(fast_linear, "fast_forward", broken(fast_linear.fast_forward, part))
    found = fastlora.check(llama(), batch())
    assert not found
    assert found.largest.relative > 5e-3
    assert "NOT the same" in str(found)
    assert not any(one for one in found.layers if "self_attn" in one.name)
    if part == "lora_b":
        assert found.loss.relative < 1e-5
        assert "lora_B" in found.largest.name


class Disturbing(nn.Module):
    """Changes its input and buffers in place, replaces a buffer, uses Python's and numpy's RNG."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.ones(()))

    def forward(self, x):
        self.calls += 1
        self.mean = 0.9 * self.mean + x.detach().abs().mean()
        keep = [random.random() < 0.5 and numpy.random.rand() < 0.8 for _ in range(x.shape[-1])]
        return x.mul_(self.calls) * torch.tensor(keep) / self.mean


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
def test_it_changes_nothing(optimized):
    model = nn.Sequential(Disturbing(), mlp(lora_dropout=0.2), nn.BatchNorm1d(4))
    if optimized:
        fastlora.optimize(model)
    up = model[1].base_model.model.up
    nn.init.zeros_(up.lora_B["default"].weight)  # which is filled for the check
    up.lora_A["default"].weight.grad = torch.ones(4, 8)
    x, wrong = torch.randn(5, 8), torch.randn(5, 9)

    def state():
        buffers = {name: (id(b), b.tolist()) for name, b in model.named_buffers()}
        random_states = random.getstate(), numpy.random.get_state()[1].tolist()
        gradients = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
        kinds = [(type(m), m.training, len(m._forward_hooks)) for m in model.modules()]
        weights = [(id(p), p._version, p.tolist()) for p in model.parameters()]
        torch_state = torch.get_rng_state().tolist()
        return buffers, random_states, torch_state, gradients, kinds, weights, x.tolist()

    before = state()
    found = fastlora.check(model, x)
    assert found
    assert len(found.filled) == 1
    assert state() == before
    with pytest.raises(RuntimeError):
        fastlora.check(model, wrong)
    assert state() == before


def mlp(**settings) -> peft.PeftModel:
    return adapted(Mlp(), target_modules=["up"], **settings).train()


def test_a_gradient_that_does_not_reach_the_input_is_found(monkeypatch):
    run = fast_linear.fast_forward
    monkeypatch.setattr(fast_linear, "fast_forward", lambda x, reading: run(x.detach(), reading))
    x = torch.randn(5, 8, requires_grad=True)
    assert not fastlora.check(mlp(), x)


@pytest.mark.parametrize(
    "make", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["tensor", "tuple", "mapping"]
)
def test_forms_of_a_batch_and_an_output_without_a_loss(make):
    x = torch.randn(5, 8).requires_grad_() * 2  # not a leaf
    found = fastlora.check(mlp().base_model.model, make(x), tolerance=1e-5)
    assert found
    assert found.tolerance == 1e-5
    assert [d.name for d in found.outputs] == ["output"]
    assert "input 0" in {gradient.name for gradient in found.gradients}


def test_autocast_inside_of_the_model_is_noticed():
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare(llama())
    found = fastlora.check(model, batch())
    assert (found.dtype, found.tolerance) == (torch.bfloat16, 0.1)


def test_several_adapters_share_masks_where_one_draw_of_two_is_not_two_draws(monkeypatch):
    """Simulates a GPU, where one draw of two seeds differs from two draws of one."""

    def draw(count, device):
        return torch.randint(0, 2**60, (count,), device=device).add_(count)

    monkeypatch.setattr(node, "draw_seed", draw)
    monkeypatch.setattr(baseline, "draw_seed", draw)
    model = adapted(tiny_llama(), target_modules=["q_proj", "o_proj"], lora_dropout=0.3).train()
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    assert fastlora.check(model, batch())


def test_there_must_be_something_to_compare():
    model = mlp()
    with model.disable_adapter(), pytest.raises(ValueError, match="nothing to compare"):
        fastlora.check(model, torch.randn(5, 8))
    with pytest.raises(ValueError, match="get_peft_model"):
        fastlora.check(Mlp(), torch.randn(5, 8))


@pytest.mark.parametrize("text", ["text", ["text"], {"input_ids": ["text"]}], ids=str)
def test_a_batch_of_text_is_refused(text):
    with pytest.raises(ValueError, match=r"batch holds no tensor, but 'text': .*tokenizer\("):
        fastlora.check(mlp(), text)


def test_a_list_of_rows_is_refused():
    with pytest.raises(ValueError, match=r"batch is \[\{'x': .* must be one batch, such as a dict"):
        fastlora.check(mlp(), [{"x": torch.ones(8)}, {"x": torch.ones(8)}])


def test_an_optimizer_inside_of_backward_is_refused():
    model = mlp()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="inside of backward"):
        fastlora.check(model, torch.randn(5, 8))


# Each layer on the same inputs


def deep(dtype, seed: int = 0, std: float = 0.02, **settings) -> peft.PeftModel:
    """10 blocks, whose adapters have the size of trained ones."""
    torch.manual_seed(seed)
    how = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["q_proj", "down_proj"]}
    model = peft.get_peft_model(
        tiny_llama(dtype, num_hidden_layers=10), peft.LoraConfig(**how | settings)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return model.train()


def assert_a_wrong_scale_is_found(
    monkeypatch, model, name: str, path: str = "", factor: float = 1.02
) -> None:
    """The check names the layer or block of this name after an error in it, or at a path in it."""
    with_scale(monkeypatch, model.get_submodule(name + path), factor)
    assert [layer.name for layer in fastlora.check(model, batch()).layers if not layer] == [name]


def with_scale(monkeypatch, culprit, factor: float) -> None:
    """The fast path computes with another scale in this layer, in its own call and in a block's."""
    read = reading._read_adapter

    def wrong(layer, *args):
        reason, adapter, *rest = read(layer, *args)
        if layer is culprit:
            adapter = adapter._replace(scale=adapter.scale * factor)
        return reason, adapter, *rest

    monkeypatch.setattr(reading, "_read_adapter", wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_deep_model_passes_on_two_seeds(dtype):
    for seed in range(2):
        found = fastlora.check(deep(dtype, seed).to(dtype), batch())
        assert found, str(found)
        assert "20 of 20 fast layers judged, all right" in str(found)


@pairwise(
    {
        "factor": [1.02, 0.98],
        "path": ["self_attn.q_proj", "mlp.down_proj"],
        "adapters": [torch.float32, torch.bfloat16],
    }
)
def test_two_percent_in_one_of_20_layers_is_found_in_bfloat16(monkeypatch, adapters, path, factor):
    model = deep(torch.bfloat16).to(adapters)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    layer = f"base_model.model.model.layers.6.{path}"
    with_scale(monkeypatch, model.get_submodule(layer), factor)
    found = fastlora.check(model, batch())
    assert not found
    assert found.largest.relative < 0.5  # the whole model's numbers hide the fault
    (wrong,) = [one for one in found.layers if not one]
    assert wrong.name == layer.removesuffix(".down_proj")
    part = "down_proj" if path == "mlp.down_proj" else "the adapter"
    (size,) = [one for one in wrong.measures if one.name == f"output, size error of {part}'s part"]
    assert size.excess > 1
    assert abs(size.value - (factor - 1)) < 6e-3
    assert f"20 of 20 fast layers judged, 1 WRONG\n    {wrong.name}: " in str(found)


@pytest.mark.parametrize("path", ["self_attn.q_proj", *[f"mlp.{n}_proj" for n in MLP]])
def test_two_percent_of_an_adapter_s_part_of_dx_is_found_in_bfloat16(monkeypatch, path):
    """It is in no other result of the layer, and much smaller than the base's part of dx."""
    model = llama().bfloat16()
    layer = f"base_model.model.model.layers.1.{path}"
    culprit = model.get_submodule(layer).lora_A["default"].weight
    run = formula._through_lora_a

    def wrong(x, dh, lora_a, *rest):
        of_culprit = lora_a.shape == culprit.shape and torch.equal(lora_a.bfloat16(), culprit)
        return run(x, dh, lora_a * 1.02 if of_culprit else lora_a, *rest)

    monkeypatch.setattr(formula, "_through_lora_a", wrong)
    wrong_ones = [one.name for one in fastlora.check(model, batch()).layers if not one]
    assert wrong_ones == [layer if "self_attn" in path else layer.rpartition(".")[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_a_new_adapter_lora_a_is_tested(monkeypatch, dtype):
    """Its gradient is zero there, as is lora_B, which the check fills."""
    model = adapted(tiny_llama(), target_modules=["v_proj", "o_proj"]).to(dtype).train()
    ups = [p for name, p in model.named_parameters() if "lora_B" in name]
    for up in ups[:3]:
        nn.init.zeros_(up)
    ups[0].data[0, 0] = -0.0
    before = [(id(up), up._version, up.signbit().tolist(), up.tolist()) for up in ups]
    found = fastlora.check(model, batch())
    assert found
    assert len(found.filled) == 3
    assert "lora_B was zero in 3 layers" in str(found)
    assert not found.zeros

    monkeypatch.setattr(fast_linear, "fast_forward", broken(fast_linear.fast_forward, "lora_a"))
    found = fastlora.check(model, batch())
    assert len([layer for layer in found.layers if not layer and "proj" in layer.name]) == 4
    assert before == [(id(up), up._version, up.signbit().tolist(), up.tolist()) for up in ups]


def test_lora_b_of_every_active_adapter_is_filled():
    model = mlp()
    model.add_adapter("b", peft.LoraConfig(target_modules=["up"]))
    model.base_model.set_adapter(["default", "b"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    found = fastlora.check(model, torch.randn(5, 8))
    assert len(found.filled) == 1
    assert not found.zeros


def test_results_that_are_zero_are_named():
    model = llama()
    for name, parameter in model.named_parameters():
        if "layers.1.self_attn.o_proj.lora_A" in name:
            nn.init.zeros_(parameter)
    found = fastlora.check(model, batch())
    assert found
    name = "base_model.model.model.layers.1.self_attn.o_proj: gradient of lora_B.default.weight"
    assert found.zeros == (name,)
    assert f"1 results are zero with this batch, and so not tested: {name}" in str(found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_judged(monkeypatch, reentrant):
    model = llama(lora_dropout=0.3)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = fastlora.check(model, batch())
    assert found, str(found)
    assert "14 of 14 fast layers judged, all right" in str(found)
    assert all(len(layer.measures) > 5 for layer in found.layers)  # gradients are among them
    name = "base_model.model.model.layers.0.self_attn.o_proj"
    assert_a_wrong_scale_is_found(monkeypatch, model, name)


def test_without_gradients_the_outputs_are_judged(monkeypatch):
    model = llama().bfloat16().requires_grad_(False)
    found = fastlora.check(model, batch())
    assert found
    assert not found.gradients
    assert "14 of 14 fast layers judged, all right" in str(found)
    name = "base_model.model.model.layers.0.self_attn.o_proj"
    assert_a_wrong_scale_is_found(monkeypatch, model, name)


def test_gradients_that_underflow_in_float16_are_judged():
    x = torch.full((5, 8), 2.0**-12).half()

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp().half()

        def forward(self, x):
            return self.inner(x).float() * 1e-6

    found = fastlora.check(Small(), x)
    assert all(found.layers), str(found)


def test_a_gradient_that_a_hook_changes_is_not_judged():
    model = mlp()
    weight = model.base_model.model.up.lora_A["default"].weight
    weight.register_hook(lambda gradient: 2 * gradient)
    found = fastlora.check(model, torch.randn(5, 8))
    assert found, str(found)
    names = {measure.name for measure in found.layers[0].measures}
    assert "gradient of lora_B.default.weight, error" in names
    assert "gradient of lora_A.default.weight, error" not in names


def test_layers_that_run_peft_s_forward_are_not_judged():
    model = llama()
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    model.get_submodule(name).lora_A["default"].register_forward_hook(lambda *_: None)
    found = fastlora.check(model, batch())
    assert found
    assert "13 of 13 fast layers judged, all right" in str(found)
    assert name not in {layer.name for layer in found.layers}


def test_own_layers_are_told_what_to_do():
    model = nn.Sequential(fastlora.LoRALinear(8, 8, r=2))
    with pytest.raises(ValueError, match="its layers are fastlora's own"):
        fastlora.check(model, torch.randn(5, 8))


# Two runs of the whole model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_whole_model_that_differs_is_judged_by_its_layers_in_16_bits(dtype):
    model = adapted(qwen3(), target_modules="all-linear").to(dtype)
    found = fastlora.check(model.train(), {"input_ids": BATCH, "labels": BATCH})
    assert found, str(found)
    other = replace(found, gradients=(*found.gradients, Difference("routes", 2.0)))
    assert bool(other) == (dtype != torch.float32)
    hint = "compare in float32 before you report a defect"
    assert (hint in str(other)) == (dtype != torch.float32)
    assert not replace(found, loss=Difference("loss", 2.0))
    wrong = replace(found, gradients=(*found.gradients, Difference("last", math.nan)))
    assert not wrong
    assert wrong.largest.name == "last"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [opt, bert, moe], ids=lambda kind: kind.__name__)
def test_no_right_model_in_16_bits_is_called_wrong(kind, dtype):
    targets = {"target_parameters": parameters_of("qwen3")} if kind is moe else {}
    labels = BATCH[:, 0] % 3 if kind is bert else BATCH
    for seed in range(3):
        torch.manual_seed(seed)
        names = ["q_proj", "fc1", "query", "dense"]
        model = adapted(kind(), target_modules=names, **targets).to(dtype)
        found = fastlora.check(model, {"input_ids": BATCH, "labels": labels})
        assert found, str(found)
