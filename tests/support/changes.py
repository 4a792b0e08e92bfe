"""Models whose state changes between calls: the changes, and the comparison after each of them.

:class:`ChangingModel` applies random changes.  A failure prints the changes that lead to it, and
``pytest tests/test_changes.py --hypothesis-profile=long`` tries many more of them.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from random import Random
from types import MethodType
from typing import Any
from unittest import mock

import peft
import torch
import torch._inductor.config
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from model_kinds import KINDS
from models import adapt, randomize
from peft.tuners.lora.layer import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.layers import guards

_ACTIVATIONS = (nn.SiLU(), nn.GELU(), nn.GELU("tanh"))
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}
_WORLDS: dict[str, Callable] = {
    "": nullcontext,
    "no-grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


class State:
    """A model, how it is compiled, and how it is called now.

    ``way``: "eager", or what the compiler compiles: "model" (``torch.compile(model)``), "in-place"
    (``model.compile()``) or "layers" (each adapted layer).
    """

    way = "eager"

    def __init__(self, kind: str, p: float = 0.0) -> None:
        self.kind, self.draw = KINDS[kind], Random(0)
        self.words = set(self.kind.words.split())
        self.p = p if "drops" in self.words else 0.0
        self.dtype = torch.float32 if "packed" in self.words else torch.float64
        # how it is called: x's leading sizes, a context, whether x has a gradient, hooks
        self.lead, self.world, self.x_trains, self.hooks = (4, 10), "", True, []
        self.settings = {"r": 4, "lora_alpha": 6, "lora_dropout": self.p} | self.kind.settings
        self.model = self.kind.make()
        if "peft" in self.words:
            self.model = adapt(self.model, **self.settings)
        else:
            fastlora.replace_linears(self.model, **self.settings)
            randomize(self.model)
        self.call = self.model.to(self.dtype).eval()

    def compile(self, way: str, **how) -> "State":
        self.way, parts = way, {"in-place": [self.model], "layers": self.layers}
        if way == "model":
            self.call = torch.compile(self.model, **how)
        for module in parts.get(way, ()):
            module.compile(**how)
        return self

    @property
    def layers(self) -> list[Any]:
        return [m for m in self.model.modules() if isinstance(m, LoraLayer | fastlora.LoRALinear)]

    def layer(self) -> Any:
        return self.draw.choice(self.layers)

    def base(self) -> Any:
        layer = self.layer()
        return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer

    def numbers(self) -> dict[str, Tensor | None]:
        """The output, and the gradients of x and of all trainable parameters."""
        return self._numbers(self.call, self.model)

    def reference(self) -> dict[str, Tensor | None]:
        """The same numbers without the mechanism under test.

        * A compiled model: the same model without the compiler.
        * A PEFT model: a copy of it, restored by ``fastlora.restore``.
        * Any other model: all modules are read anew.  This includes a PEFT model with dropout or
          with quantized bases, because PEFT draws other masks and bitsandbytes rounds differently.
        """
        if self.way != "eager":
            with torch.compiler.set_stance("force_eager"):
                return self._numbers(self.model, self.model)
        if "peft" in self.words and "packed" not in self.words and not self.p:
            model = fastlora.restore(copy.deepcopy(self.model))
            return self._numbers(model, model)
        with _read_anew():
            return self._numbers(self.model, self.model)

    def _numbers(self, call: Callable, model: nn.Module) -> dict[str, Tensor | None]:
        torch.manual_seed(3)
        if self.kind.size is None:
            x = torch.randint(0, 20, self.lead)
        else:
            x = torch.randn(*self.lead, self.kind.size).to(self.dtype).requires_grad_(self.x_trains)
        named = [*model.named_parameters(), ("x", x)]
        wanted = {name: tensor for name, tensor in named if tensor.requires_grad}
        with _WORLDS[self.world]():
            y = call(x)
        found = {"y": y.detach()}
        if y.requires_grad:
            loss = (y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
            dys = torch.autograd.grad(loss, [*wanted.values()], allow_unused=True)
            found |= {f"d_{name}": dy for name, dy in zip(wanted, dys, strict=True)}
        return found

    def compare(self, calls: int = 1) -> None:
        """Raise AssertionError unless each call under test agrees with its reference.

        If the reference raises an error, the calls must also raise one.
        """
        expected = _outcome(self.reference)
        if self.way == "eager" and isinstance(expected, CheckpointError):
            return  # a PEFT layer that is merged and disabled unmerges itself in its call
        for _ in range(calls):
            got = _outcome(self.numbers)
            if isinstance(expected, Exception):
                assert isinstance(got, Exception), f"only the reference raises: {expected!r}"
            else:
                assert not isinstance(got, Exception), f"only the call under test raises: {got!r}"
                self._assert_agree(got, expected)

    def _assert_agree(self, got: dict, expected: dict) -> None:
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


def _outcome(numbers: Callable[[], dict]) -> dict | Exception:
    try:
        return numbers()
    except Exception as error:
        return error


@contextmanager
def _read_anew() -> Iterator[None]:
    """Inside the block, modules are always read anew, and no call's record is cached."""

    def record_of(module):
        found = module.read()
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


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def _change_class(state: State) -> None:
    base = state.base()
    if isinstance(base, nn.Linear) and type(base).__module__ in (nn.Linear.__module__, __name__):
        base.__class__ = nn.Linear if isinstance(base, _Doubled) else _Doubled


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
        layer.forward = MethodType(lambda self, *args: run(type(self).forward, self, *args), layer)


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


def _load(state: State) -> None:
    state.model.load_state_dict(randomize(copy.deepcopy(state.model)).state_dict())


def _give_adapter(state: State) -> None:
    layer, r = state.layer(), state.draw.choice((2, 4, 7))
    n, k, dtype = layer.out_features, layer.in_features, layer.lora_A.dtype
    layer.lora_A = nn.Parameter(torch.randn(r, k, dtype=dtype) * 0.3)
    layer.lora_B = nn.Parameter(torch.randn(n, r, dtype=dtype) * 0.3)


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
    # PEFT draws other masks, so a model that is compared with PEFT's never drops.
    if state.p and isinstance(layer.lora_dropout[name], nn.Dropout):
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


def _flip_merge(layer: Any) -> None:
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
        "base-cast": lambda state: state.base().to(state.draw.choice([*_TOLERANCES])),
        "parametrized": lambda state: parametrize.register_parametrization(
            state.base(), "weight", _Grown()
        ),
    },
    "activates": {"activation": _activate},
    "experts": {"implementation": _implement},
    "own": {
        "merge": lambda state: [layer.merge() for layer in state.layers],
        "unmerge": lambda state: [layer.unmerge() for layer in state.layers],
        "merge-one": lambda state: _flip_merge(state.layer()),
        "load": _load,
        "dropout": _drop_by,
        "scaling": lambda state: setattr(
            state.layer(), "scaling", state.draw.choice((0.5, 2, 3.0))
        ),
        "pair": _give_adapter,
    },
    "peft": {
        "merge": lambda state: state.model.merge_adapter(),
        "merge-some": lambda state: state.model.merge_adapter(adapter_names=_names(state)),
        "merge-one": lambda state: _flip_merge(state.layer()),
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
        "class": _change_class,
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


class ChangingModel(RuleBasedStateMachine):
    """A model of one kind: its rule is a change, its invariant compares the calls."""

    def __init__(self, kind: str, compiled: bool = False) -> None:
        super().__init__()
        self.kind, self.compiled, self.cleanup = kind, compiled, ExitStack()
        self.changes = changes_of(kind)

    @initialize(
        p=st.sampled_from((0.0, 0.3)),
        trains=st.booleans(),
        way=st.sampled_from(("model", "in-place", "layers")),
        compiler=st.sampled_from(("eager", "aot_eager", "inductor")),
    )
    def start(self, p: float, trains: bool, way: str, compiler: str) -> None:
        self.cleanup.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        self.state = State(self.kind, p)
        self.state.model.train(trains)
        if self.compiled:
            torch.compiler.reset()
            settings = {"recompile_limit": 999, "accumulated_recompile_limit": 9999}
            settings["skip_nnmodule_hook_guards"] = False  # so that hooks are followed
            self.cleanup.enter_context(torch._dynamo.config.patch(settings))
            # torch's own dropout masks
            self.cleanup.enter_context(torch._inductor.config.patch(fallback_random=True))
            self.state.compile(way, backend=compiler)

    @rule(
        name=st.runner().flatmap(lambda machine: st.sampled_from([*machine.changes])),
        seed=st.integers(0, 99),
    )
    def change(self, name: str, seed: int) -> None:
        self.state.draw = Random(seed)
        with suppress(Exception):  # the model may refuse it now, or take only a part of it
            self.changes[name](self.state)

    @invariant()
    def calls_agree(self) -> None:
        # The first call after a change caches a record, and the second one uses it.
        self.state.compare(calls=1 if self.compiled else 2)

    def teardown(self) -> None:
        self.cleanup.close()
