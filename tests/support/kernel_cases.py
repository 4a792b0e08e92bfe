"""What the tests of the kernels share: operands of any layout, and records of launches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from device import DEVICE
from torch import Tensor

from fastlora.backends.dropout import dropout_mask
from fastlora.kernels.launch import Launch, intercept
from fastlora.kernels.target import target_of, use_target

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPE_IDS = {F16: "f16", BF16: "bf16", F32: "f32"}
dtypes = pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16)],
    ids=DTYPE_IDS.get,
)
LAYOUTS = ["contiguous", "window", "column-major", "every-second-column", "every-second-row"]


def random(rows: int, columns: int, dtype: torch.dtype = F32, layout: str = "contiguous") -> Tensor:
    """A random matrix.  What lies between and around its elements in memory is NaN."""
    around = {
        "contiguous": lambda: torch.empty(rows, columns, dtype=dtype, device=DEVICE),
        # Rows of 16 bytes stay rows of 16 bytes: a descriptor can still describe it.
        "window": lambda: poisoned(rows + 2, columns + 16, dtype=dtype)[1:-1, 8:-8],
        "odd": lambda: poisoned(rows + 2, columns + 3, dtype=dtype)[1:-1, 1:-2],
        "column-major": lambda: poisoned(columns + 2, rows + 2, dtype=dtype)[1:-1, 1:-1].T,
        "every-second-column": lambda: poisoned(rows, 2 * columns, dtype=dtype)[:, ::2],
        "every-second-row": lambda: poisoned(2 * rows, columns, dtype=dtype)[::2],
    }
    return around[layout]().copy_(torch.randn(rows, columns, dtype=torch.float64))


def poisoned(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def draw_seeds(count: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,)).to(DEVICE)


def keep_masks(seeds: Tensor | None, shape: tuple[int, int], p: float, count: int) -> list[Tensor]:
    """The torch backend's masks, or masks that keep everything where there is no seed."""
    if seeds is None:
        return [torch.ones(shape, dtype=torch.bool, device=DEVICE)] * count
    return [dropout_mask(seed, shape, p) for seed in seeds]


@contextmanager
def processors(count: int) -> Iterator[None]:
    """Launchers split an axis as for a device with so many processors."""
    target = target_of(torch.device(DEVICE))
    with use_target(replace(target, processors=count)):
        yield


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every launch inside the block, in order; each runs as usual."""
    records: list[Launch] = []

    def run(record: Launch) -> None:
        records.append(record)
        record.run()

    with intercept(run):
        yield records
