"""check(model, batch): PEFT's forward and the fast one on the user's own batch."""

import math
import random
from dataclasses import replace

import numpy
import peft
import pytest
import torch
from accelerate import Accelerator
from models import Mlp, tiny_llama
from peft_models import BATCH, adapted, qwen3
from torch import nn

import fastlora
from fastlora.ops import run as ops_run
from fastlora.peft import baseline
from fastlora.peft import layer as fast_linear
from fastlora.peft.check import Difference


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
    assert len(found.layers) == 14
    assert len(found.gradients) == 14 * (3 if "use_dora" in settings else 2)
    text = str(found)
    assert text.startswith("fastlora (14 of 14 layers fast) and PEFT: the same within rounding")
    assert found.layers[0].name in text or len(found.layers) > 5


class Reader(Mlp):
    """As transformers' Mamba with its dt_proj: it reads a layer's weight, and doesn't call it."""

    def forward(self, x):
        return torch.relu(self.up(x)) @ self.down.weight.T


def test_a_layer_that_nothing_calls_is_named():
    found = fastlora.check(adapted(Reader(), target_modules=["up", "down"]), torch.randn(3, 8))
    assert found
    assert "1 layers without a gradient: base_model.model.down: " in str(found)
    assert "without a gradient" not in str(fastlora.check(llama(), batch()))


def broken(run, how):
    """The fast forward with an error in its output, or in lora_B's gradient alone."""

    def wrong(x, reading):
        if how == "output":
            return run(x, reading)[0] * 1.01, None
        (adapter,) = reading.output.adapters
        up = adapter.lora_b
        faulty = adapter._replace(lora_b=up * 1.01 - 0.01 * up.detach())
        output = reading.output._replace(adapters=(faulty,))
        return run(x, reading._replace(outputs=(output,)))[0], None

    return wrong


@pytest.mark.parametrize("how", ["output", "gradient"])
def test_a_wrong_number_is_found(monkeypatch, how):
    monkeypatch.setattr(fast_linear, "fast_forward", broken(fast_linear.fast_forward, how))
    found = fastlora.check(llama(), batch())
    assert not found
    assert found.largest.relative > 5e-3
    assert "NOT the same" in str(found)
    if how == "gradient":
        assert found.loss.relative < 1e-5
        assert "lora_B" in found.largest.name


def test_a_wrong_layer_is_named(monkeypatch):
    model = llama()
    culprit = model.base_model.model.model.layers[1].self_attn.v_proj.lora_B["default"].weight
    run = fast_linear.fast_forward

    def wrong(x, reading):
        is_culprit = reading.output.adapters[0].lora_b is culprit
        return (broken(run, "gradient") if is_culprit else run)(x, reading)

    monkeypatch.setattr(fast_linear, "fast_forward", wrong)
    found = fastlora.check(model, batch())
    (wrong_layer,) = (d.name for d in found.layers if d.relative > 1e-3)
    assert wrong_layer.endswith("layers.1.self_attn.v_proj")


def test_one_number_that_is_none_is_the_largest_difference():
    found = fastlora.check(mlp(), torch.randn(5, 8))
    wrong = replace(found, gradients=(*found.gradients, Difference("last", math.nan)))
    assert found
    assert not wrong
    assert wrong.largest.name == "last"


class Disturbing(nn.Module):
    """It writes to its input and its buffers, replaces one, and draws by Python and numpy."""

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
    up.lora_A["default"].weight.grad = torch.ones(4, 8)
    x, wrong = torch.randn(5, 8), torch.randn(5, 9)

    def state():
        buffers = {name: (id(b), b.tolist()) for name, b in model.named_buffers()}
        random_states = random.getstate(), numpy.random.get_state()[1].tolist()
        gradients = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
        kinds = [type(module) for module in model.modules()]
        return buffers, random_states, torch.get_rng_state().tolist(), gradients, kinds, x.tolist()

    before = state()
    assert fastlora.check(model, x)
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
    x = torch.randn(5, 8).requires_grad_() * 2  # with a history
    found = fastlora.check(mlp().base_model.model, make(x), tolerance=1e-5)
    assert found
    assert found.tolerance == 1e-5
    assert [d.name for d in found.outputs] == ["output"]
    assert "input 0" in {gradient.name for gradient in found.gradients}


def test_autocast_inside_of_the_model_is_noticed():
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare(llama())
    assert fastlora.check(model, batch()).tolerance == 0.1


def test_several_adapters_share_masks_where_one_draw_of_two_is_not_two_draws(monkeypatch):
    """As on a GPU."""

    def draw(count, device):
        return torch.randint(0, 2**60, (count,), device=device).add_(count)

    monkeypatch.setattr(ops_run, "draw_seed", draw)
    monkeypatch.setattr(baseline, "draw_seed", draw)
    model = adapted(tiny_llama(), target_modules=["q_proj", "o_proj"], lora_dropout=0.3).train()
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    assert fastlora.check(model, batch())


def test_there_must_be_something_to_compare():
    model = mlp()
    with model.disable_adapter(), pytest.raises(ValueError, match="nothing to compare"):
        fastlora.check(model, torch.randn(5, 8))
    with pytest.raises(ValueError, match="apply_lora"):
        fastlora.check(Mlp(), torch.randn(5, 8))


def test_an_optimizer_inside_of_backward_is_refused():
    model = mlp()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="inside of backward"):
        fastlora.check(model, torch.randn(5, 8))


# What is taken for rounding, by dtype and depth


@pytest.mark.parametrize(
    ("dtype", "blocks", "tolerance"),
    [
        (torch.float32, 3, 1e-3),
        (torch.bfloat16, 1, 0.1),
        (torch.bfloat16, 9, 0.1 * math.sqrt(8)),
        (torch.float16, 3, 0.02 * math.sqrt(2)),
    ],
    ids=str,
)
def test_what_is_taken_for_rounding_grows_with_depth_in_16_bits(dtype, blocks, tolerance):
    model = adapted(qwen3(num_hidden_layers=blocks), target_modules="all-linear").to(dtype)
    found = fastlora.check(model.train(), {"input_ids": BATCH, "labels": BATCH})
    assert found.tolerance == pytest.approx(tolerance)
    assert found, str(found)
    hint = "compare in float32 to see them (model.float(), without autocast)"
    assert (hint in str(found)) == (dtype != torch.float32)
    wrong = replace(found, loss=Difference("loss", 2.0))
    assert not wrong
    assert "NOT the same" in str(wrong)
    hint = "can do that: compare in float32 before you take it for a defect"
    assert (hint in str(wrong)) == (dtype != torch.float32)
