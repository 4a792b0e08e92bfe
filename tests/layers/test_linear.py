"""LoRALinear, replace_linears and lora_state_dict: the layer that needs no PEFT."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from models import Mlp, Tied, assert_near, numbers, randomize, refused, tiny_llama
from torch import nn

import fastlora
from fastlora import LoRALinear

SETTINGS = {"r": 3, "lora_alpha": 6}


def formula(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    down = x @ layer.lora_A.T
    return x @ layer.weight.T + layer.bias + layer.scaling * (down @ layer.lora_B.T)


def made(dtype: torch.dtype = torch.float32) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(8, 12, dtype=dtype, **SETTINGS)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3)], ids=str)
def test_a_call_is_the_formula(lead):
    layer, x = made(torch.float64), torch.randn(*lead, 8, dtype=torch.float64)
    expected = copy.deepcopy(layer)
    expected.forward = lambda x: formula(expected, x)
    assert_near(numbers(layer, x), numbers(expected, x), 1e-12)


def test_a_new_layer_is_its_base_and_trains_only_its_adapter():
    layer, x = LoRALinear(8, 12, r=3), torch.randn(5, 8)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    assert "r=3, lora_alpha=16" in repr(layer)
    assert layer.scaling == 16 / 3
    assert LoRALinear(8, 12, r=4, use_rslora=True).scaling == 8


def test_initialization_is_peft_s():
    """kaiming-uniform(a=√5) is uniform within 1/√in_features."""
    lora_a = LoRALinear(400, 7, r=64).lora_A
    assert lora_a.abs().max() <= 1 / 20
    assert lora_a.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)


def test_dropout_acts_in_training_on_the_adapter_s_input():
    layer, x = LoRALinear(64, 12, r=3, lora_dropout=0.5), torch.randn(5, 64)
    nn.init.normal_(layer.lora_B)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    assert not torch.equal(layer(x), layer(x))
    product = x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer.eval()(x) - base, layer.scaling * product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_rounds_once_and_unmerge_gives_the_bits_back(dtype):
    layer, x = made(dtype).eval(), torch.randn(5, 8, dtype=dtype)
    weight, bits = layer.weight, layer.weight.clone()
    product = layer.lora_B.double() @ layer.lora_A.double()
    for _ in range(3):
        layer.merge()
        assert layer.merged
        expected = bits.double() + layer.scaling * product
        steps = 1e-6 if dtype == torch.float32 else 0.0  # 16 bits are rounded from float32
        torch.testing.assert_close(layer.weight, expected.to(dtype), rtol=steps, atol=steps)
        layer.merge()
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer.unmerge()
        assert layer.weight is weight
        assert torch.equal(layer.weight, bits)
    layer.unmerge()


def test_a_merged_layer_moves_with_its_original_and_doesn_t_train():
    layer = made()
    bits = layer.weight.clone()
    layer.merge()
    with pytest.raises(RuntimeError, match="call unmerge"):
        layer(torch.randn(2, 8))
    layer.double().unmerge()
    assert torch.equal(layer.weight, bits.double())


def test_a_broken_adapter_isn_t_merged():
    layer = made()
    with torch.no_grad():
        layer.lora_B[0, 0] = torch.inf
    with refused(layer, "NaN or infinity"):
        layer.merge()


def test_a_base_checkpoint_loads_before_and_after():
    plain = nn.Linear(8, 12)
    layer = made()
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.weight, plain.weight)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "lora" not in k})
    layer.merge()
    with pytest.raises(RuntimeError, match="call unmerge"):
        layer.load_state_dict(plain.state_dict())
    layer.unmerge()
    state = layer.state_dict()
    del state["lora_A"]
    with pytest.raises(RuntimeError, match="lora_A"):
        layer.load_state_dict(state)


def test_copies_and_pickles_compute_the_same():
    layer, x = made(), torch.randn(5, 8)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_from_linear_shares_the_base():
    linear = nn.Linear(8, 12).eval()
    layer = LoRALinear.from_linear(linear, **SETTINGS)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert not linear.weight.requires_grad


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Conv1d(8, 8, 1), "a Conv1d"),
        (nn.Linear(8, 8).to(torch.float8_e5m2), "float8_e5m2"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "ParametrizedLinear"),
        (LoRALinear(8, 8, r=2), "has one already"),
        (nn.Linear(8, 0), "no elements"),
    ],
    ids=["Conv1d", "float8", "parametrized", "LoRALinear", "empty"],
)
def test_from_linear_refuses_other_layers(layer, text):
    with pytest.raises(ValueError, match=text):
        LoRALinear.from_linear(layer, **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.0}, "r is 2.0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ],
    ids=str,
)
def test_numbers_that_don_t_fit(settings, text):
    with pytest.raises(ValueError, match=text):
        LoRALinear(8, 8, **{"r": 2} | settings)
    model = Mlp()
    with refused(model, text):
        fastlora.replace_linears(model, ["up"], **SETTINGS | settings)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["up", "down"], ["up", "down"]),
        ("u.|head", ["up", "head"]),
        (".*", ["up", "down", "head"]),
    ],
    ids=str,
)
def test_replace_linears_takes_names_or_a_regex(targets, names):
    model = Mlp()
    layers, keys = dict(model.named_modules()), set(model.state_dict())
    assert fastlora.replace_linears(model, targets, **SETTINGS) == names
    assert dict(model.named_modules()) == layers  # the same objects
    assert all(type(layers[name]) is LoRALinear for name in names)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{x}" for name in names for x in "AB"}
    assert trained == set(fastlora.lora_state_dict(model)) == set(model.state_dict()) - keys


def test_a_replaced_model_trains_as_the_formula():
    torch.manual_seed(0)
    model, x = Mlp().double(), torch.randn(5, 8, dtype=torch.float64)
    fastlora.replace_linears(model, ["up", "down"], **SETTINGS)
    randomize(model)
    expected = copy.deepcopy(model)
    for layer in (expected.up, expected.down):
        layer.forward = lambda x, layer=layer: formula(layer, x)
    assert_near(numbers(model, x), numbers(expected, x), 1e-12)
    report = fastlora.coverage(model)
    assert [layer.name for layer in report.fast] == ["up", "down"]


def test_lora_state_dict_goes_into_another_model():
    first, second = (Mlp(), Mlp())
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        fastlora.replace_linears(model, ["up"], **SETTINGS)
    randomize(first)
    _, unexpected = second.load_state_dict(fastlora.lora_state_dict(first), strict=False)
    assert not unexpected
    x = torch.randn(5, 8)
    assert torch.equal(first(x), second(x))


def test_adapters_of_16_bits_are_float32_unless_they_keep_the_dtype():
    for keeps, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = tiny_llama(torch.bfloat16)
        settings = SETTINGS | {"autocast_adapter_dtype": keeps}
        names = fastlora.replace_linears(model, ["q_proj"], **settings)
        assert len(names) == 2
        assert {p.dtype for p in fastlora.lora_state_dict(model).values()} == {dtype}


MISTAKES = {
    "misspelled": (Mlp, ["up", "dwn"], "targets has 'dwn', which matches no layer.*down, head, up"),
    "no linear layer": (Mlp, ["norm"], "norm can't take an adapter: it is a LayerNorm"),
    "no name": (Mlp, [], r"targets is \[\], but must name a layer"),
    "a broken regex": (Mlp, "(", "no regular expression"),
    "a regex without a match": (
        Mlp, "norm", "which matches no layer: a string is a regular expression .*down, head, up"
    ),
    "skipped by its parent": (
        lambda: nn.TransformerEncoderLayer(8, 2), ["linear1"], "TransformerEncoderLayer around it"
    ),
    "an embedding": (Tied, ["embed"], "it is a Embedding"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_leave_the_model_as_it_was(mistake):
    make, targets, text = MISTAKES[mistake]
    model = make()
    with refused(model, text):
        fastlora.replace_linears(model, targets, **SETTINGS)


def test_it_needs_no_peft():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import torch, fastlora\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
        "fastlora.replace_linears(model, ['0'], r=2, lora_alpha=4)\n"
        "model(torch.randn(2, 8)).sum().backward()\n"
        "print(model[0].lora_B.grad.shape)"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "torch.Size([8, 2])", run.stderr
