"""Test the emulator: correct kernels, and PTX that was broken on purpose.

    python -m tools.machine.proof [sm_80 sm_90 sm_100 …]

The barriers, waits and fences of some kernels are removed.  If all of a kind are removed, the
emulator must report it.  If one is removed, reports are only counted, because another one often
protects the same data.  The proof prints each miss, and a line at the end.  The exit status is 1
after a miss.
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import compiled  # before Triton is imported
from .compiled import RACES, Fault

# isort: split
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def matmul(
    a, b, c, M, N, K, am, ak, bk, bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """C = A @ B.  A [M, K], B [K, N], C [M, N]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), SUMS)
    for k in range(0, K, BK):
        depth = k + tl.arange(0, BK)
        in_a = (rows[:, None] < M) & (depth[None, :] < K)
        in_b = (depth[:, None] < K) & (columns[None, :] < N)
        x = tl.load(a + rows[:, None] * am + depth[None, :] * ak, mask=in_a, other=0.0)
        y = tl.load(b + depth[:, None] * bk + columns[None, :] * bn, mask=in_b, other=0.0)
        sums = tl.dot(x, y, sums, input_precision=PRECISION, out_dtype=SUMS)
    in_c = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], sums.to(c.dtype.element_ty), mask=in_c)


@triton.jit
def matmul_tma(
    a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """The same through descriptors; B is [N, K] if it is transposed."""
    i, j = tl.program_id(0) * BM, tl.program_id(1) * BN
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = a.load([i, k])
        y = b.load([j, k]).T if TRANSPOSED else b.load([k, j])
        sums = tl.dot(x, y, sums)
    c.store([i, j], sums.to(c.dtype))


@triton.jit
def attention(q, k, v, out, M, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """OUT = exp(scale Q Kᵀ) V: the first product is A of the second.  All [M, D]."""
    rows, depth = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    in_q = rows[:, None] < M
    x = tl.load(q + rows[:, None] * D + depth[None, :], mask=in_q, other=0.0)
    sums = tl.zeros((BM, D), tl.float32)
    for start in range(0, M, BN):
        others = start + tl.arange(0, BN)
        in_k = others[:, None] < M
        y = tl.load(k + others[:, None] * D + depth[None, :], mask=in_k, other=0.0)
        z = tl.load(v + others[:, None] * D + depth[None, :], mask=in_k, other=0.0)
        p = tl.exp(scale * tl.dot(x, y.T))
        sums = tl.dot(p.to(x.dtype), z, sums)
    tl.store(out + rows[:, None] * D + depth[None, :], sums.to(out.dtype.element_ty), mask=in_q)


@triton.jit
def softmax(x, y, N, stride, BLOCK: tl.constexpr):
    """The softmax of each row.  X [rows, N], Y [rows, N]."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * stride + column, mask=column < N, other=float("-inf"))
    v = tl.exp(v - tl.max(v, 0))
    tl.store(y + row * N + column, v / tl.sum(v, 0), mask=column < N)


@triton.jit
def scan(x, y, z, N, BLOCK: tl.constexpr):
    """Y: cumulative sums of each row; Z: its elements in another order.  [rows, N] each."""
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0) * N + column
    v = tl.load(x + at, mask=column < N, other=0)
    tl.store(y + at, tl.cumsum(v, 0), mask=column < N)
    tl.store(z + at, tl.gather(v, (column * 7 + 3) % BLOCK, 0), mask=column < N)


@dataclass(frozen=True)
class Case:
    """A launch with its expected results."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]
    results: tuple[torch.Tensor, ...]
    truths: tuple[torch.Tensor, ...]
    bound: float  # limit of the error as a ratio to the largest element

    def run(self, change: Callable[[str], str] | None = None, order: int = 0) -> compiled.Ran:
        for result in self.results:
            result.fill_(torch.nan if result.is_floating_point() else -1)
        launch = self.kernel, self.grid, self.arguments, self.options
        return compiled.run(*launch, change=change, order=order)

    def error(self) -> float:
        pairs = zip(self.results, self.truths, strict=True)
        return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def _data(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype)
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


BF16, F16, F32, S8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
BOUNDS = {(BF16, "ieee"): 1e-2, (F16, "ieee"): 2e-3, (F32, "tf32"): 3e-3, (F32, "ieee"): 1e-6}
BOUNDS |= {(S8, "ieee"): 0.0}
# M, N, K, tiles, warps, stages, layouts of A and B: n normal, t transposed
SHAPES = [
    (70, 52, 97, (64, 32, 32), 4, 3, "nn"), (64, 64, 64, (32, 32, 32), 4, 2, "nt"),
    (130, 100, 200, (128, 64, 32), 8, 3, "tn"), (33, 17, 9, (16, 16, 16), 1, 1, "nn"),
    (128, 128, 128, (128, 128, 64), 8, 3, "nn"), (96, 72, 136, (64, 64, 64), 4, 4, "tt"),
    (40, 72, 520, (32, 64, 32), 4, 4, "nt"),
]  # fmt: skip
TMA_SHAPES = [
    (96, 72, 136, (64, 64, 64), 4, "nt"), (200, 136, 168, (128, 128, 64), 8, "nt"),
    (200, 264, 168, (128, 256, 32), 8, "nn"), (80, 40, 104, (64, 32, 32), 4, "nn"),
    (64, 64, 256, (64, 16, 128), 4, "nt"), (100, 72, 520, (64, 64, 64), 4, "nt"),
    (136, 136, 520, (128, 128, 64), 8, "nt"),
]  # fmt: skip
BROKEN = (
    "matmul bfloat16 ieee 130x100", "matmul bfloat16 ieee 40x72x520",
    "matmul float32 tf32 40x72x520", "matmul int8 ieee 128x128x128",
    "tma bfloat16 100x72x520", "tma bfloat16 136x136x520", "attention bfloat16",
)  # fmt: skip


def product(dtype, precision, M, N, K, tiles, warps, stages, layout) -> Case:
    BM, BN, BK = tiles
    a = _data(K, M, dtype=dtype).T if layout[0] == "t" else _data(M, K, dtype=dtype)
    b = _data(N, K, dtype=dtype).T if layout[1] == "t" else _data(K, N, dtype=dtype)
    c = torch.empty(M, N, dtype=torch.int32 if dtype == S8 else dtype)
    arguments = dict(
        a=a, b=b, c=c, M=M, N=N, K=K, am=a.stride(0), ak=a.stride(1), bk=b.stride(0),
        bn=b.stride(1), BM=BM, BN=BN, BK=BK, PRECISION=precision,
        SUMS=tl.int32 if dtype == S8 else tl.float32,
    )  # fmt: skip
    name = f"matmul {str(dtype)[6:]} {precision} {M}x{N}x{K} {tiles} w{warps} s{stages} {layout}"
    options, truth = dict(num_warps=warps, num_stages=stages), a.double() @ b.double()
    grid = -(-M // BM), -(-N // BN)
    return Case(name, matmul, grid, arguments, options, (c,), (truth,), BOUNDS[dtype, precision])


def product_tma(dtype, M, N, K, tiles, warps, layout) -> Case:
    BM, BN, BK = tiles
    transposed = layout == "nt"
    a, b = _data(M, K, dtype=dtype), _data(K, N, dtype=dtype)
    b = _data(N, K, dtype=dtype) if transposed else b
    c = torch.empty(M, N, dtype=dtype)
    boxes = (a, [BM, BK]), (b, [BN, BK] if transposed else [BK, BN]), (c, [BM, BN])
    described = [TensorDescriptor.from_tensor(*each) for each in boxes]
    arguments = dict(zip("abc", described, strict=True))
    arguments |= dict(K=K, BM=BM, BN=BN, BK=BK, TRANSPOSED=transposed)
    name = f"matmul_tma {str(dtype)[6:]} {M}x{N}x{K} {tiles} w{warps} {layout}"
    truth = a.double() @ (b.T if transposed else b).double()
    grid, options = (-(-M // BM), -(-N // BN)), dict(num_warps=warps, num_stages=3)
    bound = BOUNDS[dtype, "tf32" if dtype == F32 else "ieee"]
    return Case(name, matmul_tma, grid, arguments, options, (c,), (truth,), bound)


def attention_case(dtype, M, D, tiles, warps) -> Case:
    q, k, v = (_data(M, D, dtype=dtype) for _ in range(3))
    out, (BM, BN) = torch.empty(M, D, dtype=dtype), tiles
    scale = D**-0.5
    arguments = dict(q=q, k=k, v=v, out=out, M=M, scale=scale, BM=BM, BN=BN, D=D)
    truth = torch.exp(scale * q.double() @ k.double().T) @ v.double()
    name = f"attention {str(dtype)[6:]} {M}x{D} {tiles} w{warps}"
    options = dict(num_warps=warps, num_stages=3)
    return Case(name, attention, (-(-M // BM),), arguments, options, (out,), (truth,), 1e-2)


def row_cases() -> Iterator[Case]:
    for N, warps in ((100, 4), (1000, 8), (37, 1)):
        x, y = _data(5, N + 3, dtype=F32)[:, :N], torch.empty(5, N)
        arguments = dict(x=x, y=y, N=N, stride=x.stride(0), BLOCK=triton.next_power_of_2(N))
        truth = x.double().softmax(1)
        options = dict(num_warps=warps)
        yield Case(f"softmax {N}", softmax, (5,), arguments, options, (y,), (truth,), 1e-5)
    for N, warps in ((100, 4), (64, 2)):
        x, block = torch.randint(-9, 9, (3, N), dtype=torch.int32), triton.next_power_of_2(N)
        results = torch.empty_like(x), torch.empty_like(x)
        arguments = dict(x=x, y=results[0], z=results[1], N=N, BLOCK=block)
        padded = torch.nn.functional.pad(x, (0, block - N))
        gathered = padded[:, (torch.arange(block) * 7 + 3) % block][:, :N]
        yield Case(
            f"scan {N}", scan, (3,), arguments, dict(num_warps=warps), results,
            (x.cumsum(1), gathered), 0.0,
        )  # fmt: skip


def cases(arch: int) -> Iterator[Case]:
    for dtype, precision in BOUNDS:
        for shape in SHAPES:
            if dtype != S8 or (arch != 103 and shape[3][2] >= 32):  # an int8 step has 32 or more
                yield product(dtype, precision, *shape)
    for dtype in (BF16, F16, F32) if arch >= 90 else ():
        for shape in TMA_SHAPES:
            _, BN, BK = shape[3]
            if dtype != F32 or (BN <= 128 and BK <= 64 and shape[5] == "nt"):
                yield product_tma(dtype, *shape)
    for tiles, warps in (((64, 64), 4), ((128, 64), 4), ((128, 32), 8)):
        for dtype in (BF16, F16):
            yield attention_case(dtype, 200, 64, tiles, warps)
    yield from row_cases()


# The removed instructions: pattern and replacement.
WAITS = {
    "barrier": (r"^\s*bar\.sync\s+0;", ""),
    "wait for copies": (r"^\s*cp\.async\.wait_group\s+\d+;", ""),
    "wait for wgmma": (r"^\s*wgmma\.wait_group[^;]*;", ""),
    "proxy fence": (r"^\s*fence\.proxy\.async[^;]*;", ""),
    "wait for tensor memory's loads": (r"^\s*tcgen05\.wait::ld[^;]*;", ""),
    "wait for tensor memory's stores": (r"^\s*tcgen05\.wait::st[^;]*;", ""),
    "commit": (r"^\s*(?:@%\w+\s+)?tcgen05\.commit[^;]*;", ""),
    "wait at an mbarrier": (
        r"mbarrier\.try_wait[^;]*complete,[^;]*;",
        "setp.eq.b32 complete, 0, 0;",
    ),
}


def without(wait: str, n: int | None = None) -> Callable[[str], str]:
    """A change of PTX that removes the n-th wait of a kind, or all."""
    pattern, instead = WAITS[wait]

    def change(text: str) -> str:
        places = [found.span() for found in re.finditer(pattern, text, re.MULTILINE)]
        for start, end in reversed(places if n is None else places[n : n + 1]):
            text = text[:start] + instead + text[end:]
        return text

    return change


def count(wait: str, text: str) -> int:
    return len(re.findall(WAITS[wait][0], text, re.MULTILINE))


def seen(case: Case, change: Callable[[str], str]) -> str:
    """The emulator's report for broken PTX, or nothing."""
    try:
        ran = case.run(change)
    except Fault as fault:
        return f"fault: {fault}"
    said = [each for each in ran.findings if each.kind in RACES]
    if said:
        return str(said[0])
    return "" if case.error() <= case.bound else "wrong numbers"


def prove(arch: int) -> tuple[str, bool]:
    """The line of a card, and whether nothing was missed."""
    compiled.use(arch)
    torch.manual_seed(0)
    right = total = kinds_seen = kinds = singles_seen = singles = 0
    for case in cases(arch):
        total += 1
        try:
            ran = case.run()
            races = [str(each) for each in ran.findings if each.kind in RACES]
            problem = "; ".join(races) or ("" if case.error() <= case.bound else "wrong numbers")
        except (Fault, compiled.Unsupported) as error:
            problem = str(error)
        right += not problem
        if problem:
            print(f"MISS sm_{arch} {case.name}: {problem[:300]}")
            continue
        if not any(name in case.name for name in BROKEN):
            continue
        for wait in WAITS:
            places = count(wait, ran.kernel.asm["ptx"])
            if not places:
                continue
            kinds += 1
            if seen(case, without(wait)):
                kinds_seen += 1
            else:
                print(f"MISS sm_{arch} {case.name}: no report although every {wait} is removed")
            singles += places
            singles_seen += sum(bool(seen(case, without(wait, n))) for n in range(places))
    line = (
        f"sm_{arch}: {right} of {total} correct and without races; all of a kind removed: "
        f"{kinds_seen} of {kinds} reported; one by one: {singles_seen} of {singles}"
    )
    return line, right == total and kinds_seen == kinds


def main() -> None:
    targets = sys.argv[1:] or ("sm_80", "sm_90", "sm_100", "sm_120")
    found = [prove(int(name.removeprefix("sm_"))) for name in targets]
    print(f"Triton {triton.__version__}: " + "; ".join(line for line, _ in found))
    sys.exit(not all(fine for _, fine in found))


if __name__ == "__main__":
    main()
