"""The contestants of a PEFT case: PEFT's own layers, and the same layers optimised."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

import fastlora
from fastlora.integrations.peft.masks import shared_masks

from .layers import Contest, Contestant, Group
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
        quick = (64, 48, (32, 16), 8, torch.bfloat16, torch.float32, dropout)
        cases += [PeftCase(*quick, "quick", kind) for kind in ("lora", "dora", "two-adapters")]
        for name, model in MODELS.items():
            outputs = (model.query, model.key, model.key, model.mlp, model.mlp)
            size = (model.tokens, model.hidden, outputs, 16)
            cases += [
                PeftCase(*size, torch.bfloat16, dtype, dropout, f"{name}-block") for dtype in both
            ]
        cases += [
            PeftCase(1024, 1024, (1024,), 16, dtype, torch.float32, dropout, "layer", kind)
            for kind in ("dora", "two-adapters")
            for dtype in both
        ]
    return cases


def make_contest(case: PeftCase) -> Contest:
    torch.manual_seed(0)
    x = torch.randn(case.M, case.K).to(case.dtype).requires_grad_()
    dys = tuple(torch.randn(case.M, N).to(case.dtype) for N in case.outputs)
    theirs = _peft_group(case)
    ours = copy.deepcopy(theirs)
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        layer.base_layer = other.base_layer
    fastlora.optimize(ours, strict=True)
    frozen = Group([layer.base_layer for layer in theirs.layers])
    modules = {"frozen": frozen, "fastlora": ours, "peft": theirs}
    return Contest(
        x, dys, {name: _contestant(module) for name, module in modules.items()}, [], case.dropout
    )


def check_results(contest: Contest) -> dict[str, float]:
    """The worst error of both over outputs and gradients; AssertionError beyond tolerance.

    The truth is PEFT's own layers in float64, with the masks that all share.
    """
    theirs, errors = contest.contestants["peft"], {}
    wide = copy.deepcopy(theirs.module).double()
    exact = Contest(
        contest.x.detach().double().requires_grad_(),
        tuple(dy.double() for dy in contest.dys),
        {},
        [],
        contest.dropout,
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


def _peft_group(case: PeftCase) -> Group:
    """PEFT's layers in training mode, with adapters that change something."""
    import peft

    base = Group([nn.Linear(case.K, N, bias=False, dtype=case.dtype) for N in case.outputs])
    config = peft.LoraConfig(
        r=case.r,
        lora_alpha=2 * case.r,
        lora_dropout=case.dropout,
        target_modules=r"layers\.\d+",
        use_dora=case.kind == "dora",
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).train()
    if case.kind == "two-adapters":
        model.add_adapter("other", config, autocast_adapter_dtype=False)
        model.base_model.set_adapter(["default", "other"])
    group = model.base_model.model
    for layer in group.layers:
        _randomise(layer, case)
    return group


def _randomise(layer: nn.Module, case: PeftCase) -> None:
    with torch.no_grad():
        layer.base_layer.weight.normal_(std=case.K**-0.5)
        for name in layer.lora_A:
            down, up = layer.lora_A[name].to(case.adapter_dtype), layer.lora_B[name]
            down.weight.normal_(std=case.K**-0.5)
            up.to(case.adapter_dtype).weight.normal_(std=case.r**-0.5)
        for magnitude in layer.lora_magnitude_vector.values():
            weight = magnitude.to(case.adapter_dtype).weight
            weight.mul_(1.0 + 0.1 * torch.rand_like(weight))
