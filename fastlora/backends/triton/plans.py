"""The plans that ``fastlora tune`` measures for one call, each verified against PyTorch first."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...call.projection import Adapter, Base, Output, flatten, layouts_of
from ...call.rows import Rows
from .. import torch as torch_backend
from .. import triton as triton_backend
from ..protocol import BackwardCall, Call
from ..sizes import Sizes
from . import verification
from .supported import kernels, precision_of

_SEED = 7  # any number


class PlanRunner:
    """Runs a call of the given sizes with any plan, on random tensors from its own generator."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.draw, self.sizes = torch.Generator(device).manual_seed(_SEED), sizes
        self.target, m, k = kernels.target_of(device), sizes.rows, sizes.features
        self.ranks = [r for ranks in sizes.ranks for r in ranks]
        # The first axis of experts' tensors: (E,), or () without experts.
        bank = (sizes.experts,) * bool(sizes.experts)

        def random(*shape: int, dtype: torch.dtype = sizes.dtype, spread: float = 1.0) -> Tensor:
            tensor = torch.empty(shape, dtype=dtype, device=device)
            return tensor.normal_(0.0, spread, generator=self.draw)

        def factor(*shape: int, dtype: torch.dtype = sizes.adapter_dtype) -> Tensor:
            return random(*bank, *shape, dtype=dtype, spread=shape[-1] ** -0.5)

        self.x, weights = random(m, k), [factor(n, k, dtype=sizes.dtype) for n in sizes.outs]
        outputs = [
            Output(Base(weight), tuple([Adapter(factor(r, k), factor(n, r)) for r in ranks]))
            for weight, n, ranks in zip(weights, sizes.outs, sizes.ranks, strict=True)
        ]
        layouts = layouts_of(outputs)
        numbers: Any = {"dtype": torch.int64, "device": device}
        # Equal segments: expert e ends at row (e + 1) · m // E.
        ends = torch.arange(1, sizes.experts + 1, **numbers) * m // max(1, sizes.experts)
        rows = Rows(ends.to(torch.int32)) if bank else None
        self.call = Call(layouts, sizes.dropout, torch_backend, rows)
        self.seeds = torch.arange(len(self.ranks), **numbers) if sizes.dropout else None
        self.dys = [random(m, n) for n in sizes.outs] if sizes.backward else []
        hs = [random(m, r) for r in self.ranks] if sizes.backward else []
        self.tensors = [self.x, *flatten(outputs, layouts), *hs, *self.dys]

    def default(self) -> "kernels.Plan":
        """The plan without a measurement."""
        return kernels.plan.rule(self.target, *self._choice(), self.sizes.backward)

    def plans(self) -> "list[kernels.Plan]":
        """In place, fused with the default tiles, then fused with other tiles, nearest first.

        In this order, kernels that all plans share are verified before the kernels of single tiles.
        """
        tiles = kernels.config.candidates("gemm_lowrank", self.target, self._fused_call())
        # tiles[0] is the default, which the plan FUSED has.
        others = [kernels.Plan(fused=True, gemm=config) for config in tiles[1:]]
        return [kernels.plan.IN_PLACE, kernels.plan.FUSED, *others]

    def row(self, plan: "kernels.Plan") -> "kernels.plan.Row":
        """The measurement that makes calls of these sizes follow ``plan``."""
        call, depth = self._choice()
        size = (call.m, call.n, depth, call.r, call.itemsize, call.masked, call.projections)
        backward, experts = self.sizes.backward, self.sizes.experts
        return kernels.plan.Row(self.target.device, *size, plan, backward, experts)

    def why_wrong(self, plan: "kernels.Plan") -> str:
        """Why the plan's results differ from PyTorch's; "" if they don't.

        Errors of a compiler are raised.
        """
        with warnings.catch_warnings(record=True) as said, kernels.plan.use_plan(plan):
            warnings.simplefilter("always")
            self._by(triton_backend)(self.tensors)  # verified as any first call
        for each in self.dys or [self.x]:  # new numbers: results left in memory are wrong now
            each.normal_(generator=self.draw)
        before = verification.fallbacks
        results = self.step(plan)()
        if verification.fallbacks > before:
            return str(said[-1].message) if said else "it doesn't run, and PyTorch runs instead"
        # plain: roles for which ``compared`` casts every tensor to a wider dtype.
        by_torch, plain = self._by(torch_backend), [""] * len(self.tensors)
        right = by_torch(self.tensors)
        return verification.compared(by_torch, self.tensors, plain, results, right)

    def step(self, plan: "kernels.Plan") -> Callable[[], list]:
        """The pass by the kernels."""
        run = self._by(triton_backend)

        def step() -> list:
            with kernels.plan.use_plan(plan):
                return run(self.tensors)

        return step

    def _by(self, backend: Any) -> Callable[[Sequence[Tensor]], list]:
        """The pass as a function of the tensors."""
        # The backward computes dx and the adapters' gradients, but no gradient of a weight.
        alike = [Output(Base(False), (Adapter(True, True),) * len(r)) for r in self.sizes.ranks]
        needs = [True, *flatten(alike, self.call.layouts)]

        def run(tensors: Sequence[Tensor]) -> list:
            inputs, others = tensors[: len(needs)], tensors[len(needs) :]
            if not self.sizes.backward:
                ys, hs = backend.forward(inputs, self.seeds, self.call)
                return [*ys, *hs]
            hs, dys = others[: len(self.ranks)], others[len(self.ranks) :]
            given = BackwardCall(dys, inputs, hs, needs, self.seeds, self.call)
            return backend.backward(given)

        return run

    def _choice(self) -> "tuple[kernels.config.Call, int]":
        """The key of a plan's choice: the call, and its depth."""
        s = self.sizes
        n, depth = (s.features, sum(s.outs)) if s.backward else (s.outs[0], s.features)
        size, count = s.dtype.itemsize, len(self.ranks)
        kind = (size, precision_of(self.x), count, s.dropout > 0)
        call = kernels.config.Call(s.rows, n, max(self.ranks), *kind, segments=s.experts)
        return call, depth

    def _fused_call(self) -> "kernels.config.Call":
        """The call that the launch of a fused plan chooses its tiles for (``gemm_lowrank``)."""
        (call, _), s, ranks = self._choice(), self.sizes, self.ranks
        # As in linear.py, y's launch also computes h only for one adapter without dropout.
        makes_h = not (s.backward or s.dropout or s.experts) and len(ranks) == 1
        turned = kernels.faults.races_when_turned(self.target, call.precision, call.itemsize)
        rows = (call.n, *(s.outs if s.backward else [s.features]))  # of operands, in elements
        return replace(
            call,
            masked=call.masked and s.backward,
            projections=min(len(ranks), kernels.config.MAX_PROJECTIONS),
            project=makes_h and kernels.one_launch_pays(self.x, *ranks),
            pointers=(s.backward and turned) or any(n * call.itemsize % 16 for n in rows),
        )
