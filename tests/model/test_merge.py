"""Merging: a float32 sum rounded once, an exact unmerge, and no partial merge.

It needs memory for one layer besides the model, and for the originals if they are kept.
"""

import pytest
import torch
from judge import peak_bytes
from models import Mlp, Tied, adapt, assert_untouched, randomize, refused, snapshot
from peft_models import BATCH, gpt2
from torch import nn

import fastlora
from fastlora import LoRAConfig, blocks
from fastlora.layers.linear import LoRALinear


def adapted_mlp(dtype: torch.dtype = torch.float32):
    return adapt(Mlp().to(dtype), r=3, target_modules=["up", "down"]).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merged_weight_is_the_exact_sum_rounded_once(dtype):
    model = adapted_mlp(dtype)
    layer = model.up
    exact = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # it doesn't round the sum
        fastlora.merge_lora(model)
    assert layer.weight.dtype == dtype
    ulp = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-2)
    slack = 1e-14 if dtype == torch.float64 else 1e-6  # the error of the wide sum itself
    assert ((layer.weight.double() - exact).abs() <= 0.5 * ulp + slack).all()


def test_conv1ds_are_merged_by_blocks_of_rows_and_back(monkeypatch):
    monkeypatch.setattr(blocks, "rows_at_a_time", lambda _: 7)
    # A Conv1D's weight is [in, out].
    model = adapt(gpt2().eval(), 0.1, r=4, target_modules="all-linear")
    before, y = snapshot(model), model(BATCH).logits
    fastlora.merge_lora(model)
    torch.testing.assert_close(model(BATCH).logits, y, rtol=1e-4, atol=1e-5)
    assert str(fastlora.coverage(model)) == "8 of 8 layers fast (8 merged)"
    fastlora.unmerge_lora(model)
    assert_untouched(model, before)
    assert torch.equal(model(BATCH).logits, y)


@pytest.mark.parametrize("call", [fastlora.merge_lora, fastlora.remove_lora])
def test_a_parametrized_weight_is_refused(call):
    model = adapted_mlp()
    torch.nn.utils.parametrize.register_parametrization(model.down, "weight", torch.nn.Identity())
    with refused(model, "down can't be merged or removed: its weight is computed"):
        call(model)


BROKEN = {  # what the second layer has in the place of a part, and the error message
    "lora_A on meta": ((3, 12), "its lora_A is on meta, but the weight is on cpu"),
    "lora_B on meta": ((8, 3), "its lora_B is on meta"),
    "lora_A of None": (None, r"its lora_A is None, but must be a tensor \[3, 12\]"),
    "lora_A of another shape": ((3, 1), r"its lora_A has shape \(3, 1\), but must be \[3, 12\]"),
    "weight on meta": ((8, 12), "its weight is on meta"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_adapter_that_its_weight_cannot_take_is_refused(case):
    """If the second layer's adapter is refused, the first layer isn't merged either."""
    model, (shape, message) = adapted_mlp(), BROKEN[case]
    device = "meta" if "meta" in case else "cpu"
    part = None if shape is None else nn.Parameter(torch.ones(shape, device=device))
    setattr(model.down, case.split()[0], part)
    own = {key: (id(value), value._version) for key, value in model.named_parameters()}
    with pytest.raises(ValueError, match=f"^down can't be merged: {message}"):
        fastlora.merge_lora(model)
    assert own == {key: (id(value), value._version) for key, value in model.named_parameters()}
    assert not any(layer.merged for layer in (model.up, model.down))


def test_a_merged_layer_is_one_product(monkeypatch):
    model = fastlora.merge_lora(adapted_mlp())
    monkeypatch.setattr(
        "fastlora.layers.adapted.call_recorded", lambda *_, **__: pytest.fail("the adapter ran")
    )
    model(torch.randn(2, 8))


def test_merging_twice_and_unmerging_what_is_not_merged():
    """The adapter may change in between."""
    model = adapted_mlp()
    base = model.up.weight.clone()
    with refused(model, "up is not merged"):
        fastlora.unmerge_lora(model)
    fastlora.merge_lora(model)
    with refused(model, "up is merged already"):
        fastlora.merge_lora(model)
    randomize(model)
    fastlora.unmerge_lora(model)
    assert torch.equal(model.up.weight, base)


def test_moving_while_merged_moves_the_base_too():
    model = adapted_mlp()
    fastlora.merge_lora(model).to(torch.float64)
    fastlora.unmerge_lora(model)
    assert model.up.weight.dtype == torch.float64
    model(torch.randn(2, 8, dtype=torch.float64))


def test_a_tied_weight_is_not_merged_into_the_embedding():
    model = adapt(Tied(), target_modules=["head"]).eval()
    embedding = model.embed.weight.clone()
    with pytest.warns(UserWarning, match="head were tied"):
        fastlora.merge_lora(model)
    assert torch.equal(model.embed.weight, embedding)
    assert not torch.equal(model.head.weight, embedding)
    fastlora.unmerge_lora(model)
    assert model.head.weight is model.embed.weight


def test_a_plain_model(tmp_path):
    for call in (fastlora.merge_lora, fastlora.unmerge_lora):
        with pytest.raises(ValueError, match="no LoRA layers"):
            call(Mlp())
    with pytest.raises(ValueError, match="no adapters to save"):
        fastlora.save_adapter(Mlp(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), torch.float32), (6e4, torch.float16)], ids=str
)
def test_non_finite_results_are_refused(value, dtype):
    model = adapted_mlp(dtype)
    with torch.no_grad():
        model.down.lora_B[:] = value  # the second layer: the first must not stay merged
    with pytest.raises(ValueError, match=f"merging down gives NaN or infinity in {dtype}"):
        fastlora.merge_lora(model)
    assert not model.up.merged
    assert not model.down.merged


def test_training_while_merged_is_an_error():
    model = fastlora.merge_lora(adapted_mlp()).train()
    with pytest.raises(RuntimeError, match="unmerge_lora"):
        model(torch.randn(2, 8))
    with torch.no_grad():
        model(torch.randn(2, 8))
    model.eval()(torch.randn(2, 8))


def test_loading_weights_while_merged_is_an_error(tmp_path):
    model = adapted_mlp()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fastlora.save_adapter(fastlora.merge_lora(model), tmp_path)
    with pytest.raises(RuntimeError, match="up is merged"):
        model.load_state_dict(state)
    with refused(model, "up is merged"):
        fastlora.load_adapter(model, tmp_path)
    fastlora.unmerge_lora(model)
    model.load_state_dict(state)


LAYERS, SIDE = 4, 1024  # a layer is larger than a block of rows in float32, which is 4 MiB


def large_model(dtype: torch.dtype = torch.bfloat16, side: int = SIDE) -> nn.Module:
    model = nn.Sequential(*[nn.Linear(side, 4 * side, bias=False) for _ in range(LAYERS)])
    config = LoRAConfig(r=2, target_modules="all-linear")
    return randomize(fastlora.apply_lora(model.to(dtype), config), 0.01)


BLOCKS = 3 * 4 * 2**20  # base and sum in float32, and the temporary of isfinite


@pytest.mark.parametrize("keep_base", [True, False], ids=["kept", "freed"])
def test_the_peak_is_one_layer_more(keep_base):
    model = large_model()
    layer = model[0].weight.nbytes
    before, peak, after = peak_bytes(
        model.parameters(), lambda: fastlora.merge_lora(model, keep_base=keep_base)
    )
    kept = LAYERS * layer if keep_base else 0
    assert after - before == kept
    if not keep_base:
        with refused(model, "keep_base=False"):
            fastlora.unmerge_lora(model)
    assert peak - before <= max(kept, layer) + layer * (not keep_base) * 0.1 + BLOCKS


@pytest.mark.parametrize("call", [1, LAYERS, LAYERS + 1, 2 * LAYERS])
def test_an_interruption_changes_nothing(monkeypatch, call):
    """For example out of memory or Ctrl-C, at any layer of either pass."""
    model, calls, real = large_model(side=64), [], LoRALinear.merged_weight
    before = snapshot(model)

    def interrupted(layer, *around):
        calls.append(layer)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(layer, *around)

    monkeypatch.setattr(LoRALinear, "merged_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastlora.merge_lora(model)
    assert_untouched(model, before)
    monkeypatch.undo()
    fastlora.merge_lora(model)
