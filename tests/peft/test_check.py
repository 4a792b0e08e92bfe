"""check(model, batch): PEFT's forward and the fast one on the user's own batch."""

import random

import numpy
import peft
import pytest
import torch
from accelerate import Accelerator
from models import Mlp, tiny_llama
from peft.tuners.lora.layer import Linear as PeftLinear
from peft_models import adapted
from torch import nn

import fastlora
from fastlora.ops import functional
from fastlora.peft import dropout
from fastlora.peft import layer as fast_linear


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_coarser(dtype):
    found = fastlora.check(llama(dtype), batch())
    assert found
    assert found.tolerance > 1e-3


@pytest.fixture
def read_anew(monkeypatch):
    """No call is known: each layer is read, and its reading handed on."""
    monkeypatch.setattr(fast_linear, "known", lambda *_: None)


def broken(run, how):
    """The fast forward with an error in its output, or in lora_B's gradient alone."""

    def wrong(x, name, reading, seen):
        if how == "output":
            return run(x, name, reading, None) * 1.01
        (adapter,) = reading.output.adapters
        up = adapter.lora_b
        faulty = adapter._replace(lora_b=up * 1.01 - 0.01 * up.detach())
        output = reading.output._replace(adapters=(faulty,))
        return run(x, name, reading._replace(output=output), None)

    return wrong


@pytest.mark.parametrize("how", ["output", "gradient"])
def test_a_wrong_number_is_found(read_anew, monkeypatch, how):
    monkeypatch.setattr(fast_linear, "fast_forward", broken(fast_linear.fast_forward, how))
    found = fastlora.check(llama(), batch())
    assert not found
    assert found.largest.relative > 5e-3
    assert "NOT the same" in str(found)
    if how == "gradient":
        assert found.loss.relative < 1e-5
        assert "lora_B" in found.largest.name


def test_a_wrong_layer_is_named(read_anew, monkeypatch):
    model = llama()
    culprit = model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight
    run = fast_linear.fast_forward

    def wrong(x, name, reading, seen):
        if reading.output.adapters[0].lora_b is culprit:
            return broken(run, "gradient")(x, name, reading, None)
        return run(x, name, reading, None)

    monkeypatch.setattr(fast_linear, "fast_forward", wrong)
    found = fastlora.check(model, batch())
    (wrong_layer,) = (d.name for d in found.layers if d.relative > 1e-3)
    assert wrong_layer.endswith("layers.1.mlp.up_proj")


def test_not_a_number_is_a_failure(monkeypatch):
    run = fast_linear.fast_forward
    monkeypatch.setattr(fast_linear, "fast_forward", lambda *rest: run(*rest) * torch.nan)
    assert not fastlora.check(llama(), batch())


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
def test_it_changes_nothing(optimized):
    model = llama(lora_dropout=0.2)
    if optimized:
        fastlora.optimize(model)
    model.base_model.model.extra = nn.BatchNorm1d(3)
    model.base_model.model.extra(torch.randn(4, 3))
    weight = model.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].weight
    weight.grad = torch.ones_like(weight)
    classes = [type(module) for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    state = torch.get_rng_state()
    fastlora.check(model, batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(module) for module in model.modules()] == classes
    assert all(map(torch.equal, model.buffers(), buffers))
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert [name.rsplit(".", 4)[1] for name in gradients] == ["down_proj"]
    assert (gradients.popitem()[1] == 1).all()


def test_an_error_in_the_model_leaves_it_as_it_was():
    model = llama()
    with pytest.raises((TypeError, ValueError)):
        fastlora.check(model, {"no_such_argument": 3})
    assert type(model.base_model.model.model.layers[0].mlp.up_proj) is PeftLinear


def mlp(**settings) -> peft.PeftModel:
    return adapted(Mlp(), target_modules=["up"], **settings).train()


@pytest.mark.parametrize(
    "make", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["tensor", "tuple", "mapping"]
)
def test_forms_of_a_batch_and_an_output_without_a_loss(make):
    found = fastlora.check(mlp().base_model.model, make(torch.randn(5, 8)))
    assert found
    assert [d.name for d in found.outputs] == ["output"]


class Counting(nn.Module):
    """Multiplies by the number of its calls, which it keeps in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Averaging(nn.Module):
    """Divides by a running mean, a new tensor each time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, x):
        self.mean = 0.9 * self.mean + x.detach().abs().mean()
        self.register_buffer("last", self.mean)
        return x / self.mean


BUFFERS = {"in-place": Counting(), "replaced": Averaging(), "batch-norm": nn.BatchNorm1d(4)}


@pytest.mark.parametrize("module", BUFFERS.values(), ids=BUFFERS)
def test_both_runs_start_from_the_same_buffers(module):
    model = nn.Sequential(mlp(), module)
    before = {name: (b, b.clone()) for name, b in module.named_buffers()}
    assert fastlora.check(model, torch.randn(5, 8))
    after = dict(module.named_buffers())
    assert after.keys() == before.keys()
    for name, (buffer, value) in before.items():
        assert after[name] is buffer
        assert torch.equal(buffer, value)


class Dropping(nn.Module):
    """Drops columns as Python's and numpy's generators say."""

    def forward(self, x):
        keep = [random.random() < 0.5 and numpy.random.rand() < 0.8 for _ in range(x.shape[-1])]
        return x * torch.tensor(keep)


def test_random_states_outside_of_torch_are_shared_and_put_back():
    model = nn.Sequential(mlp(), Dropping())
    states = random.getstate(), numpy.random.get_state()[1].tolist()
    assert fastlora.check(model, torch.randn(5, 8))
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == states


class Overwriting(nn.Module):
    def forward(self, x):
        return x.mul_(2)


def test_the_batch_is_left_as_it_is():
    x = torch.randn(5, 8)
    before = x.clone()
    assert fastlora.check(nn.Sequential(Overwriting(), mlp()), x)
    assert torch.equal(x, before)
    x.requires_grad_()
    found = fastlora.check(mlp(), x * 2)  # with a history
    assert found
    assert "input 0" in {gradient.name for gradient in found.gradients}
    assert x.grad is None


def test_a_gradient_that_does_not_reach_the_input_is_found(read_anew, monkeypatch):
    run = fast_linear.fast_forward
    monkeypatch.setattr(fast_linear, "fast_forward", lambda x, *rest: run(x.detach(), *rest))
    x = torch.randn(5, 8, requires_grad=True)
    assert not fastlora.check(mlp(), x)


class LossOfEach(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = mlp()

    def forward(self, x):
        return {"loss": self.mlp(x).square().mean(-1)}


def test_a_loss_for_each_row_is_summed():
    assert fastlora.check(LossOfEach(), torch.randn(5, 8)).loss.relative < 1e-5


def test_autocast_inside_of_the_model_is_noticed():
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare(llama())
    assert fastlora.check(model, batch()).tolerance == 0.1


def test_autocast_is_as_coarse_as_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        found = fastlora.check(llama(), batch())
    assert found
    assert found.tolerance == fastlora.check(llama(torch.bfloat16), batch()).tolerance


def test_several_adapters_share_masks_where_one_draw_of_two_is_not_two_draws(monkeypatch):
    """As on a GPU."""

    def draw(count, device):
        return torch.randint(0, 2**60, (count,), device=device).add_(count)

    monkeypatch.setattr(functional, "draw_seed", draw)
    monkeypatch.setattr(dropout, "draw_seed", draw)
    model = llama(lora_dropout=0.3)
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


def test_the_tolerance_can_be_given():
    assert not fastlora.check(llama(), batch(), tolerance=1e-12)
