"""The first results of kernels are verified before they are used: with faults of every kind."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from judge import row_loss_by, row_loss_of
from packed import random_int8

import fastlora
from fastlora.backends import GatedProduct, triton
from fastlora.backends import torch as torch_backend
from fastlora.backends.protocol import LossSettings
from fastlora.backends.triton import packed, verification
from fastlora.doctor import _compiled
from fastlora.formats.rotated_int8 import pack_rotated
from fastlora.kernels import launchers as kernels
from fastlora.kernels import replay
from fastlora.kernels.capture import CapturedCall

K = 40


def faults():
    return [fault for fault in verification.read_records().values() if fault]


@pytest.fixture(autouse=True)
def verifying(monkeypatch, tmp_path):
    """As on a GPU, in the first process of a user."""
    monkeypatch.setattr(verification, "_CHOSEN", verification.FIRST)
    monkeypatch.setattr(verification, "REPEATS", 3)
    forget(monkeypatch, tmp_path / "cache")


def forget(monkeypatch, folder=None):
    """As a process that starts, and of a user with another folder."""
    if folder:
        monkeypatch.setenv("FASTLORA_CACHE", str(folder))
    monkeypatch.setattr(verification, "_records", {})
    monkeypatch.setattr(replay, "calls", {})
    monkeypatch.setattr("fastlora.ops.kinds.calls", {})


def group(dtype=torch.float32, zero_b=False, r=4, out=24):
    lora_b = torch.zeros(out, r) if zero_b else torch.randn(out, r)
    return [
        fastlora.Projection(
            torch.randn(out, K, dtype=dtype),
            torch.randn(r, K, requires_grad=True),
            lora_b.requires_grad_(),
            torch.randn(out, dtype=dtype),
            0.5,
        )
    ]


def step(x, projections, p=0.0, backend="triton"):
    """Outputs and gradients of a training step."""
    torch.manual_seed(3)
    leaves = [x, *[t for one in projections for t in one[1:3] if t.requires_grad]]
    ys = fastlora.lora_linears(x, projections, dropout=p, backend=backend)
    waves = [torch.arange(y.numel(), dtype=torch.float32).view(y.shape).sin() for y in ys]
    return [
        *ys,
        *torch.autograd.grad(ys, leaves, [w.to(y) for w, y in zip(waves, ys, strict=True)]),
    ]


def rows(count=48, dtype=torch.float32):
    return torch.randn(count, K, dtype=dtype, requires_grad=True)


def agree(found, expected):
    tolerance = 1e-5 if expected[0].dtype == torch.float32 else 4e-2
    for ours, its in zip(found, expected, strict=True):
        assert (ours - its).abs().amax() <= tolerance * its.abs().amax()


def run_on_torch(run, expected, kernel=""):
    """Require one warning or more that the kernel no longer runs, and PyTorch's results."""
    with pytest.warns(RuntimeWarning, match=f"{kernel} ?no longer run") as said:
        found = run()
    agree(found, expected)
    return said


NAMES = ("project", "lowrank", "gemm_lowrank", "gemm_lowrank_few_rows")


def faulty(monkeypatch, change, names=NAMES):
    """From now on, ``change`` is done to the results of calls with one of these kernels."""
    real, counts = kernels.capture_call, []

    def capture(*call):
        made = real(*call)
        if not {each.split()[0] for each in made.identities} & set(names):
            return made

        def replayed(*arguments):
            counts.append(1)
            results = list(made.replay(*arguments))
            change(results, len(counts))
            return results

        return made._replace(replay=replayed)

    monkeypatch.setattr(kernels, "capture_call", capture)
    return counts


def tile(results, call):
    results[0][16:32, 8:24] += results[0].abs().amax()


def one_row_is_nan(results, call):
    results[0][-1] = torch.nan


def one_element(results, call):
    results[0][3, 5] += 2 * results[0].std()


def swapped(results, call):
    results[0][:20], results[0][20:40] = results[0][20:40].clone(), results[0][:20].clone()


def like_tf32(results, call):
    results[0].view(torch.int32).bitwise_and_(-(2**13))


def sometimes(results, call):
    if call % 3 == 2:
        results[0][5] = 0


FAULTS = [tile, one_row_is_nan, one_element, swapped, like_tf32, sometimes]


@pytest.mark.parametrize(
    ("dtype", "p", "zero_b"),
    [(torch.float32, 0.0, False), (torch.float32, 0.3, True), (torch.bfloat16, 0.3, False)],
    ids=["f32", "f32-dropout-fresh", "bf16-dropout"],
)
def test_right_kernels_are_verified_by_one_call(dtype, p, zero_b, recwarn):
    x, layers = rows(dtype=dtype), group(dtype, zero_b)
    agree(step(x, layers, p), step(x, layers, p, "torch"))
    assert not recwarn.list
    assert verification._records
    assert not faults()
    count = len(verification._records)
    step(x, layers, p)
    assert len(verification._records) == count


def test_a_new_kind_of_call_is_captured_once(monkeypatch):
    """With verification, in later calls, and by a later process."""
    real, kinds = kernels.capture_call, []
    monkeypatch.setattr(kernels, "capture_call", lambda *call: kinds.append(call) or real(*call))
    x, layers = rows(), group()
    for _ in range(2):
        step(x, layers)
        assert len(kinds) == 2  # forward and backward
    forget(monkeypatch)
    step(x, layers)
    assert len(kinds) == 4


@pytest.mark.parametrize("change", FAULTS, ids=lambda change: change.__name__)
def test_a_wrong_kernel_gives_pytorch_s_result_and_one_warning(monkeypatch, change):
    x, layers = rows(), group()
    expected = step(x, layers, backend="torch")
    faulty(monkeypatch, change)
    run_on_torch(lambda: step(x, layers), expected, "gemm_lowrank_few_rows")
    assert faults()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(step(x, layers), expected)


def test_a_wrong_mask_is_seen(monkeypatch):
    x, layers = rows(), group(zero_b=True)
    real = kernels.project

    def other_mask(*arguments, seeds, **options):
        return real(*arguments, seeds=None if seeds is None else seeds + 1, **options)

    monkeypatch.setattr(kernels, "project", other_mask)
    run_on_torch(lambda: step(x, layers, 0.3), step(x, layers, 0.3, "torch"))


ENDS = [20, 41, 60]


def segments_call(kind="experts", backend="triton", ends=ENDS, scale=1.0):
    """y and the adapters' gradients: three experts, or three adapters of one weight."""
    torch.manual_seed(1)
    x, weight = torch.randn(60, K), torch.randn(3, 24, K)
    a, b = torch.randn(3, 4, K, requires_grad=True), torch.randn(3, 24, 4, requires_grad=True)
    with fastlora.use_backend(backend):
        if kind == "experts":
            ends = torch.tensor(ends, dtype=torch.int32)
            y = fastlora.grouped_lora_linear(x, weight, a, b, ends, scale=scale)
        else:
            indices = torch.arange(60) % 3
            y = fastlora.multi_lora_linear(x, weight[0], a, b, indices, scales=[1.0, 2.0, 0.5])
        return [y, *torch.autograd.grad(y.square().sum(), [a, b])]


def swap_segments(monkeypatch, *names):
    """These kernels take the rows of the last segment for others."""
    for name in names:
        real = getattr(kernels, name)

        def cut(*arguments, real=real, **options):
            return real(*arguments, **options | {"ends": torch.clamp(options["ends"], max=41)})

        monkeypatch.setattr(kernels, name, cut)


@pytest.mark.parametrize(("kind", "name"), [("experts", "gemm_lowrank"), ("many", "lowrank")])
def test_a_swapped_segment_is_seen(monkeypatch, tmp_path, kind, name):
    agree(segments_call(kind), segments_call(kind, "torch"))
    assert not faults()
    forget(monkeypatch, tmp_path / "another")
    swap_segments(monkeypatch, name)
    run_on_torch(lambda: segments_call(kind), segments_call(kind, "torch"))


def spoiled_base(monkeypatch, name="gemm_lowrank"):
    """A kernel that takes the base weight's rows in another order."""
    real = getattr(kernels, name)

    def other(out, ps, qs, *arguments, **options):
        return real(out, ps, [q.flip(-1).contiguous() for q in qs], *arguments, **options)

    monkeypatch.setattr(kernels, name, other)


DEGENERATE = {
    "zero": torch.zeros(()),
    "nan": torch.tensor(torch.nan),
    "inf": torch.tensor(torch.inf),
}


@pytest.mark.parametrize("value", DEGENERATE.values(), ids=DEGENERATE)
def test_a_weight_that_hides_a_wrong_kernel_is_no_verification(monkeypatch, value):
    """A weight of zeros (adaLN-zero, ControlNet) and one with NaN, in the first call."""
    spoiled_base(monkeypatch)
    x, (one,) = rows(), group()
    odd = one._replace(weight=torch.full_like(one.weight, value.item()))
    with pytest.warns(RuntimeWarning, match="no longer run"):
        step(x, [odd])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(step(x, [one]), step(x, [one], backend="torch"))


@pytest.mark.parametrize("value", DEGENERATE.values(), ids=DEGENERATE)
def test_a_weight_that_hides_everything_is_verified_once(monkeypatch, value, recwarn):
    x, (one,) = rows(), group()
    odd = one._replace(weight=torch.full_like(one.weight, value.item()))
    first, expected = step(x, [odd]), step(x, [odd], backend="torch")
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(first, expected, strict=True))
    assert not faults()
    monkeypatch.setattr(verification, "_fault_of_probe", lambda *_: pytest.fail("verified again"))
    step(x, [odd])
    # The interpreter's numpy warns of infinities.
    assert not [one for one in recwarn if "no longer run" in str(one.message)]


def test_empty_segments_do_not_hide_a_wrong_kernel(monkeypatch):
    swap_segments(monkeypatch, "project", "gemm_lowrank")
    with pytest.warns(RuntimeWarning, match="no longer run"):
        segments_call(ends=[0, 0, 0])
    agree(segments_call(), segments_call(backend="torch"))


def test_a_scale_of_zero_leaves_kernels_unverified(monkeypatch, recwarn):
    """Calls run on PyTorch until one has a scale, which finds a wrong kernel."""
    swap_segments(monkeypatch, "project")
    for _ in range(2):
        found, expected = segments_call(scale=0.0), segments_call(scale=0.0, backend="torch")
        assert all(map(torch.equal, found, expected))
    assert not verification._records
    assert not recwarn.list
    run_on_torch(segments_call, segments_call(backend="torch"))


def test_a_packed_weight_of_zeros_leaves_kernels_unverified(monkeypatch, recwarn):
    """Calls run on PyTorch until one has numbers to compare, which finds a wrong kernel."""
    x, (one,) = rows(), group()
    right = random_int8(24, K)
    codes, scales = right.tensors
    zero = one._replace(weight=right._replace(tensors=(codes, torch.zeros_like(scales))))
    right = one._replace(weight=right)
    real = packed.packed_of
    monkeypatch.setattr(packed, "packed_of", lambda weight: swapped_codes(real(weight)))
    for _ in range(2):
        found, expected = step(x, [zero]), step(x, [zero], backend="torch")
        assert all(map(torch.equal, found, expected))
    assert not verification._records
    assert not recwarn.list
    run_on_torch(lambda: step(x, [right]), step(x, [right], backend="torch"))


def swapped_codes(weight):
    return replace(weight, codes=weight.codes.flip(-1).contiguous())


def test_a_gated_product_is_verified_and_may_be_written_over_its_operand(monkeypatch, tmp_path):
    gate, up, dy = (torch.randn(50, 64) for _ in range(3))
    product = GatedProduct(gate, up, "silu")
    wide = torch.randn(50, 128)
    for d_gate, d_up in ((dy.clone(), torch.empty(50, 64)), (wide[:, :64], wide[:, 64:])):
        given = d_gate if d_gate.is_contiguous() else dy
        expected = [torch.empty(50, 64), torch.empty(50, 64)]
        torch_backend.gated_backward(dy, product, *expected)
        for _ in range(2):
            given.copy_(dy)
            triton.gated_backward(given, product, d_gate, d_up)
            agree([d_gate, d_up], expected)
    agree([triton.gated(product)], [torch_backend.gated(product)])
    assert not faults()
    forget(monkeypatch, tmp_path / "another")
    faulty(monkeypatch, one_row_is_nan, ["gated"])
    run_on_torch(lambda: [triton.gated(product)], [torch_backend.gated(product)], "gated")


def test_a_loss_is_verified_on_few_rows_with_its_own_classes(monkeypatch, tmp_path):
    """It is written over its logits, which verification must not change before the end."""
    settings, target = LossSettings(0.1, 3.0, 2.0, 0.01), torch.arange(150) % 45
    real, compared, counts = kernels.row_loss, verification.compared, []

    def check():
        for gradient in (True, False, True):
            call = torch.randn(150, 45), target, settings, torch.randn(150), gradient
            agree(*(row_loss_of(row_loss_by(each), *call) for each in (triton, torch_backend)))

    count = lambda *given: counts.append(len(given[1][0])) or compared(*given)  # noqa: E731
    monkeypatch.setattr(verification, "compared", count)
    check()
    assert counts == [64] * 4  # random logits and the caller's, with the gradient and without
    assert not faults()
    forget(monkeypatch, tmp_path / "another")
    plain = LossSettings()
    monkeypatch.setattr(kernels, "row_loss", lambda z, t, y, s, *rest: real(z, t, y, plain, *rest))
    with pytest.warns(RuntimeWarning, match="row_loss no longer run"):
        check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check()


def test_a_kernel_that_does_not_compile_runs_on_pytorch_s_operations(monkeypatch):
    def capture(*call):
        raise RuntimeError("gemm_lowrank doesn't compile: PassManager::run failed")

    monkeypatch.setattr(kernels, "capture_call", capture)
    x, layers = rows(), group()
    with pytest.warns(RuntimeWarning, match=r"PassManager::run failed") as said:
        found = step(x, layers)
    agree(found, step(x, layers, backend="torch"))
    count = len(said)
    agree(step(x, layers), found)
    assert count == len(said) == 2  # the forward's, the backward's


def test_a_kernel_that_does_not_compile_raises_where_verification_is_off(monkeypatch):
    monkeypatch.setattr(verification, "_CHOSEN", verification.OFF)
    monkeypatch.setattr(kernels, "capture_call", lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(rows(), group())


def test_the_next_process_runs_verified_kernels_and_refuses_wrong_ones(monkeypatch, tmp_path):
    x, layers = rows(), group()
    step(x, layers)
    forget(monkeypatch)
    monkeypatch.setattr(verification, "_fault_of_probe", lambda *_: pytest.fail("verified again"))
    step(x, layers)
    for path in (tmp_path / "cache" / verification._FOLDER).glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fault": "wrong"}))
    forget(monkeypatch)
    agree(step(x, layers), step(x, layers, backend="torch"))
    assert len(faults()) == len(verification._records)


def test_other_versions_verify_again(monkeypatch):
    x, layers = rows(), group()
    step(x, layers)
    here = verification.environment(torch.device("cpu"))
    forget(monkeypatch)
    monkeypatch.setattr(verification, "environment", lambda device: here + "99.0")
    before = len(verification._known())
    step(x, layers)
    assert len(verification._known()) == 2 * before


RECORD = {"kernel": "a 1", "environment": "a GPU", "fault": "wrong"}
ODD = {
    "cut": "{",
    "list": '["a"]',
    "environment-is-a-list": RECORD | {"environment": ["a GPU"]},
    "no-name": RECORD | {"kernel": " "},
    "nested": "[" * 200_000,
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_an_odd_file_is_skipped(monkeypatch, tmp_path, text):
    """By calls, and by ``doctor``."""
    folder = tmp_path / "cache" / verification._FOLDER
    folder.mkdir(parents=True)
    (folder / "odd.json").write_text(text if isinstance(text, str) else json.dumps(text))
    assert verification.read_records() == {}
    monkeypatch.setattr(verification, "compared", lambda *_: "")
    triton.gated(GatedProduct(*torch.randn(2, 8, 16), "silu"))
    assert [kernel.split()[0] for kernel, _ in verification._records] == ["gated"]
    assert _compiled([torch.device("cpu")], broken := []) == {}
    (folder / "odd.json").write_text(json.dumps(RECORD))
    assert _compiled([torch.device("cpu")], broken).keys() == {"a 1"}
    assert "1 compiled kernels gave wrong results" in broken[0]


def test_always_verifies_each_call_and_stops_at_the_first_wrong_one(monkeypatch):
    monkeypatch.setattr(verification, "_CHOSEN", verification.ALWAYS)
    monkeypatch.setattr(verification, "REPEATS", 1)
    x, layers, is_wrong = rows(), group(), []
    expected = step(x, layers, backend="torch")
    counts = faulty(monkeypatch, lambda *made: tile(*made) if is_wrong else None)
    for _ in range(2):
        before = len(counts)
        agree(step(x, layers), expected)
        assert len(counts) > before + 2  # the probe, and the call itself, of two kinds
    is_wrong.append(True)
    with pytest.warns(RuntimeWarning, match="no longer run"):
        found = [step(x, layers) for _ in range(4)]
    for each in found:
        agree(each, expected)


def test_another_word_in_the_variable_is_an_error(monkeypatch):
    monkeypatch.setattr(verification, "_CHOSEN", "yes")
    with pytest.raises(ValueError, match="FASTLORA_VERIFY is 'yes', but must be 'first'"):
        step(rows(), group())


def test_the_caller_s_random_numbers_are_the_same():
    x, layers = rows(), group()
    step(x, layers, 0.3)
    after = torch.rand(3)
    step(x, layers, 0.3)
    assert torch.equal(torch.rand(3), after)


def test_too_little_memory_to_verify_runs_pytorch_s_operations(monkeypatch):
    def none_left(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(verification, "compared", none_left)
    x, layers = rows(), group()
    with pytest.warns(RuntimeWarning, match="enough memory to verify"):
        found = step(x, layers)
    expected = step(x, layers, backend="torch")
    agree(found, expected)
    monkeypatch.setattr(verification, "_fault_of_probe", lambda *_: pytest.fail("verified again"))
    agree(step(x, layers), expected)
    assert not verification._records


def int8_group(out=24):
    ((weight, a, b, bias, scale),) = group(out=out)
    return [fastlora.Projection(pack_rotated(weight), a, b, bias, scale)]


def wrong_code(results, call):
    """A sum that lacks one product of 1,600."""
    results[0][5, 7] += results[0].abs().amax() * 2**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_8_bit_products_are_verified_by_one_call(dtype, recwarn, monkeypatch):
    """Also float32, where the caller's own x is rounded to other codes here and there."""
    torch.manual_seed(0)
    monkeypatch.setitem(globals(), "K", 200)
    for _ in range(2):
        x = rows(dtype=dtype)
        found = [t.detach() for t in step(x, int8_group())]
        assert all(each.isfinite().all() for each in found)
    assert not recwarn.list
    assert not faults()
    assert all(isinstance(call, CapturedCall) for call in replay.calls.values())


@pytest.mark.parametrize("change", [tile, one_row_is_nan, swapped, sometimes, wrong_code])
def test_a_wrong_sum_of_8_bit_products_is_seen(monkeypatch, change):
    faulty(monkeypatch, change)
    with pytest.warns(RuntimeWarning, match="PyTorch's operations run instead"):
        step(rows(), int8_group())
    assert faults()
