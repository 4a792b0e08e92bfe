"""What is judged before any time: results, by the float64 oracle, and bytes saved for backward."""

import torch
from torch import Tensor

from fastlora import reference
from fastlora.backends.torch import dropout_mask
from fastlora.ops.functional import draw_seed

from .layers import Contest, Contestant

# Of the largest error over the largest value, and of the norms.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
_SEED = 1234


def check_results(contest: Contest) -> dict[str, float]:
    """The worst error of each contestant over its outputs and gradients.

    AssertionError if one is beyond tolerance.  PEFT draws its dropout by itself, so it is judged
    without dropout only.
    """
    expected = truth(contest)
    judged = [name for name in contest.contestants if name != "frozen"]
    if contest.dropout > 0:
        judged.remove("peft")
    errors = {}
    for name in judged:
        errors[name] = worst_error(contest, contest.contestants[name], expected)
        tolerance = TOLERANCE[contest.x.dtype]
        assert errors[name] <= tolerance, (
            f"{name} is {errors[name]:.2g} from the oracle, beyond {tolerance:.2g}"
        )
    return errors


def count_saved(contest: Contest) -> dict[str, dict[str, int]]:
    """Bytes that each contestant's forward keeps for backward: x itself, and what is added to it.

    Whole storages are counted, each once, since that is what stays in memory; parameters are not.
    """
    return {
        name: _count_saved(contest, contestant) for name, contestant in contest.contestants.items()
    }


def check_saved(contest: Contest, saved: dict[str, int]) -> None:
    """AssertionError if fastlora keeps more than x, and each projection's h [M, r] and seed."""
    x = contest.x
    ranks = sum(len(projection.lora_a) for projection in contest.projections)
    seeds = 8 * len(contest.projections) if contest.dropout > 0 else 0
    allowed = len(x) * ranks * x.element_size() + seeds
    assert saved["added"] <= allowed, (
        f"fastlora saves {saved['added']} bytes beside x, but h and seeds are {allowed}"
    )


def worst_error(contest: Contest, contestant: Contestant, expected: list[Tensor]) -> float:
    """The worst error over a contestant's outputs and gradients, of those in ``expected``."""
    found = outputs_and_gradients(contest, contestant)
    return max(error(got, want) for got, want in zip(found, expected, strict=True))


def truth(contest: Contest) -> list[Tensor]:
    """What the oracle has for a contest: outputs, and gradients of x and of every adapter."""
    masks = None
    if contest.dropout > 0:
        torch.manual_seed(_SEED)
        seeds = draw_seed(len(contest.projections), contest.x.device)
        masks = [dropout_mask(seed, tuple(contest.x.shape), contest.dropout) for seed in seeds]
    x = contest.x.detach().double().requires_grad_()
    projections = [
        (
            projection.weight.double(),
            projection.lora_a.detach().double().requires_grad_(),
            projection.lora_b.detach().double().requires_grad_(),
            None,
            projection.scale,
        )
        for projection in contest.projections
    ]
    ys = reference.lora_linears(x, projections, dropout=contest.dropout, masks=masks)
    torch.autograd.backward(ys, [dy.double() for dy in contest.dys])
    adapter = [tensor for projection in projections for tensor in projection[1:3]]
    return [*(y.detach() for y in ys), x.grad, *(tensor.grad for tensor in adapter)]


def outputs_and_gradients(contest: Contest, contestant: Contestant) -> list[Tensor]:
    """Outputs, and gradients of x and of the adapter, from a random state of their own."""
    torch.manual_seed(_SEED)
    ys = contestant.outputs(contest.x)
    torch.autograd.backward(ys, contest.dys)
    leaves = [contest.x, *contestant.adapter]
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return [*(y.detach() for y in ys), *gradients]


def error(got: Tensor, want: Tensor) -> float:
    """The worse of largest difference over largest value, and ratio of norms; NaN is infinite."""
    difference = got.double() - want
    worst = max(difference.abs().max() / want.abs().max(), difference.norm() / want.norm())
    return float("inf") if worst.isnan() else worst.item()


def _count_saved(contest: Contest, contestant: Contestant) -> dict[str, int]:
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ys = contestant.outputs(contest.x)
    for parameter in contestant.module.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    x = kept.pop(contest.x.untyped_storage().data_ptr(), None)
    added = sum(storage.nbytes() for storage in kept.values())
    del ys
    return {"x": 0 if x is None else x.nbytes(), "added": added}
