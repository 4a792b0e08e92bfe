"""Compiler faults: the configs used to avoid them, by version and device."""

from types import SimpleNamespace

import pytest
import torch
from kernel_cases import launched

from fastlora.kernels import faults, target
from fastlora.kernels.config import Call, default_config
from fastlora.kernels.gemm_lowrank import gemm_lowrank
from fastlora.kernels.project import ProjectConfig
from fastlora.kernels.target import TARGETS


def test_the_assembler_says_its_version():
    assert (12, 0) < faults.ptxas(90) < (99,)
    assert (12, 0) < faults.ptxas(100) < (99,)


def test_no_assembler_is_the_oldest(monkeypatch):
    monkeypatch.setattr(faults.triton, "knobs", SimpleNamespace(nvidia=None))
    assert faults.ptxas.__wrapped__(90) == () < (13, 3)


MASKED = Call(4096, 4096, 16, 4, "tf32", masked=True)


@pytest.mark.parametrize(
    ("name", "version", "call", "rows"),
    [
        ("sm_90", (12, 9), MASKED, 32),
        ("sm_90", (13, 3), MASKED, 64),
        ("sm_90", (12, 9), Call(4096, 4096, 16, 4, "tf32"), 64),
        ("sm_90", (12, 9), Call(4096, 4096, 16, 2, "ieee", masked=True), 64),
        ("sm_80", (12, 9), MASKED, 64),
        ("sm_100", (12, 9), MASKED, 64),
    ],
    ids=["old", "mended", "no-mask", "16-bit", "no-wgmma", "tcgen05"],
)
def test_a_masked_tf32_x_stays_off_wgmma_before_ptxas_13_3(monkeypatch, name, version, call, rows):
    monkeypatch.setattr(faults, "ptxas", lambda arch: version)
    assert default_config("project", TARGETS[name], call).block_m == rows
    reason = ProjectConfig(64, 64, warps=8, stages=4).why_not(TARGETS[name], call)
    assert ("ptxas" in reason) == (rows == 32)


def described(name, precision="ieee", dtype=torch.float32, **matrices):
    """Whether x [256, 512] times w [512, 256] uses tensor descriptors on this target."""
    p = torch.empty(256, 512, dtype=dtype, device="meta")
    operands = {"p": p, "q": torch.empty(256, 512, dtype=dtype, device="meta").mT} | matrices
    out = torch.empty(256, 256, dtype=dtype, device="meta")
    u, v = out.new_empty(256, 16), out.new_empty(16, 256)
    call = lambda: gemm_lowrank(  # noqa: E731
        out, [operands["p"]], [operands["q"]], [u], [v], precision=precision
    )
    return launched(call, TARGETS[name])[-1].arguments["DESCRIPTORS"]


# dx reads the weight transposed: its depth isn't the last axis
TURNED = torch.empty(512, 256, device="meta")


@pytest.mark.parametrize(
    ("name", "matrices", "expected"),
    [("sm_100", {}, True), ("sm_100", {"q": TURNED}, False), ("sm_90", {"q": TURNED}, True)],
    ids=["y", "dx", "dx-wgmma"],
)
def test_tensor_memory_s_tf32_turns_no_tile_by_descriptor(name, matrices, expected):
    assert described(name, "tf32", **matrices) is expected


def test_in_16_bits_tensor_memory_may_turn_them():
    assert described("sm_100", dtype=torch.bfloat16, q=TURNED.bfloat16())


@pytest.mark.parametrize(
    ("triton", "name", "columns", "expected"),
    [
        ((3, 6), "sm_100", 64, False),
        ((3, 6), "sm_100", 512, True),
        ((3, 7), "sm_100", 64, True),
        ((3, 6), "sm_90", 64, True),
    ],
    ids=["small", "large", "mended", "sm_90"],
)
def test_small_sparse_views_have_no_descriptor_on_blackwell(
    monkeypatch, triton, name, columns, expected
):
    monkeypatch.setattr(faults, "TRITON", triton)
    wide = torch.empty(256, 2 * columns, dtype=torch.bfloat16, device="meta")
    q = torch.empty(256, columns, dtype=torch.bfloat16, device="meta").mT
    assert described(name, dtype=torch.bfloat16, p=wide[:, :columns], q=q) is expected
    assert described(name, dtype=torch.bfloat16, p=wide[:, :columns].contiguous(), q=q)


@pytest.mark.parametrize(
    ("arch", "row"),
    [
        ("gfx942", "gfx942"),
        ("gfx90a", "gfx942"),
        ("gfx950", "gfx950"),
        ("gfx1100", "gfx11"),
        ("gfx1151", None),
        ("gfx1030", None),
    ],
)
def test_amd_s_devices_have_these_rows(monkeypatch, arch, row):
    properties = SimpleNamespace(
        gcnArchName=f"{arch}:sramecc+:xnack-", warp_size=64, multi_processor_count=80, name=arch
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    found = target._device_target.__wrapped__(0)
    assert (found and found.name) == row
    assert found is None or found.tf32 == (arch == "gfx942")


def test_pipelines_have_one_stage_on_gfx950():
    for kernel in ("gemm_lowrank", "project", "weight_grad"):
        for masked in (False, True):
            call = Call(4096, 4096, 16, 2, "ieee", masked=masked)
            assert default_config(kernel, TARGETS["gfx950"], call).stages == 1
