"""Gated MLPs as fused blocks: which modules and which calls are fused, and how it is undone."""

import copy
import re
import types
from functools import partial

import peft
import pytest
import torch
import transformers
from models import blocks, counted_blocks, refused, tiny_llama
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize
from transformers import activations

import fastlora
from fastlora.layers import mlp
from fastlora.layers.classes import change_classes, own_classes
from fastlora.layers.module_parts import activation_of

IN, HIDDEN, ROWS = 8, 12, 40  # calls of up to 32 rows wouldn't be fused


class Gated(nn.Module):
    """A gated MLP with Llama's names."""

    def __init__(self, act_fn=None, hidden: int = HIDDEN, size: int = IN) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden)
        self.up_proj = nn.Linear(size, hidden)
        self.down_proj = nn.Linear(hidden, size)
        self.act_fn = nn.SiLU() if act_fn is None else act_fn

    def forward(self, hidden):
        product = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return product


def adapted(module: nn.Module | None = None, **settings) -> nn.Module:
    """A model with random adapters on the three layers, in float64, fused if it can be."""
    settings = {"r": 3, "target_modules": list(mlp.PARTS)} | settings
    model = nn.Sequential(Gated() if module is None else module).double()
    config = peft.LoraConfig(**settings, init_lora_weights=False)
    return fastlora.get_peft_model(model, config).get_base_model()


def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, ROWS, IN, generator=generator, dtype=torch.float64).requires_grad_()


def results(model: nn.Module, run=lambda model, x: model(x)) -> list[Tensor | None]:
    """The output and every gradient, from a fixed random state."""
    torch.manual_seed(3)
    leaf = x()
    y = run(model, leaf)
    trained = [p for p in model.parameters() if p.requires_grad]
    y.square().sum().backward()
    found = [None if each.grad is None else each.grad.clone() for each in (leaf, *trained)]
    model.zero_grad()
    return [y.detach(), *found]


def layer_by_layer(model: nn.Module) -> nn.Module:
    """A copy without fused blocks: each gated MLP runs layer by layer."""
    model = copy.deepcopy(model)
    change_classes(own_classes(model.modules(), mlp.GatedMLP))
    assert not blocks(model)
    return model


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for our, their in zip(found, expected, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)


FAMILIES = {
    "llama": ("Llama", "LlamaMLP"),
    "qwen3": ("Qwen3", "Qwen3MLP"),
    "gemma3": ("Gemma3Text", "Gemma3MLP"),
    "recurrent_gemma": ("RecurrentGemma", "RecurrentGemmaMlp"),
}


def of_transformers(family: str) -> nn.Module:
    name, kind = FAMILIES[family]
    sizes = {"hidden_size": IN, "intermediate_size": HIDDEN, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(**sizes)
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=[kind])
    return getattr(module, kind)(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_block_agrees_with_its_layers(family):
    model = adapted(of_transformers(family), lora_dropout=0.3)
    assert blocks(model) == {"0"}
    with counted_blocks() as calls:
        found = results(model)
    assert len(calls) == 1
    assert_same(found, results(layer_by_layer(model)))
    assert [block.fast for block in fastlora.coverage(model).gated_mlps] == [True]


class Scaled(Gated):
    def forward(self, x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj * 2


class Keyword(Gated):
    def forward(self, x, scale=None):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


class Variadic(Gated):
    def forward(self, *x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(*x)) * self.up_proj(*x))
        return down_proj


class OwnCall(Gated):
    def __call__(self, x):
        return super().__call__(x) * 2


def wrapped(forward):
    def inner(self, x):
        return forward(self, x) * 2

    return inner


class Wrapped(Gated):
    forward = wrapped(Gated.forward)


UNKNOWN = [Scaled, Keyword, Variadic, OwnCall, Wrapped]


@pytest.mark.parametrize("kind", UNKNOWN, ids=lambda kind: kind.__name__)
def test_an_unknown_forward_stays_its_own(kind):
    model = adapted(kind())
    assert not blocks(model)
    (block,) = fastlora.coverage(model).gated_mlps
    assert (block.name, block.fast) == ("0", False)
    assert block.reason == "its forward is unknown to fastlora"
    assert "1 layer by layer: 0: its forward is unknown" in str(fastlora.coverage(model))


class Named(Gated):
    """Other argument names and another docstring, but the same forward."""

    def forward(self, states: Tensor) -> Tensor:
        """The MLP's forward."""
        return self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states))


def test_a_forward_is_recognized_by_its_operations():
    assert blocks(adapted(Named())) == {"0"}


ACTIVATIONS = {
    "silu": [nn.SiLU(), activations.SiLUActivation(), functional.silu],
    "gelu": [nn.GELU(), activations.GELUActivation(), functional.gelu],
    "gelu_tanh": [
        nn.GELU("tanh"),
        activations.GELUTanh(),
        partial(functional.gelu, approximate="tanh"),
    ],
    "relu": [nn.ReLU(), torch.relu, functional.relu],
    "relu2": [activations.ReLUSquaredActivation()],
    "": [
        nn.SiLU(inplace=True),
        nn.Tanh(),
        activations.GELUActivation(use_gelu_python=True),
        activations.GELUTanh(use_gelu_tanh_python=True),
        partial(functional.silu, inplace=True),
        partial(functional.gelu, torch.ones(1)),
        partial(functional.gelu, input=torch.ones(1)),
        partial(functional.gelu),
        lambda gate: gate,
        None,
    ],
}
EVERY = [(name, act) for name, acts in ACTIVATIONS.items() for act in acts]
IDS = [f"{name}-{re.sub(' at 0x.*', '', repr(act))}"[:40] for name, act in EVERY]


@pytest.mark.parametrize(("name", "act"), EVERY, ids=IDS)
def test_activations_are_recognized(name, act):
    assert activation_of(act) == name
    if name:
        model = adapted(Gated(copy.deepcopy(act)))
        with counted_blocks() as calls:
            found = results(model)
        assert len(calls) == 1
        assert_same(found, results(layer_by_layer(model)))


class Doubled(nn.SiLU):
    def forward(self, gate):
        return super().forward(gate) * 2


def block_of(model: nn.Module) -> nn.Module:
    return model[0]


def hooked(part: str, register: str = "register_forward_hook", result=None):
    def change(model):
        module = getattr(block_of(model), part)
        getattr(module, register)(lambda *_: result)

    return change


def replaced(part: str):
    def change(model):
        module = getattr(block_of(model), part)
        run = module.forward
        module.forward = lambda *args: run(*args) * 2

    return change


def merged(model):
    for layer in block_of(model).children():
        if hasattr(layer, "merge"):
            layer.merge()
    model.eval()


def other_act(model):
    block_of(model).act_fn = Doubled()


def other_dropout(model):
    block_of(model).up_proj.lora_dropout["default"] = nn.Dropout(0.5)


def other_linear(model):
    block_of(model).gate_proj = nn.Conv1d(ROWS, ROWS, 1).double()  # another kind of layer
    block_of(model).up_proj = nn.Linear(IN, IN).double()
    block_of(model).down_proj = nn.Linear(IN, IN).double()
    with torch.no_grad():
        for parameter in block_of(model).parameters():
            parameter.fill_(0.1)


def broadcast(model):
    # its single column multiplies every column of gate
    block_of(model).up_proj = nn.Linear(IN, 1).double()
    for parameter in block_of(model).up_proj.parameters():
        parameter.requires_grad_(False).fill_(0.1)


def parametrized(model):
    block_of(model).down_proj.requires_grad_(False)
    block_of(model).down_proj = block_of(model).down_proj.base_layer
    parametrize.register_parametrization(block_of(model).down_proj, "weight", nn.Tanh())


def shadowed(model):
    up = block_of(model).up_proj
    block_of(model).__dict__["up_proj"] = lambda x: up(x) * 2


def own_class(model):
    kind = type(block_of(model).gate_proj)

    class Other(kind):
        def forward(self, x):
            return kind.forward(self, x) * 2

    block_of(model).gate_proj.__class__ = Other


LEFT = {  # the changes that prevent a fused call, and a part of the report's reason
    "hook-act": (hooked("act_fn"), "activation"),
    "hook-gate": (hooked("gate_proj"), "gate_proj: a hook"),
    "pre-hook-up": (hooked("up_proj", "register_forward_pre_hook"), "up_proj: a hook"),
    "backward-hook-down": (hooked("down_proj", "register_full_backward_hook"), "down_proj: a hook"),
    "forward-act": (replaced("act_fn"), "activation"),
    "forward-down": (replaced("down_proj"), "down_proj: its forward was replaced"),
    "class-act": (other_act, "activation"),
    "class-gate": (own_class, "gate_proj: "),
    "merged": (merged, "gate_proj: its adapter is merged"),
    "dropouts": (other_dropout, "different dropouts"),
    "other-linear": (other_linear, "gate_proj: it is a Conv1d"),
    "broadcast": (broadcast, "its weights have shapes (12, 8), (1, 8) and (8, 12)"),
    "parametrized": (parametrized, "down_proj: it is parametrized"),
    "shadowed": (shadowed, "up_proj is no module"),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_call_goes_layer_by_layer(name):
    change, reason = LEFT[name]
    model = adapted()
    plain = layer_by_layer(model)
    change(model)
    change(plain)
    with counted_blocks() as calls:
        found = results(model)
    assert not calls
    assert_same(found, results(plain))
    assert blocks(model) == {"0"}
    (block,) = fastlora.coverage(model).gated_mlps
    assert reason in block.reason


def test_hooks_are_called_and_once_they_are_gone_the_call_is_a_block_s():
    model, seen = adapted(), []
    handle = block_of(model).act_fn.register_forward_hook(lambda *_: seen.append(1))
    block_of(model).register_forward_hook(lambda *_: seen.append(2))
    with counted_blocks() as calls:
        model(x())
        assert (seen, calls) == ([1, 2], [])
        handle.remove()
        model(x())
    assert seen == [1, 2, 2]
    assert len(calls) == 1


def test_a_hook_on_all_modules():
    model, seen = adapted(), []
    handle = nn_module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with counted_blocks() as calls:
            model(x())
        (block,) = fastlora.coverage(model).gated_mlps
    finally:
        handle.remove()
    assert not calls
    assert {type(module) for module in seen} >= {nn.Sequential, type(block_of(model)), nn.SiLU}
    assert block.reason == "a hook on all modules is registered"


def test_a_forward_that_is_replaced_on_the_instance():
    module = Gated()
    module.forward = types.MethodType(Scaled.forward, module)
    model = adapted(module)
    assert not blocks(model)
    reason = "its forward was replaced on the instance"
    assert fastlora.coverage(model).gated_mlps[0].reason == reason
    model = adapted()
    block_of(model).forward = types.MethodType(Scaled.forward, block_of(model))
    assert fastlora.coverage(model).gated_mlps[0].reason == reason


def few_rows(model, x):
    return model(x[:, :3])


def by_keyword(model, x):
    return block_of(model)(hidden=x)


def without_gradients(model, x):
    with torch.no_grad():
        return model(x) + 0 * x.sum()


def compiled(model, x):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)(x)


def vmapped(model, x):
    return torch.func.vmap(model)(x)


def forward_mode(model, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(x)).primal


OTHER_CALLS = [few_rows, by_keyword, without_gradients, compiled, vmapped, forward_mode]


@pytest.mark.parametrize("run", OTHER_CALLS, ids=lambda run: run.__name__)
def test_calls_that_go_layer_by_layer(run):
    model = adapted()
    plain = layer_by_layer(model)
    if run is without_gradients:
        with counted_blocks() as calls:
            assert torch.equal(run(model, x()), run(plain, x()))
    else:
        with counted_blocks() as calls:
            found = results(model, run)
        assert_same(found, results(plain, run))
    assert not calls


def test_invalid_inputs_raise_the_layers_errors():
    model = adapted()
    for wrong in (torch.randn(ROWS, IN), torch.randn(ROWS, 3).double(), "x"):
        messages = []
        for each in (model, layer_by_layer(model)):
            with pytest.raises(Exception) as error:  # noqa: PT011
                each(wrong)
            messages.append((type(error.value), str(error.value)))
        assert messages[0] == messages[1]


def test_get_peft_model_and_load_adapter_take_a_model_s_blocks(tmp_path):
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    model = fastlora.get_peft_model(tiny_llama(), config)
    report = "14 of 14 layers fast (backend torch)\n2 of 2 gated MLPs as one block"
    assert str(fastlora.coverage(model)) == report
    model.save_pretrained(tmp_path)
    assert blocks(fastlora.load_adapter(tiny_llama(), tmp_path)) == blocks(model)
    assert not blocks(fastlora.get_peft_model(tiny_llama(), config, gated_mlps=False))
    plain = tiny_llama()
    with refused(plain, "gated_mlps is 1, but must be True or False"):
        fastlora.get_peft_model(plain, config, gated_mlps=1)
