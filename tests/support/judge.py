"""The judge of every op test: the float64 oracle, and a budget from what PyTorch loses."""

from collections.abc import Callable, Sequence

import torch
from device import DEVICE
from torch import Tensor

from fastlora import Projection, lora_linears, reference
from fastlora.backends import find_backend
from fastlora.formats.format import Quantised
from fastlora.ops.door import draw_seed
from fastlora.projection import Base, Output, as_outputs, flatten, layouts_of, unflatten

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


def with_seed(run, count: int):
    """What ``run`` returns, and the seeds that it drew from torch's generator."""
    generator = torch.default_generator if DEVICE == "cpu" else torch.cuda.default_generators[0]
    state = generator.get_state()
    seeds = draw_seed(count, torch.device(DEVICE))
    generator.set_state(state)
    return run(), seeds


def masks_of(seeds: Tensor, x: Tensor, p: float) -> list[Tensor] | None:
    """The masks that the backend in use applies to x for these seeds; None without dropout."""
    if p == 0.0:
        return None
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    mask = find_backend().dropout_mask
    return [mask(seed, (rows, x.shape[-1]), p).reshape(x.shape) for seed in seeds]


def random_like(y: Tensor) -> Tensor:
    return torch.randn(y.shape, dtype=torch.float64).to(y.dtype)


def run_fastlora(
    x: Tensor,
    projections: Sequence[Projection | Output],
    p: float = 0.0,
    make_dy: Callable[[Tensor], Tensor] = random_like,
):
    """(outputs, output gradients, gradients by name, masks) of one forward and backward."""
    count = sum(len(output.adapters) for output in as_outputs(projections))
    ys, seeds = with_seed(lambda: lora_linears(x, projections, dropout=p), count)
    dys = [make_dy(y.detach()) for y in ys]
    return ys, dys, _gradients(ys, dys, x, as_outputs(projections)), masks_of(seeds, x, p)


def check_against_oracle(
    x: Tensor,
    projections: Sequence[Projection | Output],
    p: float = 0.0,
    make_dy: Callable[[Tensor], Tensor] = random_like,
    rounded: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Every output and gradient, no further from the truth than twice PyTorch's own error.

    ``rounded``: the dtype with the precision of the products, if that isn't x's.
    """
    ys, dys, gradients, masks = run_fastlora(x, projections, p, make_dy)
    truth = _reference(x, projections, p, masks, dys, to_float64)
    eager = _reference(x, projections, p, masks, dys, lambda tensor: tensor)
    sizes = [dy.abs() for dy in dys]
    size = _reference(x, projections, p, masks, sizes, lambda t: to_float64(t).abs())
    found = {f"y{i}": y for i, y in enumerate(ys)} | gradients
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert_close(name, value, truth[name], eager[name], size[name], rounded or x.dtype)
    return found


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


def to_float64(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def _reference(x, projections, p, masks, dys, convert) -> dict[str, Tensor]:
    """The oracle's outputs and gradients on converted inputs, adapters cast to x's dtype."""
    x, outputs = convert(x), [_plain(output, x.dtype) for output in as_outputs(projections)]
    layouts = layouts_of(outputs)
    leaves = [convert(tensor) for tensor in flatten(outputs, layouts)]
    cast = unflatten([leaf.to(x.dtype) for leaf in leaves], layouts)
    ys = reference.lora_linears(x, cast, dropout=p, masks=masks)
    gradients = _gradients(ys, [dy.to(x.dtype) for dy in dys], x, unflatten(leaves, layouts))
    return {f"y{i}": y for i, y in enumerate(ys)} | gradients


def _plain(output: Output, dtype: torch.dtype) -> Output:
    """With the weight that a packed one stands for in x's dtype."""
    base, adapters = output
    if isinstance(base.weight, Quantised):
        base = base._replace(weight=base.weight.dense(dtype))
    return Output(base, adapters)


def _gradients(ys, dys, x, outputs) -> dict[str, Tensor]:
    leaves = {"d_x": x}
    for i, (base, adapters) in enumerate(outputs):
        weight = None if isinstance(base.weight, Quantised) else base.weight
        leaves |= {f"d_weight{i}": weight, f"d_bias{i}": base.bias}
        for j, adapter in enumerate(adapters):
            leaves |= {f"d_lora_a{i}.{j}": adapter.lora_a, f"d_lora_b{i}.{j}": adapter.lora_b}
    leaves = {k: tensor for k, tensor in leaves.items() if tensor is not None}
    leaves = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(ys, list(leaves.values()), dys), strict=True))
