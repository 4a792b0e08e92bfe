"""The judge of every op test: the float64 oracle, and a budget from what PyTorch loses."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastlora import Projection
from fastlora.projection import Base, Output, as_outputs

K, HIDDEN, N = 24, 40, 20  # of a gated MLP
# Of a layer and of its adapter.
USUAL_DTYPES = {
    "f64": (torch.float64, torch.float64),
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-f32": (torch.bfloat16, torch.float32),
    "f16-f32": (torch.float16, torch.float32),
}


def make_projection(
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = False,
) -> Projection:
    """Random tensors that all require gradients but the base weight."""
    weight, lora_a, lora_b = (
        torch.randn(size, dtype=torch.float64) for size in ((n, k), (r, k), (n, r))
    )
    lora_a, lora_b = (t.to(adapter_dtype or dtype).requires_grad_() for t in (lora_a, lora_b))
    shift = torch.randn(n).to(dtype).requires_grad_() if bias else None
    return Projection(weight.to(dtype), lora_a, lora_b, shift, 0.75)


def make_outputs(
    dtype: torch.dtype, adapter_dtype: torch.dtype | None = None, k: int = 16
) -> list[Output]:
    """Three outputs of unlike sizes: with a bias and an adapter, with two adapters, with none."""
    one, two, more = (
        make_projection(n, k, r, dtype, adapter_dtype, bias=b)
        for n, r, b in ((6, 2, True), (9, 3, False), (9, 1, False))
    )
    weight = torch.randn(7, k, dtype=torch.float64).to(dtype)
    return [*as_outputs([one, two, more._replace(weight=None)]), Output(Base(weight))]


def make_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def make_mlp(
    dtype=torch.float32, adapter_dtype=None, bias=False, adapted="gud", sizes=(K, HIDDEN, N)
) -> list[Output]:
    """gate, up and down, with numbers of usual sizes; those whose letters are named have adapters.

    All that an adapter is made of trains, and biases do.
    """
    k, hidden, n = sizes
    outputs = []
    for letter, rows, columns, r in (("g", hidden, k, 3), ("u", hidden, k, 8), ("d", n, hidden, 5)):
        projection = make_projection(rows, columns, r, dtype, adapter_dtype, bias)
        with torch.no_grad():
            for tensor in projection[:3]:
                tensor.mul_(tensor.shape[1] ** -0.5)
        (output,) = as_outputs([projection])
        outputs.append(output if letter in adapted else output._replace(adapters=()))
    return outputs


def assert_close(
    name: str, value: Tensor, truth: Tensor, eager: Tensor, size: Tensor, dtype: torch.dtype
) -> None:
    """error ≤ 2 · error(eager) + a few units in the last place.

    The unit is that of the coarser of value's dtype and x's, ``dtype``.

    ``size`` is the sum of the absolute values of all terms: where they cancel, the rounding of h or
    dh, half a unit, is a share of that.
    """
    assert value.shape == truth.shape, name
    assert value.dtype == eager.dtype, f"{name}: {value.dtype}, eager has {eager.dtype}"
    if value.numel() == 0:
        return
    eps = max(torch.finfo(value.dtype).eps, torch.finfo(dtype).eps)
    share = 1.0 if dtype == torch.float64 else 0.5  # in float64 the oracle rounds as much as we do
    truth = truth.detach()
    error, eager_error = ((t.detach().double() - truth).abs().max() for t in (value, eager))
    budget = 2 * eager_error + eps * (2 * truth.abs().max() + share * size.detach().abs().max())
    assert error <= budget, f"{name}: {error:.3g}, budget {budget:.3g}, eager {eager_error:.3g}"


def random_like(y: Tensor) -> Tensor:
    return torch.randn(y.shape, dtype=torch.float64).to(y.dtype)


def check(
    run: Callable[[], Tensor | Sequence[Tensor]],
    textbook: Callable[[dict[str, Tensor]], Tensor | Sequence[Tensor]],
    leaves: dict[str, Tensor],
    make_dy: Callable[[Tensor], Tensor] = random_like,
    rounded: torch.dtype | None = None,
    mixed: bool = False,
) -> dict[str, Tensor]:
    """Every output and gradient of ``run``, no further from the truth than PyTorch's own error is.

    ``textbook``: the same of ``leaves``, x among them, in another dtype.  ``rounded``: the dtype
    with the precision of the products, if that isn't x's.  ``mixed``: of terms of mixed signs the
    sum of sizes is about the root of their number times the sum.
    """
    dtype = leaves["x"].dtype

    def results(ys, its_leaves: dict[str, Tensor], dys=None) -> tuple[dict, list[Tensor]]:
        ys = (ys,) if isinstance(ys, Tensor) else ys
        dys = [make_dy(y.detach()) for y in ys] if dys is None else dys
        wanted = {f"d_{name}": t for name, t in its_leaves.items() if t.requires_grad}
        its_dys = [dy.to(y.dtype) for y, dy in zip(ys, dys, strict=True)]
        found = torch.autograd.grad(ys, list(wanted.values()), its_dys, allow_unused=True)
        named = {f"y{i}": y.detach() for i, y in enumerate(ys)}
        return named | dict(zip(wanted, found, strict=True)), dys

    def by_textbook(convert: Callable[[Tensor], Tensor], its_dys: list[Tensor]) -> dict:
        own = {n: convert(t.detach()).requires_grad_(t.requires_grad) for n, t in leaves.items()}
        cast = {name: tensor.to(own["x"].dtype) for name, tensor in own.items()}
        return results(textbook(cast), own, its_dys)[0]

    found, dys = results(run(), leaves)
    truth, eager = by_textbook(Tensor.double, dys), by_textbook(lambda tensor: tensor, dys)
    size = by_textbook(lambda tensor: tensor.double().abs(), [dy.abs() for dy in dys])
    for name, value in found.items():
        if value is None:  # an adapter of a list without rows
            assert truth[name] is None or not truth[name].any(), name
        else:
            its_size = 8 * truth[name].abs() if mixed else size[name]
            assert_close(name, value, truth[name], eager[name], its_size, rounded or dtype)
    return found
