"""PEFT's and torch's own functions on an optimised model: they give, write and raise what they do
on PEFT's."""

import copy
import io
import pickle
from pathlib import Path

import peft
import pytest
import torch
from models import Mlp, tiny_llama
from peft.helpers import DoraCaching, rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import (
    KINDS,
    ROUNDING,
    VOCABULARY,
    adapted,
    assert_same,
    counted_calls,
    gradients,
    inputs,
    mlp,
    optimized,
    other_config,
    up,
    write_adapter,
)
from torch import nn

import fastlora

pytestmark = pytest.mark.usefixtures("one_thread")


# Each of these takes a PEFT model, does something with it, and returns what came out.


def disable(model):
    with model.disable_adapter():
        disabled = model(inputs())
    return disabled, model(inputs())


def enable_and_disable_layers(model):
    model.base_model.disable_adapter_layers()
    disabled = model(inputs())
    model.base_model.enable_adapter_layers()
    return disabled, model(inputs())


def add_set_delete(model):
    """A second adapter beside the first, in its place, both at once, and alone."""
    model.add_adapter("b", other_config(init_lora_weights="gaussian"))
    outputs = [model(inputs())]
    model.set_adapter("b")
    outputs += [model(inputs()), gradients(model)]
    model.base_model.set_adapter(["default", "b"])
    outputs += [model(inputs()), gradients(model)]
    model.delete_adapter("default")
    return [*outputs, model(inputs()), model.active_adapters, list(model.state_dict())]


def delete_the_last(model):
    model(inputs())
    model.delete_adapter("default")
    return up(model)(inputs())


def merge_and_unmerge(model):
    outputs = [model(inputs())]
    model.merge_adapter()
    outputs += [model(inputs()), up(model).base_layer.weight.clone()]
    model.unmerge_adapter()
    return [*outputs, model(inputs()), up(model).base_layer.weight]


def disable_while_merged(model):
    """PEFT unmerges in the forward of a disabled layer."""
    model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        disabled = model(inputs())
    return disabled, model(inputs()), up(model).merged_adapters


def weighted(model):
    """Adapters combined to a new one, by every kind that needs no random numbers."""
    model.add_adapter("b", other_config(r=4, init_lora_weights="gaussian"))
    outputs = []
    for kind in ("linear", "cat", "svd", "ties", "magnitude_prune"):
        model.add_weighted_adapter(
            ["default", "b"], [0.3, 0.7], adapter_name=kind, combination_type=kind, density=0.5
        )
        model.set_adapter(kind)
        outputs.append(model(inputs()))
    return outputs


def rescale(model):
    """Every way to change a scaling between calls."""
    layer = up(model)
    outputs = [model(inputs())]
    layer.set_scale("default", 3.0)
    outputs.append(model(inputs()))
    layer.scale_layer(0.5)
    outputs.append(model(inputs()))
    layer.unscale_layer(0.5)
    outputs.append(model(inputs()))
    layer.unscale_layer()
    with rescale_adapter_scale(model, 0.25):
        outputs.append(model(inputs()))
    return [*outputs, model(inputs())]


def read_and_set_state(model):
    state = peft.get_peft_model_state_dict(model)
    peft.set_peft_model_state_dict(model, {name: value * 2 for name, value in state.items()})
    status = model.get_model_status(), model.get_layer_status()
    return list(state), list(model.state_dict()), [repr(s) for s in status], model(inputs())


def convert(model):
    """Other dtypes, and back."""
    outputs = [model(inputs())]
    model.bfloat16()
    outputs.append(up(model)(inputs().bfloat16()).dtype)
    return [*outputs, model.double()(inputs())]


def freeze(model):
    """Each adapter's tensor alone, then none."""
    found = []
    for kept in ("lora_A", "lora_B", "base_layer.bias", "base_layer.weight"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kept in name)
        found.append(gradients(model))
    model.requires_grad_(False)
    return found, model(inputs()).requires_grad


def step_lora_plus(model):
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4)
    model(inputs()).sum().backward()
    optimizer.step()
    return model(inputs())


def step_lora_fa(model):
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=0.1)
    model(inputs()).sum().backward()
    optimizer.step()
    return model(inputs())


def copies_of(model):
    """Copies by all means, each used once; the original is used last."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        copy.copy(model),
        model,
    ]
    assert len({type(up(each)) for each in copies}) == 1
    return [gradients(each) for each in copies]


def functional_call(model):
    tensors = {name: value.detach() * 1.5 for name, value in model.state_dict().items()}
    return torch.func.functional_call(model, tensors, (inputs(),))


def change_in_place(model):
    """A layer's output is changed in place by what follows, and so is its input's source."""
    x = inputs().requires_grad_()
    y = up(model)(x * 1)
    y.mul_(2).relu_()
    y.sum().backward()
    return y, x.grad, up(model).lora_A["default"].weight.grad


def backward_twice(model):
    loss = model(inputs()).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return up(model).lora_A["default"].weight.grad


def gradient_penalty(model):
    """A gradient of a gradient."""
    x = inputs().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def jacobian(vectorize):
    def call(model):
        x = inputs()[0]
        return torch.autograd.functional.jacobian(model, x, vectorize=vectorize)

    return call


def tensor_hooks(model):
    seen = []
    weight = up(model).lora_A["default"].weight
    weight.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    model(inputs()).sum().backward()
    return seen


def hooks_on_the_layer(model):
    seen = []
    up(model).register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    up(model).register_forward_hook(lambda layer, args, y: seen.append(y) or y + 1)
    up(model).register_full_backward_hook(lambda layer, dx, dy: seen.extend([*dx, *dy]))
    return gradients(model), seen


def odd_inputs(model):
    """No rows, one row, no leading dimension, and strides of all kinds."""
    x = inputs()
    shapes = (x[:0], x[:, :0], x[:1, :1], x[0, 0], x.transpose(0, 1), x[:, :1].expand(3, 4, 8))
    outputs = [up(model)(each) for each in (*shapes, x[0, :, 0].expand(8, 5).T, x[0, :, ::1])]
    return outputs, [y.stride() for y in outputs], [y.is_contiguous() for y in outputs]


def load_again(model):
    """PeftModel.from_pretrained, load_adapter, and with empty tensors first."""
    before = model(inputs())
    folder = write_adapter(Path(model.folder), r=2)
    model.load_adapter(folder, "b")
    model.load_adapter(folder, "c", low_cpu_mem_usage=True)
    outputs = [before]
    for name in ("b", "c"):
        model.set_adapter(name)
        outputs.append(model(inputs()))
    return outputs


def hotswap(model):
    """Another adapter's values, with tensors for scalings and with padded ranks."""
    folder = write_adapter(Path(model.folder), r=6, lora_alpha=20)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert isinstance(up(model).scaling["default"], torch.Tensor)
    outputs = [model(inputs()), gradients(model)]
    hotswap_adapter(model, str(folder), "default")
    return [*outputs, model(inputs()), gradients(model)]


FUNCTIONS = {
    "disable": disable,
    "disable-layers": enable_and_disable_layers,
    "add-set-delete": add_set_delete,
    "delete-the-last": delete_the_last,
    "merge": merge_and_unmerge,
    "disable-while-merged": disable_while_merged,
    "add-weighted-adapter": weighted,
    "scale": rescale,
    "state": read_and_set_state,
    "dtypes": convert,
    "freeze": freeze,
    "lora-plus": step_lora_plus,
    "lora-fa": step_lora_fa,
    "copies": copies_of,
    "functional-call": functional_call,
    "in-place": change_in_place,
    "backward-twice": backward_twice,
    "gradient-penalty": gradient_penalty,
    "jacobian": jacobian(vectorize=False),
    "jacobian-vectorized": jacobian(vectorize=True),
    "tensor-hooks": tensor_hooks,
    "layer-hooks": hooks_on_the_layer,
    "odd-inputs": odd_inputs,
    "load": load_again,
    "hotswap": hotswap,
}
# PEFT doesn't do these with DoRA; odd-inputs has a test of its own.
NOT_WITH_DORA = {"add-weighted-adapter", "hotswap", "lora-fa", "odd-inputs"}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(k, n) for k in KINDS for n in FUNCTIONS if k == "lora" or n not in NOT_WITH_DORA],
)
def test_gives_what_it_gives_on_peft_s(kind, name, tmp_path):
    theirs = mlp(**KINDS[kind])
    ours = optimized(theirs)
    results = []
    for model, folder in ((theirs, "theirs"), (ours, "ours")):
        model.folder = tmp_path / folder
        torch.manual_seed(5)
        with counted_calls() as calls:
            results.append(FUNCTIONS[name](model))
        assert bool(calls) == (model is ours)
    assert_same(results[1], results[0], ROUNDING)


# Files, names and classes.


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_merge_and_unload_is_peft_s_bit_for_bit(settings):
    theirs = mlp(**settings)
    ours = optimized(theirs).merge_and_unload()
    theirs = theirs.merge_and_unload()
    assert repr(ours) == repr(theirs)
    assert_same(ours.state_dict(), theirs.state_dict(), 0.0)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_saved_files_are_peft_s_byte_for_byte(settings, tmp_path):
    theirs = mlp(target_modules="up|down", **settings)  # PEFT writes a list in any order
    ours = optimized(theirs)
    ours(inputs()).sum().backward()
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert "adapter_model.safetensors" in names
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_what_was_saved_loads_into_a_model_that_is_then_optimised(tmp_path):
    ours = optimized(mlp())
    ours.save_pretrained(tmp_path)
    fresh = Mlp().double()
    fresh.load_state_dict(ours.unload().state_dict())
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    expected = loaded(inputs())
    fastlora.optimize(loaded, strict=True)
    assert_same(loaded(inputs()), expected, ROUNDING)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_names_are_peft_s(settings):
    theirs = mlp(**settings)
    ours = optimized(theirs)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert vars(up(ours)).keys() == vars(up(theirs)).keys()
    assert isinstance(up(ours), lora.Linear)
    assert type(up(ours)).__name__ == type(up(theirs)).__name__


def test_restore_gives_back_the_very_class():
    model = mlp()
    classes = {name: type(module) for name, module in model.named_modules()}
    fastlora.optimize(model)
    assert type(up(model)) is not lora.Linear
    fastlora.restore(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_a_block_of_optimize_gives_back_the_very_class():
    model = mlp()
    with fastlora.optimize(model), counted_calls() as calls:
        model(inputs())
        assert len(calls) == 2
    assert type(up(model)) is lora.Linear
    with counted_calls() as calls:
        model(inputs())
    assert not calls


def test_a_copy_can_be_restored_alone():
    model = optimized(mlp())
    other = fastlora.restore(copy.deepcopy(model))
    assert type(up(other)) is lora.Linear
    assert type(up(model)) is not lora.Linear


def test_layers_that_peft_adds_later_are_told_and_taken_by_another_call():
    model = optimized(mlp())
    model.add_adapter("b", other_config(target_modules=["up", "head"]))
    model.set_adapter("b")
    report = {layer.name.split(".")[-1]: layer for layer in fastlora.coverage(model).layers}
    assert report["up"].fast
    assert "not optimised yet" in report["head"].reason
    assert all(layer.fast for layer in fastlora.optimize(model).layers)
    with counted_calls() as calls:
        model(inputs())
    assert {x.shape[-1] for x in calls} == {8}
    assert len(calls) == 2  # up and head; down has no adapter b


class Tripled(lora.Linear):
    """A user's layer."""

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


def test_a_forward_replaced_on_a_layer_is_left_alone():
    theirs = mlp()
    ours = optimized(theirs)
    for model in (theirs, ours):
        up(model).forward = lambda x: x.new_full((*x.shape[:-1], 12), 0.25)
    assert_same(ours(inputs()), theirs(inputs()), ROUNDING)
    report = {layer.name.split(".")[-1]: layer for layer in fastlora.coverage(ours).layers}
    assert "replaced" in report["up"].reason


def test_on_the_meta_device_shapes_are_peft_s():
    model = optimized(mlp()).to("meta")
    with counted_calls() as calls:
        y = model(inputs().to("meta"))
    assert (y.shape, y.device.type) == ((3, 5, 4), "meta")
    assert not calls


# DoRA's own.


def test_dora_caches_are_used_and_cleared_as_peft_s_are():
    """In evaluation a cached norm is used although B has changed; training clears it."""

    def call(model):
        outputs = []
        with DoraCaching():
            outputs += [model(inputs()), model(inputs())]
            with torch.no_grad():
                up(model).lora_B["default"].weight.mul_(2)
            outputs += [model(inputs()), model.train()(inputs()), model.eval()(inputs())]
        return [*outputs, model(inputs())]

    theirs = mlp(use_dora=True)
    ours = optimized(theirs)
    expected = call(theirs)
    with counted_calls() as calls:
        got = call(ours)
    assert len(calls) == 12
    assert not torch.equal(expected[2], expected[3])  # a stale norm differs from a fresh one
    assert_same(got, expected, ROUNDING)


def test_dora_of_one_vector_has_peft_s_shape():
    """PEFT's gain is [1, out], and so is its output for x [in]."""
    theirs = mlp(use_dora=True)
    assert_same(up(optimized(theirs))(inputs()[0, 0]), up(theirs)(inputs()[0, 0]), ROUNDING)


def test_dora_drops_in_a_training_layer_only():
    """Dropout switched on alone (Monte Carlo dropout) does nothing in PEFT's DoRA layer."""
    theirs = mlp(use_dora=True, lora_dropout=0.5)
    ours = optimized(theirs)
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
    assert_same(ours(inputs()), theirs(inputs()), ROUNDING)


# Inputs and states that PEFT refuses.


def under_autocast(x):
    def call(model):
        with torch.autocast("cpu", torch.bfloat16):
            return up(model)(x)

    return call


def without_lora_b(model):
    del up(model).lora_B["default"]
    return up(model)(inputs())


REFUSED = {
    "other-dtype": lambda model: up(model)(inputs().float()),
    "whole-numbers": lambda model: up(model)(torch.ones(2, 8, dtype=torch.long)),
    "other-device": lambda model: up(model)(inputs().to("meta")),
    "features": lambda model: up(model)(inputs()[..., :7]),
    "scalar": lambda model: up(model)(inputs()[0, 0, 0]),
    "no-tensor": lambda model: up(model)([1.0] * 8),
    "none": lambda model: up(model)(None),
    "no-input": lambda model: up(model)(),
    "argument": lambda model: up(model)(inputs(), 1),
    "keyword": lambda model: up(model)(inputs(), scale=1),
    "autocast-whole-numbers": under_autocast(torch.ones(2, 8, dtype=torch.long)),
    "autocast-other-dtype": under_autocast(torch.ones(2, 8)),
    "autocast-complex": under_autocast(torch.ones(2, 8, dtype=torch.complex64)),
    "no-lora_B": without_lora_b,
    "adapter-names-in-training": lambda model: model.train()(inputs(), adapter_names=["a"] * 3),
    "adapter-names-too-few": lambda model: model(inputs(), adapter_names=["default"]),
    "unknown-adapter": lambda model: model.set_adapter("b"),
    "taken-adapter": lambda model: model.add_adapter("default", other_config(use_dora=True)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_peft_refuses_with_the_same_error(name):
    theirs = mlp()
    ours = optimized(theirs)
    errors = []
    for model in (theirs, ours):
        try:
            REFUSED[name](model)
        except Exception as error:
            errors.append(type(error))
    assert len(errors) == 2
    assert errors[0] is errors[1]


def test_the_input_of_a_saved_call_must_not_change_before_backward():
    """As in PEFT's: an error, not a wrong gradient."""
    for model in (theirs := mlp(), optimized(theirs)):
        x = inputs()
        y = up(model)(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# Text generation, and compiled models whose adapter is swapped.


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_generates_peft_s_tokens_with_a_cache(settings):
    theirs = adapted(
        tiny_llama(), target_modules="all-linear", r=8, task_type="CAUSAL_LM", **settings
    )
    ours = optimized(theirs)
    ids = torch.randint(3, VOCABULARY, (2, 7))
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    options |= {"use_cache": True, "pad_token_id": 0}
    expected = theirs.generate(input_ids=ids, **options)
    with counted_calls() as calls:
        got = ours.generate(input_ids=ids, **options)
    assert torch.equal(got, expected)
    assert got.shape == (2, 27)
    assert len(calls) == 20 * 14  # a call for the prompt and one for each token but the last
    assert {x.shape[1] for x in calls} == {7, 1}
    with theirs.disable_adapter():
        assert not torch.equal(theirs.generate(input_ids=ids, **options), expected)


def test_an_adapter_is_swapped_in_a_compiled_model_without_compiling_again(tmp_path):
    folder = write_adapter(tmp_path, r=6, lora_alpha=20)
    theirs = mlp()
    ours = optimized(theirs)
    for model in (theirs, ours):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_same(compiled(inputs()), theirs(inputs()), ROUNDING)
    for model in (theirs, ours):
        hotswap_adapter(model, str(folder), "default")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(compiled(inputs()), theirs(inputs()), ROUNDING)
