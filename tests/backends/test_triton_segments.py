"""Experts on the Triton backend, and the use of torch's grouped_mm.

The launches of a whole call are in tests/kernels/test_host.py.
"""

import pytest
import torch
from judge import call_experts, ends_of, make_experts, make_rows
from kernel_cases import recorded
from marks import DEVICE
from torch.nn import functional

import fastlora
from fastlora import AdapterMapping
from fastlora.backends import Call, find_backend
from fastlora.backends.triton import grouped_mm
from fastlora.call.projection import Adapter, Base, Layout, Output
from fastlora.call.rows import Rows
from fastlora.kernels.plan import FUSED, IN_PLACE, use_plan
from fastlora.ops.experts import lora_experts
from fastlora.ops.run import run_new

COUNTS = [6, 0, 5, 3]


@pytest.fixture(autouse=True)
def on_triton(poisoned_memory):
    with fastlora.use_backend("triton"), torch.device(DEVICE):
        yield


@pytest.fixture
def with_grouped_mm(monkeypatch):
    """Simulates a GPU on which torch has a kernel for grouped_mm.

    That kernel leaves rows after the last expert unwritten; here they are NaN.
    """
    plain = torch.nn.functional.grouped_mm

    def careless(x, weight, *, offs):
        out = plain(x, weight, offs=offs)
        if weight.dim() == 2:  # a sum over each expert's rows
            return out
        nobody = x.new_ones(len(x), dtype=torch.int32).cumsum(0) > offs[-1:]
        return out.masked_fill_(nobody.unsqueeze(1), torch.nan)

    monkeypatch.setattr(grouped_mm, "_has_kernel", lambda device: True)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", careless)


def names(run) -> list[str]:
    with recorded() as records:
        run()
    return [each.name for each in records]


def step(dtype, p=0.0):
    x, experts = make_rows(20, 16, dtype), make_experts(4, 24, 16, 8, dtype, bias=True)
    experts.bias.requires_grad_(False)
    return all_of(x, experts, p)


def all_of(x, experts, p: float) -> list[torch.Tensor]:
    """y and three gradients."""
    torch.manual_seed(5)
    y = call_experts(x, experts, ends_of(COUNTS), dropout=p)
    return [y, *torch.autograd.grad(y.sum(), [x, experts.lora_a, experts.lora_b])]


@pytest.mark.usefixtures("with_grouped_mm")
@pytest.mark.parametrize(
    ("adapter_dtype", "p"), [(torch.bfloat16, 0.0), (torch.float32, 0.1)], ids=["bf16", "f32-p0.1"]
)
def test_the_adapter_is_added_to_torch_s_product(adapter_dtype, p):
    """In bfloat16, the only dtype of torch's kernels."""
    x = make_rows(20, 16, torch.bfloat16)
    experts = make_experts(4, 24, 16, 3, torch.bfloat16, adapter_dtype, bias=True)
    with use_plan(IN_PLACE):
        found = all_of(x, experts, p)
        assert names(lambda: step(torch.bfloat16, p)).count("lowrank") == 2
    for ours, fused in zip(found, all_of(x, experts, p), strict=True):
        assert (ours - fused).norm() <= 0.01 * fused.norm()


@pytest.mark.parametrize("in_place", [False, True], ids=["fused", "in-place"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_an_absent_adapter_is_absent(in_place, has_bias, request):
    """One launch in each direction, without a low-rank term.  After torch's product, one launch
    fills the rows without an expert.
    """
    if in_place:
        request.getfixturevalue("with_grouped_mm")
    x = make_rows(20, 16, torch.bfloat16)
    experts = make_experts(4, 24, 16, 8, torch.bfloat16, bias=has_bias)
    bias = experts.bias.detach() if has_bias else None
    output, rows = Output(Base(experts.weight.detach(), bias)), Rows(ends_of(COUNTS))
    found = []

    def run() -> None:
        (y,), _ = run_new(x, [output], 0.1, rows=rows)
        found[:] = [y, *torch.autograd.grad(y.float().square().sum(), [x])]

    with use_plan(IN_PLACE if in_place else FUSED):
        assert names(run) == ["lowrank" if in_place else "gemm_lowrank"] * 2
    ours = [*found]
    with fastlora.use_backend("torch"):
        run()
    for our, right in zip(ours, found, strict=True):
        assert (our - right).norm() <= 0.01 * right.norm()
        assert not our[sum(COUNTS) :].any()


def test_where_torch_has_no_kernel_an_in_place_plan_is_fused():
    with use_plan(IN_PLACE):
        assert "lowrank" not in names(lambda: step(torch.float32))


def test_a_block_of_experts_is_kernels_throughout():
    """The activation also runs in a kernel; numbers agree with the torch backend's."""
    up, down = make_experts(4, 48, 16, 8, torch.float32), make_experts(4, 16, 24, 8, torch.float32)
    halves = [Output(Base(e.weight), (Adapter(e.lora_a, e.lora_b, 0.5),)) for e in (up, down)]
    x, index = make_rows(10, 16, torch.float32), torch.randint(4, (10, 2))
    weights = torch.rand(10, 2, requires_grad=True)
    leaves = [x, weights, up.lora_a, up.lora_b, down.lora_a, down.lora_b]

    def run() -> list[torch.Tensor]:
        out = lora_experts(x, index, weights, *halves, "silu")
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    found: list[torch.Tensor] = []
    launched = names(lambda: found.extend(run()))
    assert {"gated", "gated_backward", "project", "gemm_lowrank", "weight_grad"} <= {*launched}
    with fastlora.use_backend("torch"):
        for ours, theirs in zip(found, run(), strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_bank_is_read_where_it_lies_and_no_row_is_gathered():
    """For adapters of one rank, and rows in any order."""
    one, mapping = make_experts(2, 64, 48, 4, torch.float32), AdapterMapping([1, -1, 0, 1], 2)
    x = torch.randn(4, 8, 48, requires_grad=True)
    tensors = x, one.weight[0], one.lora_a, one.lora_b
    own = {t.untyped_storage().data_ptr() for t in (x, one.lora_a, one.lora_b)}
    with recorded() as launches:
        fastlora.multi_lora_linear(*tensors, mapping, scales=[0.5, 1.0]).sum().backward()
    operands = [launch.arguments.get(name) for launch in launches for name in ("x", "v")]
    tensors = [t for each in operands for t in (each if isinstance(each, tuple) else (each,))]
    read = {t.untyped_storage().data_ptr() for t in tensors if t is not None}
    assert len(launches) >= 5
    assert own <= read


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_rows_in_the_middle_of_a_call_have_its_masks(name):
    """A part of the rows; the call says how many rows come before it."""
    experts = make_experts(3, 24, 16, 8, torch.float32)
    tensors = [tensor.detach() for tensor in experts[:3]]
    x, seeds = torch.randn(12, 16), torch.tensor([11])
    backend = find_backend(name)
    one = Call((Layout(False, (1.0,)),), 0.3, backend, Rows(ends_of([4, 5, 3])))
    (whole,), _ = backend.forward([x, *tensors], seeds, one)
    part = [x[4:], *(tensor[1:] for tensor in tensors)]
    one = one._replace(rows=Rows(ends_of([5, 3]), first=4))
    (y,), _ = backend.forward(part, seeds, one)
    torch.testing.assert_close(y, whole[4:])


def test_more_experts_than_a_grid_has_room_for_run_on_torch():
    outputs = [Output(Base(torch.empty(2**16 - 1, 1, 1), None))]
    reason = find_backend("triton").why_not(torch.float32, torch.device(DEVICE), outputs)
    assert "65534 experts" in reason


def weight_of(n: int = 16, k: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, n, k).to(dtype)


LIMITS = {
    "float32": (weight_of(), True),
    "bfloat16": (weight_of(dtype=torch.bfloat16), True),
    "float16": (weight_of(dtype=torch.float16), True),
    "float64": (weight_of(dtype=torch.float64), False),
    "transposed": (weight_of().mT.contiguous().mT, True),
    "one-for-all": (weight_of()[:1].expand(3, 16, 8), True),
    "odd-n": (weight_of(n=15), False),
    "odd-k": (weight_of(k=7), False),
    "4-features-of-16-bits": (weight_of(k=4, dtype=torch.bfloat16), False),
    "every-second-feature": (weight_of(k=16)[..., ::2], False),
    "odd-stride": (weight_of(k=9)[..., :8], False),
    "odd-stride-between-experts": (torch.randn(3 * 129).as_strided((3, 16, 8), (129, 8, 1)), False),
    "odd-address": (torch.randn(3 * 128 + 1)[1:].view(3, 16, 8), False),
    "1024-experts": (torch.randn(1024, 8, 8), False),
    "rows-that-overlap": (torch.randn(3, 16, 1).expand(3, 16, 8), False),
}


@pytest.mark.parametrize(("weight", "fits"), LIMITS.values(), ids=LIMITS)
def test_limits_of_grouped_mm(weight, fits):
    """torch accepts every weight that fastlora passes on, in both products, without an error."""
    x = torch.randn(5, weight.shape[2], dtype=weight.dtype)
    assert grouped_mm._takes(x, weight) is fits
    if fits:
        functional.grouped_mm(x, weight.mT, offs=ends_of([1, 1, 3]))
        functional.grouped_mm(x @ weight[0].T, weight, offs=ends_of([1, 1, 3]))


@pytest.mark.parametrize(
    ("version", "hip", "has"), [((8, 0), None, False), ((9, 0), None, True), ((10, 0), None, True),
                                ((12, 0), None, False), ((9, 4), "7.0", False)],
)  # fmt: skip
def test_which_gpus_have_a_kernel(version, hip, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert grouped_mm._has_kernel.__wrapped__(torch.device("cuda", 0)) is has
