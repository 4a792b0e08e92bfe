"""The registered ops, and torch.compile over them."""

import pytest
import torch
from judge import make_outputs, make_projection
from packed import random_four_bit
from process import run_python
from torch import nn

import fastlora
from fastlora.backends import Call, find_backend
from fastlora.ops.function import LoRALinearFunction
from fastlora.projection import Layout, flatten, layouts_of

pytestmark = pytest.mark.usefixtures("backend")


def packed_arguments(p: float, requires_grad: bool = True):
    """Two outputs: a packed weight with a bias and an adapter, and a plain one."""
    x, (_, bias, lora_a, lora_b, weight, *_), *_ = op_arguments(p, requires_grad)
    weight = weight.detach()
    four = random_four_bit(6, 16, "nf4", 64, nested=2)
    tensors = [*four.tensors, bias, lora_a, lora_b, weight]
    seeds = torch.randint(-9, 9, (1,)) if p else None
    return x, tensors, [True, False], [1, 0], [0.5], f"{four.format.text}\n", p, seeds, ""


def op_arguments(p: float, requires_grad: bool = True):
    """Three outputs: with a bias and an adapter, with two adapters, and with none."""
    x = torch.randn(2, 5, 16, requires_grad=requires_grad)
    outputs = make_outputs(torch.float32)
    layouts = layouts_of(outputs)
    tensors = [t.detach().requires_grad_(requires_grad) for t in flatten(outputs, layouts)]
    seeds = torch.randint(-9, 9, (3,)) if p else None
    return x, tensors, [True, False, False], [1, 2, 0], [0.5, 0.25, 2.0], "", p, seeds, ""


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck_forward(p):
    torch.library.opcheck(torch.ops.fastlora.lora_linears.default, op_arguments(p))
    torch.library.opcheck(torch.ops.fastlora.lora_linears.default, packed_arguments(p))


ALL = [True] * 11  # x; weight, bias, a, b; weight, a, b, a, b; weight
SOME = [True, False, True, True, False, False, False, True, True, False, False]


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("needs", [ALL, SOME], ids=["all", "some"])
def test_opcheck_backward(p, needs):
    x, tensors, *settings = op_arguments(p, requires_grad=False)
    ys, hs = torch.ops.fastlora.lora_linears(x, tensors, *settings)
    arguments = (ys, x, tensors, hs, needs, *settings)
    torch.library.opcheck(torch.ops.fastlora.lora_linears_backward.default, arguments)


def test_opcheck_backward_of_a_packed_weight():
    x, tensors, *settings = packed_arguments(0.2, requires_grad=False)
    ys, hs = torch.ops.fastlora.lora_linears(x, tensors, *settings)
    needs = [True] + [False] * 5 + [True] * 3 + [False]
    arguments = (ys, x, tensors, hs, needs, *settings)
    torch.library.opcheck(torch.ops.fastlora.lora_linears_backward.default, arguments)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_op_and_the_eager_node_agree(p):
    x, tensors, *layout, p, seeds, _ = op_arguments(p)
    ys, _ = torch.ops.fastlora.lora_linears(x, tensors, *layout, p, seeds, "")
    by_op = torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *tensors])
    layouts = (Layout(True, (0.5,)), Layout(False, (0.25, 2.0)), Layout(False, ()))
    ys = LoRALinearFunction.apply(seeds, None, Call(layouts, p, find_backend()), x, *tensors)
    by_node = torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *tensors])
    assert all(torch.equal(a, b) for a, b in zip(by_op, by_node, strict=True))


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up = fastlora.LoRALinear(16, 24, r=4, lora_dropout=dropout)
        self.down = fastlora.LoRALinear(24, 16, bias=False, r=3, lora_dropout=dropout)
        nn.init.normal_(self.up.lora_B)
        nn.init.normal_(self.down.lora_B)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_fullgraph(compiler, training):
    torch.compiler.reset()
    block = Block(0.0).train(training)
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    x = torch.randn(3, 16, requires_grad=True)
    leaves = [x, *(parameter for parameter in block.parameters() if parameter.requires_grad)]
    ys = compiled(x), block(x)
    torch.testing.assert_close(*ys)
    ours, theirs = (torch.autograd.grad(y.square().sum(), leaves) for y in ys)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_with_dropout_uses_one_mask_for_both_directions(compiler):
    """d lora_A of a layer with N = r = 1 is the dropped x: it shows which mask was used."""
    torch.compiler.reset()
    layer = fastlora.LoRALinear(32, 1, bias=False, r=1, lora_dropout=0.5)
    nn.init.ones_(layer.lora_B)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    x = torch.randn(1, 32)
    y = compiled(x)
    y.backward(torch.ones_like(y))
    update = (y - torch.nn.functional.linear(x, layer.weight)).detach()
    kept_share = layer.lora_A.grad / (layer.scaling * x)  # 0 where dropped, 1 / (1 - p) where kept
    torch.testing.assert_close(kept_share.round(decimals=3).unique(), torch.tensor([0.0, 2.0]))
    torch.testing.assert_close((layer.lora_A * layer.lora_A.grad).sum(), update.squeeze())


def test_compile_with_dynamic_rows():
    torch.compiler.reset()
    block = Block(0.0).eval()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 8, 21):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(compiled(x), block(x))


def test_a_changed_scale_is_seen_by_the_compiled_layer():
    torch.compiler.reset()
    block = Block(0.0).eval()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    compiled(x)
    block.up.scaling *= 2
    torch.testing.assert_close(compiled(x), block(x))


def test_an_unknown_backend_is_an_error_when_compiled():
    torch.compiler.reset()
    projection = make_projection(6, 8, 3, torch.float32)
    compiled = torch.compile(
        lambda x: fastlora.lora_linear(x, *projection[:3], backend="metal"), backend="aot_eager"
    )
    with pytest.raises(ValueError, match="backend 'metal'"):
        compiled(torch.randn(2, 8))


def test_export():
    block = Block(0.1).eval()
    x = torch.randn(3, 16)
    exported = torch.export.export(block, (x,))
    torch.testing.assert_close(exported.module()(x), block(x))


def test_fake_tensors_pass_through():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = fastlora.LoRALinear(16, 24, r=4, lora_dropout=0.5)
        assert layer(torch.randn(2, 3, 16)).shape == (2, 3, 24)


def test_meta_tensors_pass_through():
    layer = fastlora.LoRALinear(16, 24, r=4, lora_dropout=0.5, device="meta")
    assert layer(torch.randn(2, 3, 16, device="meta")).shape == (2, 3, 24)


FIRST_CALL = """
import torch, fastlora
layer, x = fastlora.LoRALinear(7, 9, r=2, lora_dropout=0.5), torch.randn(5, 7)
torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
torch.nn.init.ones_(layer.lora_B)
y = layer(x)
print(y.shape == (5, 9), type(y) is torch.Tensor)
"""


def test_the_first_call_of_a_process_may_be_compiled():
    """A backend imported while compiling would make fake constants."""
    assert run_python("-c", FIRST_CALL) == "True True"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("rows", [5, 64])
def test_jit_trace(rows):
    layer, (x, other) = fastlora.LoRALinear(7, 9, r=2), torch.randn(2, 1, rows, 7)
    nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(other), layer(other))
