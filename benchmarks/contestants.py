"""Who takes part: the frozen layer, fastlora by each of its ways, PEFT, and what else one can do.

A maker builds a contestant on the tensors of a case, which all contestants share.  Only public
names of fastlora are used, so that another commit's can take part (``compare.py``).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fastlora

from .cases import ADAPTERS, SAME_DTYPE, Block, Case

SCALE = 2.0


@dataclass(frozen=True)
class Tensors:
    """The float32 adapters hold the very values of the others.

    Of PEFT's layers with two adapters, the second half of the pairs is the second adapter's.
    """

    x: Tensor
    dys: tuple[Tensor, ...]
    weights: tuple[nn.Parameter, ...]
    adapters: dict[torch.dtype, list[tuple[nn.Parameter, nn.Parameter]]]  # lora_a, lora_b
    # A block, which has no weights or adapters here; or a quantised layer, of this weight.
    base: nn.Module | None = None


@dataclass(frozen=True)
class Contestant:
    """``module`` maps x to y, or to several.

    ``own_mask``: its dropout mask is known to nobody, so that it is judged without dropout.
    ``chosen`` stands around forward and backward: autograd's own threads follow it.  ``finish`` is
    what a step does after them.  ``needs_dx``: x gets a gradient.
    """

    module: nn.Module
    own_mask: bool = False
    chosen: Callable[[], AbstractContextManager[None]] = nullcontext
    finish: Callable[[], None] = lambda: None
    needs_dx: bool = True

    @property
    def adapter(self) -> list[nn.Parameter]:
        """What is trained: every lora_a before its lora_b, one projection after the other."""
        return [each for each in self.module.parameters() if each.requires_grad]

    def leaves(self, x: Tensor) -> list[Tensor]:
        """What gets a gradient."""
        return [x] * self.needs_dx + self.adapter


Maker = Callable[[Case, Tensors, float], Contestant]


@contextmanager
def _by_plan(name: str) -> Iterator[None]:
    """The triton backend with one plan, "FUSED" or "IN_PLACE"."""
    from fastlora.kernels import plan

    with fastlora.use_backend("triton"), plan.use_plan(getattr(plan, name)):
        yield


def makers_for(case: Case) -> dict[str, Maker]:
    """By name; the frozen layer, which all are compared with, first, and fastlora last."""
    if isinstance(case, Block):
        from . import blocks  # it needs transformers

        return blocks.makers_for(case)
    if case.table == "optimized":
        return {"frozen": frozen, "peft": peft_layer(), "fastlora": peft_layer(optimized=True)}
    if case.table == "mixed":
        from . import mixed  # which imports this file

        return mixed.makers()
    if case.table == "quantised":
        from . import quantised  # likewise

        return quantised.makers_for(case)
    if case.table == "few":
        optimized = {"peft, optimized": peft_layer(optimized=True)}
        return {"frozen": frozen, "peft": peft_layer(), **optimized, "fastlora": fastlora_layer()}
    if case.table not in ("gpu", "host"):
        same_dtype = {SAME_DTYPE: fastlora_layer(case.dtype)} if case.mixed else {}
        return {"frozen": frozen, **same_dtype, "peft": peft_layer(), "fastlora": fastlora_layer()}
    return {
        "frozen": frozen,
        "fused": fastlora_layer(chosen=partial(_by_plan, "FUSED")),
        "in place": fastlora_layer(chosen=partial(_by_plan, "IN_PLACE")),
        "torch backend": fastlora_layer(chosen=partial(fastlora.use_backend, "torch")),
        "peft": peft_layer(),
        "peft, optimized": peft_layer(optimized=True),
        **({"merged": merged} if case.decodes else {}),
        "fastlora": fastlora_layer(),
    }


def make_tensors(case: Case, device: torch.device) -> Tensors:
    if isinstance(case, Block):
        from . import blocks

        return blocks.make_tensors(case, device)
    torch.manual_seed(0)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device).mul_(std).to(case.dtype)

    pairs = []
    count = ADAPTERS if case.table == "mixed" else 2 if case.kind == "two-adapters" else 1
    for N in case.outputs * count:
        a, b = random(case.r, case.K, std=case.K**-0.5), random(N, case.r, std=case.r**-0.5)
        pairs.append((nn.Parameter(a), nn.Parameter(b)))
    wide = [(nn.Parameter(a.float()), nn.Parameter(b.float())) for a, b in pairs]
    weights = [random(N, case.K, std=case.K**-0.5) for N in case.outputs]
    tensors = Tensors(
        x=random(case.M, case.K).requires_grad_(),
        dys=tuple(random(case.M, N) for N in case.outputs),
        weights=tuple(nn.Parameter(weight, requires_grad=False) for weight in weights),
        adapters={torch.float32: wide, case.dtype: pairs},
    )
    if case.table != "quantised":
        return tensors
    from . import quantised

    return quantised.with_base(case, tensors)


class Group(nn.Module):
    """Layers of one x, each called by itself: what a group is without fastlora."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


class FusedGroup(Group):
    """LoRALinear layers of one x, called through :func:`fastlora.lora_linears`."""

    def __init__(self, layers: list[fastlora.LoRALinear]) -> None:
        super().__init__(layers)
        self.dropout = layers[0].lora_dropout
        self.projections = [
            fastlora.Projection(each.weight, each.lora_A, each.lora_B, None, SCALE)
            for each in layers
        ]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return fastlora.lora_linears(x, self.projections, dropout=self.dropout)


def frozen(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """``nn.Linear`` with no adapter: its forward and its dx."""
    return _contestant(linears(tensors.weights))


def merged(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """The adapter added to the weight once, for inference."""
    wholes = []
    for weight, (a, b) in zip(tensors.weights, tensors.adapters[torch.float32], strict=True):
        wholes.append(nn.Parameter((weight + SCALE * b @ a).to(case.dtype), requires_grad=False))
    return _contestant(linears(wholes))


def fastlora_layer(
    adapter_dtype: torch.dtype | None = None,
    chosen: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Maker:
    def make(case: Case, tensors: Tensors, dropout: float) -> Contestant:
        settings = {"r": case.r, "lora_alpha": SCALE * case.r, "lora_dropout": dropout}
        pairs = tensors.adapters[adapter_dtype or case.adapter_dtype]
        layers = []
        for base, pair in zip(linears(tensors.weights), pairs, strict=True):
            layers.append(fastlora.LoRALinear.from_linear(base, **settings))
            layers[-1].lora_A, layers[-1].lora_B = pair
        return _contestant(layers, FusedGroup, chosen=chosen)

    return make


def peft_layer(optimized: bool = False) -> Maker:
    """PEFT's layers, also after :func:`fastlora.optimize`."""

    def make(case: Case, tensors: Tensors, dropout: float) -> Contestant:
        group = Group(_peft_layers(case, tensors, dropout))
        if optimized:
            fastlora.optimize(group, strict=True)
        return _contestant(list(group.layers), own_mask=True)

    return make


def _contestant(layers: list, as_group: type[Group] = Group, **more: object) -> Contestant:
    """One layer is called as it is; several through a group."""
    return Contestant(layers[0] if len(layers) == 1 else as_group(layers), **more)


def linears(weights: Sequence[nn.Parameter]) -> list[nn.Linear]:
    layers = [nn.Linear(*weight.shape[::-1], bias=False, device="meta") for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = weight
    return layers


def _peft_layers(case: Case, tensors: Tensors, dropout: float) -> list[nn.Module]:
    """PEFT's own, in training mode.  DoRA's magnitude isn't the norm, or it would do nothing."""
    import peft

    config = peft.LoraConfig(
        r=case.r, lora_alpha=SCALE * case.r, lora_dropout=dropout, use_dora=case.kind == "dora",
        target_modules=r"layers\.\d+",
    )  # fmt: skip
    base = Group(linears(tensors.weights))
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).train()
    names = ["default"]
    if case.kind == "two-adapters":
        names.append("other")
        model.add_adapter("other", config, autocast_adapter_dtype=False)
        model.base_model.set_adapter(names)
    layers = list(model.base_model.model.layers)
    pairs = iter(tensors.adapters[case.adapter_dtype])
    for name in names:
        for layer in layers:
            layer.lora_A[name].weight, layer.lora_B[name].weight = next(pairs)
    for layer in layers:
        for magnitude in layer.lora_magnitude_vector.to(case.adapter_dtype).values():
            length = magnitude.weight.shape[-1]
            magnitude.weight.data *= torch.linspace(0.9, 1.1, length).to(magnitude.weight)
    return layers
