"""Gated MLPs, and the judge of their op: the oracle, in float64."""

import torch
from device import DEVICE
from judge import assert_close, make_projection, masks_of, to_float64, with_seed
from torch import Tensor

from fastlora import reference
from fastlora.ops.gated import gated_mlp
from fastlora.projection import Output, as_outputs, flatten, layouts_of, unflatten

K, HIDDEN, N = 24, 40, 20


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


def leaves_of(x: Tensor, outputs: list[Output]) -> dict[str, Tensor]:
    flat = flatten(outputs, layouts_of(outputs))
    named = {"x": x} | {f"{i}": tensor for i, tensor in enumerate(flat)}
    return {name: tensor for name, tensor in named.items() if tensor.requires_grad}


def results(run, x: Tensor, outputs: list[Output], dy: Tensor) -> dict[str, Tensor]:
    leaves = leaves_of(x, outputs)
    y = run()
    found = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(leaves, found, strict=True))


def check(
    x: Tensor, outputs: list[Output], activation: str = "silu", p: float = 0.0
) -> dict[str, Tensor]:
    """No further from the oracle in float64 than twice torch's own operations in x's dtype."""
    run = lambda: gated_mlp(x, *outputs, activation, dropout=p, down_dropout=p)  # noqa: E731
    n, hidden = outputs[2].base.weight.shape
    dy = torch.randn(*x.shape[:-1], n, dtype=torch.float64).to(x.dtype)
    # The seeds that as many layers would draw.
    count = sum(len(output.adapters) for output in outputs)
    _, seeds = with_seed(lambda: None, count) if DEVICE == "cpu" else (None, None)
    found = results(run, x, outputs, dy)
    masks = None
    if p:
        product = x.new_empty(*x.shape[:-1], hidden)
        masks = [
            masks_of(seed.reshape(1), product if output is outputs[2] else x, p)[0]
            for seed, output in zip(seeds, [o for o in outputs for _ in o.adapters], strict=True)
        ]

    def reference_of(convert):
        its_x, layouts = convert(x), layouts_of(outputs)
        flat = [convert(tensor) for tensor in flatten(outputs, layouts)]
        cast = unflatten([tensor.to(its_x.dtype) for tensor in flat], layouts)
        run = lambda: reference.gated_mlp(  # noqa: E731
            its_x, *cast, activation, dropout=p, masks=masks
        )
        return results(run, its_x, unflatten(flat, layouts), convert(dy))

    truth, eager = reference_of(to_float64), reference_of(lambda tensor: tensor)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        # Of terms of mixed signs the sum of sizes is about √(their number) times the sum.
        size = 8 * truth[name].abs()
        assert_close(name, value, truth[name], eager[name], size, x.dtype)
    return found
