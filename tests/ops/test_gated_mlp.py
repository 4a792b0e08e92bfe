"""gated_call against three calls of layers, and the tensors it saves (numbers: test_numbers.py)."""

import pytest
import torch
from judge import HIDDEN, K, N, make_mlp, make_x, saved_bytes
from marks import DEVICE
from torch import Tensor
from torch.nn import functional

import fastlora
from fastlora.backends.gated_products import ACTIVATIONS
from fastlora.call.projection import Output, flatten, layouts_of, unflatten
from fastlora.ops.gated_mlp import gated_call

pytestmark = pytest.mark.usefixtures("backend", "poisoned_memory")
with_and_without_dropout = pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)
APPLIED = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda gate: functional.relu(gate).square(),
}


def layer_by_layer(x, gate, up, down, activation, p=0.0, linears=fastlora.lora_linears) -> Tensor:
    hidden = [linears(x, [output], dropout=p)[0] for output in (gate, up)]
    return linears(APPLIED[activation](hidden[0]) * hidden[1], [down], dropout=p)[0]


def test_dropouts_of_their_own():
    """gate and up use one dropout probability, down another."""
    x, outputs = make_x(9, K), make_mlp()
    for dropout, down_dropout in ((0.0, 0.5), (0.5, 0.0)):
        torch.manual_seed(3)
        found, _ = gated_call(x, *outputs, "silu", dropout, down_dropout)
        torch.manual_seed(3)
        gate, up = (fastlora.lora_linears(x, [o], dropout=dropout)[0] for o in outputs[:2])
        product = functional.silu(gate) * up
        (expected,) = fastlora.lora_linears(product, outputs[2:], dropout=down_dropout)
        torch.testing.assert_close(found, expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="checks the CPU's random generator")
def test_without_an_adapter_nothing_is_drawn():
    x, outputs = make_x(9, K), make_mlp(adapted="")
    state = torch.get_rng_state()
    gated_call(x, *outputs, "silu", dropout=0.5, down_dropout=0.5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation):
    x, outputs = make_x(3, K, dtype=torch.float64), make_mlp(torch.float64)
    layouts = layouts_of(outputs)
    flat = flatten(outputs, layouts)

    def call(x, *tensors):
        torch.manual_seed(3)
        its = unflatten(tensors, layouts)
        return gated_call(x, *its, activation, dropout=0.3, down_dropout=0.3)[0]

    assert torch.autograd.gradcheck(call, (x, *flat), fast_mode=True)


@pytest.mark.parametrize("how", [{"create_graph": True}, {"is_grads_batched": True}], ids=str)
def test_gradients_of_gradients_and_batched_gradients_are_an_error(how):
    x, outputs = make_x(3, K), make_mlp()
    y, _ = gated_call(x, *outputs, "silu")
    with pytest.raises(RuntimeError, match="gated_mlps=False"):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape) if "is_grads_batched" in how else
                            torch.ones_like(y), **how)  # fmt: skip


@with_and_without_dropout
def test_tensors_saved_for_backward(p):
    """It saves x, gate, up, every h, and seeds if p > 0; three layers save two tensors more."""
    rows, outputs = 64, make_mlp()
    x = make_x(rows, K)
    flat = flatten(outputs, layouts_of(outputs))
    run = lambda: gated_call(x, *outputs, "silu", dropout=p, down_dropout=p)[0]  # noqa: E731
    found = sum(saved_bytes(run, flat).values())
    hs, seeds = 4 * rows * (3 + 8 + 5), 24 if p else 0
    assert found == 4 * rows * (K + 2 * HIDDEN) + hs + seeds
    layers = sum(saved_bytes(lambda: layer_by_layer(x, *outputs, "silu", p), flat).values())
    assert layers == found + 2 * 4 * rows * HIDDEN


def test_a_frozen_gated_mlp_saves_only_gate_and_up():
    x, outputs = make_x(64, K), make_mlp(adapted="")
    flat = flatten(outputs, layouts_of(outputs))
    found = sum(saved_bytes(lambda: gated_call(x, *outputs, "silu")[0], flat).values())
    assert found == 2 * 4 * 64 * HIDDEN


def other_size() -> list[Output]:
    gate, _, down = make_mlp()
    return [gate, make_mlp(adapted="")[2], down]


def wider_up() -> list[Output]:
    gate, _, down = make_mlp()
    return [gate, make_mlp(sizes=(K, HIDDEN + 1, N))[1], down]


ERRORS = {
    "activation": (lambda: (make_mlp(), "tanh"), ValueError, "activation is 'tanh', but must be"),
    "sizes": (lambda: (other_size(), "silu"), ValueError, "weight has shape"),
    "gate-and-up": (lambda: (wider_up(), "silu"), ValueError, "gate and up have weights"),
    "x": (lambda: (make_mlp(torch.float64), "silu"), TypeError, "weight has dtype torch.float64"),
    "down": (lambda: (make_mlp()[:2] + make_mlp()[:1], "silu"), ValueError, f"x has {HIDDEN} feat"),
}


@pytest.mark.parametrize(("make", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_inputs_that_do_not_fit_are_refused(make, error, message):
    outputs, activation = make()
    with pytest.raises(error, match=message):
        gated_call(make_x(5, K), *outputs, activation)


@pytest.mark.parametrize("name", ["dropout", "down_dropout"])
def test_a_bool_dropout_does_not_match_the_cache_key_of_a_number(name):
    x, outputs = make_x(5, K), make_mlp()
    gated_call(x, *outputs, "silu", **{name: 0.0})
    with pytest.raises(ValueError, match="dropout is False"):
        gated_call(x, *outputs, "silu", **{name: False})
