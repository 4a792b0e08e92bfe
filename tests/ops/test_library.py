"""The registered ops, and torch.compile over them."""

import pytest
import torch
from process import run_forked
from torch import nn

import fastlora

pytestmark = pytest.mark.usefixtures("backend")


def test_a_compiled_layer_takes_any_rows_and_sees_a_changed_scale():
    torch.compiler.reset()
    layer = fastlora.LoRALinear(16, 24, r=4)
    nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 8, 21):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(compiled(x), layer(x))
        layer.scaling *= 2


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
    assert run_forked(FIRST_CALL) == "True True"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("rows", [5, 64])
def test_jit_trace(rows):
    layer, (x, other) = fastlora.LoRALinear(7, 9, r=2), torch.randn(2, 1, rows, 7)
    nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(other), layer(other))
