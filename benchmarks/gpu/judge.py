"""What comes before any time: outputs and gradients, compared with the float64 oracle."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..oracle import TOLERANCE, error, truth, worst_error
from ..shapes import Case
from .candidates import Candidate, Inputs, contest_of
from .cases import DECODE


class Judge:
    """Judges all candidates of a case on one set of tensors; the truth is computed once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._truths: dict[object, list[Tensor]] = {}

    def judge(self, candidate: Candidate, inputs: Inputs) -> dict:
        """The worst error, and the dropout it was found with; AssertionError beyond tolerance."""
        dropout = 0.0 if candidate.own_mask else self.case.dropout
        contestant = candidate.contestant(self.case, inputs, dropout)
        if self.case.M <= DECODE:
            with torch.no_grad():
                ys = contestant.outputs(inputs.x)
            worst = self.check(candidate, inputs, ys, dropout)
        else:
            expected = self._expected(candidate, inputs, dropout)
            worst = worst_error(contest_of(self.case, inputs, dropout), contestant, expected)
            self._limit(worst)
        return {"error": float(f"{worst:.3g}"), "dropout": dropout}

    def check(
        self, candidate: Candidate, inputs: Inputs, found: Sequence[Tensor], dropout: float
    ) -> float:
        """The same for results that are there already, or the first of them."""
        expected = self._expected(candidate, inputs, dropout)
        worst = max(error(got, want) for got, want in zip(found, expected, strict=False))
        self._limit(worst)
        return worst

    def _limit(self, worst: float) -> None:
        tolerance = TOLERANCE[self.case.dtype]
        if not worst <= tolerance:
            raise AssertionError(f"{worst:.2g} from the oracle, beyond {tolerance:.2g}")

    def _expected(self, candidate: Candidate, inputs: Inputs, dropout: float) -> list[Tensor]:
        key = "frozen" if candidate.name == "frozen" else dropout
        if key not in self._truths:
            self._truths[key] = (
                _frozen_truth(inputs)
                if key == "frozen"
                else truth(contest_of(self.case, inputs, dropout))
            )
        return self._truths[key]


def _frozen_truth(inputs: Inputs) -> list[Tensor]:
    x = inputs.x.detach().double().requires_grad_()
    ys = [x @ weight.double().T for weight in inputs.weights]
    torch.autograd.backward(ys, [dy.double() for dy in inputs.dys])
    return [*(y.detach() for y in ys), x.grad]
