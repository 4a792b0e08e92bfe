"""PEFT's and torch's own functions on an optimised model: they give, write and raise what they do
on PEFT's."""

import copy
import io
import pickle
from pathlib import Path

import numpy
import peft
import pytest
import torch
from models import Mlp, tiny_llama
from peft.helpers import DoraCaching, disable_input_dtype_casting, rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners import lora
from peft.tuners.lora import config as lora_config
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import VOCABULARY, adapted, assert_same, counted_calls, optimized
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

import fastlora


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small gain nothing from more, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# In float64, so that whatever is not rounding shows: sums of 12 terms, rounded at 1e-16 each.
ROUNDING = 1e-13


def mlp(**settings) -> peft.PeftModel:
    return adapted(Mlp(), **{"target_modules": ["up", "down"]} | settings).double()


def inputs() -> torch.Tensor:
    """[3, 5, 8], the same in every call."""
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def up(model: nn.Module) -> lora.Linear:
    return model.get_submodule("base_model.model.up")


def gradients(model: nn.Module, **named) -> dict[str, torch.Tensor]:
    """The gradients of x and of all that trains, from the same random state each time."""
    torch.manual_seed(3)
    x = inputs().requires_grad_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(x, **named).square().sum()
    return dict(
        zip(["x", *trained], torch.autograd.grad(loss, [x, *trained.values()]), strict=True)
    )


def other_config(**settings) -> peft.LoraConfig:
    return peft.LoraConfig(**{"target_modules": ["up", "down"], "r": 3} | settings)


def write_adapter(folder: Path, **settings) -> Path:
    """The files of an adapter for an Mlp of float64."""
    mlp(**settings).save_pretrained(folder)
    return folder


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


def per_call_copies(model):
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
    "copies": per_call_copies,
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
KINDS = {"lora": {}, "dora": {"use_dora": True}}
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


# Each of these makes PEFT's forward take over; the reason is in coverage where the layer shows it.


def hook(part, register, *, result=None):
    """Count the calls of a hook on a part of the layer, and of the same after its removal."""

    def call(model):
        module, calls = part(up(model)), []

        def seen(*args):
            calls.append(len(args))
            return result

        handle = getattr(module, register)(seen)
        found = gradients(model), len(calls)
        handle.remove()
        return found

    return call


def global_hook(register):
    def call(model):
        calls = []
        handle = getattr(nn_module, register)(
            lambda module, *_: calls.append(type(module).__name__)
        )
        found = gradients(model), calls
        handle.remove()
        return found

    return call


def replaced_forward(part):
    def call(model):
        module = part(up(model))
        run = module.forward
        module.forward = lambda *args, **named: run(*args, **named) * 2
        return gradients(model)

    return call


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class DoubledCall(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


def other_class(part, cls):
    def call(model):
        part(up(model)).__class__ = cls
        return gradients(model)

    return call


def base(layer):
    return layer.base_layer


def lora_a(layer):
    return layer.lora_A["default"]


def lora_b(layer):
    return layer.lora_B["default"]


def dropout(layer):
    return layer.lora_dropout["default"]


def bias_on_lora_a(model):
    lora_a(up(model)).bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    return gradients(model)


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def parametrized_lora_a(model):
    parametrize.register_parametrization(lora_a(up(model)), "weight", Negated())
    return gradients(model)


class Fives(nn.Dropout):
    def forward(self, x):
        return x * 5


def dropout_of_the_user(model):
    up(model).lora_dropout["default"] = Fives(0.5)
    return gradients(model.train())


def dropout_of_everything(model):
    up(model).lora_dropout["default"] = nn.Dropout(1.0)
    return gradients(model.train())


def dropout_in_place(model):
    """It changes the layer's input, which others may read."""
    up(model).lora_dropout["default"] = nn.Dropout(0.5, inplace=True)
    torch.manual_seed(0)
    x = inputs()
    y = up(model.train())(x)
    return y, x


def casting_switched_off(model):
    with disable_input_dtype_casting(model):
        return gradients(model)


def scaling_of(value):
    def call(model):
        up(model).scaling["default"] = value
        return up(model)(inputs())

    return call


def mixed_batch(model):
    model.add_adapter("b", other_config(init_lora_weights="gaussian"))
    return model(inputs(), adapter_names=["b", "default", "__base__"])


ASIDE = {
    "hook-base": hook(base, "register_forward_hook"),
    "hook-lora_A": hook(lora_a, "register_forward_hook"),
    "hook-lora_B": hook(lora_b, "register_forward_hook"),
    "hook-dropout": hook(dropout, "register_forward_hook"),
    "pre-hook-base": hook(base, "register_forward_pre_hook"),
    "pre-hook-lora_A": hook(lora_a, "register_forward_pre_hook"),
    "backward-hook-base": hook(base, "register_full_backward_hook"),
    "backward-hook-lora_B": hook(lora_b, "register_full_backward_hook"),
    "backward-pre-hook-lora_A": hook(lora_a, "register_full_backward_pre_hook"),
    "old-backward-hook-lora_A": hook(lora_a, "register_backward_hook"),
    "hook-that-changes": hook(
        dropout, "register_forward_hook", result=torch.ones(3, 5, 8, dtype=torch.float64)
    ),
    "global-hook": global_hook("register_module_forward_hook"),
    "global-pre-hook": global_hook("register_module_forward_pre_hook"),
    "global-backward-hook": global_hook("register_module_full_backward_hook"),
    "global-backward-pre-hook": global_hook("register_module_full_backward_pre_hook"),
    "forward-base": replaced_forward(base),
    "forward-lora_A": replaced_forward(lora_a),
    "forward-lora_B": replaced_forward(lora_b),
    "forward-dropout": replaced_forward(dropout),
    "class-base": other_class(base, Doubled),
    "class-lora_A": other_class(lora_a, Doubled),
    "class-lora_B": other_class(lora_b, Doubled),
    "call-base": other_class(base, DoubledCall),
    "bias-lora_A": bias_on_lora_a,
    "parametrized-lora_A": parametrized_lora_a,
    "dropout-class": dropout_of_the_user,
    "dropout-one": dropout_of_everything,
    "dropout-in-place": dropout_in_place,
    "casting-off": casting_switched_off,
    "scaling-numpy-f32": scaling_of(numpy.float32(1.5)),
    "scaling-nan": scaling_of(float("nan")),
    "scaling-infinite": scaling_of(float("inf")),
    "scaling-large": scaling_of(1e39),
    "scaling-per-row": scaling_of(torch.arange(12, dtype=torch.float64)),
    "mixed-batch": mixed_batch,
}


@pytest.mark.parametrize("name", ASIDE)
def test_leaves_the_call_to_peft(name):
    """Both run the very same forward, so they agree to the last bit."""
    theirs = mlp()
    ours = optimized(theirs)
    with counted_calls() as calls:
        results = []
        for model in (theirs, ours):
            torch.manual_seed(5)
            results.append(ASIDE[name](model))
        inputs_of_up = [x for x in calls if x.shape[-1] == 8]
    assert_same(results[1], results[0], ROUNDING)  # `down` is fast in most of them
    assert not inputs_of_up


@pytest.mark.parametrize(
    ("name", "reason"),
    {
        "hook-base": "its base layer",
        "forward-lora_A": "its lora_A",
        "class-base": "Doubled",
        "class-lora_B": "Doubled",
        "parametrized-lora_A": "its lora_A",
        "dropout-class": "its dropout",
        "dropout-one": "drops everything",
    }.items(),
)
def test_coverage_says_why(name, reason):
    model = optimized(mlp())
    hooked = up(model)
    if name == "hook-base":
        hooked.base_layer.register_forward_hook(lambda *_: None)
    else:
        ASIDE[name](model)
    report = {layer.name: layer for layer in fastlora.coverage(model).layers}
    assert reason in report["base_model.model.up"].reason
    assert report["base_model.model.down"].fast


def test_hooks_on_a_dora_magnitude_are_called():
    theirs = mlp(use_dora=True)
    ours = optimized(theirs)
    on_magnitude = hook(
        lambda layer: layer.lora_magnitude_vector["default"], "register_forward_hook"
    )
    expected, got = on_magnitude(theirs), on_magnitude(ours)
    assert got[1] == expected[1] == 1
    assert_same(got, expected, ROUNDING)


def test_once_a_hook_is_gone_the_layer_is_fast_again():
    model = optimized(mlp())
    handle = lora_a(up(model)).register_forward_hook(lambda *_: None)
    assert not fastlora.coverage(model).layers[0].fast
    handle.remove()
    with counted_calls() as calls:
        up(model)(inputs())
    assert len(calls) == 1


# Other kinds of adapter, by PEFT's settings for them.

VARIANTS = {
    "velora": {"velora_config": lora_config.VeloraConfig(num_groups=2)},
    "bdlora": {
        "use_bdlora": lora_config.BdLoraConfig(
            target_modules_bd_a=["up"], target_modules_bd_b=["down"], nblocks=2
        )
    },
    "monteclora": {"monteclora_config": lora_config.MontecloraConfig(num_samples=2)},
    "kasa": {"kasa_config": lora_config.KasaConfig()},
    "mica": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_variants_are_peft_s(settings):
    theirs = mlp(**settings)
    ours = optimized(theirs)
    assert not any(layer.fast for layer in fastlora.coverage(ours).layers)
    with counted_calls() as calls:
        results = [(gradients(model.train()), model.eval()(inputs())) for model in (theirs, ours)]
    assert not calls
    assert_same(results[1], results[0], 0.0)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian", "eva"])
def test_other_initial_values_are_fast(init):
    """These change what the tensors hold, not what is computed."""
    theirs = mlp(init_lora_weights=init)
    ours = optimized(theirs)
    with counted_calls() as calls:
        results = [gradients(model) for model in (theirs, ours)]
    assert len(calls) == 2
    assert_same(results[1], results[0], ROUNDING)


def test_alora_is_peft_s():
    settings = {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"}
    theirs = adapted(
        tiny_llama(dtype=torch.float64), target_modules=["q_proj", "v_proj"], **settings
    )
    ours = optimized(theirs)
    ids = torch.randint(9, VOCABULARY, (2, 10))
    ids[0, 4:6] = torch.tensor([7, 8])  # the second row isn't adapted
    with counted_calls() as calls:
        results = [model(input_ids=ids).logits for model in (theirs, ours)]
    assert not calls
    assert_same(results[1], results[0], 0.0)
    assert "ALora" in str(fastlora.coverage(ours))


def test_arrow_is_peft_s(tmp_path):
    settings = {"target_modules": ["q_proj", "v_proj"], "r": 4}
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        adapted(tiny_llama(dtype=torch.float64), **settings).save_pretrained(folder)
    theirs = lora.arrow.create_arrow_model(
        tiny_llama(dtype=torch.float64),
        task_specific_adapter_paths=[str(folder) for folder in folders],
        arrow_config=lora_config.ArrowConfig(top_k=1, rng_seed=42),
    ).eval()
    ours = optimized(theirs)
    ids = torch.randint(0, VOCABULARY, (2, 10))
    with counted_calls() as calls:
        results = [model(input_ids=ids).logits for model in (theirs, ours)]
        assert not calls
        assert_same(results[1], results[0], 0.0)
        ours.set_adapter("task_0")
        ours(input_ids=ids)
        assert len(calls) == 4


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
    assert "hasn't reached it" in report["head"].reason
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


# Transforms and tracers of torch.


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model):
    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    return loss


def forward_mode(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(inputs(), inputs())))


def batched_gradients(model):
    x = inputs()[0].requires_grad_()
    y = model(x)
    dys = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return torch.autograd.grad(y, wanted, dys, is_grads_batched=True)


def vmapped_gradients(model):
    """torch.func.vmap around torch's older autograd.grad."""
    x = inputs()[0].requires_grad_()
    y = model(x)
    dys = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return torch.func.vmap(lambda dy: torch.autograd.grad(y, wanted, dy, retain_graph=True))(dys)


def per_sample_gradients(model):
    gradient = torch.func.grad(loss_of(model))
    return torch.func.vmap(gradient, in_dims=(None, 0))(trained(model), inputs())


def jit_trace(model):
    traced = torch.jit.trace(model, inputs())
    return traced(inputs() * 2)


def export(model):
    program = torch.export.export(model, (inputs(),))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return program.module()(inputs() * 2), names


def make_fx_of_gradients(model):
    def gradient(x):
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    graph = make_fx(gradient)(inputs().requires_grad_())
    return graph(inputs().requires_grad_() * 2)


TRANSFORMS = {
    "grad": lambda model: torch.func.grad(loss_of(model))(trained(model), inputs()),
    "vjp": lambda model: torch.func.vjp(model, inputs())[1](torch.ones(3, 5, 4).double()),
    "jvp": lambda model: torch.func.jvp(model, (inputs(),), (inputs(),)),
    "vmap": lambda model: torch.func.vmap(model)(inputs()),
    "jacrev": lambda model: torch.func.jacrev(model)(inputs()[0]),
    "jacfwd": lambda model: torch.func.jacfwd(model)(inputs()[0]),
    "hessian": lambda model: torch.func.hessian(lambda x: model(x).square().sum())(inputs()[0]),
    "per-sample-gradients": per_sample_gradients,
    "forward-mode": forward_mode,
    "batched-gradients": batched_gradients,
    "vmapped-gradients": vmapped_gradients,
    "jit.trace": jit_trace,
    "export": export,
    "make_fx": lambda model: make_fx(model)(inputs())(inputs() * 2),
    "make_fx-gradients": make_fx_of_gradients,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_give_what_they_give_on_peft_s(name, kind):
    theirs = mlp(**KINDS[kind])
    ours = optimized(theirs)
    assert_same(TRANSFORMS[name](ours), TRANSFORMS[name](theirs), ROUNDING)


def test_a_model_made_in_inference_mode_runs_outside_of_it():
    """Such tensors can't be saved for a backward; PEFT's output there has no gradient."""
    with torch.inference_mode():
        theirs = mlp()
        ours = optimized(theirs)
    expected, got = theirs(inputs()), ours(inputs())
    assert got.requires_grad == expected.requires_grad
    assert_same(got, expected, ROUNDING)


def test_flops_are_counted_as_peft_s():
    from torch.utils.flop_counter import FlopCounterMode

    theirs = mlp()
    ours = optimized(theirs)
    counts = []
    for model in (theirs, ours):
        with FlopCounterMode(display=False) as counter:
            model(inputs()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


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
