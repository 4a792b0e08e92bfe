"""TRL's log-probabilities and entropies, and other numbers of rows, from lazy logits."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlora.layers.logits_functions import lazy_logits
from fastlora.ops.loss import head_of
from fastlora.projection import Base, Output

K, V = 16, 50
TARGET = torch.randint(0, V, (2, 6), generator=torch.Generator().manual_seed(1))


def draw(dtype: torch.dtype, bias: bool = True) -> list[Tensor]:
    """x [2, 7, K], weight and bias, all trained."""
    torch.manual_seed(0)
    shapes = [(2, 7, K), (V, K), *[(V,)] * bias]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def lazy(leaves: list[Tensor]) -> Tensor:
    x, *head = leaves
    return lazy_logits(head_of(x, Output(Base(*head)), 0.0))


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """TRL's, for float32 logits."""
    selected = torch.gather(logits, dim=-1, index=index.unsqueeze(-1))
    lse = torch.stack([torch.logsumexp(rows, dim=-1) for rows in logits])
    return (selected - lse.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """TRL's."""
    found = []
    for chunk in logits.reshape(-1, V).split(5):
        logps = functional.log_softmax(chunk, dim=-1)
        found.append(-(torch.exp(logps) * logps).sum(-1))
    return torch.cat(found).reshape(logits.shape[:-1])


def chosen(logits: Tensor) -> Tensor:
    return torch.gather(logits, -1, TARGET.unsqueeze(-1)).squeeze(-1)


def mixed(logits: Tensor) -> Tensor:
    """The two outputs of the pass with gradients that don't cancel."""
    logits = torch.tanh(logits / 5.0) * 5.0
    return 3.0 * chosen(logits) + logits.logsumexp(-1) * torch.arange(6.0)


LOSSES = {
    "log-probabilities": lambda z: selective_log_softmax(z / 0.7, TARGET),
    "logit-alone": chosen,
    "logit-and-log-sum-exp": mixed,
}


def judged(function, dtype: torch.dtype, leaves: list[Tensor], logits: Tensor) -> list[Tensor]:
    value = function(logits.float()[..., :-1, :] if dtype == torch.bfloat16 else logits[:, :-1])
    weights = torch.linspace(-1.0, 1.0, value.numel()).view(value.shape)
    return [value, *torch.autograd.grad((value * weights).sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "view-of-bf16"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_pass_gives_logits_and_log_sum_exp_with_their_gradients(name, dtype):
    leaves = draw(dtype)
    logits = lazy(leaves)
    found = judged(LOSSES[name], dtype, leaves, logits)
    assert not logits.cell.call.is_computed
    dense = judged(LOSSES[name], dtype, leaves, functional.linear(*leaves))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    oracle = judged(LOSSES[name], torch.float64, exact, functional.linear(*exact))
    for ours, theirs, right in zip(found, dense, oracle, strict=True):
        error, allowed = (torch.dist(each.double(), right) for each in (ours, theirs))
        assert error <= 1.5 * allowed + max(torch.finfo(dtype).eps, 1e-6) * right.norm()


def test_a_confident_row_s_log_probability_is_as_precise_as_the_loss():
    leaves = draw(torch.bfloat16)
    with torch.no_grad():
        leaves[0].mul_(8.0)
        target = functional.linear(*leaves).argmax(-1)
    found = selective_log_softmax(lazy(leaves).float(), target)
    expected = -functional.cross_entropy(
        functional.linear(*leaves).float().flatten(0, 1), target.flatten(), reduction="none"
    )
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-3, atol=1e-5)


REDUCTIONS = {
    "entropy": entropy_from_logits,
    "argmax": lambda z: z.argmax(-1),
    "mean": lambda z: z.mean(dim=-1, keepdim=True),
    "mean-of-selected": lambda z: z.index_select(0, torch.tensor([1, 1])).mean(-1),
    "log-sum-exp": lambda z: torch.logsumexp(z, 2),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_numbers_of_rows_need_no_logits(name):
    leaves, reduce = draw(torch.bfloat16), REDUCTIONS[name]
    logits = lazy(leaves)
    with torch.no_grad():
        found = reduce(logits.float()[:, :-1])
        expected = reduce(functional.linear(*leaves).float()[:, :-1])
    assert not logits.cell.call.is_computed
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reader", [nn.Identity(), torch.detach], ids=["same", "detached"])
def test_a_log_sum_exp_has_the_gradient_of_its_own_logits(reader):
    """The pass of ``gather`` on the logits must not lend its graph to a detached copy."""
    leaves = draw(torch.float32)
    logits = lazy(leaves)
    torch.gather(logits, -1, TARGET[:, :1].expand(2, 7).unsqueeze(-1))
    lse = torch.logsumexp(reader(logits), -1)
    assert lse.requires_grad == reader(logits).requires_grad
    torch.testing.assert_close(lse, torch.logsumexp(functional.linear(*leaves), -1))
