"""PEFT's LoRA on the experts of transformers' models, with fastlora and without.

Experts that differ slightly from transformers' have other numbers, so they run PEFT's forward.
"""

import copy
from functools import partial

import peft
import pytest
import torch
from models import randomize
from moe_models import IDS, MODELS, base_model, experts_of, logits, parameters_of, train
from packed import NEEDS_5
from packed_experts import packed_model
from peft.tuners.lora import layer as peft_layer
from peft_models import adapted, assert_runs_the_same, counted_calls, optimized, run_both
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

import fastlora
from fastlora.peft import experts as fast_experts

moe = pytest.importorskip("transformers.integrations.moe", reason=NEEDS_5)
Qwen3MoeExperts = modeling_qwen3_moe.Qwen3MoeExperts

_TARGETS = ("target_modules", "target_parameters")


def model_of(name: str = "qwen3", implementation: str = "eager", **settings) -> nn.Module:
    targets = {"target_modules": ["q_proj"], "target_parameters": parameters_of(name)}
    return adapted(base_model(name, implementation), **targets | settings)


def fast_calls(model: nn.Module, run=train) -> int:
    """The number of fast calls; a call of experts counts twice, a linear layer once."""
    with counted_calls() as calls:
        run(model)
    return len(calls)


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_peft_s(name):
    theirs = model_of(name).double()
    ours = optimized(theirs)
    fast = sum(layer.fast for layer in fastlora.coverage(ours).layers)
    assert fast == len(fastlora.coverage(ours).layers)
    # NemotronH computes its routing in float32
    tolerance = 1e-6 if name == "nemotron" else 1e-11
    assert_runs_the_same(train, theirs, ours, fast=fast, tolerance=tolerance)


def test_wrappers_of_a_peft_that_swaps_no_features_are_fast():
    theirs = model_of("gpt-oss").double()
    ours = optimized(theirs)
    for module in ours.modules():
        vars(module).pop("_did_swap_in_out_features", None)  # PEFT 0.18 has no such attribute
    assert all(layer.fast for layer in fastlora.coverage(ours).layers)
    assert_runs_the_same(train, theirs, ours, fast=6, tolerance=1e-11)


def add_another(model):
    targets = {k: getattr(model.peft_config["default"], k) for k in _TARGETS}
    model.add_adapter("other", peft.LoraConfig(r=2, **targets))
    model.base_model.set_adapter(["default", "other"])


def of_the_experts(change):
    return lambda model: change(experts_of(model).get_base_layer())


CHANGES = {
    "merge": lambda model: model.merge_adapter(),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "add_another": add_another,
    "hook-experts": of_the_experts(lambda one: one.register_forward_hook(lambda *_: None)),
    "hook-lora_A": lambda m: experts_of(m).lora_A["default"].register_forward_hook(lambda *_: None),
    "forward": of_the_experts(lambda one: setattr(one, "forward", partial(type(one).forward, one))),
    "gate": of_the_experts(lambda one: setattr(one, "_apply_gate", lambda x: x.chunk(2, -1)[1])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_switch_to_peft_s_forward(change):
    """The next call notices a change of the model, and the report names the reason."""
    theirs = model_of().double()
    ours = optimized(theirs)
    before = fast_calls(ours, lambda model: model(input_ids=IDS))
    for model in (theirs, ours):
        CHANGES[change](model)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    assert fast_calls(ours, lambda model: model(input_ids=IDS)) < before
    if change not in ("merge", "disable"):
        report = fastlora.coverage(ours)
        reasons = [layer.reason for layer in report.not_fast if "experts" in layer.name]
        assert len(reasons) >= 2
        assert all(reasons)


def test_one_adapted_parameter():
    theirs = model_of(target_parameters=["experts.down_proj"]).double()
    assert_runs_the_same(train, theirs, fast=4, tolerance=1e-11)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_autocast(implementation):
    """Under autocast, the eager implementation casts to bfloat16; grouped_mm stays in float32."""
    theirs = model_of("gpt-oss", implementation)
    exact = copy.deepcopy(theirs)
    exact.get_base_model().set_experts_implementation("eager")

    def run(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return train(model)

    got, expected, calls = run_both(run, theirs)
    assert len(calls) == 6
    for ours, their, truth in zip(got, expected, train(exact.double()), strict=True):
        assert ours.dtype == their.dtype
        assert (ours - truth).norm() < 2.5 * (their - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_check_judges_experts(monkeypatch, dtype, implementation):
    model = model_of(implementation=implementation).to(dtype).train()
    batch = {"input_ids": IDS, "labels": IDS}
    found = fastlora.check(model, batch)
    assert found, str(found)
    count = sum(layer.fast for layer in found.coverage.layers)
    assert f"{count} of {count} fast layers judged, all right" in str(found)
    run = fast_experts.run_experts

    def wrong(*arguments):
        return run(*arguments) * 1.02

    monkeypatch.setattr(fast_experts, "run_experts", wrong)
    wrong_ones = [layer.name for layer in fastlora.check(model, batch).layers if not layer]
    assert wrong_ones
    assert all("experts" in name for name in wrong_ones)


# Experts of own classes.

HIDDEN, INNER, EXPERTS, TOP = 16, 12, 5, 2


class Scaled(Qwen3MoeExperts):
    """Its gate has a trainable parameter."""

    def __init__(self, config):
        super().__init__(config)
        self.alpha = nn.Parameter(torch.ones(1))

    def _apply_gate(self, pre: Tensor) -> Tensor:
        gate, up = pre.chunk(2, -1)
        return torch.sigmoid(gate * self.alpha) * up


class Ignored(Qwen3MoeExperts):
    """Its forward doesn't call its ``_apply_gate``."""

    def _apply_gate(self, pre: Tensor) -> Tensor:
        gate, up = pre.chunk(2, -1)
        return torch.tanh(gate) * up


@moe.use_experts_implementation
class Before(Qwen3MoeExperts):
    """Its forward doubles the input of the first product."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return Qwen3MoeExperts.forward(self, 2 * x, index, weights)


class Layer(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def layer_of(kind: type[nn.Module] = Qwen3MoeExperts, implementation: str = "eager") -> nn.Module:
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "intermediate_size": INNER}
    sizes |= {"num_experts": EXPERTS, "num_local_experts": EXPERTS}
    config = Qwen3MoeConfig(**sizes, hidden_act="silu", swiglu_alpha=1.7, swiglu_limit=7.0)
    config._experts_implementation = implementation
    layer = Layer(kind(config))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft.get_peft_model(layer, peft.LoraConfig(r=3, target_parameters=targets)).double()
    randomize(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.endswith("alpha"))
    return model


def routing(tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights, index = torch.randn(tokens, EXPERTS, dtype=torch.float64).softmax(-1).topk(TOP)
    return x, index, weights


def results(model: nn.Module, call: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(3)
    out = model(*call)
    wanted = [call[0], *[p for p in model.parameters() if p.requires_grad]]
    return [out, *torch.autograd.grad(out.square().sum(), wanted)]


def assert_peft_s(model: nn.Module, reason: str) -> None:
    ours, call = copy.deepcopy(model), routing()
    report = fastlora.coverage(fastlora.optimize(ours))
    assert {layer.reason for layer in report.not_fast} == {reason}
    for found, expected in zip(results(ours, call), results(model, call), strict=True):
        assert torch.equal(found, expected)


UNKNOWN = "its gate or activation is unknown to fastlora, or is hooked or patched"
FOREIGN = "its forward, or its experts implementation, isn't one of transformers' own"


@pytest.mark.parametrize(
    ("kind", "implementation", "reason"),
    [(Scaled, "batched_mm", UNKNOWN), (Ignored, "eager", UNKNOWN), (Before, "eager", FOREIGN)],
)
def test_another_gate_or_forward(kind, implementation, reason):
    assert_peft_s(layer_of(kind, implementation), reason)


def test_a_replaced_gate_of_the_class(monkeypatch):
    plain = Qwen3MoeExperts._apply_gate
    monkeypatch.setattr(Qwen3MoeExperts, "_apply_gate", lambda self, pre: 3 * plain(self, pre))
    assert_peft_s(layer_of(implementation="batched_mm"), UNKNOWN)


def test_a_gate_of_transformers_that_its_forward_does_not_call(monkeypatch):
    monkeypatch.setattr(Ignored._apply_gate, "__module__", "transformers.models.some")
    assert_peft_s(layer_of(Ignored), UNKNOWN)


@pytest.mark.parametrize("act", [nn.RReLU(), nn.PReLU().double()])
def test_another_activation(act):
    model = layer_of()
    model.base_model.model.experts.get_base_layer().act_fn = act.train()
    assert_peft_s(model, UNKNOWN)


@pytest.mark.parametrize("act", [nn.Tanh(), nn.LeakyReLU()])
def test_an_activation_without_a_name_here(act):
    model = layer_of()
    model.base_model.model.experts.get_base_layer().act_fn = act
    ours, call = copy.deepcopy(model), routing()
    assert not fastlora.coverage(fastlora.optimize(ours)).not_fast
    with counted_calls() as calls:
        found = results(ours, call)
    assert len(calls) == 2  # its two products
    for mine, expected in zip(found, results(model, call), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_module_of_another_transformers():
    model = layer_of()
    del model.base_model.model.experts.get_base_layer()._is_expert_parallel
    (reason,) = {layer.reason for layer in fastlora.coverage(fastlora.optimize(model)).not_fast}
    assert reason == "experts of this version of transformers are not among the tested ones"


def test_a_number_of_no_expert_is_peft_s_error():
    x, index, weights = routing()
    index[2, 1] = EXPERTS + 1
    model = layer_of()
    fastlora.optimize(model)
    with pytest.raises(RuntimeError, match="Class values must be"):
        model(x, index, weights)


def test_an_adapter_that_doesn_t_fit():
    model, shape = layer_of(), (HIDDEN, 2 * EXPERTS)
    experts = model.base_model.model.experts
    experts.lora_B["default"].weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    first, *_ = fastlora.coverage(fastlora.optimize(model)).not_fast
    name = experts.parameter_name
    assert first.reason == f"its {name}: its lora_B has shape {shape}, not (16, 15)"
    with pytest.raises(RuntimeError, match=r"Expected size|must match"):
        model(*routing())


def test_a_bias_that_is_broadcast():
    model = layer_of(GptOssExperts)
    experts = model.base_model.model.experts.get_base_layer()
    experts.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, 1, dtype=torch.float64))
    assert_peft_s(model, f"its down_proj: its bias has shape ({EXPERTS}, 1)")


def test_a_watched_sum_of_weight_and_adapter(monkeypatch):
    proxy = getattr(peft_layer, "_LoraFactorsProxy", peft_layer._LoraParameterProxy)
    plain = proxy.forward
    monkeypatch.setattr(proxy, "forward", lambda self, weight: plain(self, weight) + 1)
    reason = "something watches, or replaces, how PEFT adds an adapter to experts' weights"
    assert_peft_s(layer_of(), reason)


@pytest.mark.parametrize("format", ["nf4", "mxfp4"])
def test_packed_experts_that_are_merged_and_disabled_give_the_base(format):
    model = packed_model("qwen3", format)
    base = logits(model)
    config = peft.LoraConfig(target_modules=[], target_parameters=parameters_of("qwen3"))
    model = randomize(fastlora.get_peft_model(model, config))
    adapted_model = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)
    torch.testing.assert_close(logits(model), adapted_model)
    assert not torch.allclose(adapted_model, base, rtol=0.01)
