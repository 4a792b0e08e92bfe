"""Outputs as records, flattened and restored; frozen outputs.  test_numbers.py has the numbers."""

import pytest
import torch
from judge import make_outputs, make_projection, saved_bytes
from torch.nn.functional import linear

import fastlora
from fastlora.call.projection import Adapter, Base, Output, Projection

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("p", [0.0, 0.3], ids="p{}".format)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_single_frozen_layer(p, bias, poisoned_memory):
    """y and dx are bit-equal to torch's; only the weight is saved; no random number is drawn."""
    x = torch.randn(5, 16, requires_grad=True)
    weight, shift = torch.randn(7, 16), torch.randn(7) if bias else None
    state, outputs = torch.get_rng_state(), [Output(Base(weight, shift))]
    storages = saved_bytes(lambda: fastlora.lora_linears(x, outputs, dropout=p))
    assert torch.equal(torch.get_rng_state(), state)
    given = [weight] if shift is None else [weight, shift]
    assert set(storages) <= {tensor.untyped_storage().data_ptr() for tensor in given}
    (y,) = fastlora.lora_linears(x, outputs, dropout=p)
    dy = torch.randn_like(y)
    assert torch.equal(y, linear(x, weight, shift))
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy @ weight)


@pytest.mark.parametrize(
    ("scale", "x", "lora_a", "exact"),
    [
        (1 + 2**-8, [1.0], [384.0], 386.0),  # bfloat16 would round the scale to 1
        (1.5, [1.0, 1.0], [256.0, 1.0], 386.0),  # … or round the product to 256 before it is scaled
    ],
    ids=["scale", "product"],
)
def test_nothing_is_rounded_before_it_is_scaled(scale, x, lora_a, exact):
    x, lora_a = (torch.tensor([values], dtype=torch.bfloat16) for values in (x, lora_a))
    weight, lora_b = torch.zeros_like(x), torch.ones(1, 1, dtype=torch.bfloat16)
    assert fastlora.lora_linear(x, weight, lora_a, lora_b, scale=scale).item() == exact


def test_a_group_is_one_node():
    x, group = torch.randn(5, 7), [make_projection(4, 7, 3, torch.float32) for _ in range(3)]
    assert len({y.grad_fn for y in fastlora.lora_linears(x, group)}) == 1


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_frozen_outputs_alone_compiled(bias):
    """The list of scales is empty here, and torch takes an empty list for a list of tensors."""
    torch.compiler.reset()
    outputs = [Output(Base(torch.randn(4, 16), torch.randn(4) if bias else None))] * 2
    x = torch.randn(5, 16, requires_grad=True)
    compiled = torch.compile(
        lambda x: fastlora.lora_linears(x, outputs), fullgraph=True, backend="aot_eager"
    )
    (dx,) = torch.autograd.grad(compiled(x), x, [torch.ones(5, 4)] * 2)
    torch.testing.assert_close(dx, 2 * torch.ones(5, 4) @ outputs[0].base.weight)


def test_gradients_of_gradients_beside_an_output_that_nothing_trains():
    x, (adapted, _, frozen) = torch.randn(5, 16), make_outputs(torch.float32)
    ys = fastlora.lora_linears(x, [frozen, adapted])
    trained = adapted.adapters[0].lora_a
    loss = sum(y.square().sum() for y in ys)
    (first,) = torch.autograd.grad(loss, trained, create_graph=True)
    assert torch.allclose(first, torch.autograd.grad(ys[1].square().sum(), trained)[0], rtol=1e-4)
    only = fastlora.lora_linears(x, [frozen, adapted])[0]
    assert torch.autograd.grad(only.sum(), trained, create_graph=True, allow_unused=True)[0] is None


def test_a_vectorized_jacobian_without_a_saved_x():
    x, weight = torch.randn(3, 16), torch.randn(4, 16)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: fastlora.lora_linears(x, [Output(Base(weight))])[0], x, vectorize=True
    )
    torch.testing.assert_close(jacobian[1, :, 1], weight)


ONE = Projection(torch.ones(6, 8), torch.ones(3, 8), torch.ones(6, 3))
ADAPTER, NO_OUTPUT = Adapter(ONE.lora_a, ONE.lora_b), "must be an Output of a Base and Adapters"
WRONG = {
    "second-without-lora_a": ([ONE, Projection(None, None, ONE.lora_b)], "lora_a must be a tensor"),
    "first-without-weight": ([ONE._replace(weight=None)], "weight must be a tensor, not NoneType"),
    "adapter-is-a-tuple": ([Output(Base(ONE.weight), (tuple(ADAPTER),))], NO_OUTPUT),
    "adapter-alone": ([Output(Base(ONE.weight), ADAPTER)], NO_OUTPUT),
    "lora_b-sparse": ([ONE._replace(lora_b=ONE.lora_b.to_sparse())], "lora_b has layout"),
}


@pytest.mark.parametrize(("projections", "message"), WRONG.values(), ids=WRONG)
def test_values_that_are_no_outputs(projections, message):
    with pytest.raises(TypeError, match=message):
        fastlora.lora_linears(torch.randn(2, 8), projections)


def test_a_further_adapter_has_no_bias():
    group = [ONE, ONE._replace(weight=None, bias=torch.ones(6))]
    with pytest.raises(ValueError, match="without a weight of its own can't have a bias"):
        fastlora.lora_linears(torch.randn(2, 8), group)


@pytest.mark.parametrize("shape", [(0, 8), (6,), (6, 7)], ids=str)
def test_a_frozen_weight_that_does_not_fit(shape):
    with pytest.raises(ValueError, match="weight has shape"):
        fastlora.lora_linears(torch.randn(2, 8), [Output(Base(torch.ones(shape)))])
