"""The registered ops, and torch.compile over them."""

import pytest
import torch
from process import run_python
from torch import nn

import fastlora

pytestmark = pytest.mark.usefixtures("backend")


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
