"""Who takes part: the frozen layer, fastlora by each of its ways, PEFT, and what else one can do.

A maker builds a contestant on the tensors of a case, which all contestants share.  Only public
names of fastlora are used, so that another commit's can take part (``compare.py``).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear

import fastlora

from .cases import SAME_DTYPE, Case

SCALE = 2.0
Pairs = list[tuple[nn.Parameter, nn.Parameter]]  # lora_a, lora_b of each projection


class NotHereError(Exception):
    """Why a contestant can't take part on this machine: it is skipped, and nothing is wrong."""


@dataclass(frozen=True)
class Tensors:
    """The float32 adapters hold the very values of the others.

    Of PEFT's layers with two adapters, the second half of the pairs is the second adapter's.
    """

    x: Tensor
    dys: tuple[Tensor, ...]
    weights: tuple[nn.Parameter, ...]
    adapters: dict[torch.dtype, Pairs]


@dataclass(frozen=True)
class Contestant:
    """``module`` maps x to y, or to several; ``adapter``: what is trained.

    ``own_mask``: its dropout mask is known to nobody, so that it is judged without dropout.
    """

    module: nn.Module
    adapter: tuple[nn.Parameter, ...]
    own_mask: bool = False
    backend: str | None = None
    plan: str | None = None  # "FUSED" or "IN_PLACE"

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Around forward and backward: autograd's own threads follow it."""
        with ExitStack() as stack:
            if self.backend is not None:
                stack.enter_context(fastlora.use_backend(self.backend))
            if self.plan is not None:
                from fastlora.kernels import plan

                stack.enter_context(plan.use_plan(getattr(plan, self.plan)))
            yield


Maker = Callable[[Case, Tensors, float], Contestant]


def makers_for(case: Case) -> dict[str, Maker]:
    """By name; the frozen layer, which all are compared with, first, and fastlora last."""
    if case.table == "optimized":
        return {"frozen": frozen, "peft": peft_layer(), "fastlora": optimized}
    if case.table != "gpu":
        same_dtype = {SAME_DTYPE: fastlora_layer(case.dtype)} if case.mixed else {}
        return {"frozen": frozen, **same_dtype, "peft": peft_layer(), "fastlora": fastlora_layer()}
    return {
        "frozen": frozen,
        "fused": fastlora_layer(backend="triton", plan="FUSED"),
        "in place": fastlora_layer(backend="triton", plan="IN_PLACE"),
        "torch backend": fastlora_layer(backend="torch"),
        "float32 adapter": fastlora_layer(torch.float32),
        "addmm chain": each(AddmmChain.apply),
        "peft formula": each(peft_formula),
        "peft": peft_layer(),
        "peft, float32 adapter": peft_layer(torch.float32),
        "peft, optimized": optimized,
        **({"merged": merged} if case.decodes else {}),
        **({"compiled peft formula": each(peft_formula, True)} if case.compiled else {}),
        "fastlora": fastlora_layer(),
    }


def make_tensors(case: Case, device: torch.device) -> Tensors:
    torch.manual_seed(0)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device).mul_(std).to(case.dtype)

    pairs = []
    for N in case.outputs * (2 if case.kind == "two-adapters" else 1):
        a, b = random(case.r, case.K, std=case.K**-0.5), random(N, case.r, std=case.r**-0.5)
        pairs.append((nn.Parameter(a), nn.Parameter(b)))
    wide = [(nn.Parameter(a.float()), nn.Parameter(b.float())) for a, b in pairs]
    weights = [random(N, case.K, std=case.K**-0.5) for N in case.outputs]
    return Tensors(
        x=random(case.M, case.K).requires_grad_(),
        dys=tuple(random(case.M, N) for N in case.outputs),
        weights=tuple(nn.Parameter(weight, requires_grad=False) for weight in weights),
        adapters={torch.float32: wide, case.dtype: pairs},
    )


class Group(nn.Module):
    """Layers of one x, each called by itself: what a group is without fastlora."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


class FusedGroup(Group):
    """LoRALinear layers of one x, called through :func:`fastlora.lora_linears`."""

    def __init__(self, layers: list[fastlora.LoRALinear], dropout: float) -> None:
        super().__init__(layers)
        self.dropout = dropout
        self.projections = [
            fastlora.Projection(each.weight, each.lora_A, each.lora_B, None, SCALE)
            for each in layers
        ]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return fastlora.lora_linears(x, self.projections, dropout=self.dropout)


class Formula(nn.Module):
    """A function of (x, weight, lora_a, lora_b, scale, dropout)."""

    def __init__(self, function: Callable[..., Tensor], tensors: Sequence, dropout: float) -> None:
        super().__init__()
        self.weight, self.lora_a, self.lora_b = tensors
        self.function, self.dropout = function, dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.lora_a, self.lora_b, SCALE, self.dropout)


def frozen(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """``nn.Linear`` with no adapter: its forward and its dx."""
    return _contestant(_linears(tensors.weights))


def merged(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """The adapter added to the weight once, for inference."""
    with torch.no_grad():
        pairs = zip(tensors.weights, tensors.adapters[torch.float32], strict=True)
        wholes = [(weight.float() + SCALE * b @ a).to(weight.dtype) for weight, (a, b) in pairs]
    return _contestant(_linears([nn.Parameter(whole, requires_grad=False) for whole in wholes]))


def fastlora_layer(
    adapter_dtype: torch.dtype | None = None, backend: str | None = None, plan: str | None = None
) -> Maker:
    def make(case: Case, tensors: Tensors, dropout: float) -> Contestant:
        settings = {"r": case.r, "lora_alpha": SCALE * case.r, "lora_dropout": dropout}
        pairs = tensors.adapters[adapter_dtype or case.adapter_dtype]
        layers = []
        for base, (a, b) in zip(_linears(tensors.weights), pairs, strict=True):
            layer = fastlora.LoRALinear.from_linear(base, **settings)
            layer.lora_A, layer.lora_B = a, b
            layers.append(layer)
        group = partial(FusedGroup, dropout=dropout)
        return _contestant(layers, group, backend=backend, plan=plan)

    return make


def peft_layer(adapter_dtype: torch.dtype | None = None) -> Maker:
    def make(case: Case, tensors: Tensors, dropout: float) -> Contestant:
        layers = _peft_layers(case, tensors, dropout, adapter_dtype or case.adapter_dtype)
        return _contestant(layers, own_mask=True)

    return make


def optimized(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """PEFT's layers after :func:`fastlora.optimize`."""
    group = Group(_peft_layers(case, tensors, dropout, case.adapter_dtype))
    fastlora.optimize(group, strict=True)
    return _contestant(list(group.layers), own_mask=True)


def each(function: Callable[..., Tensor], compiled: bool = False) -> Maker:
    """A peer that is written as a function of one projection."""

    def make(case: Case, tensors: Tensors, dropout: float) -> Contestant:
        pairs = zip(tensors.weights, tensors.adapters[case.dtype], strict=True)
        layers = [Formula(function, (weight, *pair), dropout) for weight, pair in pairs]
        found = _contestant(layers, own_mask=True)
        if not compiled:
            return found
        backend = "inductor" if tensors.x.is_cuda else "aot_eager"  # which needs no C compiler
        module = torch.compile(found.module, backend=backend, fullgraph=True, dynamic=False)
        return replace(found, module=module)

    return make


def peft_formula(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
    """The forward of PEFT's linear layer, casts included; where PEFT is missing it stands in."""
    result = linear(x, weight)
    update = linear(linear(drop(x.to(a.dtype), p, training=p > 0), a), b)
    return (result + update * scale).to(result.dtype)


class AddmmChain(torch.autograd.Function):
    """Products by torch, added in place; saves h, and with dropout also what dropout made."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scale, p):
        dropped, mask = torch.native_dropout(x, p, True) if p > 0 else (x, None)
        h = (dropped @ a.T).mul_(scale)
        ctx.save_for_backward(dropped, mask, weight, a, b, h)
        ctx.scale, ctx.p = scale, p
        return linear(x, weight).addmm_(h, b.T)

    @staticmethod
    def backward(ctx, dy):
        dropped, mask, weight, a, b, h = ctx.saved_tensors
        dh = (dy @ b).mul_(ctx.scale)
        dx = dy @ weight
        if mask is None:
            dx.addmm_(dh, a)
        else:
            dx.add_((dh @ a).mul_(mask), alpha=1.0 / (1.0 - ctx.p))
        return dx, None, dh.T @ dropped, dy.T @ h, None, None


def trained(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """The adapters: every lora_a before its lora_b, one projection after the other."""
    return tuple(parameter for parameter in module.parameters() if parameter.requires_grad)


def _contestant(
    layers: list[nn.Module], as_group: Callable[[list], nn.Module] = Group, **more: object
) -> Contestant:
    """One layer is called as it is; several through a group."""
    module = layers[0] if len(layers) == 1 else as_group(layers)
    return Contestant(module, trained(module), **more)


def _linears(weights: Sequence[nn.Parameter]) -> list[nn.Linear]:
    layers = []
    for weight in weights:
        layers.append(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
        layers[-1].weight = weight
    return layers


def _peft_layers(
    case: Case, tensors: Tensors, dropout: float, adapter_dtype: torch.dtype
) -> list[nn.Module]:
    """PEFT's own, in training mode.  DoRA's magnitude isn't the norm, or it would do nothing."""
    if find_spec("peft") is None:
        raise NotHereError("PEFT is not installed")
    import peft

    config = peft.LoraConfig(
        r=case.r, lora_alpha=SCALE * case.r, lora_dropout=dropout, use_dora=case.kind == "dora",
        target_modules=r"layers\.\d+",
    )  # fmt: skip
    base = Group(_linears(tensors.weights))
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).train()
    names = ["default"]
    if case.kind == "two-adapters":
        names.append("other")
        model.add_adapter("other", config, autocast_adapter_dtype=False)
        model.base_model.set_adapter(names)
    layers = list(model.base_model.model.layers)
    pairs = iter(tensors.adapters[adapter_dtype])
    for name in names:
        for layer in layers:
            layer.lora_A[name].weight, layer.lora_B[name].weight = next(pairs)
    for layer in layers:
        for magnitude in layer.lora_magnitude_vector.to(adapter_dtype).values():
            length = magnitude.weight.shape[-1]
            magnitude.weight.data *= torch.linspace(0.9, 1.1, length).to(magnitude.weight)
    return layers
