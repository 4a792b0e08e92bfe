"""Who takes part: the frozen layer, fastlora by each of its ways, and its peers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import fastlora
from fastlora.kernels.plan import FUSED, IN_PLACE, Plan, use_plan

from ..layers import Contest, Contestant, Group
from ..shapes import Case
from .cases import DECODE
from .peers import addmm_chain, peft_formula, peft_layers

Forward = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Inputs:
    """One set of tensors.  The float32 adapters hold the very values of the others."""

    x: Tensor
    dys: tuple[Tensor, ...]
    weights: tuple[nn.Parameter, ...]
    adapters: dict[torch.dtype, list[tuple[nn.Parameter, nn.Parameter]]]
    scale: float


@dataclass(frozen=True)
class Candidate:
    """``make`` gives the forward for one case, one set of tensors, an adapter and a dropout.

    ``own_mask``: it draws a dropout mask of its own, and is judged without dropout.
    """

    name: str
    make: Callable[[Case, Inputs, list, float], Forward]
    adapter: torch.dtype | None = torch.bfloat16
    plan: Plan | None = None
    own_mask: bool = False
    inference: bool = True
    training: bool = True
    compiled: bool = False

    def joins(self, case: Case) -> bool:
        return self.inference if case.M <= DECODE else self.training

    def context(self) -> AbstractContextManager:
        """Around forward and backward: autograd's own threads follow it."""
        return nullcontext() if self.plan is None else use_plan(self.plan)

    def contestant(self, case: Case, inputs: Inputs, dropout: float) -> Contestant:
        pairs = [] if self.adapter is None else inputs.adapters[self.adapter]
        leaves = tuple(parameter for pair in pairs for parameter in pair)
        module = nn.ParameterList([*inputs.weights, *leaves])
        return Contestant(self.make(case, inputs, pairs, dropout), leaves, module)


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    torch.manual_seed(seed)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device).mul_(std).to(case.dtype)

    same = [
        (
            nn.Parameter(random(case.r, case.K, std=case.K**-0.5)),
            nn.Parameter(random(N, case.r, std=case.r**-0.5)),
        )
        for N in case.outputs
    ]
    return Inputs(
        x=random(case.M, case.K).requires_grad_(),
        dys=tuple(random(case.M, N) for N in case.outputs),
        weights=tuple(
            nn.Parameter(random(N, case.K, std=case.K**-0.5), requires_grad=False)
            for N in case.outputs
        ),
        adapters={
            case.dtype: same,
            torch.float32: [(nn.Parameter(a.float()), nn.Parameter(b.float())) for a, b in same],
        },
        scale=2.0,
    )


def contest_of(case: Case, inputs: Inputs, dropout: float) -> Contest:
    """For the oracle: it needs tensors, and no contestants."""
    projections = _projections(inputs, inputs.adapters[case.dtype])
    return Contest(inputs.x, inputs.dys, {}, projections, dropout)


def candidates(compiler: str) -> list[Candidate]:
    """The frozen layer first.  ``compiler``: the backend of torch.compile."""
    float32 = torch.float32
    both = (("", torch.bfloat16), (", float32 adapter", float32))
    listed = [
        Candidate("frozen", _frozen, adapter=None),
        Candidate("fused", _fastlora("triton"), plan=FUSED),
        Candidate("in place", _fastlora("triton"), plan=IN_PLACE),
        Candidate("torch backend", _fastlora("torch")),
        Candidate("fused, float32 adapter", _fastlora("triton"), float32, FUSED, inference=False),
        Candidate("addmm chain", _each(addmm_chain), own_mask=True),
    ]
    for suffix, dtype in both:
        listed.append(Candidate(f"peft formula{suffix}", _each(peft_formula), dtype, own_mask=True))
    if find_spec("peft") is not None:
        for suffix, dtype in both:
            listed.append(Candidate(f"peft{suffix}", _peft, dtype, own_mask=True))
    listed.append(Candidate("merged", _merged, adapter=None, training=False))
    listed.append(
        Candidate("compiled peft formula", _compiled(compiler), own_mask=True, compiled=True)
    )
    return listed


def _frozen(case: Case, inputs: Inputs, pairs: list, dropout: float) -> Forward:
    return lambda x: tuple(linear(x, weight) for weight in inputs.weights)


def _merged(case: Case, inputs: Inputs, pairs: list, dropout: float) -> Forward:
    pairs = inputs.adapters[torch.float32]
    with torch.no_grad():
        merged = [
            (weight.float() + inputs.scale * b @ a).to(weight.dtype)
            for weight, (a, b) in zip(inputs.weights, pairs, strict=True)
        ]
    return lambda x: tuple(linear(x, weight) for weight in merged)


def _fastlora(backend: str):
    def make(case: Case, inputs: Inputs, pairs: list, dropout: float) -> Forward:
        projections = _projections(inputs, pairs)
        return lambda x: fastlora.lora_linears(x, projections, dropout=dropout, backend=backend)

    return make


def _each(layer: Callable[..., Tensor]):
    """A peer that knows no groups: each projection by itself."""

    def make(case: Case, inputs: Inputs, pairs: list, dropout: float) -> Forward:
        def forward(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(
                layer(x, weight, a, b, inputs.scale, dropout)
                for weight, (a, b) in zip(inputs.weights, pairs, strict=True)
            )

        return forward

    return make


def _compiled(compiler: str):
    group = torch.compile(_peft_group, backend=compiler, fullgraph=True, dynamic=False)

    def make(case: Case, inputs: Inputs, pairs: list, dropout: float) -> Forward:
        return lambda x: group(x, inputs.weights, pairs, inputs.scale, dropout)

    return make


def _peft_group(x: Tensor, weights, pairs: list, scale: float, p: float) -> tuple[Tensor, ...]:
    return tuple(
        peft_formula(x, weight, a, b, scale, p)
        for weight, (a, b) in zip(weights, pairs, strict=True)
    )


def _peft(case: Case, inputs: Inputs, pairs: list, dropout: float) -> Forward:
    layers = peft_layers(inputs.weights, pairs, inputs.scale, dropout)
    return layers[0] if len(layers) == 1 else Group(layers)


def _projections(inputs: Inputs, pairs: list) -> list[fastlora.Projection]:
    return [
        fastlora.Projection(weight, a, b, None, inputs.scale)
        for weight, (a, b) in zip(inputs.weights, pairs, strict=True)
    ]
