"""Every kind of call as one record, so that one suite can test them all.

A record holds the tensors of a call, the call itself, and a float64 oracle of the same arguments.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import oracles
import torch
from judge import ends_of
from packed import random_four_bit, random_int8, stack
from torch import Tensor

import fastlora
from fastlora.call.projection import Adapter, Base, Output
from fastlora.formats.format import Quantized

K, N, ROWS = 16, 12, 40
INDICES = torch.tensor([2, 0, -1, 0, 2, -1, 2, 1, 1, 1], dtype=torch.int32)  # one index for 4 rows
RANKS = (2, 5, 3)
ENDS = ends_of([14, 0, 20])  # the last 6 rows belong to no expert


class Kind(NamedTuple):
    """One kind of call and its oracle.

    ``call`` and ``truth`` take the tensors in the order of ``tensors``, x first.  ``call`` also
    takes keyword options.
    """

    tensors: dict[str, Tensor]  # all but "weight" require gradients
    call: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    cast: tuple[str, ...]  # names of the tensors that autocast casts
    ranks: tuple[int, ...]  # the number of columns of each h
    seeds: int
    others: tuple[Tensor, ...] = ()  # other tensors of the call, which no call may copy


def _make(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, own: torch.dtype) -> dict:
    wide = ("x", "weight", "weight1", "weight2")
    made = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, dtype=torch.float64)
        made[name] = tensor.to(dtype if name in wide or name.startswith("bias") else own)
        made[name].requires_grad_(not name.startswith("weight"))
    return made


def _both(name: str, run: Callable[..., Tensor]) -> list[Callable[..., Tensor]]:
    """A kind's call and its truth: ``run`` with fastlora's and the oracles' function."""
    return [partial(run, getattr(place, name)) for place in (fastlora, oracles)]


def layer(dtype: torch.dtype, own: torch.dtype) -> Kind:
    shapes = {"x": (ROWS, K), "weight": (N, K), "a": (4, K), "b": (N, 4), "bias": (N,)}

    def run(function, x, weight, a, b, bias, **options):
        return function(x, weight, a, b, bias=bias, scale=0.5, **options)

    both = _both("lora_linear", run)
    return Kind(_make(shapes, dtype, own), *both, ("x", "weight"), (4,), 1)


def group(dtype: torch.dtype, own: torch.dtype) -> Kind:
    """Three outputs of one x: a bias and one adapter; two adapters; a frozen layer."""
    shapes = {
        "x": (2, ROWS // 2, K), "weight": (N, K), "weight1": (5, K), "weight2": (3, K),
        "a": (4, K), "b": (N, 4), "bias": (N,), "a1": (2, K), "b1": (5, 2),
        "a2": (3, K), "b2": (5, 3),
    }  # fmt: skip

    def outputs(weight, weight1, weight2, a, b, bias, a1, b1, a2, b2):
        return [
            Output(Base(weight, bias), (Adapter(a, b, 0.5),)),
            Output(Base(weight1), (Adapter(a1, b1, 2.0), Adapter(a2, b2, -0.25))),
            Output(Base(weight2)),
        ]

    def run(function, x, *tensors, **options):
        return torch.cat(function(x, outputs(*tensors), **options), -1)

    both, cast = _both("lora_linears", run), ("x", "weight", "weight1", "weight2")
    return Kind(_make(shapes, dtype, own), *both, cast, (4, 2, 3), 3)


def experts(dtype: torch.dtype, own: torch.dtype) -> Kind:
    shapes = {
        "x": (ROWS, K), "weight": (3, N, K), "a": (3, 4, K), "b": (3, N, 4), "bias": (3, N),
    }  # fmt: skip

    def run(function, x, weight, a, b, bias, offsets=ENDS, **options):
        return function(x, weight, a, b, offsets, bias=bias, scale=0.5, **options)

    both = _both("grouped_lora_linear", run)
    return Kind(_make(shapes, dtype, own), *both, ("x", "weight"), (4,), 1, (ENDS,))


def bank(dtype: torch.dtype, own: torch.dtype) -> Kind:
    """Adapters of different ranks, stacked in two banks and padded to the largest rank."""
    shapes = {
        "x": (len(INDICES), 4, K), "weight": (N, K), "a": (3, 5, K), "b": (3, N, 5), "bias": (N,),
    }  # fmt: skip
    numbers = {"scales": [0.5, 1.0, -2.0], "ranks": list(RANKS)}

    def run(function, x, weight, a, b, bias, indices=INDICES, **options):
        return function(x, weight, a, b, indices, bias=bias, **numbers | options)

    both = _both("multi_lora_linear", run)
    return Kind(_make(shapes, dtype, own), *both, ("x", "weight"), (5,), 3)


def adapters(dtype: torch.dtype, own: torch.dtype) -> Kind:
    """The same adapters as in ``bank``, as lists of matrices."""
    shapes = {"x": (len(INDICES), 4, K), "weight": (N, K), "bias": (N,)}
    shapes |= {f"a{i}": (r, K) for i, r in enumerate(RANKS)}
    shapes |= {f"b{i}": (N, r) for i, r in enumerate(RANKS)}
    numbers = {"scales": [0.5, 1.0, -2.0]}

    def run(function, x, weight, bias, *ab, indices=INDICES, **options):
        pairs = list(ab[:3]), list(ab[3:])
        return function(x, weight, *pairs, indices, bias=bias, **numbers | options)

    both = _both("multi_lora_linear", run)
    return Kind(_make(shapes, dtype, own), *both, ("x", "weight"), (5,), 3)


def _over(weight: Quantized, kind: Kind) -> Kind:
    """The kind with this packed weight in the place of its dense one."""
    tensors = {name: tensor for name, tensor in kind.tensors.items() if name != "weight"}

    def call(x, *own, **options):
        return kind.call(x, weight, *own, **options)

    def truth(x, *own):
        return kind.truth(x, weight.dense(x.dtype), *own)

    return Kind(tensors, call, truth, ("x",), kind.ranks, 1, (*weight.tensors, *kind.others))


def packed(dtype: torch.dtype, own: torch.dtype) -> Kind:
    """A layer whose base weight is packed as NF4."""
    return _over(random_four_bit(N, K, "nf4", 64, nested=2), layer(dtype, own))


def packed_experts(dtype: torch.dtype, own: torch.dtype) -> Kind:
    """The experts, with base weights packed as int8 with one scale for each row."""
    return _over(stack([random_int8(N, K) for _ in range(3)]), experts(dtype, own))


KINDS = {
    make.__name__: make for make in (layer, group, experts, bank, adapters, packed, packed_experts)
}


def made(name: str, dtype: torch.dtype = torch.float32, own: torch.dtype | None = None) -> Kind:
    return KINDS[name](dtype, own or dtype)
