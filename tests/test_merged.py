"""``fastlora.merged``: the base's speed inside the block, and the original bits after it.

The original bits also return after an error in the block.
"""

import threading

import pytest
import torch
from model_kinds import KINDS as MODELS
from models import Mlp, Tied, adapt, randomize
from peft_models import adapted
from torch import Tensor, nn
from torch.nn.utils import prune
from vendor_layers import BITSANDBYTES

import fastlora
from fastlora.layers.int8 import Int8Linear

EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
UP_DOWN = {"target_modules": ["up", "down"]}


def packed(model: nn.Module) -> nn.Module:
    fastlora.pack(model, "int8", UP_DOWN["target_modules"])
    return model


def in_8_bits(model: nn.Module) -> nn.Module:
    return fastlora.optimize(model, base="int8", int8_from=0)


KINDS = {
    "peft": lambda: adapted(Mlp(), **UP_DOWN),
    "peft-dora": lambda: adapted(Mlp(), use_dora=True, **UP_DOWN),
    "peft-bias": lambda: adapted(Mlp(), lora_bias=True, **UP_DOWN),
    "peft-several": lambda: adapted(Mlp(), ("default", "other"), **UP_DOWN),
    "peft-experts": lambda: adapted(MODELS["experts"].make(), **EXPERTS),
    "peft-tied": lambda: adapted(Tied(), target_modules=["mix", "head"]),
    "peft-embedding": lambda: adapted(Tied(), target_modules=["mix", "embed"]),
    "peft-int8": lambda: in_8_bits(adapted(Mlp(), lora_bias=True, **UP_DOWN)),
    "packed-int8": lambda: randomize(adapt(packed(Mlp()), **UP_DOWN)).eval(),
}
if BITSANDBYTES:
    KINDS["peft-nf4"] = lambda: adapted(MODELS["quantized"].make(), target_modules=["0", "2"])


def inputs(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    weight = next(iter(model.parameters()))
    embeds = any(isinstance(module, nn.Embedding) for module in model.modules())
    if embeds:
        return torch.randint(0, 20, (2, 9))
    linears = (m for m in model.modules() if isinstance(m, nn.Linear | Int8Linear))
    size = next((m.in_features for m in linears), 32)
    return torch.randn(2, 9, size, dtype=weight.dtype if weight.is_floating_point() else None)


def everything(model: nn.Module) -> dict[str, tuple]:
    """For each parameter and buffer: its identity, address, bits, requires_grad and attributes."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {
        name: (id(t), t.data_ptr(), t.detach().clone(), t.requires_grad, {**vars(t)})
        for name, t in tensors
    }


def assert_as_before(model: nn.Module, before: dict[str, tuple]) -> None:
    now = everything(model)
    assert now.keys() == before.keys()
    for name, (number, place, bits, trains, attributes) in before.items():
        found = now[name]
        assert (found[0], found[1], found[3]) == (number, place, trains), name
        assert torch.equal(found[2], bits), name
        assert found[4].keys() == attributes.keys(), name
        assert all(found[4][key] is value for key, value in attributes.items()), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_merged_inside_and_the_original_bits_afterwards(name, optimized):
    model = KINDS[name]()
    if optimized and name.startswith("peft"):
        fastlora.optimize(model)
    x = inputs(model)
    with torch.no_grad():
        expected = model(x)
        # after the first call, because bitsandbytes may repack a weight in it
        before = everything(model)
        for _ in range(2):
            with fastlora.merged(model) as inside:
                assert inside is model
                y = model(x)
                assert all(m.merged for m in model.modules() if hasattr(m, "merged"))
            assert_as_before(model, before)
            assert torch.equal(model(x), expected)
    # x isn't rounded in the merged layer; a repacked NF4 layer rounds its scales to 16 bits.
    tolerance = {"peft-nf4": 0.02, "peft-int8": 0.02, "packed-int8": 0.02}.get(name, 2e-5)
    assert (y - expected).norm() <= tolerance * expected.norm()
    # PEFT's forward uses the same merged weights for experts
    assert not torch.equal(y, model(x)) or "experts" in name


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_an_error_inside_leaves_no_trace(name):
    model = KINDS[name]()
    before = everything(model)
    with pytest.raises(KeyError), fastlora.merged(model):
        raise KeyError
    assert_as_before(model, before)


@pytest.mark.parametrize("keep", ["corrections", "device", "cpu"])
@pytest.mark.parametrize("name", ["peft", "peft-tied", "peft-int8", "packed-int8"])
@pytest.mark.filterwarnings("ignore")
def test_cycles_in_bfloat16_leave_the_bits(name, keep):
    model = KINDS[name]().bfloat16()
    bits = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for _ in range(3):
        with fastlora.merged(model, keep=keep):
            pass
    assert_bits(model, bits)


def assert_bits(model: nn.Module, bits: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in bits.items())


def layers_of(model: nn.Module) -> list:
    return [module for module in model.modules() if hasattr(module, "merged_adapters")]


def base_bits(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict().items()
    return {name: tensor.detach().clone() for name, tensor in state if "base_layer" in name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("name", ["peft", "peft-dora", "peft-bias", "peft-several"])
def test_100_cycles_with_adapters_that_change_inside_leave_the_bits(name, dtype):
    model = KINDS[name]().to(dtype)
    bits = base_bits(model)
    weights = [layer.base_layer.weight for layer in layers_of(model)]
    for _ in range(100):
        with torch.no_grad(), fastlora.merged(model):
            # the merged weights lie in the originals' memory, so there is no second copy
            assert all(
                w is m.base_layer.weight for w, m in zip(weights, layers_of(model), strict=True)
            )
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(-1.01)
    assert_bits(model, bits)


@pytest.mark.parametrize("keep", ["corrections", "device", "cpu"])
@pytest.mark.parametrize("name", ["peft", "peft-dora", "peft-int8", "peft-experts"])
@pytest.mark.filterwarnings("ignore")
def test_disabled_adapters_inside_give_the_exact_base_and_stay_merged(name, keep):
    model = KINDS[name]().bfloat16()
    x, bits = inputs(model), base_bits(model)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        with fastlora.merged(model, keep=keep):
            y = model(x)
            with model.disable_adapter():
                assert torch.equal(model(x), base)
                assert_bits(model, bits)
            assert all(layer.merged for layer in layers_of(model))
            assert torch.equal(model(x), y)
    assert_bits(model, bits)


def test_blocks_of_several_threads_share_a_merge():
    model = KINDS["peft"]().bfloat16()
    bits, sampler, merged = base_bits(model), fastlora.merged(model), []

    def sample():
        for _ in range(20):
            with sampler:
                with fastlora.merged(model):
                    pass
                merged.append(all(layer.merged for layer in layers_of(model)))

    threads = [threading.Thread(target=sample) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert merged == [True] * 80
    assert not any(layer.merged for layer in layers_of(model))
    assert_bits(model, bits)


def test_training_inside_is_an_error_that_says_why():
    model = KINDS["peft"]().train()
    with fastlora.merged(model), pytest.raises(RuntimeError, match="adapters get no gradient"):
        model(inputs(model)).sum().backward()
    model(inputs(model)).sum().backward()


def test_a_backward_from_before_is_refused_inside_and_right_afterwards():
    model = KINDS["peft"]().bfloat16()
    x = inputs(model).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    y = model(x).sum()
    with fastlora.merged(model), pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


def test_peft_s_unmerge_and_merge_inside_are_exact():
    model = adapted(Mlp(), **UP_DOWN).bfloat16()
    bits = base_bits(model)
    model.add_adapter("other", model.peft_config["default"])
    with fastlora.merged(model):
        model.unmerge_adapter()
        assert_bits(model, bits)
        model.set_adapter("other")
        model.merge_adapter()
        assert [layer.merged_adapters for layer in layers_of(model)] == [["other"]] * 2
    assert_bits(model, bits)


def test_another_adapter_on_a_merged_layer_is_refused():
    model = KINDS["peft-several"]()
    model.base_model.set_adapter("default")
    layer = layers_of(model)[0]
    with fastlora.merged(model):
        with pytest.raises(ValueError, match=r"merged with \['default'\]: leave the fastlora"):
            layer.merge(adapter_names=["other"])
        layer.set_adapter(["default", "other"])
        with pytest.raises(ValueError, match="leave the fastlora"), fastlora.merged(model):
            pytest.fail("the block was entered")


def test_a_cast_inside_that_loses_bits_is_an_error():
    model = KINDS["peft"]().bfloat16()
    with (
        pytest.raises(RuntimeError, match="the weights before the merge can't be rebuilt"),
        fastlora.merged(model),
    ):
        model.to(torch.float8_e4m3fn)


def test_originals_on_the_cpu_train_behind_samples_in_inference_mode(monkeypatch):
    model, to = KINDS["peft"](), Tensor.to

    def moved(tensor, *args, **named):  # simulates a move between two devices
        moves = args and isinstance(args[0], torch.device)
        return tensor.clone() if moves else to(tensor, *args, **named)

    monkeypatch.setattr(Tensor, "to", moved)
    with torch.inference_mode(), fastlora.merged(model, keep="cpu"):
        model(inputs(model))
    monkeypatch.undo()
    assert not any(p.is_inference() for p in model.parameters())
    model(inputs(model).requires_grad_()).sum().backward()


def test_modules_that_begin_to_train_inside_go_on():
    model = KINDS["peft"]()
    with fastlora.merged(model):
        model.train()
    assert all(module.training for module in model.modules())


def test_a_tied_weight_is_merged_only_in_its_layer():
    model = KINDS["peft-tied"]()
    tied = model.base_model.model.head.base_layer.weight
    assert tied is model.base_model.model.embed.weight
    with fastlora.merged(model):
        assert model.base_model.model.embed.weight is tied
        assert model.base_model.model.head.base_layer.weight is not tied
    assert model.base_model.model.head.base_layer.weight is tied


def test_a_step_between_two_samples_is_seen():
    model = KINDS["peft"]()
    x = inputs(model)
    with torch.no_grad(), fastlora.merged(model):
        first = model(x)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(2.0)
        expected = model(x)
        with fastlora.merged(model):
            second = model(x)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-5)


def test_disabled_adapters_stay_out():
    model = KINDS["peft"]()
    x = inputs(model)
    with torch.no_grad(), model.disable_adapter():
        expected = model(x)
        with fastlora.merged(model):
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["peft", "peft-int8"])
@pytest.mark.filterwarnings("ignore")  # of a CPU that is slow in 8 bits
def test_the_memory_is_known_before_the_merge(name):
    sampler = fastlora.merged(KINDS[name]())
    layers = [m.base_layer for m in KINDS["peft"]().modules() if hasattr(m, "base_layer")]
    assert sampler.bytes == sum(layer.weight.nbytes for layer in layers)
    assert str(sampler).startswith(f"{len(layers)} layers; merging takes 0 MiB")


def broken(model: nn.Module) -> nn.Module:
    next(p for n, p in model.named_parameters() if "down" in n and "lora_B" in n).data.fill_(
        torch.nan
    )
    return model


def with_base(change) -> nn.Module:
    """Whose layer ``down`` has been changed before it gets its adapter."""
    model = Mlp()
    change(model.down)
    return adapted(model, **UP_DOWN)


def buffered(linear: nn.Linear) -> None:
    weight = linear.weight.detach()
    del linear.weight
    linear.register_buffer("weight", weight)


FIXED = "down has a base whose weight is no parameter"
REFUSED = {
    "pruned": (lambda: with_base(lambda m: prune.random_unstructured(m, "weight", 0.5)), FIXED),
    "weight_norm": (lambda: with_base(nn.utils.weight_norm), FIXED),
    "parametrized": (lambda: with_base(nn.utils.parametrizations.weight_norm), FIXED),
    "buffer": (lambda: with_base(buffered), FIXED),
    "no layers": (lambda: nn.Linear(2, 2), "no LoRA layers"),
    "NaN": (lambda: broken(KINDS["peft"]()), "down can't be merged: NaN"),
    "meta": (lambda: KINDS["peft"]().to("meta"), "meta device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_model_is_unchanged(name):
    make, words = REFUSED[name]
    model = make()
    before = {n: id(p) for n, p in model.named_parameters()}
    bits = {n: p.clone() for n, p in model.named_parameters() if not p.is_meta}
    with pytest.raises(ValueError, match=words), fastlora.merged(model):
        pytest.fail("the block was entered")
    assert {n: id(p) for n, p in model.named_parameters()} == before
    for n, p in bits.items():
        torch.testing.assert_close(model.get_parameter(n), p, rtol=0, atol=0, equal_nan=True)
    assert not any(getattr(m, "merged", False) for m in model.modules())


def test_attention_modules_that_peft_s_merge_changes_are_refused():
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    model = adapted(attention, target_modules=["a"])
    with pytest.raises(ValueError, match="MultiheadAttention"), fastlora.merged(model):
        pytest.fail("the block was entered")


def test_a_merged_model_and_bad_arguments_are_refused():
    model = KINDS["peft"]()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged already"), fastlora.merged(model):
        pytest.fail("the block was entered")
    with pytest.raises(ValueError, match="keep is 'disk'"):
        fastlora.merged(KINDS["peft"](), keep="disk")
    with pytest.raises(TypeError, match="must be a torch"):
        fastlora.merged(None)


def test_a_model_cast_inside_stays_cast_afterwards():
    model = KINDS["peft"]()
    expected = {n: p.detach().double() for n, p in model.named_parameters()}
    with fastlora.merged(model):
        model.double()
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name]), name


def test_originals_go_to_the_cpu_one_after_the_other_unless_they_share_memory(monkeypatch):
    """Besides the merged weights, at most one original is on the device at a time.

    A view of an original would otherwise see other values, or lose its memory.
    """
    model, sent = KINDS["peft"](), []
    layers = [m for m in model.modules() if isinstance(getattr(m, "merged", None), bool)]
    first = layers[0].weight
    model.register_parameter("view", nn.Parameter(first.detach()[:1], requires_grad=False))

    def note(parameter, stack):
        sent.append((parameter is first, sum(layer.merged for layer in layers)))

    monkeypatch.setattr("fastlora.layers.merging.send_to_cpu", note)
    with fastlora.merged(model, keep="cpu"):
        pass
    assert len(layers) > 1
    assert sent == [(False, merged) for merged in range(2, len(layers) + 1)]
