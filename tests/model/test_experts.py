"""Adapters on the experts and routers of own models: PEFT's numbers and files, merging, calls."""

import copy
import json
import warnings

import peft
import pytest
import torch
from models import assert_untouched, randomize, refused, snapshot
from moe_models import IDS, base_model, experts_of, logits, parameters_of, train
from packed import NEEDS_5
from peft_models import counted_calls
from torch import nn

import fastlora
from fastlora import LoRAConfig
from fastlora.model.files import CONFIG

moe = pytest.importorskip("transformers.integrations.moe", reason=NEEDS_5)
# PEFT 0.21 warns about patterns for target_parameters, although it uses them.
IGNORED = "ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning"
pytestmark = pytest.mark.filterwarnings(IGNORED)


def settings_of(name: str = "qwen3", **changes) -> dict:
    targets = {"target_modules": ["q_proj"], "target_parameters": parameters_of(name)}
    return {"r": 4, "lora_alpha": 6} | targets | changes


def own_model(name: str = "qwen3", implementation: str = "eager", **changes) -> nn.Module:
    torch.manual_seed(0)
    config = LoRAConfig(**settings_of(name, **changes))
    return randomize(fastlora.apply_lora(base_model(name, implementation), config), 0.1).eval()


def plain_model(name: str, like: nn.Module) -> nn.Module:
    """A model without adapters that has the same weights."""
    base = base_model(name).to(next(like.parameters()).dtype).eval()
    base.load_state_dict({k: v for k, v in like.state_dict().items() if "lora_" not in k})
    return base


def fast_calls(model: nn.Module) -> int:
    """The number of fast products of experts' weights that have adapters."""
    with counted_calls() as calls:
        logits(model)
    return len(calls)


def test_a_new_adapter_is_peft_s_identity():
    """Also, each parameter has PEFT's rank, alpha and scaling."""
    settings = settings_of(
        r=8, rank_pattern={"gate_up_proj": 2, r"layers\.1\.mlp\.experts\.down_proj": 3},
        alpha_pattern={"experts.down_proj": 5}, use_rslora=True,
    )  # fmt: skip
    base = base_model().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    before = logits(base)
    ours = fastlora.apply_lora(base, LoRAConfig(**settings))
    torch.testing.assert_close(logits(ours), before)
    for number in (0, 1):
        outer = experts_of(theirs.base_model.model.model.layers[number])
        own = ours.model.layers[number].mlp.experts
        for layer in (outer, outer.base_layer):
            mine = dict(own.adapted_weights())[layer.parameter_name]
            assert (mine.r, mine.lora_alpha) == (layer.r["default"], layer.lora_alpha["default"])
            assert mine.scaling == layer.scaling["default"]
            its = own.get_parameter(f"{layer.parameter_name}_lora_A")
            bound = 1 / its.shape[1] ** 0.5
            assert 0.9 * bound < its.abs().max() <= bound  # kaiming-uniform, as in PEFT
            assert own.get_parameter(f"{layer.parameter_name}_lora_B").count_nonzero() == 0
            assert its.shape == layer.lora_A["default"].weight.shape


def test_merging_and_removing():
    model = own_model("gpt-oss").bfloat16()
    before, expected, experts = snapshot(model), logits(model), experts_of(model)
    _, layer = next(iter(experts.adapted_weights()))
    thin, wide, scale = layer.adapter()
    exact = layer.weight.double() + scale * (wide.double() @ thin.double()).mT
    fastlora.merge_lora(model)
    assert torch.equal(experts.gate_up_proj, exact.float().bfloat16())
    assert (logits(model) - expected).norm() < 0.05 * expected.norm()
    assert {layer.plan for layer in fastlora.coverage(model).layers} == {"merged"}
    assert fast_calls(model) == 0
    with pytest.raises(RuntimeError, match="merged"):
        model.train()(input_ids=IDS)
    with pytest.raises(RuntimeError, match="gate_up_proj is merged: call"):
        model.load_state_dict(model.state_dict())
    fastlora.unmerge_lora(model.eval())
    assert_untouched(model, before)
    merged = logits(fastlora.merge_lora(model, keep_base=False))
    fastlora.remove_lora(model)
    assert torch.equal(logits(model), merged)
    assert [type(m) for m in model.modules()] == [type(m) for m in base_model("gpt-oss").modules()]
    assert not any("lora" in key for key in model.state_dict())


def test_checkpoints_of_the_base():
    model = own_model()
    plain = plain_model("qwen3", model)
    expected = logits(model)
    model.load_state_dict(plain.state_dict())
    other = randomize(own_model())
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(fastlora.remove_lora(model)), logits(plain))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_dropout_is_replayed(reentrant):
    """Both kinds of checkpointing give the same gradients as none, with the same masks."""
    model = own_model(lora_dropout=0.3, target_modules=None).double().train()
    model.enable_input_require_grads()
    torch.manual_seed(2)
    expected = train(copy.deepcopy(model))
    other = copy.deepcopy(model)
    if reentrant is not None:
        settings = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        other.gradient_checkpointing_enable(**settings)
    torch.manual_seed(2)
    for found, wanted in zip(train(other), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert expected[0] != train(model.eval())[0]


def test_the_report_names_the_backend_of_experts():
    model = own_model()
    with fastlora.use_backend("triton"):
        for dtype, plan in ((torch.float32, "triton"), (torch.float64, "torch")):
            layers = fastlora.coverage(model.to(dtype)).layers
            experts = [layer for layer in layers if "experts" in layer.name]
            assert {(layer.fast, layer.plan) for layer in experts} == {(True, plan)}
            assert all(layer.reason == "" for layer in experts) is (plan == "triton")


def test_an_expert_index_out_of_range_runs_the_module_s_own_forward():
    model = own_model("mixtral").double()
    experts, index = experts_of(model), torch.tensor([[0, 4], [1, 2]])
    x, weights = torch.randn(2, 32).double(), torch.rand(2, 2).double()
    with counted_calls() as calls, torch.no_grad():
        found = experts(x, index, weights)
        merged = experts_of(fastlora.merge_lora(model))(x, index, weights)
    assert not calls
    torch.testing.assert_close(found, merged)


def test_an_activation_with_a_hook_is_called():
    model, calls = own_model(), []
    expected = logits(model)
    experts_of(model).act_fn.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(logits(model), expected)
    assert len(calls) == 1


def test_another_implementation_gets_the_sums(monkeypatch):
    """A foreign implementation gets weight + scaling · lora_B lora_A; it can't have dropout."""
    model = own_model(lora_dropout=0.1).double()
    expected, called = train(copy.deepcopy(model)), []

    def elsewhere(self, *args):
        called.append(self)
        return moe.batched_mm_experts_forward(self, *args)

    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS, "elsewhere", elsewhere)
    model.config._experts_implementation = "elsewhere"
    before = snapshot(model)
    torch.testing.assert_close(train(copy.deepcopy(model)), expected)
    assert len(called) == 2
    (reason,) = {layer.reason for layer in fastlora.coverage(model).not_fast}
    assert reason == "its forward, or its experts implementation, isn't one of transformers' own"
    with pytest.raises(RuntimeError, match=f"can't have lora_dropout: {reason}"):
        model.train()(input_ids=IDS)
    assert_untouched(model.eval(), before)


def leave_one(experts):
    experts.down_proj = nn.Parameter(experts.down_proj[:1])
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[:1])


REFUSED = {  # targets of gpt-oss's or of qwen3's model, and the error message
    "gpt-oss gate_up_proj_bias": "gate_up_proj_bias is no weight of its experts",
    "gpt-oss self_attn.sinks": "as experts its forward isn't that of transformers'",
    "qwen3 norm.weight": "Qwen3MoeRMSNorm, no torch.nn.Linear. .*make the adapter with PEFT",
    "qwen3 experts.gate_up": "'experts.gate_up', which matches no parameter",
    "qwen3 experts.down_proj mlp.experts": "'mlp.experts', which matches no",
}
CHANGES = {  # changes of the experts, after which qwen3's can't have adapters
    "its forward was replaced on the instance": lambda one: setattr(one, "forward", print),
    "its weights are parametrized": lambda experts: nn.utils.parametrize.register_parametrization(
        experts, "down_proj", nn.Identity()
    ),
    "it has a 'lora_dropout' of its own": lambda one: setattr(one, "lora_dropout", 0.1),
    "it has only one expert": leave_one,
}


@pytest.mark.parametrize("case", REFUSED)
def test_parameters_that_are_no_expert_weights_are_refused(case):
    name, *targets = case.split()
    model = base_model(name)
    with refused(model, REFUSED[case]):
        fastlora.apply_lora(model, LoRAConfig(target_parameters=targets))


@pytest.mark.parametrize("message", CHANGES)
def test_experts_that_can_t_have_adapters(message):
    model = base_model()
    CHANGES[message](experts_of(model))
    with refused(model, message):
        fastlora.apply_lora(model, LoRAConfig(target_parameters=["experts.gate_up_proj"]))


def test_beside_all_linear_layers(tmp_path):
    """The file lists all names; saving warns that it omits dropout; no layer is passed over."""
    settings = {"target_modules": "all-linear", "lora_dropout": 0.1, "exclude_modules": r".*gate"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = own_model(**settings)
    with pytest.warns(UserWarning, match=r"lora_dropout 0 in place of 0\.1"):
        fastlora.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain_model("qwen3", ours), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    again = fastlora.load_adapter(plain_model("qwen3", ours), tmp_path)
    assert torch.equal(logits(again), logits(ours))


def test_files_of_a_peft_that_swapped_in_and_out_are_refused(tmp_path):
    ours = own_model()
    fastlora.save_adapter(ours, tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    for version in ("0.18.0", "0.19.0"):
        (tmp_path / CONFIG).write_text(json.dumps(values | {"peft_version": version}))
        for model in (base_model(), ours):
            with refused(model, rf"PEFT {version} saved .* from PEFT 0\.19\.1"):
                fastlora.load_adapter(model, tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(values | {"peft_version": "0.19.1"}))
    fastlora.load_adapter(base_model(), tmp_path)


def test_a_dropout_that_peft_can_t_have_beside_dense_layers_of_a_mixture(tmp_path):
    base = base_model(mlp_only_layers=[0, 1])
    config = LoRAConfig(target_modules=["up_proj"], lora_dropout=0.1)
    model = randomize(fastlora.apply_lora(base, config)).eval()
    with pytest.warns(UserWarning, match=r"lora_dropout 0 in place of 0\.1: PEFT"):
        fastlora.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["lora_dropout"] == 0
    assert fastlora.load_adapter(model, tmp_path).config is model.config
    assert model.model.layers[0].mlp.up_proj.lora_dropout == 0.1


def test_attention_alone_is_spelled_as_ever(tmp_path):
    config = LoRAConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    model = fastlora.apply_lora(base_model(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.save_adapter(model, tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["target_modules"] == ["q_proj", "v_proj"]
    assert values["target_parameters"] is None
    assert values["lora_dropout"] == 0.1


def test_all_linear_says_that_it_passed_over_experts():
    with pytest.warns(UserWarning, match="left out the parameters of experts and routers") as found:
        fastlora.apply_lora(base_model(), LoRAConfig(target_modules="all-linear"))
    (message,) = [str(one.message) for one in found if "left out" in str(one.message)]
    assert "model.layers.1.mlp.experts" in message
    assert "PEFT" in message
    assert found[0].filename == __file__


# Routers, which PEFT's "all-linear" adapts.

ROUTERS = {
    "qwen3": ("qwen3", "gate", torch.float32),
    "deepseek-bf16": ("deepseek", "gate", torch.bfloat16),
    # It has a bias, and PEFT's "all-linear" doesn't adapt it.
    "gpt-oss": ("gpt-oss", "router", torch.float32),
}


def plain(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return base_model(name).to(dtype).eval()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """The gradients of the routers' adapters, by their names."""
    model(input_ids=IDS, labels=IDS).loss.backward()
    named = {
        name.replace(".default.weight", "").removeprefix("base_model.model."): parameter.grad
        for name, parameter in model.named_parameters()
        if ".lora_" in name and "expert" not in name
    }
    return [named[name] for name in sorted(named)]


@pytest.mark.parametrize(("name", "router", "dtype"), ROUTERS.values(), ids=ROUTERS)
def test_peft_s_file_both_ways_and_merged(name, router, dtype, tmp_path):
    settings = {"r": 2, "target_modules": "all-linear"}
    if name == "gpt-oss":
        settings["target_parameters"] = ["router.weight"]
    theirs = randomize(peft.get_peft_model(plain(name, dtype), peft.LoraConfig(**settings))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastlora.load_adapter(plain(name, dtype), tmp_path / "theirs").eval()
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    y = theirs(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, y, **close)
    if dtype == torch.float32:
        for our, their in zip(gradients(ours), gradients(theirs), strict=True):
            torch.testing.assert_close(our, their, **close)
    fastlora.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(plain(name, dtype), tmp_path / "ours")
    torch.testing.assert_close(again(IDS).logits, y, **close)
    layer = ours.model.layers[0].mlp.get_submodule(router)
    before = layer.weight
    fastlora.merge_lora(ours)
    torch.testing.assert_close(ours(IDS).logits, y, **close)
    assert fastlora.unmerge_lora(ours).model.layers[0].mlp.get_submodule(router).weight is before
    fastlora.remove_lora(fastlora.merge_lora(ours))
    assert type(layer) is type(plain(name).model.layers[0].mlp.get_submodule(router))
    torch.testing.assert_close(ours(IDS).logits, y, **close)


def test_it_is_reported_as_a_router():
    model = own_model(target_parameters=["gate.weight"])
    assert len(model(IDS, output_router_logits=True).router_logits) == 2
    report = fastlora.coverage(model)
    gates = [f"model.layers.{i}.mlp.gate" for i in (0, 1)]
    assert [layer.name for layer in report.not_fast] == gates
    assert f"2 not fast: {', '.join(gates)}: a router's own" in str(report)
    with pytest.raises(RuntimeError, match="merged, so its adapter would get no gradient"):
        fastlora.merge_lora(model).train()(IDS)


def test_dropout_and_shared_batches_are_refused_for_routers(tmp_path):
    model = plain("qwen3")
    with refused(model, r"gate is a router \(Qwen3MoeTopKRouter\), whose adapter can't have drop"):
        fastlora.apply_lora(model, LoRAConfig(target_modules=["gate"], lora_dropout=0.1))
    batch = {"input_ids": IDS, "labels": IDS}
    configs = [{"target_modules": ["gate"], "learning_rate": 0.1}]
    with refused(model, "gate is a router, and trials can't share a batch"):
        fastlora.sweep(model, configs, [batch], eval_data=[batch], steps=1, output_dir=tmp_path)


def test_optimize_names_the_owner_of_a_parameter():
    config = peft.LoraConfig(target_modules=[], target_parameters=["gate.weight", "q_proj.weight"])
    report = str(fastlora.coverage(fastlora.optimize(peft.get_peft_model(plain("qwen3"), config))))
    assert "mlp.gate: it is on a router, to whose weight PEFT adds lora_B lora_A" in report
    assert "q_proj: it is on a matrix of a Linear, to whose weight" in report
