"""gated_mlp: the output and every gradient against the oracle, and beside three calls of layers."""

import pytest
import torch
from device import DEVICE
from judge import USUAL_DTYPES, assert_close, make_projection, masks_of, with_seed
from memory import saved_bytes
from torch import Tensor
from torch.nn import functional

import fastlora
from fastlora import blocks, reference
from fastlora.backends import find_backend
from fastlora.backends.gated import ACTIVATIONS
from fastlora.ops import gated_mlp
from fastlora.ops.gated import follows
from fastlora.projection import Base, Output, as_outputs, flatten, layouts_of, unflatten

pytestmark = pytest.mark.usefixtures("backend", "poisoned_memory")

dtypes = pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), USUAL_DTYPES.values(), ids=USUAL_DTYPES
)
with_and_without_dropout = pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)
K, HIDDEN, N = 24, 40, 20
APPLIED = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda gate: functional.relu(gate).square(),
}


def make_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def make_mlp(dtype=torch.float32, adapter_dtype=None, bias=False, adapted="gud") -> list[Output]:
    """gate, up and down, with numbers of usual sizes; those whose letters are named have adapters.

    All that an adapter is made of trains, and biases do.
    """
    outputs = []
    for letter, n, k, r in (("g", HIDDEN, K, 3), ("u", HIDDEN, K, 8), ("d", N, HIDDEN, 5)):
        projection = make_projection(n, k, r, dtype, adapter_dtype, bias)
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


def layer_by_layer(x, gate, up, down, activation, p=0.0, linears=fastlora.lora_linears) -> Tensor:
    hidden = [linears(x, [output], dropout=p)[0] for output in (gate, up)]
    return linears(APPLIED[activation](hidden[0]) * hidden[1], [down], dropout=p)[0]


def results(run, x: Tensor, outputs: list[Output], dy: Tensor) -> dict[str, Tensor]:
    leaves = leaves_of(x, outputs)
    y = run()
    found = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(leaves, found, strict=True))


def check(x: Tensor, outputs: list[Output], activation: str = "silu", p: float = 0.0) -> None:
    """No further from the oracle in float64 than twice torch's own operations in x's dtype."""
    run = lambda: gated_mlp(x, *outputs, activation, dropout=p, down_dropout=p)  # noqa: E731
    dy = torch.randn(*x.shape[:-1], N, dtype=torch.float64).to(x.dtype)
    # The seeds that as many layers would draw.
    count = sum(len(output.adapters) for output in outputs)
    _, seeds = with_seed(lambda: None, count) if DEVICE == "cpu" else (None, None)
    found = results(run, x, outputs, dy)
    masks = None
    if p and count:
        hidden = x.new_empty(*x.shape[:-1], HIDDEN)
        masks = [
            masks_of(seed.reshape(1), hidden if output is outputs[2] else x, p)[0]
            for seed, output in zip(seeds, [o for o in outputs for _ in o.adapters], strict=True)
        ]

    def reference_of(convert, activate=reference.gated.gated, size=None):
        its_x, layouts = convert(x), layouts_of(outputs)
        flat = [convert(tensor) for tensor in flatten(outputs, layouts)]
        cast = unflatten([tensor.to(its_x.dtype) for tensor in flat], layouts)
        run = lambda: reference.gated_mlp(  # noqa: E731
            its_x, *cast, activation, dropout=p, masks=masks
        )
        return results(run, its_x, unflatten(flat, layouts), convert(dy))

    def to_float64(tensor):
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    truth, eager = reference_of(to_float64), reference_of(lambda tensor: tensor)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        # Of terms of mixed signs the sum of sizes is about √(their number) times the sum.
        size = 8 * truth[name].abs()
        assert_close(name, value, truth[name], eager[name], size, x.dtype)


@dtypes
@with_and_without_dropout
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, adapter_dtype, p):
    check(make_x(33, K, dtype=dtype), make_mlp(dtype, adapter_dtype), activation, p)
