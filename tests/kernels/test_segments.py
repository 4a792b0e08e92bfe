"""The three contractions over segments: each row with its segment's factors, against float64."""

from collections.abc import Sequence

import pytest
import torch
from judge import assert_close
from kernel_cases import BF16, F32, draw_seeds, keep_masks, random, recorded
from marks import DEVICE, pairwise
from torch import Tensor

from fastlora.kernels import segments
from fastlora.kernels.gemm_config import GemmConfig
from fastlora.kernels.gemm_lowrank import gemm_lowrank
from fastlora.kernels.project import project
from fastlora.kernels.weight_grad import weight_grad

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DESCRIPTORS = GemmConfig(32, 32, 16, warps=4, stages=2, group=2, descriptors=True)
POINTERS = GemmConfig(32, 32, 16, warps=4, stages=2, group=2)
# The ends of segments in 100 rows; tiles have 16 or 32 rows.
ENDS = {
    "one": [100],
    "even": [32, 64, 100],
    "ragged": [1, 34, 34, 50, 97, 98, 99],
    "empty-at-both-ends": [0, 0, 70, 70],
    "nobody-s": [0, 0, 0],
}
M = 100


def tensor_of(ends: Sequence[int]) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=DEVICE)


def rows_of(ends: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def banks(ends: Sequence[int], rows: int, columns: int, dtype=F32, layout="contiguous") -> Tensor:
    """One matrix for each segment."""
    return (
        torch.stack([random(rows, columns, dtype) for _ in ends])
        if layout == "contiguous"
        else (torch.stack([random(columns, rows, dtype) for _ in ends]).mT)
    )


def product(x: Tensor, factors: Tensor, ends: Sequence[int]) -> Tensor:
    """Each row times its segment's factor; zeros for rows without a segment."""
    out = x.new_zeros(len(x), factors.shape[-1])
    for e, rows in enumerate(rows_of(ends)):
        out[rows] = x[rows] @ factors[e]
    return out


def x_with_nobody_s(columns: int, ends: Sequence[int], dtype=BF16) -> tuple[Tensor, Tensor]:
    """x with NaN in rows without a segment, and a copy with zeros there."""
    x = random(M, columns, dtype)
    x[ends[-1] :] = 0.0
    poisoned = x.clone()
    poisoned[ends[-1] :] = torch.nan
    return poisoned, x


@pairwise(
    {
        "ends": ENDS,
        "layout,p": {"contiguous-p0.3": ("contiguous", 0.3), "transposed": ("transposed", 0.0)},
        "config": {"descriptors": DESCRIPTORS, "pointers": POINTERS},
    }
)
def test_gemm_lowrank(ends, p, layout, config):
    """N and K make the last tile of a weight overlap the next weight, which is NaN here."""
    (x, clean), n, k = x_with_nobody_s(24, ends), 40, 24
    q = banks(ends, k, n, BF16, layout)
    if len(ends) > 3 and ends[1] == ends[0]:
        q[1] = torch.nan  # it has no rows
    u, v, bias = random(M, 3, BF16), banks(ends, 3, n), banks(ends, 1, n)[:, 0]
    u[ends[-1] :] = 0.0
    seeds = draw_seeds(1) if p else None
    (mask,) = keep_masks(seeds, (M, n), p, 1)
    out = x.new_empty(M, n)
    gemm_lowrank(
        out, [x], [q], [u], [v], precision="ieee", bias=bias, dropout=p, seeds=seeds,
        ends=tensor_of(ends), config=config,
    )  # fmt: skip
    ones = x.new_ones(M, 1)
    ones[ends[-1] :] = 0.0

    def formula(convert) -> Tensor:
        low = product(convert(u), convert(v.to(BF16)), ends)
        base = product(convert(clean), convert(q), ends)
        return (
            base
            + torch.where(mask, low, 0)
            + product(convert(ones), convert(bias.to(BF16))[:, None], ends)
        )

    found = formula(lambda t: t.double()), formula(lambda t: t), formula(lambda t: t.double().abs())
    assert_close("out", out, *found, x.dtype)


def test_more_segments_than_one_load_covers(monkeypatch):
    monkeypatch.setattr(segments, "_MOST_AT_ONCE", 4)
    ends = [3 * i for i in range(1, 31)]
    x, v = random(M, 20), banks(ends, 20, 3)
    (u,) = project(x, [v], [1.0], precision="ieee", ends=tensor_of(ends))
    torch.testing.assert_close(u, product(x, v, ends))


@pytest.mark.parametrize("ends", [[200, 300], [-5, -1], [60, 20, 90], [-300, 500, -9]], ids=str)
def test_invalid_ends_touch_no_other_memory(ends):
    """Operands are the middle rows of larger matrices; nothing around them may change."""
    around = random(3 * M, 40)
    before, x = around.clone(), around[M : 2 * M]
    u, v = random(3 * M, 4), banks(ends, 40, 4)
    u_before = u.clone()
    there = tensor_of(ends)
    project(x, [v], [1.0], precision="ieee", ends=there)
    weight_grad(x, [u[M : 2 * M]], [v.clone()], precision="ieee", b=v, ends=there)
    for config in (DESCRIPTORS, POINTERS):
        out = around[M : 2 * M]
        gemm_lowrank(
            out, [u[M : 2 * M]], [v.mT.contiguous()], [u[M : 2 * M]], [v.mT],
            precision="ieee", ends=there, config=config,
        )  # fmt: skip
    assert torch.equal(around[:M], before[:M])
    assert torch.equal(around[2 * M :], before[2 * M :])
    assert torch.equal(u, u_before)


def test_no_launch_depends_on_where_segments_end():
    """So the host reads no ends, and a CUDA graph may be replayed with other ends."""
    grids = []
    for ends in ENDS["ragged"], [0] * 7, [100] * 7:
        with recorded() as records:
            project(
                random(M, 20), [banks(ends, 20, 3)], [1.0], precision="ieee", ends=tensor_of(ends)
            )
        grids.append([record.grid for record in records])
    assert grids[0] == grids[1] == grids[2]
