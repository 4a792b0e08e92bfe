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
from marks import pairwise
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor
from tp_worker import LAYERS, SCALE

from fastlora.backends.dropout import dropout_mask
from fastlora.layers.mlp import PARTS
from fastlora.ops.node import draw_seed
from fastlora.reference import lora_linear

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.17")
    or Version(version("peft")) < Version("0.21.1"),
    reason="tensor parallel LoRA layers need transformers 5.17 and PEFT 0.21.1",
)


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

    def layer(self, x: Tensor, p: float = 0.0, mask: Tensor | None = None) -> Tensor:
        weight, bias, *pair = self
        return lora_linear(x, weight, *pair, bias=bias, scale=SCALE, dropout=p, mask=mask)


def weights_of(folder: Path, name: str, dtype: torch.dtype) -> Weights:
    """A layer's whole weights in float64, as ``dtype`` rounds its base's."""
    base = load_file(folder / "base" / "model.safetensors")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    weight, bias = (base.get(f"model.layers.1.{name}.{each}") for each in ("weight", "bias"))
    start = f"base_model.model.model.layers.1.{name}"
    pair = [adapter[f"{start}.lora_{half}.weight"].double().requires_grad_() for half in "AB"]
    bias = None if bias is None else bias.to(dtype).double()
    return Weights(weight.to(dtype).double(), bias, *pair)


def mask_of(shape: tuple[int, int], p: float, ranks: int) -> Tensor:
    """The mask of a layer's next call: one for all ranks, or side by side one of each."""
    rows, columns = shape
    seeds = draw_seed(ranks, torch.device("cpu")).split(1)
    return torch.cat([dropout_mask(seed, (rows, columns // ranks), p) for seed in seeds], 1)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm()).item()


# The q and o projections have a bias; up and down have none.
NAMES = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "up": "mlp.up_proj"}
NAMES |= {"down": "mlp.down_proj"}
DTYPES = {"f32": (torch.float32, 1e-6), "bf16": (torch.bfloat16, 1e-2)}


@pairwise({"name": NAMES, "p": [0.0, 0.3], "dtype,tolerance": DTYPES})
def test_a_layer_has_the_numbers_of_one_rank(name, dtype, p, tolerance, two, folder_of):
    """The output of the last of two calls, and the gradients that both accumulate."""
    folder = folder_of(dropout=p)
    weights, x, dy = inputs_of(folder, name, dtype)
    found = two.run(worker.run_layer, folder, name, x, dy, dtype, calls=2)
    x, mask = x.double().requires_grad_(), None
    torch.manual_seed(7)
    for _ in range(2):
        if p:
            mask = mask_of((10, x.shape[-1]), p, 2 if is_rowwise(name) else 1).view(x.shape)
        y = weights.layer(x, p, mask)
        y.backward(dy.double())
    assert {layer.fast for layer in found} == {2}
    assert_parts(found, name, y, [x, weights.lora_a, weights.lora_b], tolerance)


@pytest.mark.parametrize("name", [NAMES["q"], NAMES["down"]])
def test_gradients_of_gradients(name, two, folder_of):
    weights, x, dy = inputs_of(folder_of(), name, torch.float32)
    found = two.run(worker.run_twice, folder_of(), name, x, dy)
    x = x.double().requires_grad_()
    y = weights.layer(x)
    whole = weights.lora_b if is_rowwise(name) else weights.lora_a
    (gradient,) = torch.autograd.grad(y, whole, dy.double(), create_graph=True)
    gradient.square().sum().backward()
    half = weights.lora_a if is_rowwise(name) else weights.lora_b
    assert_parts(found, name, y, [x, half], 1e-5)


def is_rowwise(name: str) -> bool:
    return name.endswith(worker.ROWWISE)


def inputs_of(folder: Path, name: str, dtype: torch.dtype) -> tuple[Weights, Tensor, Tensor]:
    weights = weights_of(folder, name, dtype)
    n, k = weights.weight.shape
    return weights, torch.randn(2, 5, k).to(dtype), torch.randn(2, 5, n).to(dtype)


def assert_parts(
    layers: list[worker.Layer], name: str, y: Tensor, inputs: list[Tensor], tolerance: float
) -> None:
    """Compare each rank's layer with one process's y and the gradients of x and some halves."""
    dx, *gradients = [tensor.grad for tensor in inputs]
    for rank, layer in enumerate(layers):
        pairs = [(layer.y, y), (layer.dx, dx)]
        part = int(is_rowwise(name))  # the ranks have parts of dx, or of y
        pairs[part] = pairs[part][0], pairs[part][1].chunk(len(layers), -1)[rank]
        found = {gradient.shape: gradient for gradient in layer.gradients.values()}
        pairs += [(found[gradient.shape], gradient) for gradient in gradients]
        assert all(error(*pair) < tolerance for pair in pairs)
        assert {found[gradient.shape].dtype for gradient in gradients} == {torch.float32}


def assert_same(found: worker.Step, expected: worker.Step, tolerance: float = 1e-5) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    assert len(found.gradients) >= 2 * LAYERS
    for name, gradient in expected.gradients.items():
        assert error(found.gradients[name], gradient) < tolerance, name


@pytest.mark.parametrize(
    ("size", "kind"),
    [(4, {"lora_bias": True}), (2, {"second": True}), (2, {"bias": "all"})],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_model_has_the_numbers_of_peft_and_of_one_rank(size, kind, ranks, folder_of):
    folder = folder_of(**kind)
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


def test_adapters_stay_equal_if_random_states_differ(two, folder_of):
    """In PEFT's forward, the ranks' copies of a colwise lora_A get different gradients."""
    first, *others = two.run(worker.run_with_own_random_states, folder_of(dropout=0.3))
    assert len(first) == LAYERS
    assert all(gradient.any() for gradient in first.values())
    for found in others:
        assert found.keys() == first.keys()
        for name in first:
            assert found[name].equal(first[name]), name


def test_an_adapter_that_trains_with_checkpoints_is_saved_whole(two, folder_of, tmp_path):
    outputs = [tmp_path / "alone", tmp_path / "ranks"]
    alone = worker.train_and_save(folder_of(), outputs[0])
    assert alone[-1] < 0.995 * alone[0]
    for losses in two.run(worker.train_and_save, folder_of(), outputs[1], checkpoints=True):
        assert losses == pytest.approx(alone, rel=1e-5)
    files = [load_file(output / "adapter_model.safetensors") for output in outputs]
    assert files[0].keys() == files[1].keys()
    assert all(error(files[1][name], tensor) < 1e-5 for name, tensor in files[0].items())


def test_check(two, folder_of):
    for text in two.run(worker.check, folder_of(dropout=0.3)):
        assert f"({LAYERS} of {LAYERS} layers fast) and PEFT: the same within rounding" in text


def test_merging_is_refused(two, folder_of):
    for ours, theirs in two.run(worker.merge, folder_of()):
        assert "q_proj is sharded over ranks" in ours
        assert "DTensor" in theirs


PARALLEL = "its base layer is tensor parallel"
CHANGES = {
    "hook": "a hook watches, or something replaces, the calls of its base layer",
    "dora": f"{PARALLEL} and its adapter is no plain LoRA (DoRA, …)",
    "whole": f"{PARALLEL} and its lora_B isn't, or the ranks have unequal parts",
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.items(), ids=CHANGES)
def test_a_changed_layer_is_left_to_peft(change, reason, two, folder_of):
    assert two.run(worker.report, folder_of(), change) == [[reason, str(LAYERS - 1)]] * 2


def test_unequal_parts_are_left_to_peft(ranks, folder_of):
    folder = folder_of(wide=50)
    alone = worker.run_step(folder, optimized=False)
    for found in ranks(4).run(worker.run_step, folder, mend=True):
        assert found.fast == LAYERS - 6
        assert_same(found, alone)
        reasons = {layer.name.split(".")[-1]: layer.reason for layer in found.coverage.layers}
        assert {name for name, reason in reasons.items() if reason} == set(PARTS)
        assert reasons["up_proj"] == CHANGES["whole"]
        assert reasons["down_proj"].startswith(f"{PARALLEL} and its lora_A isn't")


OVER_TWO = "over 2 of 4 ranks, beside another kind of parallelism"
STYLE = {"model.layers.*.self_attn.o_proj": "rowwise_split_input"}


@pytest.mark.filterwarnings("ignore:TP plan .* is not supported", "ignore:.*no layer runs fast")
@pytest.mark.parametrize(
    ("size", "sizes", "left", "reason"),
    [
        (2, {"plan": STYLE}, 2, "in another style than colwise and rowwise"),
        (4, {"tp_size": 2, "fsdp_size": 2}, LAYERS, OVER_TWO),
    ],
    ids=["style", "fsdp2"],
)
def test_other_placements_are_left_to_peft(size, sizes, left, reason, ranks, folder_of):
    for coverage in ranks(size).run(worker.report_of_new, folder_of(), **sizes):
        assert len(coverage.not_fast) == left
        assert {layer.reason for layer in coverage.not_fast} == {f"{PARALLEL} {reason}"}
        assert len(coverage.fast) == LAYERS - left


def test_mixed_batches_are_left_to_peft(two, folder_of):
    for found, peft in two.run(worker.mixed, folder_of()):
        assert found.equal(peft)


def test_compiled_calls_are_left_to_peft(two, folder_of):
    for compiled, eager, fast in two.run(worker.compiled, folder_of()):
        assert not fast
        assert error(compiled, eager) < 1e-6
