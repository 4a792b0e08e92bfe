"""How far the sums of tensor cores are from the truth: a layer's five products, bit for bit.

    .venv/bin/pip install mmasim==2.1.1
    .venv/bin/python -m tools.numerics

mmasim (arXiv 2511.10909) computes what mma.sync, wgmma and MFMA do, in which bits are cut off when
terms are aligned.  It takes some minutes.
"""

from importlib.metadata import version

import torch
from mmasim.amd import MFMA
from mmasim.nv_ptx import MMA, WGMMA
from torch import Tensor

DEPTHS, ROWS, R, TILE = (4096, 14336), 4096, 16, 16
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def machines(dtype: str) -> dict:
    """What multiplies [m, depth] by [depth, n], onto a float32 sum, in the steps of each."""
    return {
        "sm_80": MMA("Ampere", f"m16n8k16.f32.{dtype}.{dtype}.f32"),
        "sm_90": WGMMA("Hopper", f"m64n16k16.f32.{dtype}.{dtype}"),
        "gfx942": MFMA("CDNA3", f"f32_16x16x16_{dtype}"),
    }


def products(dtype: torch.dtype, depth: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What each multiplies, rounded as it comes: [TILE, depth] and [depth, TILE].

    ``depth`` is K for h and y, N for dx; gradients of the adapter sum over ROWS.
    """

    def data(rows: int, columns: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(rows, columns, dtype=torch.float64)).to(dtype)

    x, weight, lora_a = (
        data(TILE, depth),
        data(TILE, depth, depth**-0.5),
        data(R, depth, depth**-0.5),
    )
    dy, by_columns, lora_b = data(TILE, depth), data(depth, TILE, depth**-0.5), data(TILE, R, 0.25)
    found = {
        "h": (x, lora_a.T),
        # One sum, whose last R terms are the adapter's.
        "y": (torch.cat([x, data(TILE, R)], 1), torch.cat([weight, lora_b], 1).T),
        "dx": (torch.cat([dy, data(TILE, R)], 1), torch.cat([by_columns, data(R, TILE, 0.25)])),
    }
    if depth == DEPTHS[0]:
        found["d lora_a"] = data(R, ROWS), data(ROWS, TILE)
        found["d lora_b"] = data(TILE, ROWS), data(ROWS, R)
    return found


def error(found: Tensor, truth: Tensor) -> float:
    """The largest, over the largest value."""
    return ((found.double() - truth).abs().max() / truth.abs().max()).item()


def main() -> None:
    torch.manual_seed(0)
    print(f"mmasim {version('mmasim')}, torch {torch.__version__}, seed 0\n")
    head = ["product", "depth", "dtype", "sm_80", "sm_90", "gfx942", "float32", "rounded", "torch"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, dtype in DTYPES.items():
        for depth in DEPTHS:
            for product, (left, right) in products(dtype, depth).items():
                truth = left.double() @ right.double()
                start = torch.zeros(truth.shape, dtype=torch.float32)
                sums = {each: run(left, right, start) for each, run in machines(name).items()}
                sums["float32"] = left.float() @ right.float()
                rounded = max(error(each.to(dtype), truth) for each in sums.values())
                errors = [error(each, truth) for each in sums.values()]
                unit = torch.finfo(dtype).eps / 2
                cells = [f"{each:.1e} ({each / unit:.2g})" for each in errors]
                ends = [
                    f"{each:.1e} ({each / unit:.2g})"
                    for each in (rounded, error(left @ right, truth))
                ]
                print(
                    f"| {product} | {left.shape[1]} | {name} | {' | '.join(cells + ends)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
