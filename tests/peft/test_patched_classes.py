"""A method that is replaced on a class runs in every call that PEFT would send through it."""

import copy
import functools

import peft
import pytest
import torch
from models import randomize
from peft.tuners.lora import dora, variants
from peft.tuners.lora import layer as peft_layer
from peft_models import adapted
from torch import nn
from transformers import LlamaConfig, MixtralConfig, activations, pytorch_utils
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral import modeling_mixtral
from vendor_layers import BITSANDBYTES, quantized

import fastlora
from fastlora.layers import frozen

K, N = 64, 128


def one(base: nn.Module, **settings) -> nn.Module:
    model = nn.Sequential(base)
    model.is_loaded_in_4bit = type(base).__module__.startswith("bitsandbytes")
    return adapted(model, target_modules=["0"], **settings)


def gated(act: nn.Module | None = None) -> nn.Module:
    block = LlamaMLP(LlamaConfig(hidden_size=K, intermediate_size=N))
    block.act_fn = block.act_fn if act is None else act
    return adapted(nn.Sequential(block), target_modules="all-linear")


class Routed(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def experts() -> nn.Module:
    sizes = {"hidden_size": K, "intermediate_size": N}
    config = MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    model = Routed(modeling_mixtral.MixtralExperts(config))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    return adapted(model, target_modules=[], target_parameters=names)


def several() -> nn.Module:
    return adapted(nn.Sequential(nn.Linear(K, N)), ("default", "other"), target_modules=["0"])


def rows(count: int = 64) -> torch.Tensor:
    return torch.randn(count, K, generator=torch.Generator().manual_seed(1))


def call(model: nn.Module, **named) -> list[torch.Tensor]:
    """The output and every gradient."""
    torch.manual_seed(1)
    model.zero_grad()
    if isinstance(getattr(model.base_model.model, "experts", None), nn.Module):
        y = model(rows(), torch.arange(128).view(64, 2) % 4, torch.rand(64, 2))
    else:
        y = model(rows(len((named or FEW)["adapter_names"])), **named)
    y.square().mean().backward()
    return [y, *[p.grad for p in model.parameters() if p.grad is not None]]


FEW = {"adapter_names": ["default", "other"] * 32}
MANY = {"adapter_names": ["default", "other"] * 40}
CASES = {  # the patched class, and a model
    "PEFT's layer": (peft_layer.Linear, lambda: one(nn.Linear(K, N))),
    "PEFT's layer, mixed": (peft_layer.Linear, several),
    "PEFT's layer, mixed few rows": (peft_layer.Linear, several),
    "PEFT's layer in a gated MLP": (peft_layer.Linear, gated),
    "PEFT's wrapper of experts": (peft_layer.ParamWrapper, experts),
    "base": (nn.Linear, lambda: one(nn.Linear(K, N))),
    "base, mixed": (nn.Linear, several),
    "base, Conv1D": (pytorch_utils.Conv1D, lambda: one(pytorch_utils.Conv1D(N, K))),
    "dropout": (nn.Dropout, lambda: one(nn.Linear(K, N), lora_dropout=0.5)),
    "no dropout": (nn.Identity, lambda: one(nn.Linear(K, N))),
    "DoRA": (variants.DoraLinearVariant, lambda: one(nn.Linear(K, N), use_dora=True)),
    "DoRA's magnitude": (dora.DoraLinearLayer, lambda: one(nn.Linear(K, N), use_dora=True)),
    "gated MLP": (LlamaMLP, gated),
    "experts": (modeling_mixtral.MixtralExperts, experts),
    "experts' activation": (activations.SiLUActivation, experts),
}
OF_TRANSFORMERS = ("SiLUActivation", "ReLUSquaredActivation", "GELUActivation", "GELUTanh")
for act in (*(getattr(activations, n) for n in OF_TRANSFORMERS), nn.SiLU, nn.GELU, nn.ReLU):
    CASES[f"{act.__module__}.{act.__name__}"] = act, lambda act=act: gated(act())
if BITSANDBYTES:
    import bitsandbytes
    from peft.tuners.lora import bnb

    CASES |= {
        "bitsandbytes' layer": (bitsandbytes.nn.Linear4bit, lambda: one(quantized("nf4", K, N))),
        "PEFT's layer of bitsandbytes'": (bnb.Linear4bit, lambda: one(quantized("nf4", K, N))),
        "lora_A over bitsandbytes' layer": (nn.Linear, lambda: one(quantized("nf4", K, N))),
    }
# How a model is called; the others get only x.
CALLS = {"PEFT's layer, mixed": MANY, "PEFT's layer, mixed few rows": FEW, "base, mixed": MANY}


# bitsandbytes computes in 16 bits, and on some CPUs with repacked weights where PEFT's model is not
# optimized.
assert_close = functools.partial(torch.testing.assert_close, rtol=2e-2, atol=2e-2)


def patch(monkeypatch, kind: type, name: str = "forward") -> None:
    """With functools.wraps, so that its name and its module are the original's."""
    before = vars(kind).get(name)
    run = getattr(kind, name)

    @functools.wraps(run)
    def doubled(*args, **named):
        return run(*args, **named) * 2

    is_static = isinstance(before, staticmethod)
    monkeypatch.setattr(kind, name, staticmethod(doubled) if is_static else doubled)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_is_replaced_on_the_class_runs(name, when, monkeypatch):
    (kind, make), named = CASES[name], CALLS.get(name, {})
    theirs = randomize(make())
    ours = copy.deepcopy(theirs)
    plain = call(theirs, **named)
    if when == "before":
        patch(monkeypatch, kind)
    fastlora.optimize(ours)
    if when == "after":
        for _ in range(2):
            call(ours, **named)
        patch(monkeypatch, kind)
    expected = call(theirs, **named)
    assert not torch.equal(expected[0], plain[0])
    for _ in range(2):
        assert_close(call(ours, **named), expected)
    report = fastlora.coverage(ours)
    reasons = [each.reason for each in (*report.layers, *report.gated_mlps)]
    assert any(reasons)
    monkeypatch.undo()
    if when == "before":
        fastlora.optimize(ours)
    assert_close(call(ours, **named), plain)
    assert fastlora.coverage(ours).fast


@pytest.mark.parametrize("kind", [peft_layer.Linear, nn.Linear, nn.Identity], ids=str)
def test_a_call_that_is_replaced_on_the_class_runs(kind, monkeypatch):
    theirs = randomize(one(nn.Linear(K, N)))
    ours = copy.deepcopy(theirs)
    fastlora.optimize(ours)
    call(ours)
    patch(monkeypatch, kind, "__call__")
    assert_close(call(ours), call(theirs))


def test_a_frozen_linear_layer_runs_a_forward_that_is_replaced(monkeypatch):
    monkeypatch.setattr(frozen, "are_wide", lambda _: True)  # as on a CPU that is slow at 16 bits
    head = nn.Linear(K, 2)
    model = nn.Sequential(nn.Linear(K, K), head).bfloat16()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    theirs = copy.deepcopy(model)
    fastlora.optimize(model)
    x = rows().bfloat16()
    torch.testing.assert_close(model(x), theirs(x))
    patch(monkeypatch, nn.Linear)
    torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=0)


def test_a_forward_that_torch_compiles_is_the_library_s(monkeypatch):
    layer = one(nn.Linear(K, N))
    monkeypatch.setattr(nn.Linear, "forward", torch.compile(nn.Linear.forward, backend="eager"))
    fastlora.optimize(layer)
    assert [each.reason for each in fastlora.coverage(layer).layers] == [""]


@pytest.mark.parametrize("kind", [peft_layer.Linear, nn.Linear], ids=str)
def test_a_compiled_model_sees_it(kind, monkeypatch):
    theirs = randomize(one(nn.Linear(K, N)))
    ours = copy.deepcopy(theirs)
    fastlora.optimize(ours)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows()), theirs(rows()))
    patch(monkeypatch, kind)
    torch.testing.assert_close(compiled(rows()), theirs(rows()))
