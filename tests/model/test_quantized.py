"""apply_lora on quantized layers of several vendors: the formula with the dequantized weight."""

import copy

import pytest
import safetensors.torch
import torch
from judge import peak_bytes
from models import randomize
from torch import Tensor, nn
from vendor_layers import BITSANDBYTES, KINDS, quantized, repack

import fastlora
from fastlora import LoRAConfig
from fastlora.formats import quantized_weight
from fastlora.model import merge as merging

K, N = 256, 96
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROTATED = "rotated-int8"  # fastlora's own, whose calls round x and dy
ALL = [*BITSANDBYTES, *KINDS, ROTATED]
needs_bitsandbytes = pytest.mark.skipif(not BITSANDBYTES, reason="bitsandbytes isn't installed")


def adapted(kind: str, dtype: torch.dtype = F32, widths: tuple[int, ...] = (N,)) -> nn.Sequential:
    """Layers of these widths, with adapters that change the output."""
    sizes = zip((K, *widths), widths, strict=False)
    model = nn.Sequential(*[quantized(kind, k, n, dtype=dtype) for k, n in sizes])
    config = LoRAConfig(r=4, target_modules=r"\d", init_lora_weights=False)
    return fastlora.apply_lora(model, config).eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors, torchao's dequantized because they can't be compared."""
    state = model.state_dict().items()
    return {
        name: value.dequantize() if "torchao" in type(value).__module__ else value.clone()
        for name, value in state
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ALL)
def test_it_is_the_vendor_s_layer_with_an_adapter(kind):
    model = nn.Sequential(quantized(kind, K, N))
    layer, plain, keys = model[0], type(model[0]), set(model.state_dict())
    parts = layer._parameters | layer._buffers
    weight = quantized_weight(layer).weight.dense(F32).double()
    fastlora.apply_lora(model, LoRAConfig(r=4, target_modules=["0"]))
    nn.init.normal_(layer.lora_B)
    assert isinstance(layer, plain)
    assert all(getattr(layer, name, None) is part for name, part in parts.items())
    assert model.state_dict().keys() - keys == {"0.lora_A", "0.lora_B"}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["0.lora_A", "0.lora_B"]

    x = torch.randn(5, K, requires_grad=True)
    leaves = [x, layer.lora_A, layer.lora_B]
    y = model(x)
    found = [y, *torch.autograd.grad(y.square().sum(), leaves)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    z, a, b = wide
    y = z @ weight.T + layer.bias.double() + layer.scaling * (z @ a.T @ b.T)
    expected = [y, *torch.autograd.grad(y.square().sum(), wide)]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= (0.02 if kind == ROTATED else 2e-6) * other.norm()
    fastlora.remove_lora(model)
    assert type(layer) is plain


@needs_bitsandbytes
def test_products_run_in_16_bits_and_y_has_x_s_dtype():
    layer, x = adapted("nf4", BF16)[0], torch.randn(3, K)
    y = layer(x)
    assert y.dtype == F32
    assert torch.equal(y, layer(x.to(BF16)).float())
    expected = layer.merged_weight(F32) @ x.T
    torch.testing.assert_close(y, expected.T + layer.bias, atol=0.1, rtol=0.05)


def test_adapters_drop_only_in_training():
    layer, x = adapted("float8")[0], torch.randn(3, K)
    y, layer.lora_dropout = layer(x), 0.5
    assert torch.equal(layer(x), y)
    assert not torch.equal(layer.train()(x), y)


# The largest relative error allowed for a layer.
REQUANTIZED = {"nf4": 0.4, "fp4": 0.4, "int8": 0.05, "torchao-int8": 0.02, "torchao-float8": 0.05}
REQUANTIZED |= {"hqq": 0.2, "float8": 0.05, ROTATED: 0.02}


@pytest.mark.parametrize("kind", [k for k in REQUANTIZED if k in ALL])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_merge_quantizes_again_and_unmerge_is_exact(kind, dtype):
    model, x = adapted(kind, dtype), torch.randn(5, K, dtype=dtype)
    layer, plain = model[0], type(model[0]).plain_class
    layer.bias.data = layer.bias.to(dtype)  # bitsandbytes' own call casts the bias to this dtype
    before, y = state_of(model), model(x)
    wanted = layer.merged_weight(F32)
    with pytest.warns(UserWarning, match=r"1 merged weights were quantized again.* up to 0\.\d+"):
        fastlora.merge_lora(model)
    assert isinstance(layer, plain)
    distance = (layer.packed().weight.dense(F32) - wanted).norm() / wanted.norm()
    assert 0 < distance < REQUANTIZED[kind]
    if kind != "float8":  # its own call needs a kernel that isn't installed
        with torch.no_grad():
            assert (model.train()(x) - y).norm() <= 2 * REQUANTIZED[kind] * y.norm()
    is_four_bit = kind in ("nf4", "fp4")
    assert not is_four_bit or layer.quant_state is layer.weight.quant_state
    fastlora.unmerge_lora(model.eval())
    assert not is_four_bit or layer.quant_state is layer.weight.quant_state
    assert_equal(state_of(model), before)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "gptq"])
def test_merged_into_a_plain_weight_of_the_model_s_dtype_and_back(kind, dtype):
    """Also after a call of bitsandbytes has cast the bias."""
    layer, x = quantized(kind, K, N, dtype=dtype), torch.randn(5, K, dtype=dtype)
    plain, close = type(layer), 0.02 if dtype == BF16 or kind in ("int8", ROTATED) else 0.003
    if kind in BITSANDBYTES:
        with torch.no_grad():
            layer.eval()(x)
    # A 4-bit layer knows the dtype that it computes in, so no other parameter has to tell it.
    others = [] if kind in ("nf4", "fp4") else [nn.LayerNorm(K, dtype=dtype)]
    model = nn.Sequential(*others, layer).eval()
    fastlora.apply_lora(model, LoRAConfig(r=4, target_modules=[str(len(others))]))
    nn.init.normal_(layer.lora_B, std=0.1)
    y = model(x)
    fastlora.merge_lora(model, requantize=False)
    assert layer.weight.dtype == dtype
    assert (model(x) - y).norm() <= close * y.norm()
    with pytest.raises(RuntimeError, match="its adapter would get no gradient"):
        model.train()(x)
    copied = copy.deepcopy(model.eval()) if kind != "hqq" else model  # its bias is no leaf
    model.to("cpu")._apply(torch.clone)  # like a move to another device, makes all tensors anew
    for one in {model, copied}:
        fastlora.unmerge_lora(one)
        assert torch.equal(one(x), y)
    fastlora.remove_lora(fastlora.merge_lora(model, requantize=False))
    assert (type(layer), layer.weight.dtype) == (nn.Linear, dtype)
    assert (model(x) - y).norm() <= close * y.norm()
    fastlora.remove_lora(copied)
    assert kind == "hqq" or type(copied[-1]) is plain


@needs_bitsandbytes
def test_a_merge_into_plain_weights_makes_no_float32_model():
    layers, size = [quantized("int8", 512, 4096) for _ in range(4)], 512 * 4096
    model = nn.Sequential(nn.Embedding(1, 8, dtype=BF16), *layers)
    config = LoRAConfig(r=2, target_modules="all-linear")
    randomize(fastlora.apply_lora(model, config), 0.01)
    merge = lambda: fastlora.merge_lora(model, keep_base=False, requantize=False)  # noqa: E731
    before, peak, after = peak_bytes(model.parameters(), merge)
    assert after - before <= 4 * size  # two bytes for each element
    assert peak - before <= (4 + 2) * size + 3 * 4 * 2**20  # one more layer, and blocks of rows


def test_a_merge_that_fails_leaves_everything(monkeypatch):
    model, x = adapted("float8", widths=(192, N)), torch.randn(3, K)
    y, put = model(x), merging.LoRAQuantized.use_merged

    def fail(layer, *arguments):
        if layer is model[1]:
            raise MemoryError
        return put(layer, *arguments)

    monkeypatch.setattr(merging.LoRAQuantized, "use_merged", fail)
    with pytest.raises(MemoryError):
        fastlora.merge_lora(model)
    assert torch.equal(model(x), y)


@needs_bitsandbytes
@pytest.mark.parametrize("keep_base", [True, False])
def test_a_merged_weight_that_packing_makes_infinite_is_refused(keep_base):
    model, x = adapted("int8", widths=(K, N)), torch.randn(3, K)  # packing goes through float16
    with torch.no_grad():
        model[1].lora_A.fill_(1.0)
        model[1].lora_B[0] = 1e5
    y = model(x)
    with pytest.raises(ValueError, match="packed again it holds NaN or infinity"):
        fastlora.merge_lora(model, keep_base=keep_base)
    assert not any(layer.merged for layer in model)
    assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="not merged"):
        fastlora.unmerge_lora(model)


@pytest.mark.parametrize(
    ("kind", "requantize", "message"),
    [
        ("gptq", True, "GPTQ"),
        ("gptq", False, "GPTQ"),
        ("awq", True, "AWQ's numbers are read, and not made"),
        ("gguf-q4_k", True, "are read, and not made"),
    ],
)
def test_a_refused_merge_names_the_reason_and_changes_nothing(kind, requantize, message):
    model, x = adapted(kind), torch.randn(3, K)
    before, y = state_of(model), model(x)
    with pytest.raises(ValueError, match=message):
        fastlora.merge_lora(model, requantize=requantize)
    assert_equal(state_of(model), before)
    assert not model[0].merged
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("torchao-rounding", {}, "torchao gives no gradient"),
        ("int8", {"threshold": 6.0}, "its outlier threshold is 6"),
    ],
)
def test_unreadable_layers_are_refused(kind, settings, message):
    model = nn.Sequential(quantized(kind, **settings))
    with pytest.raises(ValueError, match=message):
        fastlora.apply_lora(model, LoRAConfig(target_modules=["0"]))


@needs_bitsandbytes
def test_a_layer_that_becomes_unreadable_raises_when_called():
    model = adapted("nf4")
    assert "1 quantized: NF4" in str(fastlora.coverage(model))
    model[0].weight.quant_state.absmax = model[0].weight.quant_state.absmax[:-1]
    with pytest.raises(ValueError, match="can't be read: its quantization state is broken"):
        model(torch.randn(3, K))
    (eager,) = fastlora.coverage(model).not_fast
    assert "its quantization state is broken" in eager.reason


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "hqq", ROTATED])
def test_files_of_adapters_and_state_dicts(kind, tmp_path):
    """HQQ's layer has its own state_dict and load_state_dict."""
    model, x = adapted(kind), torch.randn(3, K)
    state, expected = state_of(model), model(x)
    first = {"nf4": "0.weight", "hqq": "0.W_q", ROTATED: "0.codes"}[kind]
    assert state.keys() >= {first, "0.lora_A", "0.lora_B"}
    fastlora.save_adapter(model, tmp_path)
    if kind == "nf4":  # HQQ's has whole numbers among its tensors
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
        assert safetensors.torch.load_file(tmp_path / "model.safetensors").keys() == state.keys()
    else:
        for name in ("lora_A", "lora_B"):
            nn.init.zeros_(getattr(model[0], name))
        model.load_state_dict(state)
        assert torch.equal(model(x), expected)
    fastlora.load_adapter(fastlora.remove_lora(model), tmp_path)
    assert torch.equal(model(x), expected)


@needs_bitsandbytes
@pytest.mark.parametrize("evaluated", ["before", "after"])
def test_a_frozen_four_bit_layer_gives_x_its_gradient_after_an_evaluation(evaluated):
    """On a CPU with AVX512-BF16, bitsandbytes repacks the weight and then gives x no gradient."""
    model = nn.Sequential(quantized("nf4", 256, 128), quantized("nf4", 128, 64))
    x, frozen = torch.randn(5, 256), model[1]
    if evaluated == "before":
        repack(frozen)
    weight = quantized_weight(frozen).weight.dense(F32)
    fastlora.apply_lora(model, LoRAConfig(r=4, target_modules=["0"], init_lora_weights=False))
    with torch.no_grad():
        model.eval()(x)
    y = model.train()(x)
    y.backward(torch.ones_like(y))
    found, model[0].lora_A.grad = model[0].lora_A.grad, None
    y = model[0](x) @ weight.T
    y.backward(torch.ones_like(y))
    bits = 8 if evaluated == "before" else 17  # the weight stays rounded to bfloat16
    assert (found - model[0].lora_A.grad).norm() <= 2**-bits * found.norm()
    repacks = type(frozen)(8, 8).support_avx512bf16_for_cpu
    fastlora.remove_lora(model)
    assert frozen.support_avx512bf16_for_cpu == repacks
