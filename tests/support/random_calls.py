"""Random calls of any kind, layout, dtype and environment, each drawn from a seed and an index.

:func:`check` runs one call and compares it with the composite formula in float64, with the same
dropout masks.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from math import prod, sqrt
from random import Random
from typing import NamedTuple
from unittest import mock

import oracles
import packed
import torch
from dora_layers import dora_linear
from judge import assert_close
from marks import DEVICE
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora.backends import products
from fastlora.backends.dropout import dropout_mask
from fastlora.backends.gated_products import ACTIVATIONS
from fastlora.call.projection import HALF_DTYPES, Adapter, Base, Output
from fastlora.common import row_blocks as blocks
from fastlora.formats.format import Quantized
from fastlora.formats.gguf import KINDS as GGUF
from fastlora.ops import few_rows, kinds
from fastlora.ops.gated_mlp import gated_call
from fastlora.ops.node import draw_seed

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
_PAIR = ("lora_a", "lora_b")
_SHORT = {F32: "f32", F64: "f64", BF16: "bf16", F16: "f16"}
_WORLDS = ("eager",) * 5 + ("autocast", "no-grad", "inference", "checkpoint", "registered")
_EITHER, _FLOAT8 = (True, False), ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz")
# Each function cuts a matrix [rows, columns] from a larger tensor, which ``empty(*shape)`` makes.
LAYOUTS = {
    "dense": lambda empty, rows, columns: empty(rows, columns),
    "transposed": lambda empty, rows, columns: empty(columns, rows).T,
    "columns": lambda empty, rows, columns: empty(rows, columns + 24)[:, 5:-19],
    "columns-at-16-bytes": lambda empty, rows, columns: empty(rows, columns + 32)[:, 16:-16],
    "every-second-row": lambda empty, rows, columns: empty(2 * rows, columns)[::2],
    "at-an-odd-address": lambda empty, rows, columns: empty(rows * columns + 3)[3:].view(rows, -1),
    "expanded": lambda empty, rows, columns: empty(1, columns).expand(rows, columns),
    "every-second-column": lambda empty, rows, columns: empty(rows, 2 * columns)[:, ::2],
    "expanded-columns": lambda empty, rows, columns: empty(rows, 1).expand(rows, columns),
    "one-number": lambda empty, rows, columns: empty(1, 1).expand(rows, columns),
    "negated": lambda empty, rows, columns: torch._neg_view(empty(rows, columns)),
}
# Values: a number that must divide K, the function that packs [n, k], and a function that draws its
# other arguments.
FORMATS: dict[str, tuple[int, Callable, Callable]] = {
    "nf4": (1, packed.random_four_bit, lambda n, k, pick: ("nf4", pick((16, 64)))),
    "fp4": (1, packed.random_four_bit, lambda n, k, pick: ("fp4", 32, pick((1, 3, 16)))),
    "int8": (1, packed.random_int8, lambda n, k, pick: ()),
    "int4": (8, packed.random_int4, lambda n, k, pick: (8, pick((F32, BF16)))),
    "affine": (8, packed.random_affine, lambda n, k, pick: (
        pick((1, n)), pick((8, k)), pick(_EITHER), pick((F32, BF16)))),
    "float8": (1, packed.random_float8, lambda n, k, pick: (
        pick((1, 16, n)), pick((16, k)), pick(_FLOAT8), pick((F32, BF16, F16)))),
    "mxfp4": (32, packed.random_mxfp4, lambda n, k, pick: ()),
    "nvfp4": (16, packed.random_nvfp4, lambda n, k, pick: ()),
    "gguf": (256, packed.random_gguf, lambda n, k, pick: (pick(list(GGUF)), pick(_EITHER))),
}  # fmt: skip


class Made(NamedTuple):
    """A call and its reference.

    ``textbook(leaves, masks, change)`` computes the call by the composite formula.  :func:`check`
    calls it three times: in float64 (the truth), in the call's dtype (for PyTorch's own error), and
    with the absolute values of all tensors (for the sizes of all terms).  ``change`` is applied to
    the scales, which the last call also takes as absolute values.
    """

    run: Callable[[], Tensor | Sequence[Tensor]]
    textbook: Callable[..., Tensor | Sequence[Tensor]]
    masks: list[tuple[tuple[int, int], float]]  # rows and columns for each seed, and p
    widths: list[int]  # of the outputs
    last: int | None = None  # rows from this index on belong to no expert


class Case:
    """The properties of a call that are drawn before its tensors; ``words`` describes them.

    ``fixed`` replaces drawn properties: kind, dtype, adapter_dtype, world, p, format, K, M, wide,
    small, node, plan, and a layer's N.  *World* is the mode or transform around the call, such as
    autocast.  The entry ``alone`` is a prefix: only tensors whose names begin with it require
    gradients.
    """

    def __init__(self, seed: int, index: int, backend: str, **fixed: object) -> None:
        self.draw, self.alone = Random(f"{seed} {index}"), fixed.get("alone")
        self.backend, self.pick, self.random = backend, self.draw.choice, self.draw.random
        pick, kernels, of = self.pick, backend != "torch", fixed.get
        kind = pick([kind for kind, (_, count) in KINDS.items() for _ in range(count)])
        self.kind = of("kind", kind)
        self.make, _ = KINDS[self.kind]
        self.dtype = of("dtype", pick((F32, F32, BF16, BF16, F16, BF16 if kernels else F64)))
        adapter_dtype = pick((self.dtype, self.dtype, F32, F32, pick((BF16, F16, F64))))
        self.adapter_dtype = of("adapter_dtype", adapter_dtype)
        worlds = _WORLDS
        if self.kind == "gated":  # a gated MLP is tested only where it is an autograd node
            worlds = tuple(w for w in worlds if w in ("eager", "autocast", "checkpoint"))
        self.world, self.compute = of("world", pick(worlds)), self.dtype
        if self.world == "autocast" and self.dtype != F64:
            self.compute = pick((BF16, F16))
        self.p = of("p", pick((0.0, 0.0, 0.1, 0.5, 0.9)))
        packs = self.random() < 0.3
        # the norm of a packed weight is computed in float32
        if self.kind == "dora" and self.dtype == F64:
            packs = False
        self.format = of("format", pick(list(FORMATS)) if packs else "")
        unit = FORMATS[self.format][0] if self.format else 1
        self.K, self.inner = (unit * max(1, self.size() // unit) for _ in range(2))
        self.K, self.N = of("K", self.K), of("N")
        self.M = of("M", pick((0, 1, 1, *[self.size() for _ in range(8)])))
        self.lead = self._lead()
        # wide: run as on a CPU with slow 16-bit products.  small: small blocks of rows.  node: use
        # the node also for few rows.
        self.wide, self.small = of("wide", pick((True, False))), of("small", self.random() < 0.3)
        self.node = of("node", self.random() < 0.3)
        plan = pick((None, "FUSED", "IN_PLACE", "UNPACKING")) if kernels else None
        self.plan = of("plan", plan)
        self.seed, self.processors = self.draw.getrandbits(60), pick((1, 4, 6, 100))
        self.leaves: dict[str, Tensor] = {}  # the tensors that the textbook takes, by name
        self.given: list[Tensor] = []  # all tensors that are passed to the call
        dtypes = [_SHORT[each] for each in (self.dtype, self.adapter_dtype)]
        more = {"wide": self.wide, "blocks": self.small, "node": self.node, self.plan: self.plan}
        self.words = " ".join(
            [
                *(self.kind, "-".join(dtypes), self.world, f"M{self.M} K{self.K} p{self.p}"),
                *([self.format] if self.format else []),
                *(word for word, holds in more.items() if holds),
            ]
        )

    def size(self) -> int:
        any_size = self.draw.randint(1, 150 if self.backend == "torch" else 80)
        return self.pick((1, 2, 3, 5, 8, 16, 17, 33, 64, any_size | 1, any_size | 1, any_size))

    def scale(self) -> float:
        return self.pick((0.75, 0.75, 2, -1.5, 0.0))

    def matrix(self, rows: int, columns: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
        """A random matrix of any layout; memory around it is NaN."""
        layout = "dense" if not rows or self.random() < 0.5 else self.pick(list(LAYOUTS))
        values = size * torch.randn(rows, columns, dtype=F64)
        if self.random() < 0.1:
            values[: rows // 2] = 0.0
        nan = lambda *shape: torch.full(shape, torch.nan, dtype=dtype)  # noqa: E731
        cut = LAYOUTS[layout](nan, rows, columns)
        places = tuple([slice(0, None if stride else 1) for stride in cut.stride()])
        cut[places].copy_(values[places])
        return cut

    def stack(self, *shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
        """Stacked matrices: dense, each transposed, or with gaps."""
        count, rows, columns = shape
        whole = self.matrix(count * rows, columns, dtype, size).unflatten(0, (count, rows))
        return whole.mT.contiguous().mT if self.random() < 0.3 else whole

    def rows(self, columns: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
        """A random x of shape [*lead, columns]."""
        lead, flat = self.lead, self.matrix(self.M, columns, dtype, size)
        if not lead:
            return flat[0]
        if len(lead) == 2 and self.random() < 0.3:
            return flat.unflatten(0, lead[::-1]).transpose(0, 1)
        return flat.unflatten(0, lead)

    def weight(self, name: str, n: int, k: int) -> Tensor | Quantized:
        if self.format and self.random() < 0.8:
            _, make, drawn = FORMATS[self.format]
            weight = make(n, k, *drawn(n, k, self.pick))
            self.leaves[name] = packed.by_elements(weight, self.compute).to(self.compute)
            self.given += weight.tensors
            return weight
        dtype = self.dtype
        if self.compute != dtype:  # autocast unifies the dtypes
            dtype = self.pick((F32, BF16, F16))
        return self.leaf(name, self.matrix(n, k, dtype, k**-0.5), 0.1)

    def leaf(self, name: str, tensor: Tensor, chance: float = 0.8) -> Tensor:
        """Register a tensor that may require a gradient."""
        drawn = self.random() < chance
        self.leaves[name] = tensor.requires_grad_(
            drawn if self.alone is None else name.startswith(self.alone)
        )
        self.given.append(tensor)
        return tensor

    def output(self, i: int, n: int, k: int, adapters: int) -> Output:
        """Output i of a group; all its tensors are leaves."""
        weight, bias = self.weight(f"weight{i}", n, k), None
        if self.random() < 0.4:
            bias = self.matrix(n, 1, self.pick((self.dtype, F32)))[:, 0]
            bias = self.leaf(f"bias{i}", bias, 0.5)
        pairs = [self.pair(f"{i}.{j}", n, k, self.size_of_x([i])) for j in range(adapters)]
        return Output(Base(weight, bias), tuple(Adapter(*ab, self.scale()) for ab in pairs))

    def pair(self, place: str, n: int, k: int, size_of_x: float) -> tuple[Tensor, Tensor]:
        """An adapter's tensors, scaled so that products are about 1."""
        r, dtype = self.size(), self.adapter_dtype
        a, b = self.matrix(r, k, dtype, k**-0.5 / size_of_x), self.matrix(n, r, dtype, r**-0.5)
        pairs = zip(_PAIR, (a, b), strict=True)
        return tuple(self.leaf(f"{name}{place}", each) for name, each in pairs)

    def size_of_x(self, outputs: Sequence[int]) -> float:
        """A factor for x that keeps the base products of ``outputs`` finite in float16."""
        weights = [self.leaves[f"weight{i}"].detach().double() for i in outputs]
        return 1 / max(1.0, *[float(w.norm() / w.shape[0] ** 0.5) for w in weights])

    def texts(self, leaves: dict[str, Tensor], outputs: Sequence[Output], change: Callable) -> list:
        """``outputs`` in the form that the reference takes, with their tensors from ``leaves``."""
        return [
            (
                (leaves[f"weight{i}"], leaves.get(f"bias{i}")),
                [
                    (leaves[f"lora_a{i}.{j}"], leaves[f"lora_b{i}.{j}"], change(scale))
                    for j, (_, _, scale) in enumerate(adapters)
                ],
            )
            for i, (_, adapters) in enumerate(outputs)
        ]

    @contextmanager
    def world_of(self) -> Iterator[None]:
        """Set up everything that isn't an argument of the call."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        with ExitStack() as stack:
            put = lambda *change: stack.enter_context(mock.patch.object(*change))  # noqa: E731
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            put(kinds, "calls", {})
            put(products, "FORCED", self.wide)
            if self.node:
                put(few_rows, "MOST_ROWS", 0)
            if self.small:
                put(blocks, "SMALLEST_BLOCK", 5 * self.K)
                for name, value in {"_BLOCK": 0, "_ROWS": 0, "_FEWEST_ROWS": 8}.items():
                    put(products, name, value)
                put(products, "_FEWEST_OF_WEIGHT", 4)
            torch.use_deterministic_algorithms(True, warn_only=True)
            stack.callback(torch.use_deterministic_algorithms, deterministic)
            stack.enter_context(fastlora.use_backend(self.backend))
            if self.backend == "triton":
                from fastlora.kernels.target import target_of, use_target

                its = target_of(torch.device(DEVICE))
                stack.enter_context(use_target(replace(its, processors=self.processors)))
            if self.plan:
                from fastlora.kernels import plan

                stack.enter_context(plan.use_plan(getattr(plan, self.plan)))
            yield

    def _lead(self) -> tuple[int, ...]:
        M, splits = self.M, [(self.M,), (self.M,), (1, self.M), (self.M, 1)]
        if M == 1 and self.kind in ("layer", "gated", "dora"):
            splits.append(())
        splits += [(d, M // d) for d in (2, 3, 5) if M % d == 0]
        splits += [(2, 1, M // 6, 3)] if M % 6 == 0 else []
        return (M,) if self.kind == "experts" else self.pick(splits)


def _layer(case: Case) -> Made:
    """One output or a group; outputs may be frozen or have several adapters."""
    outputs = []
    for i in range(case.pick((1, 1, 1, 2, 3, 5))):
        n = case.N or case.size()
        outputs.append(case.output(i, n, case.K, case.pick((0, 1, 1, 1, 1, 2, 3))))
    x = case.rows(case.K, case.dtype, case.size_of_x(range(len(outputs))))
    case.leaf("x", x)

    def textbook(t, masks, change):
        its = case.texts(t, outputs, change)
        return oracles.lora_linears(t["x"], its, dropout=case.p if masks else 0.0, masks=masks)

    masks = [((case.M, case.K), case.p) for output in outputs for _ in output.adapters]
    run = partial(fastlora.lora_linears, x, outputs, dropout=case.p)
    return Made(run, textbook, masks, [output.base.weight.shape[0] for output in outputs])


def _gated(case: Case) -> Made:
    """A gated MLP: two layers to ``inner`` columns, and one from there."""
    # In 16 bits, rounding may change the sign of relu's input, and gradients jump there.
    edge = {"relu"} if case.compute in HALF_DTYPES else set()
    activation, n = case.pick([each for each in ACTIVATIONS if each not in edge]), case.size()
    shapes = (case.inner, case.K), (case.inner, case.K), (n, case.inner)
    outputs = [case.output(i, *shape, case.pick((0, 1, 1, 2))) for i, shape in enumerate(shapes)]
    x = case.leaf("x", case.rows(case.K, case.dtype, case.size_of_x((0, 1))))

    def textbook(t, masks, change):
        its, p = case.texts(t, outputs, change), case.p if masks else 0.0
        if change(2) == 4:  # ``change`` squares, so the divisor 1 - p must also be squared
            p = 1 - (1 - p) ** 2
        return oracles.gated_mlp(t["x"], *its, activation, dropout=p, masks=masks)

    def run():
        return gated_call(x, *outputs, activation, dropout=case.p, down_dropout=case.p)[0]

    pairs = zip(outputs, shapes, strict=True)
    masks = [((case.M, k), case.p) for output, (_, k) in pairs for _ in output.adapters]
    return Made(run, textbook, masks, [n])


def _experts(case: Case) -> Made:
    """Experts, some without rows; x is NaN after the last expert's rows."""
    E, N, K, r = case.pick((1, 2, 3, 5, 9)), case.size(), case.K, case.size()
    cuts = sorted(case.draw.randint(0, case.M) for _ in range(E))
    ends = torch.tensor(cuts, dtype=torch.int32)
    x = case.rows(K, case.dtype)
    if 0 not in x.stride():
        x[cuts[-1] :] = torch.nan
    tensors, own = {"x": case.leaf("x", x)}, {"dtype": case.adapter_dtype}
    if case.format:
        _, make, drawn = FORMATS[case.format]
        numbers = drawn(N, K, case.pick)
        tensors["weight"] = weight = packed.stack([make(N, K, *numbers) for _ in range(E)])
        each = [Quantized(weight.format, own) for own in zip(*weight.tensors, strict=True)]
        dense = [packed.by_elements(one, case.compute).to(case.compute) for one in each]
        case.leaves["weight"], case.given = torch.stack(dense), [*case.given, *weight.tensors]
    else:
        weight = case.stack(E, N, K, dtype=case.dtype, size=K**-0.5)
        tensors["weight"] = case.leaf("weight", weight, 0.1)
    tensors["lora_a"] = case.leaf("lora_a", case.stack(E, r, K, size=K**-0.5, **own))
    tensors["lora_b"] = case.leaf("lora_b", case.stack(E, N, r, size=r**-0.5, **own))
    if case.random() < 0.4:
        tensors["bias"] = case.leaf("bias", case.matrix(E, N, case.pick((case.dtype, F32))), 0.5)
    scale, p = case.scale(), case.p
    case.given.append(ends)

    def textbook(t, masks, change):
        mask = masks[0] if masks else None
        numbers = {"scale": change(scale), "dropout": p, "mask": mask}
        return oracles.grouped_lora_linear(**t, offsets=ends, **numbers)

    run = partial(fastlora.grouped_lora_linear, **tensors, offsets=ends, scale=scale, dropout=p)
    return Made(run, textbook, [((case.M, K), p)], [N], cuts[-1])


def _many(case: Case) -> Made:
    """Many adapters in a batch: lists, or banks with NaN after each rank.  Index -1: no adapter."""
    n, N, K = case.pick((1, 2, 3, 7)), case.size(), case.K
    base = case.output(0, N, K, 0).base
    size = case.size_of_x([0])
    x = case.leaf("x", case.rows(K, case.dtype, size))
    banks, ps = case.random() < 0.5, [case.pick((case.p, 0.3)) if case.p else 0.0 for _ in range(n)]
    scales = [case.scale() for _ in range(n)]
    lora_a, lora_b = map(list, zip(*[case.pair(str(i), N, K, size) for i in range(n)], strict=True))
    ranks = [len(each) for each in lora_a]
    if banks:
        down, up = ([case.leaves.pop(f"{name}{i}") for i in range(n)] for name in _PAIR)
        lora_a = torch.full((n, max(ranks), K), torch.nan, dtype=case.adapter_dtype)
        lora_b = torch.full((n, N, max(ranks)), torch.nan, dtype=case.adapter_dtype)
        for i, r in enumerate(ranks):
            lora_a[i, :r], lora_b[i, :, :r] = down[i].detach(), up[i].detach()
        case.leaf("lora_a", lora_a), case.leaf("lora_b", lora_b)
    lead = case.lead[: case.draw.randint(1, len(case.lead))]
    own = [case.draw.randint(-1, n - 1) for _ in range(prod(lead))]
    own = sorted(own) if case.random() < 0.3 else own
    indices = torch.tensor(own, dtype=torch.int32).reshape(lead)
    given = indices if case.random() < 0.5 else fastlora.AdapterMapping(indices, n)
    call_ranks = ranks if banks else None
    case.given.append(indices)

    def textbook(t, masks, change):
        pairs = [t[each] if banks else [t[f"{each}{i}"] for i in range(n)] for each in _PAIR]
        numbers = {"scales": [change(s) for s in scales], "ranks": call_ranks, "dropouts": ps}
        weight, bias, masks = t["weight0"], t.get("bias0"), masks or [None] * n
        tensors = t["x"], weight, *pairs, indices
        return oracles.multi_lora_linear(*tensors, bias=bias, masks=masks, **numbers)

    tensors = x, base.weight, lora_a, lora_b, given
    numbers = {"scales": scales, "ranks": call_ranks, "dropout": ps, "bias": base.bias}
    repeats = case.M // max(1, len(own))
    masks = [((own.count(i) * repeats, K), p) for i, p in enumerate(ps)]
    return Made(partial(fastlora.multi_lora_linear, *tensors, **numbers), textbook, masks, [N])


def _dora(case: Case) -> Made:
    N, K = case.size(), case.K
    ((weight, bias), ((a, b, scale),)) = case.output(0, N, K, 1)
    x = case.leaf("x", case.rows(K, case.dtype, case.size_of_x([0])))
    parts = case.leaves["weight0"].double(), scale * (b.double() @ a.double())
    norms = sum(parts).norm(dim=1).detach()
    magnitude = (norms * (1 + 0.3 * torch.randn(N, dtype=F64)) + 0.1).to(F32)
    case.leaf("magnitude", magnitude)
    keep = torch.rand(x.shape) >= case.p
    drop = (lambda x: x * keep.to(x.dtype) / (1.0 - case.p)) if case.p else None
    # Where the adapter nearly cancels the weight, the norm comes from a small difference.
    lost = (sum(part.norm(dim=1).detach() for part in parts) / norms).square() / 4

    def textbook(t, masks, change):
        tensors = weight, a, b, magnitude = [
            t[name] for name in ("weight0", "lora_a0.0", "lora_b0.0", "magnitude")
        ]
        x, bias, new_scale = t["x"], t.get("bias0"), change(scale)
        dropped = x if drop is None else drop(x)
        if change is not abs:
            more = {"scale": new_scale, "dropped": dropped}
            return oracles.dora_linear(x, *tensors, bias=bias, **more)
        # The bias is added to z and subtracted again; the gain uses the original numbers.
        z = dropped @ weight.T + new_scale * (dropped @ a.T @ b.T) + (0 if bias is None else bias)
        y = magnitude / norms * lost.clamp_min(1.0) * z + (0 if bias is None else bias)
        return y if drop is None else y + (x + dropped) @ weight.T

    tensors, more = (
        (x, weight, a, b, magnitude),
        {"bias": bias, "scale": scale, "drop": drop, "p": case.p},
    )
    return Made(partial(dora_linear, *tensors, **more), textbook, [], [N])


# Values: the function that makes a call of this kind, and the kind's share in the draw.
KINDS: dict[str, tuple[Callable[[Case], Made], int]] = {
    "layer": (_layer, 4), "experts": (_experts, 2), "many": (_many, 2), "gated": (_gated, 1),
    "dora": (_dora, 1),
}  # fmt: skip


def check(case: Case) -> None:
    """Raise AssertionError if results are wrong, not repeatable, or an input changes."""
    with nullcontext() if DEVICE == "cpu" else torch.device(DEVICE):
        _check(case)


def _check(case: Case) -> None:
    torch.manual_seed(case.seed)
    made = case.make(case)
    gated = case.kind == "gated"
    size = case.size_of_x([2]) if gated else 1.0  # keeps dh from an overflow in float16
    dys = [case.rows(width, case.compute, size) for width in made.widths]
    if len(dys) > 1 and case.random() < 0.2:
        dys[case.draw.randrange(len(dys))] = None
    for dy in dys:
        if made.last is not None and dy is not None and 0 not in dy.stride():
            dy[made.last :] = torch.nan
    given = [*case.given, *(dy for dy in dys if dy is not None)]
    memory = [_bytes_of(tensor) for tensor in given]
    with case.world_of():
        found = _results(case, made, dys)
        again = _results(case, made, dys)
    for name, value in found.items():
        assert _same_bits(value, again[name]), f"{name} has other bits when run again"
    for tensor, before in zip(given, memory, strict=True):
        assert torch.equal(_bytes_of(tensor), before), f"an input {tuple(tensor.shape)} was changed"
    masks: list[Tensor | None] = []
    if any(p for _, p in made.masks):
        torch.manual_seed(case.seed)
        seeds = draw_seed(len(made.masks), torch.device(DEVICE))
        pairs = zip(seeds, made.masks, strict=True)
        masks = [dropout_mask(seed, shape, p) if p else None for seed, (shape, p) in pairs]
    longest = max(max(tensor.shape, default=1) for tensor in case.leaves.values())
    truth = _textbook(case, made, masks, dys, Tensor.double)
    eager = _textbook(case, made, masks, dys)
    change = (lambda value: value * value) if gated else abs
    size = _textbook(case, made, masks, dys, lambda tensor: change(tensor.double()), change)
    # An overflow in PyTorch, or a row of norm 0 in DoRA, leaves gradients without a valid
    # reference.
    is_whole = all(eager[name].isfinite().all() for name in eager if name.startswith("y"))
    for name, value in found.items():
        if value is None:
            assert not truth[name].count_nonzero(), f"{name} is None"
        elif eager[name].isfinite().all() and (is_whole or name.startswith("y")):
            # Absolute values overestimate sizes after three layers; random signs partly cancel.
            term_size = 8 * size[name].sqrt() if gated else size[name]
            if case.compute in (F32, F64):  # each of so many additions may round
                term_size = max(4.0, sqrt(longest)) * term_size
            assert_close(name, value, truth[name], eager[name], term_size, case.compute)


def _results(case: Case, made: Made, dys: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """Outputs and gradients by name, computed from the case's seed."""
    torch.manual_seed(case.seed)
    worlds = {
        "autocast": lambda: torch.autocast(DEVICE, case.compute),
        "no-grad": torch.no_grad,
        "inference": torch.inference_mode,
        "registered": lambda: FlopCounterMode(display=False),
    }
    run = made.run
    if case.world == "checkpoint":
        run = lambda: checkpoint(made.run, use_reentrant=False)  # noqa: E731
    with ExitStack() as stack:
        if case.world in worlds and not (case.world == "autocast" and case.dtype == F64):
            stack.enter_context(worlds[case.world]())
        ys = _as_tuple(run())
    named = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    if case.world in ("no-grad", "inference"):
        return named
    return named | _gradients(ys, dys, case.leaves)


def _gradients(
    ys: Sequence[Tensor], dys: Sequence[Tensor | None], leaves: dict[str, Tensor]
) -> dict[str, Tensor | None]:
    wanted = {f"d_{name}": leaf for name, leaf in leaves.items() if leaf.requires_grad}
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None and y.requires_grad]
    if not pairs or not wanted:
        return dict.fromkeys(wanted)
    used, used_dys = zip(*pairs, strict=True)
    found = torch.autograd.grad(used, list(wanted.values()), used_dys, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def _textbook(
    case: Case,
    made: Made,
    masks: list[Tensor | None],
    dys: Sequence[Tensor | None],
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    change: Callable = lambda value: value,
) -> dict[str, Tensor]:
    """Outputs and gradients by name, from converted tensors and changed scales."""
    leaves = {
        name: convert(leaf.detach()).requires_grad_(leaf.requires_grad)
        for name, leaf in case.leaves.items()
    }
    dtype = convert(torch.empty(0, dtype=case.compute)).dtype
    cast = {name: leaf.to(dtype) for name, leaf in leaves.items()}
    ys = _as_tuple(made.textbook(cast, masks or None, change))
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    converted_dys = [None if dy is None else convert(dy) for dy in dys]
    for name, value in _gradients(ys, converted_dys, leaves).items():
        found[name] = torch.zeros_like(leaves[name[2:]]) if value is None else value
    return found


def _as_tuple(ys: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (ys,) if isinstance(ys, Tensor) else ys


def _bytes_of(tensor: Tensor) -> Tensor:
    """A copy of the tensor's whole memory."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))
