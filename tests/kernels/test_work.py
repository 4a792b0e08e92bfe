"""The bytes and FLOPs that launchers state are those counted in Triton's interpreter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from judge import make_projection
from kernel_cases import BF16, F32, Counted, counted_launches
from marks import DEVICE
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from benchmarks.forms import Form, Operands
from fastlora.kernels.gemm_config import GemmConfig
from fastlora.kernels.row_loss import row_loss
from fastlora.kernels.sum_planes import sum_planes

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="bytes are counted in the interpreter")

DESCRIPTORS = GemmConfig(32, 32, 16, warps=4, stages=2, group=2, descriptors=True)
POINTERS = GemmConfig(32, 32, 16, warps=4, stages=2, group=2)


class Planes:
    """The call of sum_planes.  Its planes are partial sums, so ``tensors`` doesn't list them."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype = F32) -> None:
        self.planes = [torch.randn(shape) for shape in shapes]
        self.outs = [torch.empty(shape[1:], dtype=dtype) for shape in shapes]

    def run(self, config: None) -> list[Tensor]:
        sum_planes(self.planes, self.outs)
        return self.outs

    def truth(self) -> None:
        """Does nothing: a sum is not a product."""

    def tensors(self) -> list[Tensor]:
        return self.outs


# Tile sizes in the interpreter: project 32 x 32; weight_grad 32 rows and 64 or 32 columns; steps
# over the rank of at most 64 (gemm) or 128.  Few rows or columns are split for its 6 processors.
FORMS: dict[str, Form] = {
    "project-ragged": Form("h", 250, 67, (3,)),
    "project-ragged-split": Form("h", 40, 190, (3,)),
    "project-one-row": Form("h", 1, 130, (5,), dtype=F32),
    "project-group-masked": Form("h", 70, 67, (3, 20, 16), dropout=0.1),
    "project-group-of-five": Form("h", 70, 67, (3, 4, 5, 6, 7)),
    "project-rank-130": Form("h", 40, 66, (130,)),
    "y-aligned-pointers": Form("y", 64, 96, (16,), (64,)),
    "y-ragged-bias": Form("y", 70, 72, (3,), (40,), bias=True),
    "y-ragged-bias-pointers": Form("y", 70, 67, (3,), (37,), bias=True),
    "y-more-tiles-than-processors": Form("y", 130, 136, (8,), (24,)),
    "y-and-h-ragged-pointers": Form("y,h", 40, 67, (3,), (37,), bias=True),
    "dx-ragged-pointers": Form("dx", 70, 67, (3,), (37,)),
    "dx-group-masked-rank-80": Form("dx", 70, 72, (3, 20, 80), (40, 24, 8), dropout=0.1),
    "dx-group-masked-pointers": Form("dx", 70, 67, (3, 20), (37, 24), dropout=0.1),
    "dx-group-of-five-pointers": Form("dx", 70, 72, (3, 4, 5, 6, 7), (8,) * 5, dropout=0.1),
    "packed-y-pointers": Form("y", 20, 128, (3,), (128,), packed="four-bit nested"),
    "packed-y-and-h-pointers": Form("y,h", 70, 40, (3,), (192,), bias=True, packed="four-bit"),
    "packed-dx-group-float8-pointers": Form("dx", 20, 70, (3, 4), (150, 24), packed="float8"),
    "rows-of-x-ragged": Form("x8", 70, 67, ()),
    "rows-of-x-f32": Form("x8", 40, 130, (), dtype=F32),
    "rows-of-dy": Form("dy8", 40, 190, ()),
    "int8-y-aligned": Form("y", 70, 144, (16,), (64,), bias=True, int8=True),
    "int8-y-ragged-pointers": Form("y", 70, 67, (3,), (37,), int8=True),
    "int8-dx-group-masked-pointers": Form("dx", 70, 67, (3, 20), (37, 24), dropout=0.1, int8=True),
    "add-to-y": Form("y+", 70, 67, (16,), bias=True),
    "add-to-dx-masked": Form("dx+", 64, 96, (3, 80), dropout=0.1),
    "weight-grad-ragged": Form("dA", 70, 330, (3,)),
    "weight-grad-split": Form("dA", 260, 70, (3,)),
    "weight-grad-group-masked": Form("dB", 70, 330, (3, 20, 16), dropout=0.1),
    "one-pass-ragged-split": Form("dB,dh", 260, 70, (3,)),
    "one-pass-one-tile": Form("dB,dh", 20, 30, (3,)),
    "one-pass-over-x-ragged": Form("dA,dx+", 70, 330, (3,)),
    "one-pass-over-x-split-masked": Form("dA,dx+", 260, 70, (3, 20, 16), dropout=0.1),
    "one-pass-over-x-of-five": Form("dA,dx+", 70, 67, (3, 4, 5, 6, 7), dropout=0.1),
}
PLANES: dict[str, Callable[[], Planes]] = {
    "sum-planes": lambda: Planes([(3, 40, 30), (2, 7), (4, 1024)]),
    "sum-planes-to-16-bit": lambda: Planes([(5, 33, 70)], BF16),
}


@dataclass
class Result:
    launches: list[Counted]
    call: Operands | Planes
    made: Sequence[Tensor]


@pytest.fixture(scope="module", params=[*FORMS, *PLANES])
def result(request) -> Result:
    """A case's launches, counted."""
    name = request.param
    call = PLANES[name]() if name in PLANES else Operands(FORMS[name], DEVICE)
    config = None
    if name in FORMS and FORMS[name].kernel == "gemm_lowrank" and not FORMS[name].int8:
        config = POINTERS if "pointers" in name else DESCRIPTORS
    with counted_launches() as launches:
        made = call.run(config)
    return Result(launches, call, made)


def check_bytes(counted: Counted) -> None:
    stated = counted.stated
    assert stated.loaded == len(counted.loads.addresses())
    assert stated.loaded_by_tiles == counted.loads.total
    assert stated.stored == len(counted.stores.addresses())
    assert stated.stored == counted.stores.total, "a byte is stored twice"


def test_bytes_are_as_stated_and_none_is_stored_twice(result):
    for counted in result.launches:
        check_bytes(counted)


def test_partial_sums_are_the_bytes_outside_of_inputs_and_results(result):
    for counted in result.launches:
        tensors = [*result.call.tensors(), *result.made]
        assert counted.stated.partial == counted.outside(tensors)


def test_flops_match_the_formula(result):
    with FlopCounterMode(display=False) as formula:
        result.call.truth()
    products = [counted for counted in result.launches if counted.launch.name != "sum_planes"]
    assert sum(counted.stated.flops for counted in products) == formula.get_total_flops()


@pytest.mark.parametrize("gradient", [False, True])
def test_a_loss_loads_its_logits_twice_at_most_and_stores_them_once(gradient):
    z, target, (losses, upstream) = torch.randn(3, 5000), torch.arange(3), torch.randn(2, 3)
    with counted_launches() as launches:
        row_loss(z, target, losses, (0.1, 3.0, 2.0, 0.01), upstream, gradient)
    check_bytes(launches[0])
    assert launches[0].loads.total <= (1 + gradient) * z.nbytes + 3 * 4 + 3 * 8 + 3 * 4


def test_a_sum_of_planes_adds_every_element():
    with counted_launches() as launches:
        sum_planes([torch.randn(3, 40, 30)], [torch.empty(40, 30)])
    assert [counted.stated.flops for counted in launches] == [3 * 40 * 30]


@pytest.mark.parametrize(
    ("dtype", "ranks", "p"),
    [(F32, (4, 20, 3), 0.1), (BF16, (4,), 0.0)],
    ids=["f32-group-dropout", "bf16-one"],
)
def test_every_launch_of_the_op_states_its_bytes(p, ranks, dtype):
    x = torch.randn(2, 35, 40).to(dtype).requires_grad_()
    group = [make_projection(35, 40, r, dtype, F32, bias=True) for r in ranks]
    with counted_launches() as launches:
        ys = fastlora.lora_linears(x, group, dropout=p, backend="triton")
        torch.autograd.backward(ys, [torch.randn_like(y) for y in ys])
    assert {counted.launch.name for counted in launches} >= {
        "project",
        "gemm_lowrank",
        "weight_grad",
    }
    for counted in launches:
        check_bytes(counted)


OVER_SEGMENTS = [(name, False) for name in ("h", "y", "dx", "y+", "dA", "dB,dh")]
OVER_SEGMENTS += [(name, True) for name in ("h", "y+", "dx+", "dA", "dB,dh")]


@pytest.mark.parametrize(("name", "own"), OVER_SEGMENTS)
def test_over_segments_that_all_have_rows_bytes_are_as_stated(name, own):
    """Bytes loaded by tiles depend on where segments end, so they are only bounded."""
    depths = (40,) if name in ("y", "dx") else ()
    p = 0.1 if name in ("h", "dx", "dx+", "dA") else 0.0
    form = Form(name, 100, 72, (3,), depths, dropout=p, bias=name == "y", segments=3, own=own)
    with counted_launches() as launches:
        Operands(form, DEVICE).run()
    for counted in launches:
        assert counted.stated.loaded == len(counted.loads.addresses())
        assert counted.stated.stored == len(counted.stores.addresses()) == counted.stores.total
        assert counted.loads.total <= counted.stated.loaded_by_tiles
