"""torch's transforms and tracers give for an optimised model what they give for PEFT's."""

import pytest
import torch
from peft_models import KINDS, ROUNDING, assert_same, inputs, mlp, optimized
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model):
    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    return loss


def forward_mode(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(inputs(), inputs())))


def call_and_unit_gradients(model):
    """y, what has a gradient, and a dy for each element of y."""
    x = inputs()[0].requires_grad_()
    y = model(x)
    dys = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    return y, [x, *(p for p in model.parameters() if p.requires_grad)], dys


def batched_gradients(model):
    return torch.autograd.grad(*call_and_unit_gradients(model), is_grads_batched=True)


def export(model):
    program = torch.export.export(model, (inputs(),))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return program.module()(inputs() * 2), names


def compiled(transform):
    """The transform is part of what is compiled."""

    def call(model):
        torch._dynamo.reset()
        function = torch.compile(lambda x: transform(model, x), backend="aot_eager")
        with torch.no_grad():  # the transforms' own gradients are all that is asked for
            return function(inputs())

    return call


TRANSFORMS = {
    "grad": lambda model: torch.func.grad(loss_of(model))(trained(model), inputs()),
    "jvp": lambda model: torch.func.jvp(model, (inputs(),), (inputs(),)),
    "vmap": lambda model: torch.func.vmap(model)(inputs()),
    "per-sample-gradients": lambda model: torch.func.vmap(
        torch.func.grad(loss_of(model)), in_dims=(None, 0)
    )(trained(model), inputs()),
    "forward-mode": forward_mode,
    "batched-gradients": batched_gradients,
    "jit.trace": lambda model: torch.jit.trace(model, inputs())(inputs() * 2),
    "export": export,
    "make_fx": lambda model: make_fx(model)(inputs())(inputs() * 2),
    "compiled-inside": compiled(lambda model, x: torch.func.vmap(torch.func.jacrev(model))(x[0])),
}
ROWS = [(name, kind) for name in TRANSFORMS for kind in KINDS]
ROWS.remove(("compiled-inside", "dora"))  # seconds for what each shows


@pytest.mark.parametrize(("name", "kind"), ROWS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_give_what_they_give_on_peft_s(name, kind):
    theirs = mlp(**KINDS[kind])
    ours = optimized(theirs)
    assert_same(TRANSFORMS[name](ours), TRANSFORMS[name](theirs), ROUNDING)
