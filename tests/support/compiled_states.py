"""Models whose state changes between calls: the kinds of models, the changes, and the comparison.

A comparison makes the same call in two ways and compares the output and all gradients; if one call
raises an error, the other must also raise one.  ``State.way`` says which two ways:

* "model", "in-place", "layers": the compiled model, and the same model without the compiler.
torch must be told to follow hooks (``skip_nnmodule_hook_guards``).
* "kept": a call that uses the guarded records which earlier calls left on the modules, and a call
that reads every module anew.
* "peft": an optimized model, and a copy of it on which ``fastlora.restore`` was called.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any, NamedTuple
from unittest import mock

import peft
import torch
import torch._inductor.config
from models import Mlp, Tied, adapt, randomize
from moe_models import base_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from peft_models import adapted
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D
from vendor_layers import BITSANDBYTES, quantized

import fastlora
from fastlora.layers import guards
from fastlora.layers.adapted import Adapted

_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
_ACTIVATIONS = (nn.SiLU(), nn.GELU(), nn.GELU("tanh"))
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}
_WORLDS: dict[str, Callable] = {
    "": nullcontext,
    "no-grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


class Kind(NamedTuple):
    """``words``: selects the changes that this kind takes (the keys of ``CHANGES``).  ``size``: the
    number of columns of x; None if x holds ids.
    """

    words: str
    make: Callable[[], nn.Module]
    settings: dict[str, Any]
    size: int | None


def _block() -> nn.Module:
    return nn.Sequential(LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48)))


def _transposed() -> nn.Module:
    return nn.Sequential(Conv1D(24, 32), nn.GELU(), Conv1D(8, 24))


def _over_nf4() -> nn.Module:
    model = nn.Sequential(quantized("nf4", 64, 32), nn.GELU(), nn.Linear(32, 64))
    model.is_loaded_in_4bit = True  # PEFT looks for this attribute of the model
    return model


def _mixture(packed: str = "") -> nn.Module:
    mixture = nn.Sequential(base_model(moe_intermediate_size=32).model.layers[0].mlp)
    if packed:
        fastlora.pack(mixture, packed)
    return mixture


# Settings of the adapters.
_UP_DOWN, _ALL = {"target_modules": ["up", "down"]}, {"target_modules": "all-linear"}
_UP = {"target_modules": ["up"]}
_SAVED = {"target_modules": ["mix"], "modules_to_save": ["head"]}
_EMBEDDED = {"target_modules": ["mix", "embed"]}
_BOTH = {"target_modules": ["0", "2"]}
_STACKS = {"target_modules": [], "target_parameters": _EXPERTS}
_ROUTED = _STACKS | {"target_parameters": ["gate.weight", *_EXPERTS]}
KINDS = {
    "linear": Kind("own linear drops", Mlp, _UP_DOWN, 8),
    "saved": Kind("own linear drops", Tied, _SAVED, None),
    "conv1d": Kind("own linear drops", _transposed, _ALL, 32),
    "block": Kind("own linear drops activates", _block, _ALL, 32),
    "experts": Kind("own experts drops activates", _mixture, _STACKS, 32),
    "router": Kind("own experts activates", _mixture, _ROUTED, 32),
    "packed-experts": Kind("own experts drops packed", lambda: _mixture("nf4"), _STACKS, 32),
    "peft": Kind("peft linear drops", Mlp, _UP, 8),
    "peft-saved": Kind("peft linear drops", Tied, _SAVED | _EMBEDDED, None),
    "peft-dora": Kind("peft linear drops", Mlp, _UP | {"use_dora": True}, 8),
    "peft-conv1d": Kind("peft linear drops", _transposed, _BOTH | {"fan_in_fan_out": True}, 32),
    "peft-block": Kind("peft linear drops activates", _block, _ALL, 32),
    "peft-experts": Kind("peft experts activates", _mixture, _STACKS, 32),
}  # fmt: skip
if BITSANDBYTES:
    KINDS["quantized"] = Kind("own linear drops packed", _over_nf4, _BOTH, 64)
    KINDS["peft-quantized"] = Kind("peft linear drops packed", _over_nf4, _BOTH, 64)


class State:
    """A model, how it is compiled, and how it is called now.

    ``way``: "model" calls ``torch.compile(model)``; "in-place" calls ``model.compile()``; "layers"
    compiles each adapted layer; "kept" and "peft" use no compiler (see the top of the file).
    """

    way = "model"

    def __init__(self, kind: str, p: float = 0.0, draw: Random | None = None) -> None:
        self.kind, self.draw = KINDS[kind], draw or Random(0)
        self.words = set(self.kind.words.split())
        self.p = p if "drops" in self.words else 0.0
        self.dtype = torch.float32 if "packed" in self.words else torch.float64
        # how it is called: x's leading sizes, a context, whether x has a gradient, hooks
        self.lead, self.world, self.x_trains, self.hooks = (4, 10), "", True, []
        settings = {"r": 4, "lora_alpha": 6, "lora_dropout": self.p} | self.kind.settings
        self.settings, base = settings, self.kind.make()
        self.model = adapted(base, **settings) if "peft" in self.words else adapt(base, **settings)
        if "peft" in self.words:
            fastlora.optimize(self.model)
        self.model.to(self.dtype).eval()

    def compile(self, way: str = "model", **how) -> "State":
        self.way, parts = way, {"in-place": [self.model], "layers": self.layers}
        self.call = torch.compile(self.model, **how) if way == "model" else self.model
        for module in parts.get(way, ()):
            module.compile(**how)
        return self

    @property
    def layers(self) -> list[Any]:
        kind = LoraLayer if "peft" in self.words else Adapted
        return [module for module in self.model.modules() if isinstance(module, kind)]

    def layer(self) -> Any:
        return self.draw.choice(self.layers)

    def base(self) -> Any:
        layer = self.layer()
        return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer

    def numbers(self, compiled: bool) -> dict[str, Tensor | None]:
        """The output, and the gradients of x and of all trainable parameters."""
        model = self.call if compiled else self.model
        if self.way == "peft" and not compiled:
            model = fastlora.restore(copy.deepcopy(model))
        torch.manual_seed(3)
        if self.kind.size is None:
            x = torch.randint(0, 20, self.lead)
        else:
            x = torch.randn(*self.lead, self.kind.size).to(self.dtype).requires_grad_(self.x_trains)
        # the names of the parameters are the unwrapped model's
        whole = self.model if compiled else model
        named = [*whole.named_parameters(), ("x", x)]
        wanted = {name: tensor for name, tensor in named if tensor.requires_grad}
        stance = "default" if compiled and self.way not in ("kept", "peft") else "force_eager"
        anew = _read_anew() if self.way == "kept" and not compiled else nullcontext()
        with torch.compiler.set_stance(stance), anew:
            with _WORLDS[self.world]():
                y = model(x)
            found = {"y": y.detach()}
            if y.requires_grad:
                loss = (y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
                dys = torch.autograd.grad(loss, [*wanted.values()], allow_unused=True)
                found |= {f"d_{name}": dy for name, dy in zip(wanted, dys, strict=True)}
        return found

    def compare(self, may_refuse: bool = False) -> None:
        """Raise AssertionError unless the call under test agrees with its reference.

        ``may_refuse``: the compiler may also raise an error that says it can't compile this call.
        """
        outcomes = []
        for compiled in (False, True):
            try:
                outcomes.append(self.numbers(compiled))
            except Exception as error:
                outcomes.append(error)
        expected, got = outcomes
        if self.way == "kept" and isinstance(expected, CheckpointError):
            return  # a PEFT layer that is merged and disabled unmerges itself in its call
        if isinstance(expected, Exception):
            assert isinstance(got, Exception), f"only the uncompiled call raises: {expected!r}"
            return
        if isinstance(got, Exception):
            refuses = isinstance(got, TorchDynamoException) or "no compiled frames" in str(got)
            refuses = refuses and may_refuse
            assert refuses, f"only the compiled call raises: {got!r}"
            return
        dtypes = {self.dtype, *(p.dtype for p in self.model.parameters())}
        dtypes |= {torch.bfloat16} if self.world == "autocast" else set()
        routes = 1e-6 if "experts" in self.words else 0.0  # routers compute in float32 in any case
        tolerance = max(routes, *(_TOLERANCES.get(dtype, 0.0) for dtype in dtypes))
        for name, tensor in expected.items():
            other = got[name]
            if tensor is None or other is None:  # None is as good as zeros
                assert not any(t is not None and t.count_nonzero() for t in (tensor, other)), name
                continue
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
            size, off = tensor.double().norm(), (other.double() - tensor.double()).norm()
            assert off <= tolerance * max(size, 1e-6), f"{name} is off by {off / size:.2g}"


@contextmanager
def _read_anew() -> Iterator[None]:
    """Inside the block, modules are always read anew, and no call's record is cached."""

    def record_of(module, reader):
        found = reader.read(module)
        return guards.GuardedRecord(found), found

    with (
        mock.patch.object(guards, "record_of", record_of),
        mock.patch.object(guards, "key_of_x", return_value=None),
    ):
        yield


# The changes.  Each takes the State and changes its model or how it is called.


def _replace(module: nn.Module, name: str = "weight") -> None:
    old = module._parameters[name]
    assert isinstance(old, Tensor)
    module._parameters[name] = nn.Parameter(old.detach() * 1.25, old.requires_grad)


def _replace_adapters(state: State) -> None:
    for module in state.model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.requires_grad:
                _replace(module, name)


@torch.no_grad()
def _step(state: State) -> None:
    for p in state.model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p), alpha=0.1)


def _give_data(state: State) -> None:
    for p in state.model.parameters():
        if p.requires_grad:
            p.data = p.data * 1.5


def _tie(state: State) -> None:
    one, other = state.base(), state.base()
    if one.weight.shape == other.weight.shape:
        one._parameters["weight"] = other._parameters["weight"]


def _give_bias(state: State) -> None:
    base = state.base()
    rows = base.nf if isinstance(base, Conv1D) else base.out_features
    bias = nn.Parameter(torch.ones(rows, dtype=state.dtype), state.draw.random() < 0.5)
    base.bias = None if base.bias is not None and not isinstance(base, Conv1D) else bias


def _freeze_one(state: State) -> None:
    state.draw.choice([p for p in state.model.parameters() if p.requires_grad]).requires_grad_(
        False
    )


def _train_adapters(state: State) -> None:
    for name, p in state.model.named_parameters():
        if "lora_" in name:
            p.requires_grad_()


def _train_base(state: State) -> None:
    weight = state.base().weight
    weight.requires_grad_(not weight.requires_grad)


def _cast(state: State) -> None:
    state.dtype = state.draw.choice(list(_TOLERANCES))
    state.model.to(state.dtype)


def _cast_adapters(state: State) -> None:
    for name, p in state.model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()


def _inside(state: State) -> nn.Module:
    """A layer, or any other module inside the model whose forward is called."""
    inside = [m for m in state.model.modules() if type(m).forward is not nn.ModuleDict.forward]
    return state.draw.choice(state.draw.choice((inside[1:], state.layers or inside[1:])))


def _hook(state: State) -> None:
    module = _inside(state)
    if state.draw.random() < 0.5:
        hook = lambda module, args, y: y * 2 if isinstance(y, Tensor) else None  # noqa: E731
        state.hooks.append(module.register_forward_hook(hook))
    else:
        hook = lambda module, args: (args[0] * 0.5, *args[1:])  # noqa: E731
        state.hooks.append(module.register_forward_pre_hook(hook))


def _unhook(state: State) -> None:
    while state.hooks:
        state.hooks.pop().remove()


class _Grown(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


def _put_forward(state: State, run: Callable) -> None:
    """Give a module a forward of its own, or remove the one it was given."""
    layer = _inside(state)
    if layer.__dict__.pop("forward", None) is None:
        layer.forward = lambda *args: run(type(layer).forward, layer, *args)


def _checkpoint(state: State) -> None:
    if not state.p:  # its recomputation draws other dropout masks
        _put_forward(state, partial(checkpoint, use_reentrant=False))


def _activate(state: State) -> None:
    for module in state.model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = state.draw.choice(_ACTIVATIONS)


def _implement(state: State) -> None:
    for module in state.model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            name = state.draw.choice(("eager", "batched_mm"))
            module.config._experts_implementation = name


def _merge_one(state: State) -> None:
    _, weight = state.draw.choice(list(state.layer().adapted_weights()))
    if weight.merged:
        weight.unmerge()
    else:
        weight.use_merged(weight.merged_weight(torch.float32))


def _apply(state: State) -> None:
    settings = state.settings | {"r": state.draw.choice((3, 4, 5))}
    adapt(state.model, **settings)


def _pack(state: State) -> None:
    fastlora.remove_lora(state.model)
    try:
        if "experts" in state.words:
            fastlora.pack(state.model, state.draw.choice(("nf4", "mxfp4", "fp8")))
        else:
            fastlora.pack(state.model, "nf4", [state.draw.choice(("0", "up", "gate_proj", "2"))])
            state.dtype = torch.float32
            state.model.float()
    finally:
        _apply(state)


def _load(state: State) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fastlora.save_adapter(randomize(copy.deepcopy(state.model)), folder)
        fastlora.remove_lora(state.model)
        fastlora.load_adapter(state.model, folder)


def _give_adapter(state: State) -> None:
    layer, r = state.layer(), state.draw.choice((2, 4, 7))
    (n, k), dtype = layer.shape, layer.lora_A.dtype
    layer.lora_A = nn.Parameter(torch.randn(r, k, dtype=dtype) * 0.3)
    layer.lora_B = nn.Parameter(torch.randn(n, r, dtype=dtype) * 0.3)


def _rescale_experts(state: State) -> None:
    layer = next(layer for layer in state.layers if hasattr(layer, "adaptations"))
    name = state.draw.choice(list(layer.adaptations))
    layer.adaptations[name] = replace(layer.adaptations[name], lora_alpha=state.draw.choice((3, 9)))


def _drop_by(state: State) -> None:
    state.layer().lora_dropout = state.draw.choice((0.0, 0.25, 0.5)) if state.p else 0.0


def _names(state: State) -> list[str]:
    """A random selection of the model's PEFT adapters."""
    names = list(state.model.peft_config)
    return state.draw.sample(names, state.draw.randint(1, len(names)))


def _add(state: State) -> None:
    name, r = f"more{len(state.model.peft_config)}", state.draw.choice((3, 4))
    config = peft.LoraConfig(**state.settings | {"r": r}, init_lora_weights=False)
    state.model.add_adapter(name, config)
    if "packed" not in state.words:
        state.model.to(state.dtype)
    state.model.set_adapter(name)


def _delete(state: State) -> None:
    *others, name = state.model.peft_config
    if others:
        state.model.delete_adapter(name)
        state.model.set_adapter(others[0])


def _peft_load(state: State) -> None:
    with tempfile.TemporaryDirectory() as folder:
        state.model.save_pretrained(folder, selected_adapters=["default"])
        name = f"read{len(state.model.peft_config)}"
        state.model.load_adapter(folder, name, is_trainable=True)
        state.model.base_model.set_adapter(["default", name])


def _hotswap(state: State) -> None:
    with tempfile.TemporaryDirectory() as folder:
        other = randomize(copy.deepcopy(state.model))
        other.save_pretrained(folder, selected_adapters=["default"])
        hotswap_adapter(state.model, folder, "default")


def _of(state: State) -> tuple[Any, str]:
    """A random PEFT layer, and the name of one of its adapters."""
    layer = state.layer()
    return layer, state.draw.choice(list(layer.scaling))


def _set_scaling(state: State, as_is: Callable = float) -> None:
    layer, name = _of(state)
    layer.scaling[name] = as_is(state.draw.choice((0.25, 2, 1.5, 0.0)))


def _edit_dropout(state: State) -> None:
    layer, name = _of(state)
    if isinstance(layer.lora_dropout[name], nn.Dropout):
        layer.lora_dropout[name].p = state.draw.choice((0.0, 0.25, 0.5))


def _replace_dropout(state: State) -> None:
    layer, name = _of(state)
    drop = nn.Dropout(state.draw.choice((0.0, 0.3)) if state.p else 0.0)
    layer.lora_dropout[name] = state.draw.choice((nn.Identity(), drop)).train(layer.training)


def _flip_dropout(state: State) -> None:
    for drop in state.layer().lora_dropout.values():
        drop.train(not drop.training)


def _replace_pair(state: State) -> None:
    layer, name = _of(state)
    k, n = layer.lora_A[name].in_features, layer.lora_B[name].out_features
    how = {"dtype": layer.lora_A[name].weight.dtype}
    layer.lora_A[name] = nn.Linear(k, 6, bias=False, **how)
    layer.lora_B[name] = nn.Linear(6, n, bias=state.draw.random() < 0.5, **how)


def _peft_merge_one(state: State) -> None:
    layer = state.layer()
    layer.unmerge() if layer.merged else layer.merge()


def _flip(state: State, name: str) -> None:
    layer = state.layer()
    setattr(layer, name, not getattr(layer, name))


# The changes, by the words that a kind must have to take them; "" fits every kind.
CHANGES: dict[str, dict[str, Callable[[State], object]]] = {
    "": {
        "nothing": lambda state: None,
        "train": lambda state: state.model.train(),
        "evaluate": lambda state: state.model.eval(),
        "layer-mode": lambda state: _flip(state, "training"),
        "rows": lambda state: setattr(
            state, "lead", state.draw.choice(((3, 12), (64, 1), (4, 10)))
        ),
        "few-rows": lambda state: setattr(state, "lead", state.draw.choice(((1, 3), (2, 2)))),
        "world": lambda state: setattr(state, "world", state.draw.choice(("", "", *_WORLDS))),
        "x": lambda state: setattr(state, "x_trains", not state.x_trains),
        "step": _step,
        "data": _give_data,
        "adapters-replaced": _replace_adapters,
        "one-frozen": _freeze_one,
        "adapters-train": _train_adapters,
        "cast": _cast,
        "adapters-cast": _cast_adapters,
        "hook": _hook,
        "unhook": _unhook,
        "forward": lambda state: _put_forward(state, lambda run, *args: run(*args) * 0.5),
        "checkpointed": _checkpoint,
    },
    "linear": {
        "base-replaced": lambda state: _replace(state.base()),
        "bias": _give_bias,
        "tied": _tie,
        "base-trains": _train_base,
        "parametrized": lambda state: parametrize.register_parametrization(
            state.base(), "weight", _Grown()
        ),
    },
    "activates": {"activation": _activate},
    "experts": {"implementation": _implement},
    "own": {
        "merge": lambda state: fastlora.merge_lora(state.model),
        "merge-for-good": lambda state: fastlora.merge_lora(state.model, keep_base=False),
        "merge-plain": lambda state: fastlora.merge_lora(state.model, requantize=False),
        "merge-one": _merge_one,
        "unmerge": lambda state: fastlora.unmerge_lora(state.model),
        "remove": lambda state: fastlora.remove_lora(state.model),
        "apply": _apply,
        "pack": _pack,
        "load": _load,
        "dropout": _drop_by,
    },
    "own linear": {
        "scaling": lambda state: setattr(
            state.layer(), "scaling", state.draw.choice((0.5, 2, 3.0))
        ),
        "pair": _give_adapter,
    },
    "own experts": {"rescaled": _rescale_experts},
    "peft": {
        "merge": lambda state: state.model.merge_adapter(),
        "merge-some": lambda state: state.model.merge_adapter(adapter_names=_names(state)),
        "merge-one": _peft_merge_one,
        "unmerge": lambda state: state.model.unmerge_adapter(),
        "disable": lambda state: state.model.base_model.disable_adapter_layers(),
        "enable": lambda state: state.model.base_model.enable_adapter_layers(),
        "layer-disabled": lambda state: _flip(state, "_disable_adapters"),
        "add": _add,
        "set-adapter": lambda state: state.model.base_model.set_adapter(_names(state)),
        "layer-set-adapter": lambda state: state.layer().set_adapter(_names(state)),
        "delete": _delete,
        "set-scale": lambda state: _of(state)[0].set_scale("default", state.draw.choice((0.5, 3))),
        "scaling": _set_scaling,
        "scale-layer": lambda state: state.layer().scale_layer(1.5),
        "unscale-layer": lambda state: state.layer().unscale_layer(),
        "restore": lambda state: fastlora.restore(state.model),
        "optimize": lambda state: fastlora.optimize(
            state.model, gated_mlps=state.draw.random() < 0.5
        ),
        "load": _peft_load,
        "unload": lambda state: state.model.base_model.merge_and_unload(),
    },
    "peft linear": {
        "scaling-tensor": lambda state: _set_scaling(state, torch.tensor),
        "dropout-edited": _edit_dropout,
        "dropout-replaced": _replace_dropout,
        "dropout-mode": _flip_dropout,
        "hotswap": _hotswap,
        "casting": lambda state: _flip(state, "cast_input_dtype_enabled"),
        "pair": _replace_pair,
        "variant-dropped": lambda state: state.layer().lora_variant.clear(),
    },
}


def changes_of(kind: str) -> dict[str, Callable[[State], object]]:
    """The changes that this kind takes."""
    words = set(KINDS[kind].words.split())
    fitting = [group for needs, group in CHANGES.items() if words >= set(needs.split())]
    return {name: change for group in fitting for name, change in group.items()}


class Case:
    """A random sequence of changes, with comparisons before it and after each change."""

    def __init__(self, seed: int, index: int, backend: str = "torch") -> None:
        draw = self.draw = Random(f"{seed} {index}")
        self.kind = draw.choice(list(KINDS))
        self.p, self.trains = draw.choice((0.0, 0.0, 0.3)), draw.random() < 0.5
        self.fullgraph = draw.random() < 0.5
        self.compiler = draw.choice(("eager",) * 12 + ("aot_eager",) * 12 + ("inductor",))
        self.way = draw.choice(("model", "model", "in-place", "layers"))
        self.changes = draw.choices(list(changes_of(self.kind)), k=draw.randint(3, 8))
        more = [word for word in ("fullgraph", "trains") if getattr(self, word)]
        how = (self.kind, self.compiler, self.way, f"p{self.p}", *more)
        self.words = " ".join((*how, *self.changes))


class KeptCase(Case):
    """The same sequences for the way "kept", which tests the cached records without a compiler."""

    def __init__(self, seed: int, index: int, backend: str = "torch") -> None:
        super().__init__(seed, index)
        self.way, self.fullgraph = "kept", False
        self.changes += self.draw.choices(list(changes_of(self.kind)), k=12)
        self.words = " ".join((self.kind, self.way, f"p{self.p}", *self.changes))


def check(case: Case) -> None:
    torch.compiler.reset()
    torch.manual_seed(1)
    state = State(case.kind, case.p, case.draw)
    state.model.train(case.trains)
    state.compile(case.way, backend=case.compiler, fullgraph=case.fullgraph)
    done: list[str] = []
    with ExitStack() as stack:
        settings = {"recompile_limit": 999, "accumulated_recompile_limit": 9999}
        settings["skip_nnmodule_hook_guards"] = "hook" not in case.changes
        stack.enter_context(torch._dynamo.config.patch(settings))
        # torch's own dropout masks
        stack.enter_context(torch._inductor.config.patch(fallback_random=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("nothing", *case.changes):
            try:
                changes_of(case.kind)[name](state)
                done.append(name)
            # the model may refuse this change now, or take only a part of it
            except Exception as error:
                done.append(f"({name}: {type(error).__name__})")
            for _ in range(case.draw.choice((1, 1, 2) if case.way != "kept" else (1, 2, 4))):
                try:
                    state.compare(may_refuse=case.fullgraph)
                except AssertionError as error:
                    raise AssertionError(f"after {', '.join(done)}: {error}") from error
