"""The checks before timing: results against the float64 oracle, and bytes saved for backward."""

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

import fastlora
from fastlora.backends.products import h_dtype

from .cases import Case
from .contestants import SCALE, Contestant, Maker, Tensors
from .lineup import makers_for

# Limits of the largest error as a ratio to the largest value, and of the same ratio of norms.  The
# limit of bfloat16 allows four roundings of at most 2⁻⁸ (h, the base product, the sum, a group's
# next sum); sums in tensor cores add 3e-5.  float32 products here don't use them (docs/maths.md).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
# The limits of rows in 8 bits: of a layer, and of all gradients of a step.
_IN_8_BITS, _IN_16_BITS = (2e-2, 0.2), (TOLERANCE[torch.bfloat16], 0.1)
_SEED = 1234


class Judge:
    """Verifies the contestants of a case; each expected result is computed once.

    ``known_masks``: fastlora is this commit's, so that its dropout masks can be computed here.
    """

    def __init__(self, case: Case, tensors: Tensors, known_masks: bool = True) -> None:
        self.case, self.tensors, self.known_masks = case, tensors, known_masks
        self.shared_masks: Callable[[nn.Module], AbstractContextManager] = nullcontext
        if case.by_peft:  # PEFT's dropout gets fastlora's masks
            from fastlora.peft.baseline import shared_masks

            self.shared_masks = shared_masks
        self._truths: dict[tuple[bool, float], list[Tensor]] = {}

    def error(self, name: str, make: Maker, backward: bool = True) -> float:
        """The worst error of outputs and gradients.  Raises AssertionError beyond the tolerance."""
        dropout = self.case.dropout
        contestant = make(self.case, self.tensors, dropout)
        if not self.known_masks or (contestant.own_mask and not self.case.by_peft):
            dropout = 0.0
            contestant = make(self.case, self.tensors, dropout)
        with contestant.chosen(), self.shared_masks(contestant.module):
            found = results(contestant, self.tensors, backward)
        key = (name == "frozen", dropout)
        if key not in self._truths:
            self._truths[key] = self._truth(*key)
        # An inference has only outputs, and the frozen layer has no adapter.
        tolerance = TOLERANCE[self.case.dtype]
        if self.case.in_8_bits:
            of_layer, of_step = _IN_8_BITS if name == "fastlora" else _IN_16_BITS
            tolerance = of_step if self.case.block else of_layer
        return checked(zip(found, self._truths[key], strict=False), tolerance)

    def _truth(self, frozen: bool, dropout: float) -> list[Tensor]:
        """The expected outputs, and gradients of x and of every adapter."""
        wide = widened(self.tensors)
        if self.case.by_peft:
            make = makers_for(self.case)["frozen" if frozen else "peft"]
            contestant = make(self.case, self.tensors, dropout)
            module = copy.deepcopy(contestant.module).double()
            with self.shared_masks(module):
                return results(replace(contestant, module=module), wide)
        if self.case.table == "mixed" and not frozen:
            return _truth_of_a_mixed_batch(wide)
        pairs = wide.adapters[torch.float64][: len(wide.weights)]
        projections = [
            fastlora.Projection(weight, a, b, None, 0.0 if frozen else SCALE)
            for weight, (a, b) in zip(wide.weights, pairs, strict=True)
        ]
        masks = self._masks(wide.x, dropout) if dropout > 0 else None
        ys = fastlora.reference.lora_linears(wide.x, projections, dropout=dropout, masks=masks)
        leaves = [wide.x] if frozen else [wide.x, *chain(*pairs)]
        gradients = torch.autograd.grad(ys, leaves, wide.dys)
        return [*(y.detach() for y in ys), *gradients]

    def _masks(self, x: Tensor, dropout: float) -> list[Tensor]:
        """The masks that fastlora draws from the judge's random state."""
        from fastlora.backends.dropout import dropout_mask
        from fastlora.ops.node import draw_seed

        torch.manual_seed(_SEED)
        seeds = draw_seed(len(self.case.outputs), x.device)
        return [dropout_mask(seed, tuple(x.shape), dropout) for seed in seeds]


def _truth_of_a_mixed_batch(wide: Tensors) -> list[Tensor]:
    """The expected y, and gradients of x and of every adapter; each adapter has one sequence."""
    import oracles  # late: tests/support isn't on the path of every program that measures

    pairs = wide.adapters[torch.float64]
    indices = torch.arange(len(pairs)).repeat_interleave(len(wide.x) // len(pairs))
    lora_a, lora_b = map(list, zip(*pairs, strict=True))
    y = oracles.multi_lora_linear(
        wide.x, wide.weights[0], lora_a, lora_b, indices, scales=[SCALE] * len(pairs)
    )
    return [y.detach(), *torch.autograd.grad(y, [wide.x, *chain(*pairs)], wide.dys)]


def widened(tensors: Tensors) -> Tensors:
    """The same values in float64."""

    def wide(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.detach().double(), requires_grad=tensor.requires_grad)

    pairs = [(wide(a), wide(b)) for a, b in tensors.adapters[torch.float32]]
    dys, weights = (tuple(map(wide, each)) for each in (tensors.dys, tensors.weights))
    return Tensors(wide(tensors.x), dys, weights, {torch.float64: pairs})


def results(contestant: Contestant, tensors: Tensors, backward: bool = True) -> list[Tensor]:
    """Outputs, and gradients of x and of the adapter, from a fixed random state."""
    torch.manual_seed(_SEED)
    with torch.set_grad_enabled(backward):
        ys = contestant.module(tensors.x)
    ys = (ys,) if isinstance(ys, Tensor) else ys
    if not backward:
        return list(ys)
    gradients = torch.autograd.grad(ys, contestant.leaves(tensors.x), tensors.dys)
    return [*(y.detach() for y in ys), *gradients]


def checked(pairs: Iterable[tuple[Tensor, Tensor]], tolerance: float) -> float:
    """The worst error of results and expected results; AssertionError beyond the tolerance.

    A pair's error is the larger of two ratios: of the largest difference to the largest value, and
    of the same norms.
    """
    worst = 0.0
    for got, want in pairs:
        difference = got.double() - want
        for each in (difference.abs().max() / want.abs().max(), difference.norm() / want.norm()):
            worst = each.item() if not each <= worst else worst  # also if it is NaN
            if not worst <= tolerance:
                raise AssertionError(f"{worst:.2g} from the oracle, beyond {tolerance:.2g}")
    return worst


def kept_for_backward(contestant: Contestant, tensors: Tensors) -> dict[str, int]:
    """Bytes that the forward saves for backward: of x, and of all other tensors ("added").

    Whole storages are counted, each once, because whole storages stay in memory.  Parameters are
    not counted.
    """
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with contestant.chosen(), hooks:
        ys = contestant.module(tensors.x)
    for own in (*contestant.module.parameters(), *contestant.module.buffers()):
        for tensor in _plain(own):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
    x = kept.pop(tensors.x.untyped_storage().data_ptr(), None)
    added = sum(storage.nbytes() for storage in kept.values())
    del ys
    return {"x": 0 if x is None else x.nbytes(), "added": added}


def _plain(parameter: Tensor) -> list[Tensor]:
    """The inner tensors of torchao's parameter; any other parameter itself."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return [parameter]
    return [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]


def check_kept(case: Case, kept: dict[str, int], tensors: Tensors) -> None:
    """Raise AssertionError if fastlora saves more than x, and each projection's h [M, r] and seed.

    The scales of a quantized base, which are no parameters, are also allowed.  With few rows on a
    CPU, a copy of x in the adapter's dtype is allowed; with dropout, the mask and the dropped x
    replace the seed.
    """
    M, K, n = case.M, case.K, len(case.outputs)
    if case.has_no_node:
        own, adapter = case.dtype.itemsize, case.adapter_dtype.itemsize
        allowed = M * case.r * adapter
        allowed += M * K * adapter if case.dropout or adapter != own else 0
        allowed += M * K if case.dropout else 0  # the mask
    else:
        allowed = n * M * case.r * h_dtype(case.dtype, tensors.x.device).itemsize
        allowed += 8 * n if case.dropout else 0
    if tensors.base is not None:
        from fastlora.formats import quantized_weight

        _, *scales = quantized_weight(tensors.base).weight.tensors
        allowed += sum(each.nbytes for each in scales)
    if kept["added"] > allowed:
        raise AssertionError(
            f"saves {kept['added']} bytes in addition to x, but {allowed} are allowed"
        )
