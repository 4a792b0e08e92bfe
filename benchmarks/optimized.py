"""The contestants of a PEFT case: PEFT's own layers, and the same layers optimised."""

import copy
from dataclasses import dataclass

import torch

import fastlora
from fastlora.peft.masks import shared_masks

from .layers import Contest, Contestant, Group, peft_layers
from .oracle import TOLERANCE, outputs_and_gradients, worst_error
from .shapes import DROPOUTS, MODELS, OVER_PEFT, Case, Target


@dataclass(frozen=True)
class PeftCase(Case):
    """Layers of PEFT's for one x; ``kind`` is lora, dora, or two-adapters, both active."""

    kind: str = "lora"

    @property
    def id(self) -> str:
        return super().id.replace(self.name, f"{self.name}-{self.kind}", 1)

    @property
    def targets(self) -> tuple[Target, ...]:
        return () if self.quick else (Target("both", OVER_PEFT, 1.0),)


def peft_cases() -> list[PeftCase]:
    """A block's q, k, v, gate and up projections; one layer of the less usual kinds."""
    cases = []
    both = (torch.float32, torch.bfloat16)
    for dropout in DROPOUTS:
        cases += [
            PeftCase(
                M=64,
                K=48,
                outputs=(32, 16),
                r=8,
                dtype=torch.bfloat16,
                adapter_dtype=torch.float32,
                dropout=dropout,
                name="quick",
                kind=kind,
            )
            for kind in ("lora", "dora", "two-adapters")
        ]
        for name, model in MODELS.items():
            cases += [
                PeftCase(
                    M=model.tokens,
                    K=model.hidden,
                    outputs=(model.query, model.key, model.key, model.mlp, model.mlp),
                    r=16,
                    dtype=torch.bfloat16,
                    adapter_dtype=dtype,
                    dropout=dropout,
                    name=f"{name}-block",
                )
                for dtype in both
            ]
        cases += [
            PeftCase(
                M=1024,
                K=1024,
                outputs=(1024,),
                r=16,
                dtype=dtype,
                adapter_dtype=torch.float32,
                dropout=dropout,
                name="layer",
                kind=kind,
            )
            for kind in ("dora", "two-adapters")
            for dtype in both
        ]
    return cases


def make_contest(case: PeftCase) -> Contest:
    torch.manual_seed(0)
    x = torch.randn(case.M, case.K).to(case.dtype).requires_grad_()
    dys = tuple(torch.randn(case.M, N).to(case.dtype) for N in case.outputs)
    theirs = Group(peft_layers(case, case.kind))
    ours = copy.deepcopy(theirs)
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        layer.base_layer = other.base_layer
    fastlora.optimize(ours, strict=True)
    frozen = Group([layer.base_layer for layer in theirs.layers])
    modules = {"frozen": frozen, "fastlora": ours, "peft": theirs}
    contestants = {name: _contestant(module) for name, module in modules.items()}
    return Contest(x, dys, contestants, projections=[], dropout=case.dropout)


def check_results(contest: Contest) -> dict[str, float]:
    """The worst error of both over outputs and gradients; AssertionError beyond tolerance.

    The truth is PEFT's own layers in float64, with the masks that all share.
    """
    theirs, errors = contest.contestants["peft"], {}
    wide = copy.deepcopy(theirs.module).double()
    exact = Contest(
        contest.x.detach().double().requires_grad_(),
        tuple(dy.double() for dy in contest.dys),
        contestants={},
        projections=[],
        dropout=contest.dropout,
    )
    with shared_masks(wide):
        truth = outputs_and_gradients(exact, _contestant(wide))
    for name in ("fastlora", "peft"):
        contestant = contest.contestants[name]
        with shared_masks(contestant.module):
            errors[name] = worst_error(contest, contestant, truth)
    tolerance = TOLERANCE[contest.x.dtype]
    assert errors["fastlora"] <= max(tolerance, 2 * errors["peft"]), errors
    return errors


def _contestant(module: Group) -> Contestant:
    adapter = tuple(parameter for parameter in module.parameters() if parameter.requires_grad)
    return Contestant(module, adapter, module)
