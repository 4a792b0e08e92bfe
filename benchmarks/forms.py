"""The calls of launchers in a layer: operands, the call, and its expected results.

====== ================================================= =============
y      x weightᵀ + h lora_bᵀ (+ bias)                    gemm_lowrank
y,h    the same, and h, in one launch                    gemm_lowrank_few_rows
dx     Σ dy weight + keep ∘ (dh lora_a)
y+ dx+ only the low-rank term, for torch's base product     lowrank
h      factor · (keep ∘ x) lora_aᵀ                       project
dh     factor · dy lora_b
dA     dhᵀ (keep ∘ x)                                    weight_grad
dA,dx+ the same, and dx+, in one pass over x
dB     dyᵀ h
x8     codes and scales of x, rotated                    quantize_rows
dy8    codes and scales of dy, times the weight's scales
dB,dh  the same, and dh, in one pass over dy
loss   each row's loss and gradient (no operands here)   row_loss
====== ================================================= =============

Tuning, the compile report and the tests of stated work make their calls here.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastlora.backends.dropout import dropout_mask
from fastlora.formats.bitsandbytes import CODES
from fastlora.formats.microscaled import E2M1
from fastlora.kernels.common import dropout_threshold
from fastlora.kernels.config import Call, Config
from fastlora.kernels.dequant import dequant
from fastlora.kernels.gemm_int8_lowrank import gemm_int8_lowrank
from fastlora.kernels.gemm_lowrank import gemm_lowrank
from fastlora.kernels.gemm_lowrank_few_rows import gemm_lowrank_few_rows
from fastlora.kernels.lowrank import lowrank
from fastlora.kernels.packed import FLOAT8, FOUR_BIT, INT8, Packed
from fastlora.kernels.project import project
from fastlora.kernels.quantize_rows import quantize_rows
from fastlora.kernels.segments import SegmentNumbers
from fastlora.kernels.weight_grad import weight_grad

FACTOR = 2.0
_KERNELS = {
    "y": "gemm_lowrank", "dx": "gemm_lowrank", "y+": "lowrank", "dx+": "lowrank",
    "h": "project", "dh": "project", "x8": "quantize_rows", "dy8": "quantize_rows",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """One call, with a rank for each projection.

    ``columns`` are the columns of out for y and dx, and of x or dy for the others.  ``depths`` are
    the inner lengths of the base products; y+ and dx+ have none.
    """

    name: str
    M: int
    columns: int
    ranks: tuple[int, ...]
    depths: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    bias: bool = False
    precision: str = "ieee"
    packed: str = ""  # the weights' packing, one of PACKED; "": dense
    segments: int = 0  # the number of segments, of about the same length
    own: bool = False  # each segment is an adapter: its own factor, scale and mask, unsorted rows
    int8: bool = False  # y and dx multiply int8

    @property
    def kernel(self) -> str:
        return _KERNELS.get(self.name.split(",")[0], "weight_grad")

    @property
    def also(self) -> bool:
        """Whether the launch also computes h, dh or a low-rank term."""
        return "," in self.name

    @property
    def adds(self) -> bool:
        """Whether the launch also adds a low-rank term."""
        return self.name == "dA,dx+"

    @property
    def call(self) -> Call:
        """The properties that a choice of tiles depends on, as the launcher states them."""
        size = self.dtype.itemsize
        return Call(
            self.M, self.columns, max(self.ranks, default=1), size, self.precision, len(self.ranks),
            self.dropout > 0, project=self.also and not self.adds, low_rank=self.adds,
            pointers=bool(self.packed)
            or any(e * (1 if self.int8 else size) % 16 for e in (self.columns, *self.depths)),
            packed=self.packed.partition(" ")[0], segments=self.segments,
            int8="" if not self.int8 else "rotated int8" if self.name == "dx" else "int8",
        )  # fmt: skip

    @property
    def id(self) -> str:
        words = [self.name, f"m{self.M}", f"n{self.columns}"]
        words += [f"k{'+'.join(map(str, self.depths))}"] * bool(self.depths)
        words += [f"r{'+'.join(map(str, self.ranks))}"] * bool(self.ranks)
        words += ["masked" * (self.dropout > 0), self.packed, "8bit" * self.int8]
        words += [f"s{self.segments}"] * bool(self.segments) + ["own"] * self.own
        return " ".join(filter(None, words))


class Operands:
    """The tensors of a form's call."""

    def __init__(self, form: Form, device: torch.device | str) -> None:
        self.form, self.device = form, device
        M, N, ranks = form.M, form.columns, form.ranks
        count = form.segments if form.own else len(ranks)
        self.seeds = torch.arange(count, device=device) if form.dropout else None
        self.ends, self.banks, self.order, self.numbers = None, (), None, None
        if form.segments:
            self.banks = (form.segments,)
            ends = torch.arange(1, form.segments + 1, device=device) * M // form.segments
            self.ends = ends.to(torch.int32)
        if form.own:
            self.order = torch.arange(M, dtype=torch.int32, device=device).flip(0)
            factors = torch.full((form.segments,), FACTOR, device=device)
            least = dropout_threshold(form.dropout)
            thresholds = torch.full_like(factors, least, dtype=torch.int32)
            self.numbers = SegmentNumbers(factors, thresholds)
        self.bias = self._random(*self.banks, N) if form.bias else None
        self.us = [self._random(M, r) for r in ranks]  # h, or every dh
        self.scales, self.rounded = None, ()
        if form.kernel.endswith("lowrank"):
            self.out = self._random(M, N)
            self.ps = [self._random(M, depth) for depth in form.depths]  # x, or every dy
            if form.int8:
                self.ps = [self._codes(M, depth) for depth in form.depths]
                columns = self._scales(N) if form.name == "y" else None
                self.scales = ([self._scales(M) for _ in form.depths], columns)
                self.qs = [self._factor(depth, torch.int8) for depth in form.depths]
            elif form.packed:
                self.qs = [self._packed(depth) for depth in form.depths]
            else:
                self.qs = [self._factor(depth, form.dtype) for depth in form.depths]
            self.vs = [self._factor(r, form.adapter_dtype) for r in ranks]
            self.a = self._adapter(ranks[0], form.depths[0]).mT if form.also else None
            return
        self.v = self._random(M, N)  # x or dy
        if form.kernel == "quantize_rows":
            factors = self._scales(N) if form.name == "dy8" else None
            self.rounded = (self._codes(M, N), self._scales(M), factors)
        self.b = self._adapter(N, ranks[0]) if form.also and not form.adds else None
        self.vs = [self._adapter(r, N).mT for r in ranks] if form.adds else []
        self.out = self._random(M, N) if form.adds else None
        # [N, r]: factors for h and dh, results for the others.
        lies = form.name in ("h", "dA", "dA,dx+")
        self.adapters = [self._adapter(r, N).mT if lies else self._adapter(N, r) for r in ranks]

    def tensors(self) -> list[Tensor]:
        """All operands and results."""
        rows, columns = self.scales or ([], None)
        tuples = [*self.rounded, *rows, columns]
        lists = [e if isinstance(e, list) else [e] for e in (*vars(self).values(), *tuples)]
        named = [each for found in lists for each in found]
        packed = [t for each in named if isinstance(each, Packed) for t in each.tensors()]
        return packed + [each for each in named if isinstance(each, Tensor)]

    def run(self, config: Config | None = None) -> list[Tensor]:
        """Launch the call.  Returns its results."""
        form = self.form
        shared = {"precision": form.precision, "config": config}
        shared |= {"dropout": form.dropout, "seeds": self.seeds, "ends": self.ends}
        sorted_ = {"order": self.order, "numbers": self.numbers}
        if form.kernel == "project":
            factors = [FACTOR] * len(form.ranks)
            return project(self.v, self.adapters, factors, **shared, **sorted_)
        if form.kernel == "quantize_rows":
            quantize_rows(self.v, *self.rounded, precision=form.precision)
            return [*self.rounded[:2]]
        if form.kernel == "weight_grad":
            options = {"b": self.b, "factor": FACTOR, **shared, **sorted_}
            also = {"vs": self.vs, "low_rank": self.out}
            product = weight_grad(self.v, self.us, self.adapters, **also, **options)
            return [*self.adapters, *(each for each in (product, self.out) if each is not None)]
        if form.kernel == "lowrank":
            lowrank(self.out, self.us, self.vs, bias=self.bias, add=form.own, **shared, **sorted_)
            return [self.out]
        operands = (self.out, self.ps, self.qs, self.us, self.vs)
        if form.int8:
            masked = {name: shared[name] for name in ("dropout", "seeds", "precision", "config")}
            gemm_int8_lowrank(*operands, *self.scales, bias=self.bias, **masked)
            return [self.out]
        if not form.also:
            gemm_lowrank(*operands, bias=self.bias, **shared)
            return [self.out]
        (p,), (q,), (u,), (v,) = operands[1:]
        options = {"precision": form.precision, "config": config, "bias": self.bias}
        gemm_lowrank_few_rows(self.out, p, q, self.a, u, v, FACTOR, **options)
        return [self.out, u]

    def run_in_place(self, adapter_first: bool = True) -> list[Tensor]:
        """y and dx in place: torch's product is added to the adapter's part."""
        shared = {"precision": self.form.precision, "dropout": self.form.dropout}
        shared |= {"seeds": self.seeds, "bias": self.bias}
        low_rank = partial(lowrank, self.out, self.us, self.vs, **shared)
        if adapter_first:
            low_rank()
        for i, (p, q) in enumerate(zip(self.ps, self.qs, strict=True)):
            torch.addmm(self.out, p, q, beta=float(adapter_first or i > 0), out=self.out)
        if not adapter_first:
            low_rank(add=True)
        return [self.out]

    def truth(self) -> list[Tensor]:
        """The expected float64 results of :meth:`run`, if the call has no segments."""
        form, us = self.form, [u.double() for u in self.us]
        if form.kernel == "project":
            parts = enumerate(self.adapters)
            return [FACTOR * self._kept(self.v.double(), i) @ a.double() for i, a in parts]
        if form.kernel == "quantize_rows":
            return []  # it has no products
        if form.kernel == "weight_grad":
            v = self.v.double()
            product = [] if self.b is None else [FACTOR * v @ self.b.double()]
            pairs = enumerate(zip(us, self.vs, strict=False))
            terms = [self._kept(u @ v.mT.double(), i) for i, (u, v) in pairs]
            product += [torch.stack(terms).sum(0)] if terms else []
            return [self._kept(v, i).T @ u for i, u in enumerate(us)] + product
        if self.a is not None:
            us = [FACTOR * self.ps[0].double() @ self.a.double()]
        base = [p.double() @ self._dense(q).double() for p, q in zip(self.ps, self.qs, strict=True)]
        pairs = enumerate(zip(us, self.vs, strict=True))
        low_rank = [self._kept(u @ v.double(), i) for i, (u, v) in pairs]
        out = sum(base + low_rank) + (0 if self.bias is None else self.bias.double())
        return [out, *(us if form.also else [])]

    def _kept(self, product: Tensor, i: int) -> Tensor:
        if self.seeds is None:
            return product
        return product * dropout_mask(self.seeds[i], tuple(product.shape), self.form.dropout)

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        random = torch.randn(shape, device=self.device)
        return random.mul_(shape[-1] ** -0.25).to(dtype or self.form.dtype)

    def _codes(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=self.device)

    def _scales(self, count: int) -> Tensor:
        return torch.rand(count, device=self.device) + 0.5

    def _adapter(self, *shape: int) -> Tensor:
        return self._random(*self.banks, *shape, dtype=self.form.adapter_dtype)

    def _packed(self, depth: int) -> Packed:
        """A packed weight [depth, columns]; for y, the codes are ordered as [columns, depth]."""
        of_y = self.form.name.startswith("y")
        rows, columns = (self.form.columns, depth) if of_y else (depth, self.form.columns)
        experts = self.form.segments
        packed = random_packed(self.form.packed, max(1, experts) * rows, columns, self.device)
        packed = replace(packed, rows=rows, experts=experts)
        return packed.mT if of_y else packed

    def _dense(self, q: Tensor | Packed) -> Tensor:
        if isinstance(q, Tensor):
            return q
        made = dequant(q, self.ps[0].new_empty(q.rows, q.columns))
        return made.T if q.transposed else made

    def _factor(self, depth: int, dtype: torch.dtype) -> Tensor:
        """[depth, columns] for each segment; the weights of y are transposed."""
        make = self._codes if dtype == torch.int8 else partial(self._random, dtype=dtype)
        if self.form.name.startswith("y"):
            return make(*self.banks, self.form.columns, depth).mT
        return make(*self.banks, depth, self.form.columns)


# "four-bit nested": QLoRA's usual recipe; "four-bit e2m1": MXFP4.
PACKED = (FOUR_BIT, f"{FOUR_BIT} nested", f"{FOUR_BIT} e2m1", INT8, FLOAT8)


def random_packed(
    kind: str, rows: int, columns: int, device: torch.device | str, block: int = 64
) -> Packed:
    """A weight of random codes.  With 256 nested scales or more, each code of a scale occurs."""
    kind, _, form = kind.partition(" ")
    codes = partial(torch.randint, 0, 256, dtype=torch.uint8, device=device)
    if kind == FOUR_BIT:
        count, table = rows * columns, CODES["nf4"]
        blocks, packed = -(-count // block), codes(((count + 1) // 2,))
        if not form:
            scales = torch.rand(blocks, device=device) + 0.5
            return Packed(kind, packed, scales, rows, columns, 1, block, table)
        scales = torch.arange(blocks, device=device).to(torch.uint8)
        if form == "e2m1":
            numbers = torch.linspace(0.5, 1.5, 256, device=device)
            outer = torch.ones(1, device=device), numbers, torch.zeros((), device=device)
            shape, block = (rows, columns, 1, block), 2**40
            return Packed(kind, packed, scales, *shape, E2M1, outer, block, low_first=True)
        outer = (
            torch.rand(-(-blocks // 256), device=device) + 0.5,
            torch.linspace(-1, 1, 256, device=device),
            torch.full((), 1.75, device=device),
        )
        return Packed(kind, packed, scales, rows, columns, 1, block, table, outer, 256)
    if kind == INT8:
        numbers, scales = codes((rows, columns)).view(torch.int8), torch.rand(rows, device=device)
        return Packed(kind, numbers, scales + 0.5, rows, columns, 1, 0, factor=1.0 / 127.0)
    bits = codes((rows, columns))
    bits = torch.where(bits & 0x7F == 0x7F, 1, bits)  # no NaN
    scales = torch.rand(-(-rows // 128), -(-columns // 128), device=device) + 0.5
    return Packed(kind, bits, scales, rows, columns, 128, 128)
