"""Operands with elements more than 2³¹ apart, so addresses must be computed in 64 bits.

The memory between the elements is never touched, so a CPU doesn't allocate it.
"""

import judge
import pytest
import torch
from kernel_cases import BF16, DEVICE, F32, poisoned, random

from fastlora.kernels.gemm_lowrank import gemm_lowrank
from fastlora.kernels.project import project
from fastlora.kernels.row_loss import row_loss
from fastlora.kernels.weight_grad import weight_grad

FAR = 2**30 + 2**17  # three rows reach beyond 2³¹ elements and 2³² bytes


@pytest.fixture(scope="module")
def memory():
    """A tensor of 4 GiB of address space."""
    try:
        return torch.empty(2 * FAR + 2**16, dtype=BF16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"4 GiB can't be allocated: {error}")


@pytest.fixture(params=["far rows", "far columns"])
def far(request, memory):
    """A matrix [3, 40] or [40, 3] inside of ``memory``."""
    if request.param == "far rows":
        matrix = torch.as_strided(memory, (3, 40), (FAR, 1))
    else:
        matrix = torch.as_strided(memory, (40, 3), (1, FAR))
    return matrix.copy_(torch.randn(matrix.shape))


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=0.1)


def test_project(far):
    a = random(far.shape[1], 4)
    (product,) = project(far, [a], [1.0], precision="ieee")
    close(product, far.double() @ a.double())


def test_project_from_a_far_adapter(far):
    x = random(5, len(far), BF16)
    (product,) = project(x, [far], [1.0], precision="ieee")
    close(product, x.double() @ far.double())


def test_gemm_lowrank_of_p(far):
    q, u, v = random(far.shape[1], 24, BF16), random(len(far), 2, BF16), random(2, 24)
    out = poisoned(len(far), 24, dtype=BF16)
    gemm_lowrank(out, [far], [q], [u], [v], precision="ieee")
    close(out, far.double() @ q.double() + u.double() @ v.double())


def test_gemm_lowrank_of_q_and_v(far):
    """far.T is both q and v."""
    p, u = random(5, far.shape[1], BF16), random(5, far.shape[1], BF16)
    out = poisoned(5, len(far), dtype=BF16)
    gemm_lowrank(out, [p], [far.T], [u], [far.T], precision="ieee")
    close(out, (p.double() + u.double()) @ far.T.double())


def test_weight_grad(far):
    u, out = random(len(far), 4, BF16), poisoned(far.shape[1], 4, dtype=F32)
    weight_grad(far, [u], [out], precision="ieee")
    close(out, far.double().T @ u.double())


def test_row_loss(memory):
    z = torch.as_strided(memory, (3, 40), (FAR, 1)).copy_(random(3, 40))
    target = torch.tensor([39, 0, 39], device=DEVICE)
    judge.check_row_loss(row_loss, z, target, (0.1, 3.0, 2.0, 0.01))
