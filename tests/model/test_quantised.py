"""Your own models with bitsandbytes' layers: adapted in place, and theirs in all else."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
from bnb_layers import KINDS, bnb, quantised
from memory import peak_bytes
from models import randomise
from torch import nn

import fastlora
from fastlora import LoRAConfig
from fastlora.model import merge as merging

CONFIG = LoRAConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)


def adapted(kind: str, dtype=torch.float32, **settings) -> nn.Sequential:
    model = nn.Sequential(quantised(kind, 64, 128, dtype=dtype), quantised(kind, dtype=dtype))
    return fastlora.apply_lora(model, LoRAConfig(**(vars(CONFIG) | settings)))


@pytest.mark.parametrize("kind", KINDS)
def test_class_tensors_and_state_dict_are_theirs_with_an_adapter(kind):
    plain = nn.Sequential(quantised(kind))
    kept, before, kind_before = plain[0].weight, plain.state_dict(), type(plain[0])
    fastlora.apply_lora(plain, LoRAConfig(target_modules=["0"]))
    assert isinstance(plain[0], kind_before)
    assert plain[0].weight is kept
    after = plain.state_dict()
    assert after.keys() - before.keys() == {"0.lora_A", "0.lora_B"}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name for name, p in plain.named_parameters() if p.requires_grad} == {
        "0.lora_A", "0.lora_B"
    }  # fmt: skip
    assert plain[0].lora_A.dtype == torch.float32
    fastlora.remove_lora(plain)
    assert type(plain[0]) is kind_before


def test_sixteen_bits_compute_and_x_keeps_its_dtype():
    model, x = adapted("nf4", torch.bfloat16), torch.randn(3, 64)
    layer, y = model[0], model[0](x)
    assert y.dtype == torch.float32
    expected = layer.merged_weight(torch.float32) @ x.T
    torch.testing.assert_close(y, expected.T + layer.bias, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(kind, copied):
    model, x = adapted(kind), torch.randn(3, 64)
    assert torch.equal(copied(model)(x), model(x))


def test_files_of_adapters_and_of_the_model(tmp_path):
    model, other, x = adapted("nf4"), adapted("nf4"), torch.randn(3, 64)
    fastlora.save_adapter(model, tmp_path)
    for mine, its in zip(other, model, strict=True):
        mine.weight, mine.quant_state, mine.bias = its.weight, its.quant_state, its.bias
    fastlora.load_adapter(fastlora.remove_lora(other), tmp_path)
    assert torch.equal(other(x), model(x))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert found.keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_quantised_again_and_the_way_back_is_exact(kind):
    model, x = adapted(kind), torch.randn(3, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    y = model(x)
    with pytest.warns(UserWarning, match=r"2 merged weights were quantised again.* up to 0\.\d+"):
        fastlora.merge_lora(model)
    assert isinstance(model[0], (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    with torch.no_grad():
        distance = (model.train()(x) - y).norm() / y.norm()
    assert 0 < distance < (0.05 if kind == "int8" else 0.4)
    assert kind == "int8" or model[0].quant_state is model[0].weight.quant_state
    fastlora.unmerge_lora(model)
    assert kind == "int8" or model[0].quant_state is model[0].weight.quant_state
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merged_into_plain_weights(kind):
    model, x = adapted(kind), torch.randn(3, 64)
    y = model(x)
    fastlora.merge_lora(model, requantise=False)
    torch.testing.assert_close(model.eval()(x), y)
    with pytest.raises(RuntimeError, match="its adapter would get no gradient"):
        model.train()(x)
    again = fastlora.remove_lora(copy.deepcopy(model.eval()))
    assert [type(layer) for layer in again] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(again(x), y)
    assert torch.equal(fastlora.unmerge_lora(model)(x), y)


@pytest.mark.parametrize(
    ("kind", "around"), [("nf4", torch.float32), ("nf4", None), ("int8", torch.bfloat16)], ids=str
)
def test_merged_into_plain_weights_where_16_bits_compute(kind, around):
    """Also where a call of bitsandbytes' own has cast the bias; the dtype is the model's around."""
    layer, dtype = quantised(kind, dtype=torch.bfloat16), around or torch.bfloat16
    x = torch.randn(3, 128, dtype=dtype)
    with torch.no_grad():
        layer.eval()(x)
    before = nn.Identity() if around is None else nn.LayerNorm(128, dtype=dtype)
    model = nn.Sequential(before, layer).eval()
    adapter = LoRAConfig(r=4, target_modules=["1"], init_lora_weights=False)
    y = fastlora.apply_lora(model, adapter)(x)
    fastlora.merge_lora(model, requantise=False)
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(model(x), y, atol=0.1, rtol=0.02)
    fastlora.remove_lora(model)
    torch.testing.assert_close(model(x), y, atol=0.1, rtol=0.02)


def test_a_merge_into_plain_weights_makes_no_float32_model():
    layers, size = [quantised("int8", 512, 4096) for _ in range(4)], 512 * 4096
    model = nn.Sequential(nn.Embedding(1, 8, dtype=torch.bfloat16), *layers)
    config = LoRAConfig(r=2, target_modules="all-linear")
    randomise(fastlora.apply_lora(model, config), 0.01)
    merge = lambda: fastlora.merge_lora(model, keep_base=False, requantise=False)  # noqa: E731
    before, peak, after = peak_bytes(model.parameters(), merge)
    assert after - before <= 4 * size  # two bytes a number for one
    assert peak - before <= (4 + 2) * size + 3 * 4 * 2**20  # one layer more, and blocks of rows


def test_a_merge_that_fails_leaves_everything(monkeypatch):
    model, x = adapted("nf4"), torch.randn(3, 64)
    y, put = model(x), merging.LoRAQuantised.use_merged

    def fail(layer, *arguments):
        if layer is model[1]:
            raise MemoryError
        return put(layer, *arguments)

    monkeypatch.setattr(merging.LoRAQuantised, "use_merged", fail)
    with pytest.raises(MemoryError):
        fastlora.merge_lora(model)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_merged_weight_that_packing_makes_infinite_is_refused(keep_base):
    model, x = adapted("int8"), torch.randn(3, 64)  # packed by way of float16
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


def test_what_cant_be_read_is_no_base_and_later_an_error():
    layer = quantised("int8", threshold=6.0)
    with pytest.raises(ValueError, match="its outlier threshold is 6"):
        fastlora.apply_lora(nn.Sequential(layer), LoRAConfig(target_modules=["0"]))
    model = adapted("nf4")
    assert "2 quantised: NF4" in str(fastlora.coverage(model))
    model[0].weight.quant_state.absmax = model[0].weight.quant_state.absmax[:-1]
    with pytest.raises(ValueError, match="can't be read: its quantisation state is broken"):
        model(torch.randn(3, 64))
    (eager,) = fastlora.coverage(model).eager
    assert "its quantisation state is broken" in eager.reason
