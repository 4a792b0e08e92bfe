"""Packed weights in kernels: dequantized bit for bit, and unpacked inside of a product."""

import pytest
import torch
from kernel_cases import BF16, F16, F32, draw_seeds, dtypes, poisoned, random
from marks import DEVICE, pairwise
from packed import by_elements, random_four_bit, random_int8, random_mxfp4, random_nvfp4, stack

from benchmarks.forms import PACKED, random_packed
from fastlora.backends.triton.packed import packed_of
from fastlora.formats.format import Quantized
from fastlora.formats.microscaled import MXFP4, NVFP4
from fastlora.kernels.common import INTERPRETED
from fastlora.kernels.dequant import dequant
from fastlora.kernels.gemm_config import GemmConfig
from fastlora.kernels.gemm_lowrank import gemm_lowrank
from fastlora.kernels.packed import FLOAT8, Packed

FORMATS = {
    "nf4": lambda: random_four_bit(20, 192),
    "fp4-block-32": lambda: random_four_bit(33, 96, "fp4", 32),
    "nf4-block-4096": lambda: random_four_bit(9, 1000, block=4096),
    "nf4-nested": lambda: random_four_bit(70, 256, nested=256),
    "nf4-nested-blocks-across-rows": lambda: random_four_bit(40, 100, nested=16),
    "nf4-odd": lambda: random_four_bit(33, 77),
    "one-element": lambda: random_four_bit(1, 1),
    "mxfp4": lambda: random_mxfp4(33, 96),
    "mxfp4-e8m0": lambda: random_mxfp4(7, 1024, torch.float8_e8m0fnu),
    "mxfp4-float32": lambda: random_mxfp4(20, 192, torch.float32),
    "nvfp4": lambda: random_nvfp4(33, 80),
    "int8": lambda: random_int8(70, 77),
    "int8-one-column": lambda: random_int8(70, 1),
}


def here(weight: Quantized) -> Quantized:
    """The weight on the tests' device."""
    return Quantized(weight.format, tuple([tensor.to(DEVICE) for tensor in weight.tensors]))


def filled(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight, by ``dequant``; memory around it must stay unwritten."""
    memory = poisoned(packed.of_all_experts.rows + 2, packed.columns, dtype=dtype)
    out = dequant(packed, memory[1:-1])
    assert memory[0].isnan().all()
    assert memory[-1].isnan().all()
    return out


def size_of(lefts: list[torch.Tensor], rights: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the absolute values of all terms of Σ left right."""
    pairs = zip(lefts, rights, strict=True)
    return sum(left.double().abs() @ right.double().abs() for left, right in pairs)


def assert_same(one: torch.Tensor, two: torch.Tensor, size: torch.Tensor) -> None:
    """Bit-equal in the interpreter; compiled, a packed weight's product sums k in another order."""
    if INTERPRETED.value:
        assert torch.equal(one, two)
    assert ((one.double() - two.double()).abs() <= torch.finfo(one.dtype).eps * size).all()


@dtypes
@pytest.mark.parametrize("name", FORMATS)
def test_a_dense_weight_is_the_formats_bit_for_bit(name, dtype):
    """Also equal to the format's definition: a product in float32, rounded once."""
    weight = FORMATS[name]()
    made = filled(packed_of(here(weight)), dtype).cpu()
    assert torch.equal(made, by_elements(weight).to(dtype))
    assert torch.equal(made, weight.dense(dtype))


def test_each_expert_has_its_scale_of_all():
    experts = [random_nvfp4(9, 48), random_nvfp4(9, 48, 0.3), random_nvfp4(9, 48, 2.0)]
    made = filled(packed_of(here(stack(experts))), F32).cpu()
    assert torch.equal(made, torch.cat([by_elements(expert) for expert in experts]))


def test_every_scale_of_mxfp4_and_nvfp4():
    """Each scale with every code."""
    dtype, packed = F32, torch.arange(256).to(torch.uint8).repeat(256, 1)
    bits = torch.arange(256).to(torch.uint8)[:, None]
    powers = bits.repeat(1, 16)
    e4m3 = bits.repeat(1, 32).view(torch.float8_e4m3fn), torch.tensor(0.0173)
    mxfp4, nvfp4 = MXFP4(256, 512), NVFP4(256, 512)
    for weight in (Quantized(mxfp4, (packed, powers)), Quantized(nvfp4, (packed, *e4m3))):
        made, truth = filled(packed_of(here(weight)), dtype).cpu(), weight.dense(dtype)
        # Skip subnormal numbers, which the interpreter rounds to zero, and infinities.
        made, truth = made[2:251], truth[2:251]
        torch.testing.assert_close(made, truth, rtol=0, atol=0, equal_nan=True)
    assert filled(packed_of(Quantized(mxfp4, (packed, powers))), dtype)[255].isnan().all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_a_scale_of_16_bits_is_multiplied_by_its_factor_in_16_bits(dtype):
    weight = random_int8(20, 30)
    weight = here(weight._replace(tensors=(weight.tensors[0], weight.tensors[1].to(dtype))))
    assert torch.equal(filled(packed_of(weight), F32), weight.dense(F32))


@pytest.mark.parametrize("blocks", [(0, 0), (1, 0), (128, 128), (32, 64)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_every_number_of_float8_and_nan(dtype, blocks):
    rows, columns = 130, 140
    bits = torch.arange(rows * columns, device=DEVICE).to(torch.uint8).view(rows, columns)
    height, width = blocks[0] or rows, blocks[1] or columns
    scales = torch.rand(-(-rows // height), -(-columns // width), device=DEVICE) * 100
    wide = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    truth = (bits.view(torch.float8_e4m3fn).float() * wide).to(dtype)
    made = filled(Packed(FLOAT8, bits, scales, rows, columns, *blocks), dtype)
    assert made.isnan().any()
    torch.testing.assert_close(made, truth, rtol=0, atol=0, equal_nan=True)


@pairwise(
    {
        "kind": {kind: kind for kind in PACKED},
        "orientation": {"y": "y", "dx": "dx"},
        "tile": {"narrow": (16, 32, 32), "deep": (32, 16, 128)},
    }
)
def test_unpacking_in_a_product_gives_the_bits_of_the_dense_weight(kind, orientation, tile):
    """With ragged tiles, and blocks of scales that are narrower and wider than a tile."""
    m, out_features, in_features = 18, 40, 128 if kind.startswith("four") else 77
    packed = random_packed(kind, out_features, in_features, DEVICE)
    dense = filled(packed, BF16)
    if orientation == "y":
        packed, dense = packed.mT, dense.mT
    k, n = dense.shape
    p, u, v, bias = random(m, k, BF16), random(m, 5, BF16), random(5, n, F32), random(1, n)[0]
    config = GemmConfig(*tile, warps=4, stages=2)
    outs = [poisoned(m, n, dtype=BF16) for _ in range(2)]
    for out, q in zip(outs, (packed, dense), strict=True):
        gemm_lowrank(out, [p], [q], [u], [v], precision="ieee", bias=bias, config=config)
    assert_same(*outs, size_of([p, u], [dense, v]) + bias.double().abs())


@pairwise(
    {
        "kind": {"four-bit": "four-bit nested", "float8": "float8"},
        "count": [2, 5],
        "dropout": [0.0, 0.3],
    }
)
def test_a_group_of_packed_weights(kind, count, dropout):
    depths = [20 + 13 * i for i in range(count)]
    packed = [random_packed(kind, depth, 64, DEVICE) for depth in depths]
    ps = [random(20, depth, BF16) for depth in depths]
    us, vs = [random(20, 4, BF16) for _ in depths], [random(4, 64, F32) for _ in depths]
    shared = {"dropout": dropout, "seeds": draw_seeds(count) if dropout else None}
    shared |= {"precision": "ieee", "config": GemmConfig(32, 32, 32, warps=4, stages=2)}
    outs, dense = (
        [poisoned(20, 64, dtype=BF16) for _ in range(2)],
        [filled(q, BF16) for q in packed],
    )
    for out, qs in zip(outs, (packed, dense), strict=True):
        gemm_lowrank(out, ps, qs, us, vs, **shared)
    assert_same(*outs, size_of([*ps, *us], [*dense, *vs]))
