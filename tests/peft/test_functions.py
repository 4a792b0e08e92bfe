"""PEFT's and torch's own functions on an optimized model.

They return, write and raise the same as on PEFT's model.  torch's transforms and tracers also work,
and files, names and classes stay PEFT's.
"""

from pathlib import Path

import peft
import pytest
import torch
from peft.tuners import lora
from peft_models import (
    KINDS,
    ROUNDING,
    assert_runs_the_same,
    assert_same,
    inputs,
    mlp,
    optimized,
    other_config,
    run_both,
    up,
    write_adapter,
)
from torch._dynamo import config as dynamo_config
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.layers.guards import _PLACE

# Each function takes a PEFT model, does something with it, and returns all results.


def disable_while_merged(model):
    """PEFT unmerges in the forward of a disabled layer."""
    model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        disabled = model(inputs())
    return disabled, model(inputs()), up(model).merged_adapters


def add_weighted_adapter(model):
    """Combine adapters into a new one, by every method that needs no random numbers."""
    model.add_adapter("b", other_config(r=4, init_lora_weights="gaussian"))
    outputs = []
    for kind in ("linear", "cat", "svd", "ties", "magnitude_prune"):
        model.add_weighted_adapter(
            ["default", "b"], [0.3, 0.7], adapter_name=kind, combination_type=kind, density=0.5
        )
        model.set_adapter(kind)
        outputs.append(model(inputs()))
    return outputs


def read_and_set_state(model):
    state = peft.get_peft_model_state_dict(model)
    peft.set_peft_model_state_dict(model, {name: value * 2 for name, value in state.items()})
    status = model.get_model_status(), model.get_layer_status()
    return list(state), list(model.state_dict()), [repr(s) for s in status], model(inputs())


def change_in_place(model):
    """Later operations change a layer's output in place; its input is an intermediate tensor."""
    x = inputs().requires_grad_()
    y = up(model)(x * 1)
    y.mul_(2).relu_()
    y.sum().backward()
    return y, x.grad, up(model).lora_A["default"].weight.grad


def gradient_penalty(model):
    x = inputs().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def jacobian(model):
    return torch.autograd.functional.jacobian(model, inputs()[0], vectorize=True)


def odd_inputs(model):
    """No rows, one row, no leading dimension, and strides of all kinds."""
    x = inputs()
    shapes = (x[:0], x[:, :0], x[:1, :1], x[0, 0], x.transpose(0, 1), x[:, :1].expand(3, 4, 8))
    outputs = [up(model)(each) for each in (*shapes, x[0, :, 0].expand(8, 5).T, x[0, :, ::1])]
    return outputs, [y.stride() for y in outputs], [y.is_contiguous() for y in outputs]


def load_again(model):
    """PeftModel.from_pretrained, load_adapter, and load_adapter with empty tensors first."""
    before = model(inputs())
    folder = write_adapter(Path(model.folder), r=2)
    model.load_adapter(folder, "b")
    model.load_adapter(folder, "c", low_cpu_mem_usage=True)
    outputs = [before]
    for name in ("b", "c"):
        model.set_adapter(name)
        outputs.append(model(inputs()))
    return outputs


FUNCTIONS = [
    disable_while_merged, add_weighted_adapter, read_and_set_state, change_in_place,
    gradient_penalty, jacobian, odd_inputs, load_again,
]  # fmt: skip
# PEFT doesn't support these with DoRA; odd_inputs has its own test for DoRA.
NOT_WITH_DORA = {add_weighted_adapter, odd_inputs}


@pytest.mark.parametrize(
    ("kind", "run"),
    [(k, f) for k in KINDS for f in FUNCTIONS if k == "lora" or f not in NOT_WITH_DORA],
)
def test_functions_give_the_same_as_on_peft_s_model(kind, run, tmp_path):
    theirs = mlp(**KINDS[kind])
    theirs.folder = tmp_path
    got, expected, calls = run_both(run, theirs)
    assert calls
    assert_same(got, expected, ROUNDING)


kinds = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


@kinds
def test_names_files_and_merged_models_are_peft_s(settings, tmp_path):
    theirs = mlp(target_modules="up|down", **settings)  # PEFT writes lists in random order
    ours = optimized(theirs)
    ours(inputs()).sum().backward()
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert vars(up(ours)).keys() - {_PLACE} == vars(up(theirs)).keys()
    assert isinstance(up(ours), lora.Linear)
    assert type(up(ours)).__name__ == type(up(theirs)).__name__
    files = []
    for number, model in enumerate((ours, theirs)):
        model.save_pretrained(tmp_path / f"{number}")
        files.append({p.name: p.read_bytes() for p in (tmp_path / f"{number}").iterdir()})
    assert "adapter_model.safetensors" in files[0]
    assert files[0] == files[1]
    ours, theirs = ours.merge_and_unload(), theirs.merge_and_unload()
    assert repr(ours) == repr(theirs)
    assert_same(ours.state_dict(), theirs.state_dict(), 0.0)


class Tripled(lora.Linear):
    """A layer class defined by a user."""

    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs) * 3


def test_a_user_s_layer_class_is_left_alone():
    theirs = mlp()
    up(theirs).__class__ = Tripled
    ours = optimized(theirs)
    assert type(up(ours)) is Tripled
    report = {layer.name.split(".")[-1]: layer for layer in fastlora.coverage(ours).layers}
    assert "Tripled" in report["up"].reason
    assert report["down"].fast
    assert_same(ours(inputs()), theirs(inputs()), ROUNDING)


def test_dora_caches_are_used_and_cleared_as_peft_s_are():
    """In evaluation, a cached norm is used even after B has changed; training clears the cache."""
    from peft.helpers import DoraCaching

    def call(model):
        outputs = []
        with DoraCaching():
            outputs += [model(inputs()), model(inputs())]
            with torch.no_grad():
                up(model).lora_B["default"].weight.mul_(2)
            outputs += [model(inputs()), model.train()(inputs()), model.eval()(inputs())]
        return [*outputs, model(inputs())]

    got = assert_runs_the_same(call, mlp(use_dora=True), fast=12, tolerance=ROUNDING)
    assert not torch.equal(got[2], got[3])  # a stale norm differs from a fresh one


def test_dora_of_one_vector_and_of_dropout_in_evaluation_is_peft_s():
    """PEFT's gain is [1, out], so x [in] gives an output of that shape.

    A dropout in training mode inside an evaluation-mode layer (Monte Carlo dropout) has no effect.
    """
    theirs = mlp(use_dora=True, lora_dropout=0.5)
    ours = optimized(theirs)
    for model in (theirs, ours):
        up(model).lora_dropout.train()
    for x in (inputs(), inputs()[0, 0]):
        assert_same(up(ours)(x), up(theirs)(x), ROUNDING)


@pytest.mark.usefixtures("fresh_compiler")
def test_checkpointed_in_a_compiled_whole_graph_it_needs_a_setting_of_torch_s():
    """PEFT's own layer also needs this setting."""
    layer, x = up(optimized(mlp(use_dora=True))), inputs().requires_grad_()
    run = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False).square().sum(),
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="nsafe side effect"):
        run(x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    with dynamo_config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        torch.testing.assert_close(torch.autograd.grad(run(x), x)[0], expected)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model):
    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    return loss


def per_sample_gradients(model):
    gradient = torch.func.grad(loss_of(model))
    return torch.func.vmap(gradient, in_dims=(None, 0))(trained(model), inputs())


def forward_mode(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(inputs(), inputs())))


def export(model):
    program = torch.export.export(model, (inputs(),))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return program.module()(inputs() * 2), names


def compiled(transform):
    """Compile a function that includes the transform."""

    def call(model):
        torch._dynamo.reset()
        function = torch.compile(lambda x: transform(model, x), backend="aot_eager")
        with torch.no_grad():  # only the transforms' own gradients are needed
            return function(inputs())

    return call


TRANSFORMS = {
    "grad": lambda model: torch.func.grad(loss_of(model))(trained(model), inputs()),
    "jvp": lambda model: torch.func.jvp(model, (inputs(),), (inputs(),)),
    "per-sample-gradients": per_sample_gradients,
    "forward-mode": forward_mode,
    "jit.trace": lambda model: torch.jit.trace(model, inputs())(inputs() * 2),
    "export": export,
    "make_fx": lambda model: make_fx(model)(inputs())(inputs() * 2),
    "compiled-inside": compiled(lambda model, x: torch.func.vmap(torch.func.jacrev(model))(x[0])),
}
ROWS = [(name, kind) for name in TRANSFORMS for kind in KINDS]
ROWS.remove(("compiled-inside", "dora"))  # takes seconds, and tests nothing more than lora does


@pytest.mark.parametrize(("name", "kind"), ROWS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_give_the_same_as_on_peft_s_model(name, kind):
    theirs = mlp(**KINDS[kind])
    ours = optimized(theirs)
    assert_same(TRANSFORMS[name](ours), TRANSFORMS[name](theirs), ROUNDING)
