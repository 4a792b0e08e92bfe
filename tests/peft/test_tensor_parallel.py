"""Optimized PEFT models that transformers shards over ranks give the numbers of one process.

The ranks are processes on the CPU.  All of them see the whole batch.
"""

from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import tp_worker as worker
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor
from tp_worker import LAYERS, R, SCALE

import fastlora
from fastlora.backends.dropout import dropout_mask
from fastlora.ops.run import draw_seed
from fastlora.reference import lora_linear

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.17") or Version(version("peft")) < Version("0.21.1"),
    reason="tensor parallel LoRA layers need transformers 5.17 and PEFT 0.21.1",
)
RANKS = pytest.mark.parametrize("size", [2, 4])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function that returns a folder with the saved model of these settings."""

    @cache
    def get(**settings) -> Path:
        folder = tmp_path_factory.mktemp("model")
        worker.save(folder, **settings)
        return folder

    return get


class Weights(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor


def weights_of(folder: Path, name: str, dtype: torch.dtype) -> Weights:
    """A layer's whole weights in float64, as ``dtype`` rounds its base's."""
    base = load_file(folder / "base" / "model.safetensors")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    weight, bias = (base.get(f"model.layers.1.{name}.{each}") for each in ("weight", "bias"))
    start = f"base_model.model.model.layers.1.{name}"
    lora_a, lora_b = (adapter[f"{start}.lora_{half}.weight"].double() for half in "AB")
    bias = None if bias is None else bias.to(dtype).double()
    return Weights(weight.to(dtype).double(), bias, lora_a, lora_b)


def mask_of(shape: tuple[int, int], p: float, ranks: int) -> Tensor:
    """The mask of a layer's next call: one for all ranks, or side by side one of each."""
    rows, columns = shape
    seeds = draw_seed(ranks, torch.device("cpu")).split(1)
    return torch.cat([dropout_mask(seed, (rows, columns // ranks), p) for seed in seeds], 1)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm()).item()


# The q and o projections have a bias; up and down have none.
LAYER = pytest.mark.parametrize(
    "name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
)


@RANKS
@LAYER
@pytest.mark.parametrize(
    ("dtype", "p", "tolerance"),
    [
        (torch.float32, 0.0, 1e-6),
        (torch.float32, 0.3, 1e-6),
        (torch.bfloat16, 0.0, 1e-2),
        (torch.bfloat16, 0.3, 1e-2),
    ],
)
def test_a_layer_has_the_numbers_of_one_rank(size, name, dtype, p, tolerance, ranks, folder_of):
    """The output of the last of two calls, and the gradients that both accumulate."""
    folder = folder_of(dropout=p)
    weights = weights_of(folder, name, dtype)
    n, k = weights.weight.shape
    x, dy = torch.randn(2, 5, k).to(dtype), torch.randn(2, 5, n).to(dtype)
    found = ranks(size).run(worker.run_layer, folder, name, x, dy, dtype, calls=2)

    is_rowwise = name.endswith(("o_proj", "down_proj"))
    inputs = [x.double(), weights.lora_a, weights.lora_b]
    for tensor in inputs:
        tensor.requires_grad_()
    torch.manual_seed(7)
    for _ in range(2):
        mask = mask_of((10, k), p, size if is_rowwise else 1).view(2, 5, k) if p else None
        y = lora_linear(
            inputs[0], weights.weight, *inputs[1:], bias=weights.bias, scale=SCALE,
            dropout=p, mask=mask,
        )  # fmt: skip
        y.backward(dy.double())
    for rank, layer in enumerate(found):
        assert layer.fast == 2
        dx = inputs[0].grad
        if is_rowwise:
            dx = dx.chunk(size, -1)[rank]
        else:
            y_of_rank = y.chunk(size, -1)[rank]
        assert error(layer.y, y if is_rowwise else y_of_rank) < tolerance
        assert error(layer.dx, dx) < tolerance
        for half, tensor in zip("AB", inputs[1:], strict=True):
            gradient = layer.gradients[f"lora_{half}.default.weight"]
            assert gradient.dtype == torch.float32
            assert error(gradient, tensor.grad) < tolerance


def assert_same(found: worker.Step, expected: worker.Step, tolerance: float = 1e-5) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    assert len(found.gradients) >= 2 * LAYERS
    for name, gradient in expected.gradients.items():
        assert error(found.gradients[name], gradient) < tolerance, name


@RANKS
def test_a_model_has_the_numbers_of_peft_and_of_one_rank(size, ranks, folder_of):
    folder = folder_of()
    alone = worker.run_step(folder, optimized=False)
    theirs = ranks(size).run(worker.run_step, folder, optimized=False)
    for found, peft in zip(ranks(size).run(worker.run_step, folder), theirs, strict=True):
        assert (found.fast, peft.fast, alone.fast) == (LAYERS, 0, 0)
        assert_same(found, peft)
        assert_same(found, alone)
        assert str(found.coverage).splitlines() == [
            f"{LAYERS} of {LAYERS} layers fast (backend torch)",
            "0 of 2 gated MLPs as one block",
            "2 layer by layer: base_model.model.model.layers.0.mlp, "
            "base_model.model.model.layers.1.mlp: its gate_proj: its base layer is tensor parallel",
        ]


@RANKS
def test_dropout_has_the_masks_that_peft_s_forward_would_share(size, ranks, folder_of):
    folder = folder_of(dropout=0.3)
    theirs = ranks(size).run(worker.run_step, folder, optimized=False, masks=True)
    found = ranks(size).run(worker.run_step, folder)
    for one, other in zip(found, theirs, strict=True):
        assert (one.fast, other.fast) == (LAYERS, 0)
        assert_same(one, other)


def test_adapters_stay_equal_if_random_states_differ(ranks, folder_of):
    """Without dropout's masks in common, too: lora_A of a colwise layer and lora_B of a rowwise."""
    first, *others = ranks(4).run(worker.run_with_own_random_states, folder_of(dropout=0.3))
    assert len(first) == LAYERS
    assert all(gradient.any() for gradient in first.values())
    for found in others:
        assert found.keys() == first.keys()
        assert all(found[name].equal(first[name]) for name in first)


@RANKS
@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
def test_a_trained_adapter_is_saved_whole(size, checkpoints, ranks, folder_of, tmp_path):
    outputs = [tmp_path / "alone", tmp_path / "ranks"]
    alone = worker.train_and_save(folder_of(), outputs[0])
    assert alone[-1] < 0.99 * alone[0]
    for losses in ranks(size).run(worker.train_and_save, folder_of(), outputs[1], checkpoints):
        assert losses == pytest.approx(alone, rel=1e-5)
    files = [load_file(output / "adapter_model.safetensors") for output in outputs]
    assert files[0].keys() == files[1].keys()
    assert all(error(files[1][name], tensor) < 1e-5 for name, tensor in files[0].items())


@RANKS
def test_logits_in_evaluation(size, ranks, folder_of):
    alone = worker.sample(folder_of(), optimized=False)
    for logits in ranks(size).run(worker.sample, folder_of()):
        assert error(logits, alone) < 1e-5


def test_check(ranks, folder_of):
    for text in ranks(2).run(worker.check, folder_of(dropout=0.3)):
        assert f"({LAYERS} of {LAYERS} layers fast) and PEFT: the same within rounding" in text


def test_merging_is_refused(ranks, folder_of):
    for ours, theirs in ranks(2).run(worker.merge, folder_of()):
        assert "q_proj is sharded over ranks: sample from the model as it is" in ours
        assert "DTensor" in theirs
