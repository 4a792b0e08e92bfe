"""The first results of kernels are judged before they are used: with faults of every kind."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import pytest
import torch

import fastlora
from fastlora.backends.triton import first_contact, trust
from fastlora.kernels import kept, script
from fastlora.verdicts import Environment, faults

K = 40


@pytest.fixture(autouse=True)
def judging(monkeypatch, tmp_path):
    """As on a GPU, in the first process of a user."""
    monkeypatch.setattr(trust, "_CHOSEN", trust.FIRST)
    monkeypatch.setattr(first_contact, "REPEATS", 3)
    forget(monkeypatch, tmp_path / "cache")


def forget(monkeypatch, folder=None):
    """As a process that starts, and of a user with another folder."""
    if folder:
        monkeypatch.setenv("FASTLORA_CACHE", str(folder))
    monkeypatch.setattr(trust, "_verdicts", {})
    monkeypatch.setattr(kept, "_calls", {})
    monkeypatch.setattr("fastlora.ops.kinds._calls", {})


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
    leaves = [x, *[t for one in projections for t in one[:3] if t.requires_grad]]
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


def faulty(monkeypatch, change, kernels=("project", "lowrank", "gemm_lowrank")):
    """From now on, ``change`` is done to what calls with one of these kernels make."""
    real, counts = script.script_of, []

    def resolve(*call):
        made = real(*call)
        if not {each.split()[0] for each in made.identities} & set(kernels):
            return made

        def replay(*arguments):
            counts.append(1)
            results = list(made.replay(*arguments))
            change(results, len(counts))
            return results

        return made._replace(replay=replay)

    monkeypatch.setattr(kept, "script_of", resolve)
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
def test_right_kernels_are_believed_after_one_call(dtype, p, zero_b, recwarn):
    x, layers = rows(dtype=dtype), group(dtype, zero_b)
    agree(step(x, layers, p), step(x, layers, p, "torch"))
    assert not recwarn.list
    assert trust._verdicts
    assert not faults()
    judged = len(trust._verdicts)
    step(x, layers, p)
    assert len(trust._verdicts) == judged


@pytest.mark.parametrize("change", FAULTS, ids=lambda change: change.__name__)
def test_a_wrong_kernel_gives_pytorch_s_result_and_one_warning(monkeypatch, change):
    x, layers = rows(), group()
    expected = step(x, layers, backend="torch")
    faulty(monkeypatch, change)
    with pytest.warns(RuntimeWarning, match=r"gemm_lowrank run no more on Triton's interp") as said:
        found = step(x, layers)
    agree(found, expected)
    assert faults()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(step(x, layers), expected)
    assert len([each for each in said if "run no more" in str(each.message)]) >= 1


def test_a_wrong_mask_is_seen(monkeypatch):
    from fastlora.backends.triton import layer

    x, layers = rows(), group(zero_b=True)
    real = layer.kernels.project

    def other_mask(*arguments, seeds, **options):
        return real(*arguments, seeds=None if seeds is None else seeds + 1, **options)

    monkeypatch.setattr(layer.kernels, "project", other_mask)
    with pytest.warns(RuntimeWarning, match="run no more"):
        found = step(x, layers, 0.3)
    agree(found, step(x, layers, 0.3, "torch"))


@pytest.mark.parametrize("kind", ["experts", "many"])
def test_a_swapped_segment_is_seen(monkeypatch, tmp_path, kind):
    from fastlora.backends.triton.cover import kernels

    def call(backend):
        torch.manual_seed(1)
        x, weight = torch.randn(60, K), torch.randn(3, 24, K)
        a, b = torch.randn(3, 4, K, requires_grad=True), torch.randn(3, 24, 4, requires_grad=True)
        ends = torch.tensor([20, 41, 60], dtype=torch.int32)
        with fastlora.use_backend(backend):
            if kind == "experts":
                y = fastlora.grouped_lora_linear(x, weight, a, b, ends)
            else:
                indices = torch.arange(60) % 3
                y = fastlora.multi_lora_linear(x, weight[0], a, b, indices, scales=[1.0, 2.0, 0.5])
            return [y, *torch.autograd.grad(y.square().sum(), [a, b])]

    agree(call("triton"), call("torch"))
    assert not faults()
    forget(monkeypatch, tmp_path / "another")
    real = kernels.lowrank if kind == "many" else kernels.gemm_lowrank

    def swapped(out, *arguments, **options):
        ends = options["ends"]
        return real(out, *arguments, **options | {"ends": torch.clamp(ends, max=41)})

    name = "lowrank" if kind == "many" else "gemm_lowrank"
    monkeypatch.setattr(kernels, name, swapped)
    with pytest.warns(RuntimeWarning, match="run no more"):
        found = call("triton")
    agree(found, call("torch"))


def test_a_gated_product_is_judged_and_may_be_written_over_its_operand(monkeypatch, tmp_path):
    gate, up, dy = (torch.randn(50, 64) for _ in range(3))
    from fastlora.backends import torch as by_torch
    from fastlora.backends import triton

    wide = torch.randn(50, 128)
    for d_gate, d_up in ((dy.clone(), torch.empty(50, 64)), (wide[:, :64], wide[:, 64:])):
        given = d_gate if d_gate.is_contiguous() else dy
        expected = [torch.empty(50, 64), torch.empty(50, 64)]
        by_torch.gated_backward(dy, gate, up, "silu", *expected)
        for _ in range(2):
            given.copy_(dy)
            triton.gated_backward(given, gate, up, "silu", d_gate, d_up)
            agree([d_gate, d_up], expected)
    agree([triton.gated(gate, up, "silu")], [by_torch.gated(gate, up, "silu")])
    assert not faults()
    forget(monkeypatch, tmp_path / "another")
    faulty(monkeypatch, one_row_is_nan, ["gated"])
    with pytest.warns(RuntimeWarning, match="gated run no more"):
        agree([triton.gated(gate, up, "silu")], [by_torch.gated(gate, up, "silu")])


def test_what_does_not_compile_runs_on_pytorch_s_operations(monkeypatch):
    def resolve(*call):
        raise RuntimeError("gemm_lowrank doesn't compile: PassManager::run failed")

    monkeypatch.setattr(kept, "script_of", resolve)
    x, layers = rows(), group()
    with pytest.warns(RuntimeWarning, match=r"PassManager::run failed") as said:
        found = step(x, layers)
    agree(found, step(x, layers, backend="torch"))
    count = len(said)
    agree(step(x, layers), found)
    assert count == len(said) == 2  # the forward's, the backward's


def test_what_does_not_compile_raises_where_nobody_judges(monkeypatch):
    monkeypatch.setattr(trust, "_CHOSEN", trust.OFF)
    monkeypatch.setattr(kept, "script_of", lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(rows(), group())


def test_the_next_process_believes_a_verdict_and_refuses_what_was_wrong(monkeypatch, tmp_path):
    x, layers = rows(), group()
    step(x, layers)
    forget(monkeypatch)
    monkeypatch.setattr(first_contact, "_judged", lambda *_: pytest.fail("judged again"))
    step(x, layers)
    for path in (tmp_path / "cache" / "verdicts").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fault": "wrong"}))
    forget(monkeypatch)
    agree(step(x, layers), step(x, layers, backend="torch"))
    assert len(faults()) == len(trust._verdicts)


def test_other_versions_judge_again(monkeypatch):
    x, layers = rows(), group()
    step(x, layers)
    here = trust.environment(torch.device("cpu"))
    forget(monkeypatch)
    other = Environment(here.device, here.driver, "99.0", here.ptxas, here.torch)
    monkeypatch.setattr(trust, "environment", lambda device: other)
    before = len(trust._known())
    step(x, layers)
    assert len(trust._known()) == 2 * before


def test_files_that_say_nothing_are_passed_over(monkeypatch, tmp_path):
    x, layers = rows(), group()
    step(x, layers)
    texts = "", "{", '{"kernel": 3}', '["a"]'
    files = [*(tmp_path / "cache" / "verdicts").glob("*.json")]
    assert len(files) >= len(texts)
    for path, text in zip(files, cycle(texts), strict=False):
        path.write_text(text)
    forget(monkeypatch)
    step(x, layers)
    assert trust._verdicts


def test_a_home_that_cannot_be_written_changes_nothing(monkeypatch, tmp_path, recwarn):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file"))
    x, layers = rows(), group()
    agree(step(x, layers), step(x, layers, backend="torch"))
    assert trust._verdicts
    assert not recwarn.list


def test_always_judges_each_call_and_stops_at_the_first_wrong_one(monkeypatch):
    monkeypatch.setattr(trust, "_CHOSEN", trust.ALWAYS)
    monkeypatch.setattr(first_contact, "REPEATS", 1)
    x, layers = rows(), group()
    expected = step(x, layers, backend="torch")
    agree(step(x, layers), expected)

    def later(results, call):
        if call > 4:
            tile(results, call)

    counts = faulty(monkeypatch, later)
    agree(step(x, layers), expected)
    assert len(counts) > 1
    with pytest.warns(RuntimeWarning, match="run no more"):
        found = [step(x, layers) for _ in range(4)]
    for each in found:
        agree(each, expected)


def test_several_threads_may_judge_at_one_time(monkeypatch, recwarn):
    x, layers = rows(), group()
    made = step(x, layers, backend="torch")[:1]  # the interpreter itself is one thread's
    monkeypatch.setattr(first_contact, "compared", lambda *_: "")
    monkeypatch.setattr(
        kept,
        "script_of",
        lambda *_: script.Script(
            lambda *_: [made[0].detach(), torch.zeros(48, 4)], "", [], frozenset({"project 1"})
        ),
    )

    def run(_):
        return fastlora.lora_linears(x.detach(), layers, backend="triton")[0].detach()

    with ThreadPoolExecutor(8) as threads:
        assert all(torch.equal(each, made[0]) for each in threads.map(run, range(8)))
    assert list(trust._verdicts) == [("project 1", trust.environment(torch.device("cpu")))]
    assert not recwarn.list


def test_another_word_in_the_variable_is_an_error(monkeypatch):
    monkeypatch.setattr(trust, "_CHOSEN", "yes")
    with pytest.raises(ValueError, match="FASTLORA_VERIFY is 'yes', but must be 'first'"):
        step(rows(), group())


def test_the_caller_s_random_numbers_are_the_same():
    x, layers = rows(), group()
    step(x, layers, 0.3)
    after = torch.rand(3)
    step(x, layers, 0.3)
    assert torch.equal(torch.rand(3), after)


def test_too_little_memory_to_judge_runs_pytorch_s_operations(monkeypatch):
    def none_left(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(first_contact, "compared", none_left)
    x, layers = rows(), group()
    with pytest.warns(RuntimeWarning, match="enough memory to judge"):
        found = step(x, layers)
    expected = step(x, layers, backend="torch")
    agree(found, expected)
    monkeypatch.setattr(first_contact, "_judged", lambda *_: pytest.fail("judged again"))
    agree(step(x, layers), expected)
    assert not trust._verdicts


def test_without_memory_for_a_wider_dtype_errors_are_those_of_a_rounding():
    its = torch.randn(64, 48).bfloat16()
    close = its + its.abs().amax() * 2**-7
    assert first_contact._worst(its, its, None, 2**-7) == 0
    assert first_contact._worst(close, its, None, 2**-7) <= 1
    assert first_contact._worst(its.roll(1, 0), its, None, 2**-7) > 1
