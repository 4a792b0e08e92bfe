"""Every kind of call as one record, so that one suite holds for all: what goes in, the truth."""

from collections.abc import Callable
from typing import NamedTuple

import oracles
import torch
from judge import ends_of
from packed import random_four_bit, random_int8, stack
from torch import Tensor

import fastlora
from fastlora.formats.format import Quantized
from fastlora.projection import Base, Output

K, N, ROWS = 16, 12, 40
INDICES = torch.tensor([2, 0, -1, 0, 2, -1, 2, 1, 1, 1], dtype=torch.int32)  # of 4 rows each
RANKS = (2, 5, 3)
ENDS = ends_of([14, 0, 20])  # and 6 rows of nobody


class Kind(NamedTuple):
    """``call`` and ``truth`` take the tensors, x first; ``call`` has options of its own."""

    tensors: dict[str, Tensor]  # all but "weight" require gradients
    call: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    cast: tuple[str, ...]  # those that autocast casts
    ranks: tuple[int, ...]  # the columns of each h
    seeds: int
    others: tuple[Tensor, ...] = ()  # what else a call takes, of all of which nothing is copied


def _make(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, own: torch.dtype) -> dict:
    wide = ("x", "weight", "weight1", "weight2")
    made = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, dtype=torch.float64)
        made[name] = tensor.to(dtype if name in wide or name.startswith("bias") else own)
        made[name].requires_grad_(not name.startswith("weight"))
    return made


def layer(dtype: torch.dtype, own: torch.dtype) -> Kind:
    shapes = {"x": (ROWS, K), "weight": (N, K), "a": (4, K), "b": (N, 4), "bias": (N,)}

    def call(x, weight, a, b, bias, **options):
        return fastlora.lora_linear(x, weight, a, b, bias=bias, scale=0.5, **options)

    def truth(x, weight, a, b, bias):
        return oracles.lora_linear(x, weight, a, b, bias=bias, scale=0.5)

    return Kind(_make(shapes, dtype, own), call, truth, ("x", "weight"), (4,), 1)


def group(dtype: torch.dtype, own: torch.dtype) -> Kind:
    """An adapter and a bias; two adapters; a frozen layer."""
    shapes = {
        "x": (2, ROWS // 2, K), "weight": (N, K), "weight1": (5, K), "weight2": (3, K),
        "a": (4, K), "b": (N, 4), "bias": (N,), "a1": (2, K), "b1": (5, 2),
        "a2": (3, K), "b2": (5, 3),
    }  # fmt: skip

    def outputs(weight, weight1, weight2, a, b, bias, a1, b1, a2, b2):
        return [
            Output(Base(weight, bias), (fastlora.projection.Adapter(a, b, 0.5),)),
            Output(
                Base(weight1),
                (
                    fastlora.projection.Adapter(a1, b1, 2.0),
                    fastlora.projection.Adapter(a2, b2, -0.25),
                ),
            ),
            Output(Base(weight2)),
        ]

    def call(x, *tensors, **options):
        return torch.cat(fastlora.lora_linears(x, outputs(*tensors), **options), -1)

    def truth(x, *tensors):
        return torch.cat(oracles.lora_linears(x, outputs(*tensors)), -1)

    cast = ("x", "weight", "weight1", "weight2")
    return Kind(_make(shapes, dtype, own), call, truth, cast, (4, 2, 3), 3)


def experts(dtype: torch.dtype, own: torch.dtype) -> Kind:
    shapes = {
        "x": (ROWS, K), "weight": (3, N, K), "a": (3, 4, K), "b": (3, N, 4), "bias": (3, N),
    }  # fmt: skip

    def call(x, weight, a, b, bias, offsets=ENDS, **options):
        return fastlora.grouped_lora_linear(
            x, weight, a, b, offsets, bias=bias, scale=0.5, **options
        )

    def truth(x, weight, a, b, bias):
        return oracles.grouped_lora_linear(x, weight, a, b, ENDS, bias=bias, scale=0.5)

    return Kind(_make(shapes, dtype, own), call, truth, ("x", "weight"), (4,), 1, (ENDS,))


def bank(dtype: torch.dtype, own: torch.dtype) -> Kind:
    """Adapters of unlike ranks in two banks."""
    shapes = {
        "x": (len(INDICES), 4, K), "weight": (N, K), "a": (3, 5, K), "b": (3, N, 5), "bias": (N,),
    }  # fmt: skip
    numbers = {"scales": [0.5, 1.0, -2.0], "ranks": list(RANKS)}

    def call(x, weight, a, b, bias, indices=INDICES, **options):
        options = numbers | options
        return fastlora.multi_lora_linear(x, weight, a, b, indices, bias=bias, **options)

    def truth(x, weight, a, b, bias):
        return oracles.multi_lora_linear(x, weight, a, b, INDICES, bias=bias, **numbers)

    return Kind(_make(shapes, dtype, own), call, truth, ("x", "weight"), (5,), 3)


def adapters(dtype: torch.dtype, own: torch.dtype) -> Kind:
    """The same as a list of matrices."""
    shapes = {"x": (len(INDICES), 4, K), "weight": (N, K), "bias": (N,)}
    shapes |= {f"a{i}": (r, K) for i, r in enumerate(RANKS)}
    shapes |= {f"b{i}": (N, r) for i, r in enumerate(RANKS)}
    numbers = {"scales": [0.5, 1.0, -2.0]}

    def call(x, weight, bias, *ab, indices=INDICES, **options):
        pairs, options = (list(ab[:3]), list(ab[3:])), numbers | options
        return fastlora.multi_lora_linear(x, weight, *pairs, indices, bias=bias, **options)

    def truth(x, weight, bias, *ab):
        pairs = list(ab[:3]), list(ab[3:])
        return oracles.multi_lora_linear(x, weight, *pairs, INDICES, bias=bias, **numbers)

    return Kind(_make(shapes, dtype, own), call, truth, ("x", "weight"), (5,), 3)


def packed(dtype: torch.dtype, own: torch.dtype) -> Kind:
    """A layer over NF4."""
    weight: Quantized = random_four_bit(N, K, "nf4", 64, nested=2)
    shapes = {"x": (ROWS, K), "a": (4, K), "b": (N, 4), "bias": (N,)}

    def call(x, a, b, bias, **options):
        return fastlora.lora_linear(x, weight, a, b, bias=bias, scale=0.5, **options)

    def truth(x, a, b, bias):
        return oracles.lora_linear(x, weight.dense(x.dtype), a, b, bias=bias, scale=0.5)

    return Kind(_make(shapes, dtype, own), call, truth, ("x",), (4,), 1, weight.tensors)


def packed_experts(dtype: torch.dtype, own: torch.dtype) -> Kind:
    """The experts over int8 with a scale for each row."""
    weight = stack([random_int8(N, K) for _ in range(3)])
    shapes = {"x": (ROWS, K), "a": (3, 4, K), "b": (3, N, 4), "bias": (3, N)}

    def call(x, a, b, bias, offsets=ENDS, **options):
        return fastlora.grouped_lora_linear(
            x, weight, a, b, offsets, bias=bias, scale=0.5, **options
        )

    def truth(x, a, b, bias):
        dense = weight.dense(x.dtype)
        return oracles.grouped_lora_linear(x, dense, a, b, ENDS, bias=bias, scale=0.5)

    others = (*weight.tensors, ENDS)
    return Kind(_make(shapes, dtype, own), call, truth, ("x",), (4,), 1, others)


KINDS = {
    make.__name__: make for make in (layer, group, experts, bank, adapters, packed, packed_experts)
}


def made(name: str, dtype: torch.dtype = torch.float32, own: torch.dtype | None = None) -> Kind:
    return KINDS[name](dtype, own or dtype)
