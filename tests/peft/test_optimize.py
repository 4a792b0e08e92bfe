"""optimize, restore and coverage on PEFT layers: the numbers, the report, and the way back."""

import pickle
from inspect import signature
from types import MethodType

import accelerate
import peft
import pytest
import torch
from models import Mlp, adapt, tiny_llama
from peft.tuners.lora.layer import Linear as PeftLinear
from peft_models import counted_calls, mlp
from process import run_forked
from torch import nn

import fastlora
from fastlora.peft.optimized import while_optimized


def adapted() -> peft.PeftModel:
    return mlp().float()


@pytest.fixture
def fast_calls():
    with counted_calls() as calls:
        yield calls


def test_the_report_before_and_after():
    model = adapted()
    before = fastlora.coverage(model)
    assert str(before) == (
        "0 of 2 layers fast\n2 in PEFT's forward: base_model.model.up, base_model.model.down: "
        "not optimized yet: fastlora.optimize(model) does it"
    )
    report = fastlora.coverage(fastlora.optimize(model))
    assert str(report) == str(fastlora.coverage(model)) == "2 of 2 layers fast (backend torch)"
    first = report.layers[0]
    assert (first.name, first.shape, first.adapter) == ("base_model.model.up", (12, 8), "default")
    assert (first.r, first.fast, first.plan) == (4, True, "torch")
    assert pickle.loads(pickle.dumps(report)) == report


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.conv = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 1)

    def forward(self, ids):
        return self.conv(self.mix(self.embed(ids)).transpose(1, 2))


def mixed() -> peft.PeftModel:
    return peft.get_peft_model(Mixed(), peft.LoraConfig(target_modules=["embed", "mix", "conv"]))


def test_layers_of_other_kinds_are_peft_s_and_say_so():
    report = fastlora.coverage(fastlora.optimize(mixed()))
    fast = {layer.name.split(".")[-1]: layer.fast for layer in report.layers}
    assert fast == {"embed": False, "mix": True, "conv": False}
    assert "1 of 3 layers fast, 32 % of the adapted parameters (backend torch)\n" in str(report)
    assert "embed: only PEFT's lora.Linear is sped up, not Embedding" in str(report)


def test_a_model_without_a_fast_layer_warns_with_the_reasons():
    model = peft.get_peft_model(Mixed(), peft.LoraConfig(target_modules=["embed"]))
    with pytest.warns(UserWarning, match=r"no layer runs fast: 0 of 1 .*(.|\n)*not Embedding"):
        assert fastlora.optimize(model) is model


def test_strict_raises_with_the_report_and_changes_nothing():
    model = mixed()
    message = r"1 of 3 layers fast(.|\n)*embed: only PEFT's lora.Linear"
    with pytest.raises(ValueError, match=message):
        fastlora.optimize(model, strict=True)
    assert type(model.base_model.model.mix) is PeftLinear
    assert fastlora.coverage(fastlora.optimize(adapted(), strict=True)).not_fast == ()


def test_optimizing_twice_and_restoring_without_are_no_ops():
    model = adapted()
    assert fastlora.restore(model) is model
    for each in (model, nn.DataParallel(model)):
        assert fastlora.optimize(each) is each
        assert str(fastlora.coverage(model)) == "2 of 2 layers fast (backend torch)"
    fastlora.restore(model)
    assert type(model.base_model.model.up) is PeftLinear


@pytest.mark.parametrize(
    ("switch", "blocks", "loss"), [("gated_mlps", 0, True), ("loss", 2, False)]
)
def test_a_switch_stays_on_until_an_argument_of_false(switch, blocks, loss):
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules="all-linear"))
    before = str(fastlora.coverage(fastlora.optimize(model, loss=True)))
    assert str(fastlora.coverage(fastlora.optimize(model))) == before
    report = fastlora.coverage(fastlora.optimize(model, **{switch: False}))
    assert sum(mlp.fast for mlp in report.gated_mlps) == blocks
    assert bool(report.loss) == loss


def test_while_optimized_undoes_only_its_own_call(fast_calls):
    model, x = adapted(), torch.randn(2, 8)
    fastlora.optimize(model.base_model.model.up)
    with while_optimized(model) as report:
        assert len(report.fast) == 2
        model(x)
        assert len(fast_calls) == 2
    model(x)
    assert len(fast_calls) == 3  # up was fast before
    assert type(model.base_model.model.down) is PeftLinear


IA3 = peft.IA3Config(target_modules=["up"], feedforward_modules=[])


def replaced() -> Mlp:
    model = Mlp()
    fastlora.replace_linears(model, ["up"], r=4, lora_alpha=8)
    return model


REFUSED = {
    "plain": (Mlp, ValueError, "no PEFT LoRA layers.*fastlora.get_peft_model"),
    "no-module": (lambda: 3, TypeError, "model is a int.*torch.nn.Module, such as trainer.model"),
    "ia3": (lambda: peft.get_peft_model(Mlp(), IA3), ValueError, "its adapters: IA3.*only LoRA"),
    "fastlora": (replaced, ValueError, "fastlora's own"),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_other_models_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        fastlora.optimize(make())


def test_a_saved_optimized_model_obeys_fastlora_disable(tmp_path):
    model = adapted().eval()
    fastlora.optimize(model)
    import peft.tuners.lora.gptq  # a layer of a quantized base; its class is made on first use

    packed = fastlora.peft.layer.fast_kinds()[peft.tuners.lora.gptq.GPTQLoraLinear]
    blank = packed.__new__(packed)
    torch.nn.Module.__init__(blank)
    torch.save((model, blank), tmp_path / "model.pt")
    code = """
import sys, torch
model, blank = torch.load(sys.argv[1], weights_only=False)
import fastlora; print(fastlora.coverage(model))
from fastlora.peft import layer; layer.fast_forward = None
try: print(model(torch.ones(1, 8)).shape)
except TypeError: print("fast", type(blank).__bases__[1].__module__)
"""
    outputs = {
        "1": ["0 of 2 layers fast", "torch.Size([1, 4])"],
        "": ["2 of 2 layers fast (backend torch)", "fast peft.tuners.lora.gptq"],
    }
    for disabled, expected in outputs.items():
        output = run_forked(code, tmp_path / "model.pt", FASTLORA_DISABLE=disabled)
        assert [line for line in output.splitlines() if "PEFT's forward:" not in line] == expected


FAST_KINDS = fastlora.peft.layer.fast_kinds()


@pytest.mark.parametrize("kind", FAST_KINDS, ids=lambda kind: kind.__qualname__)
def test_fast_classes_have_the_signatures_of_peft_s(kind):
    """diffusers looks for ``adapter_names`` in the signature of ``merge``."""
    for name in ("merge", "unmerge", "update_layer"):
        if hasattr(kind, name):
            found, expected = (
                [(p.name, p.kind, p.default) for p in signature(method).parameters.values()]
                for method in (getattr(FAST_KINDS[kind], name), getattr(kind, name))
            )
            assert found == expected, name


def test_accelerate_s_instance_forward_is_reached(fast_calls):
    """accelerate calls the forward it found, so optimize replaces that one; restore undoes it."""
    model, x = adapted(), torch.randn(2, 8)
    up = model.base_model.model.up
    accelerate.hooks.add_hook_to_module(up, accelerate.hooks.ModelHook())
    theirs = up(x)
    assert fastlora.coverage(fastlora.optimize(up)).fast
    torch.testing.assert_close(up(x), theirs)
    assert len(fast_calls) == 1
    accelerate.hooks.remove_hook_from_module(up)
    torch.testing.assert_close(up(x), theirs)
    assert len(fast_calls) == 2
    fastlora.restore(up)
    assert up.__dict__["forward"] == MethodType(PeftLinear.forward, up)
    up(x)
    assert len(fast_calls) == 2


def test_restore_reaches_a_layer_that_was_parametrized_since():
    layer = adapted().base_model.model.up
    fastlora.optimize(layer)
    layer.extra = nn.Parameter(torch.ones(2))
    nn.utils.parametrize.register_parametrization(layer, "extra", nn.Identity())
    fastlora.restore(layer)
    assert type(layer).__bases__ == (PeftLinear,)


def test_another_instance_forward_is_left_alone():
    layer = adapted().base_model.model.up
    layer.forward = lambda x: x
    report = str(fastlora.coverage(fastlora.optimize(layer)))
    assert "its forward was replaced on the instance" in report
    assert layer(3) == 3
    assert type(layer) is PeftLinear


def test_on_the_meta_device_it_is_eager_until_there_is_data(fast_calls):
    with torch.device("meta"):
        model = adapted()
    assert "is on the meta device" in str(fastlora.coverage(fastlora.optimize(model)))
    assert model(torch.empty(2, 8, device="meta")).shape == (2, 4)
    assert not fast_calls
    model.to_empty(device="cpu")
    model(torch.randn(2, 8))
    assert len(fast_calls) == 2
    assert model.to("meta")(torch.empty(2, 8, device="meta")).shape == (2, 4)
    assert len(fast_calls) == 2


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_train_reaches_every_part_that_is_in_another_mode(mode):
    model = adapt(tiny_llama(num_hidden_layers=1)).train(mode)
    assert fastlora.layers.classes.is_in_mode(model.base_model, mode)
    for part in [*model.modules()]:
        part.training = not mode  # as a user sets one part by hand
        assert model.train(mode) is model
        assert {each.training for each in model.modules()} == {mode}


def test_train_calls_a_part_s_own_train():
    model, modes = adapt(tiny_llama(num_hidden_layers=1)).train(), []

    class Kept(torch.nn.Linear):
        def train(self, mode=True):
            modes.append(mode)
            return self

    next(m for m in model.modules() if type(m) is torch.nn.Linear).__class__ = Kept
    model.train()
    assert modes == [True]
