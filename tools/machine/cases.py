"""The calls of fastlora whose kernels the machine runs.  A case's name defines the whole call.

For example ``layer fused bf16/f32 80x96+64x128 r8+4 p0.1 bias x:odd``: a group of two outputs, with
96 and 64 features, by the plan "fused".  x is [80, 128] in bfloat16 with an odd stride; the
adapters are in float32 with ranks 8 and 4; dropout is 0.1.  The judges of the op tests make the
tensors and compare every output and gradient with the reference in float64.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import int8_products
import judge
import oracles
import packed
import torch
from int8 import exact
from kernel_cases import BF16, F16, F32, poisoned, random
from torch import Tensor

from fastlora import Projection, lora_linears, multi_lora_linear
from fastlora.backends import find_backend
from fastlora.backends.dropout import dropout_mask
from fastlora.backends.protocol import LossSettings
from fastlora.backends.triton.packed import packed_of
from fastlora.call.projection import (
    Adapter,
    Base,
    Output,
    as_outputs,
    flatten,
    layouts_of,
    unflatten,
)
from fastlora.call.rows import Rows
from fastlora.formats.format import Quantized
from fastlora.formats.rotated_int8 import pack_rotated
from fastlora.kernels.dequant import dequant
from fastlora.kernels.plan import FUSED, IN_PLACE, Plan
from fastlora.kernels.sum_planes import sum_planes
from fastlora.kernels.target import target_of
from fastlora.ops.experts import lora_experts, routing_of
from fastlora.ops.gated_mlp import gated_call
from fastlora.ops.node import draw_seed
from fastlora.ops.run import run_new

DTYPES = {"bf16": BF16, "f16": F16, "f32": F32, "tf32": F32}
PLANS = {"fused": FUSED, "in-place": IN_PLACE}
FORMATS = {
    "nf4": lambda n, k: packed.random_four_bit(n, k, "nf4", 64 if k % 64 == 0 else 16),
    "fp4-nested": lambda n, k: packed.random_four_bit(n, k, "fp4", 32, 4),
    "mxfp4": packed.random_mxfp4,
    "nvfp4": packed.random_nvfp4,
    "int8": packed.random_int8,
    "float8-rows": lambda n, k: packed.random_float8(n, k, 1, k, scale=F32),
    "float8-blocks": lambda n, k: packed.random_float8(n, k, 32, 64, scale=F32),
    "rotated": lambda n, k: pack_rotated(random(n, k)),  # multiplied in 8 bits
    # No kernel reads the following formats; torch unpacks them.
    "float8-e5m2": lambda n, k: packed.random_float8(n, k, 32, 64, "float8_e5m2"),
    "affine": lambda n, k: packed.random_affine(n, k, 1, 32),
    "int4": lambda n, k: packed.random_int4(n, k, 32),
    "gguf": lambda n, k: packed.random_gguf(n, k, "Q8_0"),
}
Results = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    name: str
    plan: Plan | None = None  # None: the default
    dtype: str = "bf16"
    adapter: str = ""
    sizes: tuple[int, int] = (0, 0)  # rows, and features of x
    outputs: tuple[int, ...] = ()  # the features of each output
    ranks: tuple[int, ...] = ()  # 0: a frozen layer
    p: float = 0.0
    words: dict[str, str] = field(default_factory=dict)  # all other words: "x:odd" is x → odd

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return DTYPES[self.dtype], DTYPES[self.adapter or self.dtype]

    def run(self) -> Results:
        """Return every result of the call.  Raises AssertionError if one is wrong."""
        return _CHECKS[self.name.split()[0]](self)


def case_of(name: str) -> Case:
    """The case with this name."""
    said: dict[str, Any] = {}
    words: dict[str, str] = {}
    for word in name.split()[1:]:
        if word in PLANS:
            said["plan"] = PLANS[word]
        elif word.split("/")[0] in DTYPES:
            said["dtype"], _, said["adapter"] = word.partition("/")
        elif match := re.fullmatch(r"(\d+)x([\d+]+)x(\d+)", word):
            said["sizes"], said["outputs"] = (int(match[1]), int(match[3])), _numbers(match[2])
        elif re.fullmatch(r"r[\d+]+", word):
            said["ranks"] = _numbers(word[1:])
        elif re.fullmatch(r"p0\.\d+", word):
            said["p"] = float(word[1:])
        else:
            key, _, words[key] = word.partition(":")
    return Case(name, words=words, **said)


def _numbers(word: str) -> tuple[int, ...]:
    return tuple(map(int, word.split("+")))


def _layer(case: Case) -> Results:
    """A layer or a group, with dense or packed weights."""
    (M, K), (dtype, adapter), words = case.sizes, case.dtypes, case.words
    trains = words.get("only", "xab")

    def matrix(name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return random(rows, columns, dtype, words.get(name, "contiguous"))

    x, is_int8 = matrix("x", M, K, dtype), words.get("weight") == "rotated"
    if is_int8:
        _require_int8()
        x.copy_(exact(M, K))
    x.requires_grad_("x" in trains)
    group: list[Projection | Output] = []
    for i, (n, r) in enumerate(zip(case.outputs, case.ranks, strict=True)):
        make = FORMATS.get(words.get("weight", ""))
        weight = make(n, K) if make else matrix("w", n, K, dtype)
        bias = random(1, n, dtype)[0].requires_grad_() if "bias" in words else None
        a, b = matrix("a", r, K, adapter), matrix("b", n, r, adapter)
        a, b = a.requires_grad_("a" in trains), b.requires_grad_("b" in trains)
        adapted = Projection(weight, a, b, bias, 0.75 + i / 2)
        group.append(adapted if r else Output(Base(weight, bias)))
    make_dy = {
        "": judge.random_like,
        "expanded": lambda y: torch.ones((), dtype=y.dtype).expand(y.shape),
        "transposed": lambda y: judge.random_like(y.T).T,
    }[words.get("dy", "")]
    rounded = F16 if case.dtype == "tf32" else None  # float16 and TF32 have mantissas of 10 bits
    outputs = as_outputs(group)
    dense = [Output(output.base._replace(weight=_dense(output.base.weight, dtype)),
                    output.adapters) for output in outputs]  # fmt: skip
    layouts = layouts_of(dense)
    leaves = {"x": x} | {f"{i}": each for i, each in enumerate(flatten(dense, layouts))}
    masks = _masks([((M, K), case.p) for output in outputs for _ in output.adapters])

    def textbook(t: dict[str, Tensor]) -> Any:
        x, *flat = t.values()
        its = unflatten(flat, layouts)
        if not is_int8:
            return oracles.lora_linears(x, its, dropout=case.p, masks=masks)
        pairs = zip(its, outputs, strict=True)
        its = [own._replace(base=own.base._replace(weight=o.base.weight)) for own, o in pairs]
        return int8_products.lora_linears(x, its, dropout=case.p, masks=masks)

    run = _seeded(lambda: lora_linears(x, group, dropout=case.p))
    return judge.check(run, textbook, leaves, make_dy, rounded)


def _dense(weight: Any, dtype: torch.dtype) -> Tensor:
    return weight.dense(dtype) if isinstance(weight, Quantized) else weight


_SEED = 5  # torch's generator has this seed when a call begins


def _seeded(run: Callable[[], Any]) -> Callable[[], Any]:
    def seeded() -> Any:
        torch.manual_seed(_SEED)
        return run()

    return seeded


def _masks(shapes: list[tuple[tuple[int, int], float]]) -> list[Tensor | None] | None:
    """The dropout masks that a call will draw: one for each (shape, p), None where p is 0."""
    if not any(p for _, p in shapes):
        return None
    state = torch.get_rng_state()
    torch.manual_seed(_SEED)
    seeds = draw_seed(len(shapes), torch.device("cpu"))
    torch.set_rng_state(state)
    pairs = zip(seeds, shapes, strict=True)
    return [dropout_mask(seed, shape, p) if p else None for seed, (shape, p) in pairs]


def _experts(case: Case) -> Results:
    (M, K), counts = case.sizes, _numbers(case.words["of"])
    size = (case.outputs[0], K, case.ranks[0])
    stacks = judge.make_experts(len(counts), *size, *case.dtypes, "bias" in case.words)
    if "swapped" in case.words:
        stacks = stacks._replace(weight=stacks.weight.mT.contiguous().mT)
    if "weight" in case.words:
        make = FORMATS[case.words["weight"]]
        stacks = stacks._replace(weight=packed.stack([make(size[0], K) for _ in counts]))
    x, ends = judge.make_rows(M, K, case.dtypes[0]), judge.ends_of(counts)
    weight, lora_a, lora_b, bias = stacks
    leaves = {"x": x, "weight": _dense(weight, x.dtype), "lora_a": lora_a, "lora_b": lora_b}
    leaves |= {} if bias is None else {"bias": bias}
    (mask,) = _masks([((M, K), case.p)]) or [None]
    options = {"scale": 0.75, "dropout": case.p}

    def run() -> Any:
        if case.ranks[0]:
            return judge.call_experts(x, stacks, ends, **options)
        return run_new(x, [Output(Base(weight, bias))], case.p, rows=Rows(ends))[0]

    return judge.check(
        _seeded(run),
        lambda t: oracles.grouped_lora_linear(**t, offsets=ends, mask=mask, **options),
        leaves,
    )


def _adapters(case: Case) -> Results:
    """Many adapters, with sorted or unsorted rows or sequences; some rows have no adapter."""
    (M, K), (n,), count = case.sizes, case.outputs, len(case.ranks)
    indices = torch.randint(-1, count, (M,), dtype=torch.int32)
    if "sorted" in case.words:
        indices = indices.clamp(min=0).sort()[0]
    shape = (M, int(case.words["items"]), K) if "items" in case.words else (M, K)
    x = judge.random_like(torch.empty(shape, dtype=case.dtypes[0])).requires_grad_()
    banks, bias = "lists" not in case.words, "bias" in case.words
    own, pairs = case.dtypes[1], []
    for r in case.ranks:
        pairs.append((random(r, K, own).requires_grad_(), random(n, r, own).requires_grad_()))
    leaves = {"x": x, "weight": random(n, K, x.dtype)}
    leaves |= {"bias": random(1, n, x.dtype)[0].requires_grad_()} if bias else {}
    ranks = None
    if banks:  # NaN in the padding behind each rank: a kernel mustn't read it
        ranks, most = list(case.ranks), max(case.ranks)
        lora_a, lora_b = poisoned(count, most, K, dtype=own), poisoned(count, n, most, dtype=own)
        for i, (a, b) in enumerate(pairs):
            lora_a[i, : a.shape[0]], lora_b[i, :, : a.shape[0]] = a.detach(), b.detach()
        leaves |= {"lora_a": lora_a.requires_grad_(), "lora_b": lora_b.requires_grad_()}
    else:
        leaves |= {f"{name}{i}": t for i, ab in enumerate(pairs)
                   for name, t in zip(("lora_a", "lora_b"), ab, strict=True)}  # fmt: skip
    dropouts = [case.p * i / count for i in range(count)]
    numbers = {"scales": [0.5 + 0.25 * i for i in range(count)], "ranks": ranks}
    each = M and x.numel() // K // M
    masks = _masks([((int((indices == i).sum()) * each, K), p) for i, p in enumerate(dropouts)])

    def of(t: dict[str, Tensor], function: Callable, **options: Any) -> Tensor:
        a, b = ([t[f"{name}{i}"] for i in range(count)] if not banks else t[name]
                for name in ("lora_a", "lora_b"))  # fmt: skip
        return function(t["x"], t["weight"], a, b, indices, bias=t.get("bias"), **options)

    return judge.check(
        _seeded(lambda: of(leaves, multi_lora_linear, dropout=dropouts, **numbers)),
        lambda t: of(t, oracles.multi_lora_linear, dropouts=dropouts,
                     masks=masks or [None] * count, **numbers),
        leaves,
    )  # fmt: skip


def _mlp(case: Case) -> Results:
    """A gated MLP.  Its backward overwrites the gradient that it reads."""
    (M, K), (hidden,), words = case.sizes, case.outputs, case.words
    adapted = words.get("adapted", "gud")
    mlp = judge.make_mlp(*case.dtypes, "bias" in words, adapted, (K, hidden, K))
    x = judge.make_x(M, K, dtype=case.dtypes[0])
    layouts = layouts_of(mlp)
    leaves = {"x": x} | {f"{i}": each for i, each in enumerate(flatten(mlp, layouts))}
    shapes = [(M, K), (M, K), (M, hidden)]
    pairs = zip(mlp, shapes, strict=True)
    masks = _masks([(shape, case.p) for output, shape in pairs for _ in output.adapters])

    def textbook(t: dict[str, Tensor]) -> Tensor:
        x, *flat = t.values()
        its = unflatten(flat, layouts)
        return oracles.gated_mlp(x, *its, words["act"], dropout=case.p, masks=masks)

    options = {"dropout": case.p, "down_dropout": case.p}
    run = _seeded(lambda: gated_call(x, *mlp, words["act"], **options)[0])
    return judge.check(run, textbook, leaves, mixed=True)


def _block(case: Case) -> Results:
    """A block of experts; gate and up are halves of one matrix.  Some tokens have no expert."""
    (M, K), (inner,), (r,), E, act = case.sizes, case.outputs, case.ranks, 4, case.words["act"]
    index = torch.stack([torch.randperm(E + 1)[:2] for _ in range(M)])
    dtype = case.dtypes[0]
    x, shares = judge.make_x(M, K, dtype=dtype), judge.make_x(M, 2, dtype=dtype)
    stacks = [judge.make_experts(E, n, k, r, *case.dtypes) for n, k in ((2 * inner, K), (K, inner))]
    stacks = [each._replace(weight=each.weight / each.weight.shape[2] ** 0.5) for each in stacks]
    leaves = [x, shares, *(tensor for each in stacks for tensor in each[1:3])]
    dy = judge.random_like(x.detach())

    def results(y: Tensor, its_leaves: list[Tensor]) -> Results:
        gradients = torch.autograd.grad(y, its_leaves, dy.to(y.dtype))
        return {"y": y.detach()} | {f"d_{i}": each for i, each in enumerate(gradients)}

    def by_oracle(convert: Callable[[Tensor], Tensor]) -> Results:
        x, shares, *adapters = its_leaves = [convert(leaf) for leaf in leaves]
        order, ends, k = routing_of(index, E)
        y = x[order // k]
        for i, (weight, *_) in enumerate(stacks):
            tensors = [t.to(x.dtype) for t in (weight, *adapters[2 * i : 2 * i + 2])]
            y = oracles.grouped_lora_linear(y, *tensors, ends, scale=0.5)
            y = y if i else oracles.gated(*y.chunk(2, dim=1), act)
        total = torch.zeros_like(x)
        return results(
            total.index_add(0, order // k, y * shares.flatten()[order, None]), its_leaves
        )

    up, down = (Output(Base(e.weight), (Adapter(e.lora_a, e.lora_b, 0.5),)) for e in stacks)
    found = results(lora_experts(x, index, shares, up, down, act), leaves)
    truth, eager = (
        by_oracle(lambda leaf: leaf.detach().double().requires_grad_()),
        by_oracle(lambda leaf: leaf),
    )
    for name, value in found.items():
        size = 8 * truth[name].abs()
        judge.assert_close(name, value, truth[name], eager[name], size, dtype)
    return found


def _dequant(case: Case) -> Results:
    """A packed weight unpacked by a kernel: equal to the format's definition, bit for bit."""
    (n, k), dtype = case.sizes, case.dtypes[0]
    weight = FORMATS[case.words["weight"]](n, k)
    out = dequant(packed_of(weight), poisoned(n, k, dtype=dtype))
    assert torch.equal(out, packed.by_elements(weight).to(dtype))
    return {"weight": out}


def _require_int8() -> None:
    target = target_of(torch.device("cpu"))
    if not target.int8:
        raise ValueError(f"8-bit products can't run on sm_{target.arch}")


def _int8(case: Case) -> Results:
    """Rounding of any x, and both products, whose integer sums are exact bit for bit."""
    _require_int8()
    (M, K), (n,), dtype = case.sizes, case.outputs, case.dtypes[0]
    precision = "tf32" if case.dtype == "tf32" else "ieee"
    x, dy = random(M, K, dtype), random(M, n, dtype)
    options = {"precision": precision}
    of_x = int8_products.check_rounding(x, **options)
    of_dy = int8_products.check_rounding(dy, torch.rand(n) + 0.5, **options)
    weight, (rows, columns) = int8_products.random_codes(n, K), (torch.ones(M), torch.ones(n))
    out = {"x": of_x[0], "dy": of_dy[0]}
    scales = int8_products.Scales([rows], columns)
    out["y"] = int8_products.check_product([of_x[0]], [weight.mT], scales, **options)
    for name, q in {"rows": weight, "turned": weight.mT.contiguous().mT}.items():
        out[name] = int8_products.check_product(
            [of_dy[0]], [q], int8_products.Scales([rows]), **options
        )
    return out


def _sums(case: Case) -> Results:
    """Up to four sums of planes in one launch, with several dtypes."""
    dtypes = (BF16, F32, F16, F32)
    planes = [random(count, n) for count, n in zip((3, 1, 5, 2), case.outputs, strict=False)]
    outs = [poisoned(p.shape[1], dtype=dtype) for p, dtype in zip(planes, dtypes, strict=False)]
    sum_planes(planes, outs)
    for plane, out in zip(planes, outs, strict=True):
        torch.testing.assert_close(out, plane.double().sum(0).to(out.dtype))
    return {f"sum{i}": out for i, out in enumerate(outs)}


def _loss(case: Case) -> Results:
    """The softmax of a loss and its gradient, written over logits with rows of any stride."""
    (M, _), (V,), words, fields = case.sizes, case.outputs, case.words, LossSettings._fields
    z = random(M, V, case.dtypes[0], words.get("z", "contiguous"))
    settings = LossSettings(**{name: float(words[name]) for name in fields if name in words})
    upstream = random(1, M)[0] if "upstream" in words else None
    run = judge.row_loss_by(find_backend("triton"))
    return judge.check_row_loss(run, z, torch.randint(0, V, (M,)), settings, upstream)


_CHECKS = {
    "layer": _layer, "experts": _experts, "adapters": _adapters, "mlp": _mlp, "block": _block,
    "dequant": _dequant, "int8": _int8, "sums": _sums, "loss": _loss,
}  # fmt: skip


# {a,b} expands to one case with a and one with b.  A star marks quick cases; together they reach
# every branch of the kernels.
_ALL = """
* layer {fused,in-place} {bf16/f32,f32} {77x53x75 r3 bias,96x128x160 r8 p0.25}
* layer {fused,in-place} bf16/f32 {96x160x128 r16,70x40x72 r40 p0.5 bias,65x136x200 r200}
* layer {fused,in-place} bf16/f32 80x{96+64+32x128 r16+16+16,50+64+33x120 r8+4+16 p0.1}
  layer {fused,in-place} {bf16,f16,f32/bf16} {77x53x75 r3 bias,96x128x160 r8 p0.25}
  layer {fused,in-place} {bf16,f16,f32,f32/bf16} {96x160x128 r16,65x136x200 r200}
  layer {fused,in-place} {bf16,f16,f32,f32/bf16} 70x40x72 r40 p0.5 bias
  layer {fused,in-place} {bf16,f16,f32,f32/bf16} 80x96+64+32x128 r16+16+16
  layer {fused,in-place} {bf16,f16,f32,f32/bf16} 80x50+64+33x120 r8+4+16 p0.1
* layer {fused,in-place} tf32 {96x160x128 r16,77x53x75 r3 p0.2 bias,70x48+48+48x64 r8+8+8 p0.1}
* layer {fused,in-place} bf16 70x48+48+48+48+48x64 r8+8+8+8+8 p0.1
* layer {fused,in-place} bf16 70x48+48+48+48x64 r64+64+64+64 p0.1
* layer in-place bf16/f32 140x96+72+136x128 r64+64+64{, p0.1}
* layer in-place bf16/f32 400x40x72 r{16 p0.1,64}
* layer in-place tf32 140x40x72 r64
* layer {fused,in-place} bf16 70x48+40+56x64 r8+0+4 bias
* layer fused bf16 {1,17}x96x200 r16 bias
  layer fused bf16 {2,16,33,64}x96x200 r16 bias
  layer fused {f16,f32} {1,2,16,17,33,64}x96x200 r16 bias
* layer fused {bf16/f32 5x33x77 r5,bf16 16x80x96 r8 p0.1,tf32 9x64x96 r8}
* layer fused bf16/f32 70x48x80 r8 {x,w}:column-major
* layer fused bf16/f32 70x48x80 r8 x:window w:window a:window b:window
* layer fused bf16/f32 70x48x80 r8 x:odd w:odd a:odd b:odd p0.1
* layer fused bf16/f32 70x48x80 r8 x:every-second-column a:every-second-column
* layer fused bf16/f32 70x48x80 r8 x:every-second-row w:every-second-row a:column-major
* layer in-place bf16/f32 70x48x80 r8 p0.1 a:odd b:column-major
* layer fused bf16 70x48x80 r8 dy:{expanded,transposed}
* layer fused bf16 70x48x80 r8 p0.1 only:{ab,a,b,x,xb}
* layer {fused,in-place} bf16/f32 70x56x88 r{1,17,65}
  layer {fused,in-place} bf16/f32 70x56x88 r{2,5,16,31,32,64,100,128,199}
  layer in-place bf16/f32 70x56x88 r{1,2,5,16,17,31,32,64,65,100,128,199} p0.1
* layer fused bf16 {1x1x1,3x1x5,129x1x8,1x300x8,100x16x1,200x7x9,257x31x65} r4
* layer fused f32 {1x1x1,129x1x8,257x31x65} r4 p0.3
  layer fused f32 {3x1x5,1x300x8,100x16x1,200x7x9} r4 p0.3
* layer fused bf16 600x40x72 r8 p0.1
* layer {fused ,}bf16/f32 70x520x640 r16{, p0.1}
* experts fused bf16/f32 {90x48x72 of:30+0+41+7,5x48x72 of:0+0+5,128x48x72 of:64+64} r8
* experts fused bf16/f32 {90x50x75 of:30+0+41+7,40x50x75 of:1+2+3+4+5+0+6} r5 p0.2 bias
* experts in-place bf16/f32 {90x64x80 of:30+0+41+7,5x64x80 of:0+0+5} r64 swapped
  experts fused {bf16,f16,f32} {90x48x72 of:30+0+41+7,5x48x72 of:0+0+5} r8
  experts fused {bf16,bf16/f32,f16,f32} {128x48x72 of:64+64,40x48x72 of:1+2+3+4+5+0+6} r8
  experts fused {bf16,f16,f32} {90x50x75 of:30+0+41+7,5x50x75 of:0+0+5} r5 p0.2 bias
  experts fused {bf16,bf16/f32,f16,f32} {128x50x75 of:64+64,40x50x75 of:1+2+3+0+6} r5 p0.2 bias
* experts {fused,in-place} bf16 {90x48x72 of:30+0+41+7,128x64x80 of:64+64} r0 bias
  experts fused {f16,f32} {90x50x75 of:30+0+41+7,40x48x72 of:1+2+3+4+5+0+6} r0
  experts in-place {bf16,f16,f32} 90x64x80 r64 swapped of:{30+0+41+7,64+26,1+2+3+4+5+0+6}
* experts bf16/f32 {20x96x128 of:9+0+6,150x64x128 of:90+55} r8 bias weight:{nf4,nvfp4,float8-blocks}
  experts {bf16,f32}/f32 {20x96x128 of:9+0+6,150x64x128 of:90+55} r8 p0.1 weight:{nf4,int8}
  experts {bf16,f32}/f32 {20x96x128 of:9+0+6,150x64x128 of:90+55} r8 weight:float8-{rows,blocks}
* adapters fused bf16/f32 84x{48x72 r8+4+16,50x75 r8+3+16 p0.3 lists}
* adapters in-place bf16/f32 84x48x72 r8+8+8 p0.3 bias
* adapters fused bf16/f32 {5x48x72 r8+40 items:23,71x48x72 r8+8 p0.3 sorted}
  adapters fused {bf16,f32} 84x{48x72 r8+4+16,50x75 r8+3+16 p0.3 lists}
  adapters in-place {bf16,f32} 84x48x72 r8+8+8 p0.3 bias
  adapters fused {bf16,f32} {5x48x72 r8+40 items:23,71x48x72 r8+8 p0.3 sorted}
* mlp fused bf16/f32 9x40x24 act:{silu,gelu,gelu_tanh,relu,relu2}
* mlp {fused bf16/f32 33x1101x40 p0.1 bias act:silu,in-place f32 70x96x64 p0.1 adapted:gd act:relu}
  mlp fused {f16,f32} 9x40x24 act:{silu,gelu,gelu_tanh,relu,relu2}
* block fused {bf16/f32,f32} 21x40x24 r4 act:silu
* layer bf16/f32 {80x64x128 r8,20x64+64x128 r8+8} weight:{nf4,fp4-nested,int8,float8-blocks}
* layer bf16/f32 {33x96x128 r8,7x64x192 r8 p0.2 bias} weight:{nf4,mxfp4,int8,float8-rows}
* layer {tf32,f32} 33x96x128 r8{, p0.2} weight:{nf4,int8}
* layer tf32 {33x96x128 r8 weight:mxfp4,80x64x128 r8 weight:nf4}
  layer {tf32,f32} {33x96x128,80x64x128} r8 weight:{mxfp4,nvfp4,fp4-nested}
  layer {tf32,f32} {33x96x128,80x64x128} r8 weight:float8-{rows,blocks}
* layer bf16/f32 80x64x128 r8 weight:{float8-e5m2,affine,int4,gguf}
  layer {bf16,f16,f32}/f32 {33x96x128,80x64x128} r8 weight:{nf4,fp4-nested,int8}
  layer {bf16,f16,f32}/f32 {33x96x128,80x64x128} r8 weight:{float8-rows,float8-blocks}
* dequant bf16 37x128x128 weight:{nf4,fp4-nested,mxfp4,nvfp4,int8,float8-rows,float8-blocks}
* dequant bf16 13x51x51 weight:{nf4,fp4-nested,int8,float8-rows,float8-blocks}
  dequant {f16,f32} {37x128x128,13x51x51} weight:{nf4,fp4-nested,int8,float8-rows,float8-blocks}
* int8 bf16 {37x53x75 r3,130x136x192 r16,1x70x64 r8,33x64x640 r150}
* int8 {f16,f32,tf32} 37x53x75 r3
  int8 {f16,f32,tf32} {130x136x192 r16,1x70x64 r8,33x64x640 r150}
* layer {bf16,bf16/f32,f32/bf16} {80x64x128 r8,77x53x75 r3 p0.25 bias} weight:rotated
* layer bf16/f32 {33x96+64+32x128 r16+16+16 p0.1,20x50+64+33x120 r8+0+70} weight:rotated
* layer {bf16 1x48x72 r8,bf16 70x520x640 r16 p0.1,tf32 33x96x128 r8 p0.2} weight:rotated
* layer bf16/f32 70x48x80 r8 weight:rotated {x:column-major,dy:transposed,only:x}
  layer f16/f32 {80x64x128 r8,33x96+64+32x128 r16+16+16 p0.1,300x260x200 r64} weight:rotated
  layer {f32,tf32} {33x96+64+32x128 r16+16+16 p0.1,300x260x200 r64 p0.1} weight:rotated
* sums 0x{1000,1000+64+2048+7}x0
* loss {bf16 3x5000x0,f16 2x1000x0 z:every-second-row,f32 3x4097x0 z:odd label_smoothing:0.1}
* loss bf16 3x1027x0 z:window upstream softcap:3 logit_scale:2 label_smoothing:0.1 z_loss:0.01
  loss {bf16,f16,f32} {1x1x0,3x5x0,2x9001x0 softcap:30,2x4096x0 upstream z_loss:0.01}
"""


def names(quick: bool = False) -> list[str]:
    """The names of all cases, or of the quick ones."""
    found: dict[str, None] = {}
    for line in _ALL.strip().splitlines():
        parts = re.split(r"\{(.*?)\}", line[2:])
        choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
        if line[0] == "*" or not quick:
            found |= dict.fromkeys(map("".join, product(*choices)))
    return list(found)
