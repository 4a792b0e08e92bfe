"""The environment of a layer: threads, transforms, tracers, and the first call of a process."""

import threading

import pytest
import torch
from process import run_forked
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora import LoRALinear

on_both_backends = pytest.mark.usefixtures("backend")


def make_layer(dropout: float = 0.0, **settings) -> LoRALinear:
    layer = LoRALinear(12, 7, r=4, lora_dropout=dropout, **settings)
    nn.init.normal_(layer.lora_B)
    return layer


def test_threads_keep_their_own_backend(monkeypatch):
    from fastlora import backends

    monkeypatch.setattr(backends, "BACKENDS", ("torch", "other"))
    names = []
    with fastlora.use_backend("other"):
        thread = threading.Thread(target=lambda: names.append(backends.backend_name()))
        thread.start()
        thread.join()
        assert backends.backend_name() == "other"
        assert backends.backend_name("torch") == "torch"
    assert names == ["torch"]
    assert backends.backend_name() == "torch"


def test_the_registered_op_runs_on_the_backend_that_its_call_names(monkeypatch):
    from fastlora.backends import torch as torch_backend

    ran, forward = [], torch_backend.forward
    monkeypatch.setattr(torch_backend, "forward", lambda *all: ran.append(1) or forward(*all))
    tensors = torch.randn(40, 12), torch.randn(7, 12), torch.randn(2, 12), torch.randn(7, 2)
    with fastlora.use_backend("triton"), FlopCounterMode(display=False):
        fastlora.lora_linear(*tensors)
        assert ran == []
        fastlora.lora_linear(*tensors, backend="torch")
    assert ran == [1]


@on_both_backends
@pytest.mark.parametrize("name", ["x", "weight"])
def test_a_tensor_leaked_from_a_transform_works(name):
    """A tensor that leaks out of torch.func.grad is a wrapper around the tensor with the memory."""
    layer, x, leaked = make_layer(0.5), torch.randn(40, 12), []
    tensors = {"x": x, "weight": layer.weight, "lora_a": layer.lora_A, "lora_b": layer.lora_B}

    def leak(tensor):
        leaked.append(tensor)
        return tensor.sum()

    torch.func.grad(leak)(tensors[name])
    found = []
    for value in (tensors[name], leaked[0]):
        torch.manual_seed(1)
        y = fastlora.lora_linear(**tensors | {name: value}, dropout=0.5)
        found.append([y, *torch.autograd.grad(y.sum(), (layer.lora_A, layer.lora_B))])
    assert all(map(torch.equal, *found))


FIRST_CALL = """
import torch, fastlora
layer, x = fastlora.LoRALinear(7, 9, r=2, lora_dropout=0.5), torch.randn(5, 7)
torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
torch.nn.init.ones_(layer.lora_B)
y = layer(x)
print(y.shape == (5, 9), type(y) is torch.Tensor)
"""


def test_the_first_call_of_a_process_may_be_compiled():
    """If a backend were imported during compilation, its constants would become fake tensors."""
    assert run_forked(FIRST_CALL) == "True True"
